"""Ids that a text must not hold: those without which the forward counts its rows (padding).

RoBERTa and its kin number rows by cumsum(ids != padding), XLM counts them so. Where no such id occurs, each comparison
is True: rows are numbered by their places, and caches are exact. So the program says which ids these are, in
`meta["never"]`: prompts are checked, no decision takes one, and `restrict` reads comparisons as what they are then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from aropt.ir.calls import bind, op_name, tensor_inputs
from aropt.ir.program import Graph

COMPARES = {"aten::ne", "aten::eq"}
COUNTS = {"aten::cumsum", "aten::sum", "aten::any", "aten::all", "aten::argmax", "aten::argmin", "aten::mean"}


def compared(node: fx.Node) -> int | None:
    """The id with which a node compares each of the forward's ids; None for anything else."""
    if node.op != "call_function" or op_name(node) not in COMPARES:
        return None
    x = bind(node)
    ids, other = x["self"], x["other"]
    given = isinstance(ids, fx.Node) and ids.op == "placeholder" and ids.name == "ids"
    return other if given and type(other) is int else None


def settled(node: fx.Node, never: Sequence[int]) -> bool:
    """Whether a node compares ids with one that does not occur."""
    return compared(node) in never if never else False


def counted(graph: Graph) -> list[int]:
    """The ids that a forward compares its ids with, where the answers are counted along the sequence."""
    found = []
    for node in graph.fx.nodes:
        known = compared(node)
        if known is not None and known not in found and counts(graph, node):
            found.append(known)
    return found


def counts(graph: Graph, node: fx.Node) -> bool:
    """Whether what is made of the comparison alone is counted along an axis of symbolic size, or masks columns."""
    made = {node}
    for other in graph.fx.nodes:
        inputs = tensor_inputs(other) if other.op == "call_function" else []
        if not made & set(inputs):
            continue
        shape = next(n for n in inputs if n in made).meta["val"].shape
        if op_name(other) in COUNTS:
            dims = bind(other).get("dim")
            if any(not isinstance(shape[d], int) for d in (dims if isinstance(dims, list) else [dims or 0])):
                return True
        value = other.meta["val"]
        if all(n in made or plain(n) for n in inputs) and isinstance(value, Tensor):
            made.add(other)
            if value.dim() > 2 and not isinstance(value.shape[-1], int):
                return True
    return False


def plain(node: fx.Node) -> bool:
    """Whether a value depends on no ids, only on their number."""
    if op_name(node) in ("aten::ones_like", "aten::zeros_like", "aten::full_like"):
        return True
    return node.op == "call_function" and all(plain(n) for n in tensor_inputs(node))


def facts(graph: Graph, meta: dict[str, Any]) -> dict[str, Any]:
    """`never`, and example prompts without it; nothing where an id is counted that a text does hold."""
    ends = {int(t) for t in meta.get("eos") or []} | {meta.get("mask")}
    never = [k for k in counted(graph) if k not in ends and 0 <= k < int(meta["vocab"])]
    if not never:
        return {}
    first = int(others(int(meta["input_vocab"]), [*never, meta.get("mask")])[0])
    prompts = [[first if t in never else t for t in p] for p in meta["prompts"]]
    return {"never": never, "prompts": prompts}


def others(vocab: int, excluded: Sequence[int | None]) -> Tensor:
    """The ids of a vocabulary but some, in order: int64 [N]."""
    return torch.tensor([t for t in range(vocab) if t not in excluded])


def without(logits: Tensor, never: Sequence[int]) -> Tensor:
    """The logits [..., V], -inf for ids that never occur."""
    for known in never:
        logits = torch.where(torch.arange(logits.shape[-1]) == known, -torch.inf, logits)
    return logits
