"""What the two sides of a model of windows compute, found in its graph on a basis (see aropt.rewriting.affine).

In: tables t with row = sum over places j of t[j, id of place j]. Out: matrices from a row to the logits of its ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from aropt.ir import ops
from aropt.ir.calls import op_name
from aropt.ir.torch_compat import elements
from aropt.rewriting.affine import affine, between, constant, dominates, evaluate, floating, rank

NEAR = 1e-5  # of the largest value: what sums in another order may differ by
PRODUCTS = 4  # multiplications that take as long as reading a weight
TRIES = 64, 4  # sequences of so many random rows that a side has to get right: several, as its moves may mix rows


class NotThis(Exception):
    """Why a side is left as it is."""


def joint(graph: fx.Graph) -> fx.Node:
    """The last value [B, T, D] that the ids alone decide and that all the rest reads them through. Raises NotThis."""
    ids = next(n for n in graph.nodes if n.op == "placeholder" and n.name == "ids")
    inside = {ids}
    for node in graph.nodes:
        read = [n for n in node.all_input_nodes if not constant(n)]
        if node.op == "call_function" and read and all(n in inside for n in read):
            name = op_name(node)
            looked_up = name == "aten::embedding" or (name == "aten::index" and constant(node.args[0]))
            whole = not floating(node) or looked_up or affine(node) or name == "aten::where"
            inside |= {node} if whole and name != "aten::sym_size" else set()
    starts = [n for n in inside if floating(n) and not any(floating(m) for m in n.all_input_nodes if m in inside)]
    if not starts:
        raise NotThis("no table is looked up for the ids")

    def leaves(node: fx.Node) -> bool:
        return floating(node) and any(u not in inside for u in node.users)

    content: list[fx.Node] = [n for n in graph.nodes if n in inside and floating(n) and n not in starts]
    for node in reversed(content):
        if rank(node) == 3 and dominates(node, starts, inside, leaves):
            return single_precision(node)
    out = next(n for n in graph.nodes if n in inside and leaves(n))
    user = next(u for u in out.users if u not in inside)
    raise NotThis(
        f"{op_name(user)} ({place(user)}) reads ids before a window's are one row; "
        "until then only moves, sums of what they alone decide, and products with weights can be tables"
    )


def single_precision(node: fx.Node) -> fx.Node:
    """The node. Raises NotThis where it is of another type."""
    if node.meta["val"].dtype != torch.float32:
        raise NotThis(f"{place(node)} computes in {str(node.meta['val'].dtype).removeprefix('torch.')}, not float32")
    return node


def value(result: fx.Node, given: Mapping[fx.Node, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
    """As `evaluate`; raises NotThis where that can't."""
    try:
        return evaluate(result, given, weights)
    except LookupError as reason:
        raise NotThis(f"{op_name(result)} ({place(result)}): {reason}") from None


def tables(joined: fx.Node, weights: Mapping[str, Tensor], places: int, known: int, single: int) -> tuple[Tensor, bool]:
    """(table [V, c] or [W, V, c], whether places are summed) of `joined`; ids from `single` on fill a row alone.

    Raises NotThis where the row is no sum over its places.
    """
    ids = next(n for n in joined.graph.nodes if n.op == "placeholder" and n.name == "ids")

    def rows(given: Tensor, count: int = 1) -> Tensor:
        return value(joined, {ids: given.unflatten(0, (-1, count))}, weights).flatten(0, 1)

    base = rows(torch.zeros(1, places, dtype=torch.int64))
    # in float64: what the others add is taken off again, and has to go without a trace
    table = torch.zeros(places, known, base.shape[1], dtype=torch.float64)
    for place in range(places):
        given = torch.zeros(single, places, dtype=torch.int64)
        given[:, place] = torch.arange(single)
        table[place, :single] = rows(given) - base
    if known > single:
        table[0, single:] = rows(torch.arange(single, known).unsqueeze(1).expand(-1, places)) - base
    table[0] += base
    part = base.shape[1] // places
    pieces = concatenated(table, part, single)
    table = table.float()
    check(rows, table, single)
    return (table, True) if pieces is None else (pieces, False)


def check(rows: Callable[[Tensor, int], Tensor], table: Tensor, single: int) -> None:
    """Raises NotThis unless the tables give random rows, some of them of an id alone."""
    places, known, _ = table.shape
    (tries, count), generator = TRIES, torch.Generator().manual_seed(0)
    given = torch.randint(0, single, (tries * count, places), generator=generator)
    if known > single:
        given[::3] = torch.randint(single, known, (len(given[::3]), 1), generator=generator)
    made = ops.load("token_shuffle").overload(given, table, True)
    if not near(made, rows(given, count)):
        raise NotThis("a row is no sum over its places of what each id alone decides")


def near(made: Tensor, wanted: Tensor) -> bool:
    """Whether two results are the same but for the order of sums."""
    return bool((made - wanted).abs().max() <= NEAR * wanted.abs().max())


def concatenated(table: Tensor, part: int, single: int) -> Tensor | None:
    """The pieces [V, c] or [W, V, c], where each place fills a part of the row of its own; else None."""
    places, _, width = table.shape
    if part * places != width:
        return None
    pieces = torch.stack([table[j, :, j * part : (j + 1) * part] for j in range(places)])
    pieces[:, single:] = table[0, single:].unflatten(1, (places, part)).transpose(0, 1)
    rest = table[:, :single].clone()
    constant_part = rest[0, 0].clone()
    for j in range(places):
        rest[j, :, j * part : (j + 1) * part] = 0
    # what place 0 holds for the others is a constant: what they have of their first id
    for j in range(1, places):
        at = slice(j * part, (j + 1) * part)
        pieces[j, :single] += constant_part[at]
        rest[0, :, at] -= constant_part[at]
    if bool(rest.abs().max() > NEAR * table.abs().max()):
        return None
    pieces = pieces.float()
    shared = all(torch.equal(pieces[0], p) for p in pieces[1:])
    return pieces[0].contiguous() if shared else pieces.contiguous()


def source(logits: fx.Node) -> fx.Node:
    """The first value [B, R, d] that the logits [B, R, W, V] are affine in, and come through. Raises NotThis."""
    entries: set[fx.Node] = set()
    inside, todo = {logits}, [logits]
    while todo:
        node = todo.pop()
        read = {n for n in node.all_input_nodes if floating(n) and not constant(n)}
        if not read or not affine(node):
            entries.add(node)
            continue
        todo += read - inside
        inside |= read
    inner: list[fx.Node] = [n for n in logits.graph.nodes if n in inside and n is not logits]
    for node in inner:
        if rank(node) == 3 and dominates(node, entries, inside, lambda at: at is logits):
            return single_precision(node)
    found = [f"{op_name(n)} ({place(n)})" for n in logits.graph.nodes if n in entries]
    if len(found) > 1:
        raise NotThis(f"logits are made of more than one row: of {' and '.join(found)}")
    raise NotThis(f"{found[0]} comes after a row is parted into a window's, and is neither linear nor a move")


def place(node: fx.Node) -> str:
    """Where a node is, for people."""
    return str(node.meta.get("where") or node.name)


def matrix(entry: fx.Node, result: fx.Node, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(weight [d, ...], bias [...]) with result = entry weight + bias, for a row."""
    width = int(entry.meta["val"].shape[-1])
    rest = entry.meta["val"].shape[2:-1]
    zero = value(result, {entry: torch.zeros(1, 1, *rest, width)}, weights)[0, 0]
    basis = torch.eye(width).reshape(width, 1, *[1] * len(rest), width).expand(width, 1, *rest, width)
    return (value(result, {entry: basis}, weights)[:, 0] - zero).float(), zero.float()


def unshuffle(
    entry: fx.Node, part: fx.Node, logits: fx.Node, weights: Mapping[str, Tensor]
) -> list[Tensor | None] | None:
    """weight [W, c, d], bias [W, c], head [V, c] and its bias [V], by way of the part [B, R, W, c]; None: no such.

    `part` may be the logits: then there is no head. A bias of zeros is None.
    """
    weight, bias = matrix(entry, part, weights)
    made: list[Tensor | None] = [weight.permute(1, 2, 0).contiguous(), bias if bool(bias.any()) else None, None, None]
    if part is not logits:
        head, added = matrix(part, logits, weights)  # [c, W, V], [W, V]: of a basis vector in every place at once
        made[2:] = head[:, 0].T.contiguous(), added[0] if bool(added.any()) else None
    count = entry.meta["val"].shape[1]  # a cached step may keep the last row alone
    count = count if isinstance(count, int) else TRIES[1]
    given = torch.randn(2, count, weight.shape[0], generator=torch.Generator().manual_seed(0))
    right = near(ops.load("token_unshuffle").overload(given, *made), value(logits, {entry: given}, weights))
    return made if right else None


def ways(entry: fx.Node, logits: fx.Node) -> list[fx.Node]:
    """Where the windows' parts can be cut: values [B, R, W, c] that all logits come through, the logits among them."""
    inside = between(entry, logits)
    places = int(logits.meta["val"].shape[2])
    return [
        n for n in inside[1:]
        if rank(n) == 4 and int(n.meta["val"].shape[2]) == places
        and (n is logits or dominates(n, [entry], set(inside), lambda at: at is logits))
    ]  # fmt: skip


def multiplied(entry: fx.Node, part: fx.Node, logits: fx.Node) -> int:
    """Products of numbers that a row takes through a part."""
    width, (places, vocab) = int(entry.meta["val"].shape[-1]), map(int, logits.meta["val"].shape[2:])
    if part is logits:
        return width * places * vocab
    size = int(part.meta["val"].shape[3])
    return width * places * size + places * size * vocab


def spent(entry: fx.Node, part: fx.Node, logits: fx.Node) -> float:
    """What a row's way through a part takes, by which ways are compared: weights read, and a part of the products.

    A round of few rows waits for weights. Those of the head are read once for all places of a window.
    """
    width, (places, vocab) = int(entry.meta["val"].shape[-1]), map(int, logits.meta["val"].shape[2:])
    size = int(part.meta["val"].shape[3])
    read = width * places * size + (0 if part is logits else size * vocab)
    return read + multiplied(entry, part, logits) / PRODUCTS


def written(entry: fx.Node, logits: fx.Node) -> int:
    """Products of numbers that a row takes as the graph is written."""
    rows = elements(entry.meta["val"][..., 0])
    total = 0
    for node in between(entry, logits)[1:]:
        if op_name(node) in ("aten::linear", "aten::matmul", "aten::mm"):
            read: Any = node.args[0]
            total += elements(node.meta["val"]) * int(read.meta["val"].shape[-1]) // rows
    return total
