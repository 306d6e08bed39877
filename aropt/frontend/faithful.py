"""The captured graph against the module itself: a trace holds what Python did once, and must hold for all lengths.

torch.export sees one length. What Python reads from elsewhere (a counter, a table looked up by the length) becomes a
constant in silence, so that the graph and the module are run on the same ids, and the module twice in a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from aropt.errors import Unsupported
from aropt.frontend.compute import HALVES
from aropt.frontend.forwards import Forward
from aropt.ir.program import Graph
from aropt.ir.torch_compat import looped_scans
from aropt.ir.units import window

SHORT = 16  # every length up to it is compared
WORK = 4e9  # multiplications that the comparison may take, about: a second
SINGLE, HALF = 1e-3, 5e-2  # what rounding may do, as a share of the largest logit


class Halves(TorchDispatchMode):
    """Whether anything is computed in 16 bits."""

    supports_higher_order_operators = True  # a scan of an exported program

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen |= isinstance(result, Tensor) and result.dtype in HALVES
        return result


def check(graph: Graph, weights: dict[str, Tensor], module: nn.Module, meta: dict[str, Any]) -> None:
    """Compares logits on several lengths. Raises Unsupported where the graph gives others than the module."""
    forward, captured, halves = Forward(module), graph.bind(weights), Halves()
    size, padding = (
        sum(w.numel() for w in weights.values()),
        getattr(getattr(module, "config", None), "pad_token_id", None),
    )
    with torch.no_grad(), halves:
        run(forward, drawn(meta, padding, 2))
    share = HALF if halves.seen else SINGLE
    for length in lengths(int(meta["capacity"]), size):
        ids = drawn(meta, padding, length)
        with torch.no_grad():
            first, again, ours = run(forward, ids), run(forward, ids), captured(ids)[0]
        if not alike(first, again, share):
            raise unfaithful(
                "the module gives other logits for the same ids when it is called again",
                length,
                "keep no count or other state in the module, and draw nothing at random: forward(ids) is a function",
            )
        if not alike(first, ours, share):
            raise unfaithful(
                "the captured graph gives other logits than the module itself",
                length,
                "compute what depends on the length with tensors: what Python looks up is the same for all lengths",
            )


def lengths(capacity: int, size: int) -> list[int]:
    """1, 2, one that is drawn, then all short ones and two long ones, as far as `size` weights allow."""
    generator = torch.Generator().manual_seed(capacity)
    some = [int(torch.randint(1, most + 1, (), generator=generator)) for most in (min(SHORT, capacity), capacity)]
    order = dict.fromkeys([1, 2, some[0], *range(3, SHORT + 1), some[1], capacity])
    found, spent = list[int](), 0.0
    for length in (n for n in order if n <= capacity):
        spent += 6.0 * length * (size + length * 1024)  # two rows, three forwards; attention grows with the square
        if len(found) < 3 or spent <= WORK:
            found.append(length)
    return found


def drawn(meta: dict[str, Any], padding: int | None, length: int) -> Tensor:
    """Ids int64 [2, length] without the padding id, which some models do not count as a position."""
    known = int(meta["input_vocab"])
    ids = torch.randint(known, (2, length, *window(meta)), generator=torch.Generator().manual_seed(length))
    return ids if padding is None or known < 2 else torch.where(ids == padding, (ids + 1) % known, ids)


def run(forward: nn.Module, ids: Tensor) -> Tensor:
    """The module's own logits. Raises Unsupported where it fails on ids of this length."""
    try:
        with looped_scans():
            logits: Tensor = forward(ids)
    except Unsupported:
        raise
    except Exception as error:  # the user's code may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise unfaithful(
            f"the model does not take {ids.shape[1]} ids: {reason}",
            ids.shape[1],
            "give a smaller --capacity (capacity= in Python, or an attribute of the module)",
        ) from error
    return logits


def alike(one: Tensor, other: Tensor, share: float) -> bool:
    """Whether logits differ by rounding alone; what is not finite is the same in both."""
    if one.shape != other.shape:
        return False
    one, other = one.double(), other.double()
    finite = torch.isfinite(one) & torch.isfinite(other)
    if not bool((finite | (one == other) | (one.isnan() & other.isnan())).all()):
        return False
    one, other = one[finite], other[finite]
    return not one.numel() or float((one - other).abs().max()) <= share * max(float(one.abs().max()), 1e-6)


def unfaithful(why: str, length: int, hint: str) -> Unsupported:
    return Unsupported(
        what="the model can't be captured as it is", where=f"forward(ids) of {length} ids", why=why, hint=hint
    )
