"""What a program that is read may say of sizes and numbers, so that nothing is made of any size.

A value may have MOST elements and TIMES as many as the weights; the error says the number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from aropt.ir import ops
from aropt.ir.dims import resolve, symbols
from aropt.ir.encode_args import refuse
from aropt.ir.program import Graph, Input, Spec, StateSpec
from aropt.ir.torch_compat import HINTS, elements, example_sizes

MOST = 2**24  # elements of a value beside a tiny model: 64 MiB of float32
TIMES = 16  # as many of a value as the weights have
RANK = 16
MODALITIES = ("image", "text", "tokens")
LARGE = 2**31
SAID = (
    ("input_vocab", int), ("null", int), ("mask", int), ("block", int), ("shift", bool), ("unit", int), ("single", int),
    ("side", int), ("window", int), ("guidance_free", bool), ("draft_mask", int),
)  # fmt: skip
LISTS = ("prompts", "eos", "rules", "examples", "left_out")


def most(weights: Mapping[str, Tensor], meta: Mapping[str, Any]) -> int:
    """The elements that a value may have."""
    return MOST + TIMES * sum(w.numel() for w in weights.values())


def check_meta(meta: Mapping[str, Any]) -> None:
    """Raises UsageError unless what is known of the model has the types, and numbers the range, that are relied on."""
    kinds: dict[str, type] = {**dict(SAID), "vocab": int, "capacity": int}
    for name, kind in kinds.items():
        value = meta.get(name)
        if value is None and name not in ("vocab", "capacity"):
            continue
        least = 1 if name in ("vocab", "input_vocab", "capacity", "unit") else 0
        if type(value) is not kind or (isinstance(value, int) and not least <= value < LARGE):
            refuse(f"meta.{name}", f"it is {str(value)[:40]!r}, not a {kind.__name__} of {least} or more")
    for name in LISTS:
        if not isinstance(meta.get(name) or [], list):
            refuse(f"meta.{name}", "it is no list")
    known = meta.get("input_vocab") or meta["vocab"]
    for prompt in meta.get("prompts") or []:
        if not isinstance(prompt, list) or not prompt or not all(ids(i, known) for i in prompt):
            refuse("meta.prompts", f"{str(prompt)[:40]} is no list of ids from 0 to {known - 1}")
    if not all(ids(i, LARGE) for i in meta.get("eos") or []):
        refuse("meta.eos", f"{str(meta['eos'])[:40]} are no ids")
    own = meta.get("defaults") or {}
    if not isinstance(own, dict) or not all(number_or_ids(v) for v in own.values()):
        refuse("meta.defaults", f"{str(own)[:40]} are no parameters, each a number or a list of ids")
    if meta.get("modality") not in (None, *MODALITIES):
        refuse("meta.modality", f"it is {str(meta['modality'])[:40]!r}, none of {', '.join(MODALITIES)}")
    if type(meta.get("loop") or "") is not str:
        refuse("meta.loop", f"it is {str(meta['loop'])[:40]!r}, no name")


def number_or_ids(value: Any) -> bool:
    return type(value) in (int, float) or (isinstance(value, list) and all(ids(i, LARGE) for i in value))


def ids(value: Any, known: int) -> bool:
    return type(value) is int and 0 <= value < known


def check_values(inputs: Mapping[str, Input], state: Mapping[str, StateSpec], capacity: int, limit: int) -> None:
    """Raises UsageError for an input whose default is out of its range, and for state that is larger than the limit.

    State is counted for one sequence as long as the capacity, all of it together.
    """
    for name, given in inputs.items():
        check_spec(f"input '{name}'", given.spec, limit)
        problem = "" if given.default is None else given.problem(given.default)
        if problem and name not in ("limit", "stop"):
            refuse(f"input '{name}'", f"its default is {given.default}, and {problem}")
    total = 0
    for name, kept in state.items():
        check_spec(f"state '{name}'", kept.spec, limit)
        sizes = {s: 1 if s == "B" else capacity for d in kept.spec.dims for s in symbols(d)}
        total += sum_of(f"state '{name}'", kept.spec, sizes)
        if total > limit * max(1, len(state)):
            refuse(f"state '{name}'", f"all state has more than {limit} elements a value, for {capacity} rows")
        whole = kept.spec.dtype.is_floating_point or kept.init is None or float(kept.init).is_integer()
        if not whole or (kept.init is not None and math.isnan(kept.init)):
            refuse(f"state '{name}'", f"it can't begin with {kept.init}")


def check_spec(where: str, spec: Spec, limit: int) -> None:
    """Raises UsageError for a type with more elements, at the example sizes that shapes are derived with."""
    if len(spec.dims) > RANK:
        refuse(where, f"it has {len(spec.dims)} dims, more than {RANK}")
    names = {s for d in spec.dims for s in symbols(d)}
    if len(names) > len(HINTS):
        refuse(where, f"it has more than {len(HINTS)} symbols")
    count = sum_of(where, spec, example_sizes({where: spec}))
    if count > limit:
        refuse(where, f"{spec} has more than the {limit} elements that a value may have beside these weights")


def sum_of(where: str, spec: Spec, sizes: Mapping[str, int]) -> int:
    """Elements of a type. Raises UsageError for a dim that is no sum of products."""
    try:
        return math.prod(max(0, resolve(d, sizes)) for d in spec.dims)
    except (KeyError, ValueError, TypeError):
        refuse(where, f"{spec} has a size that can't be read")


def check_nodes(where: str, graph: Graph, limit: int) -> None:
    """Raises UsageError for a node whose value has more elements, or one within the body of a scan."""
    for node in graph.fx.nodes:
        value = node.meta.get("val")
        made = [*value] if isinstance(value, (list, tuple)) else [value]
        for one in [*made, *inner_values(node)]:
            if isinstance(one, Tensor) and elements(one) > limit:
                refuse(
                    f"{where}, node '{node.name}'", f"it has more than {limit} elements: too many beside the weights"
                )


def inner_values(node: fx.Node) -> list[Any]:
    """The fake values of the calls that an op's text makes; nothing is allocated."""
    definition = ops.defined(node.target)
    if definition is None or definition.inside is None:
        return []
    with node.meta["val"][0].fake_mode, torch.no_grad():
        found: list[Any] = definition.inside(*fx.node.map_arg(node.args, lambda n: n.meta["val"]))
    return found
