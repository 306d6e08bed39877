"""Shifts and causal convolutions in the ways that models write them are computed from state, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from aropt.errors import Unsupported
from aropt.frontend.trace import capture_model
from aropt.ir.calls import op_name
from aropt.restrict.convolved import normalize_convolutions
from tests.support.equivalence import check

VOCAB, CAPACITY, D = 23, 12, 4
SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "padded": lambda x: F.pad(x, (0, 0, 1, -1)),
    "padded and cut": lambda x: F.pad(x[:, :-1], (0, 0, 1, 0)),
    "padded by a module": nn.ZeroPad2d((0, 0, 1, -1)),
    "joined to zeros": lambda x: torch.cat([x.new_zeros(x.shape[0], 1, D), x[:, :-1]], 1),
    "joined to zeros like it": lambda x: torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1),
    "along the last axis": lambda x: F.pad(x.transpose(1, 2), (1, -1)).transpose(1, 2),
}


class Model(nn.Module):
    """Rows that are mixed once, by `shift` or by a convolution, and again after a nonlinearity."""

    def __init__(self, shift: Callable[[Tensor], Tensor] | None = None, before: bool = False, **sizes: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(VOCAB, D), nn.Linear(D, VOCAB)
        taps, dilation = sizes.get("kernel_size", 1), sizes.get("dilation", 1)
        self.width, self.before = (taps - 1) * dilation, before
        self.conv = nn.Conv1d(D, D, padding=0 if before else self.width, **sizes) if sizes else None
        self.shift = shift

    def mixed(self, x: Tensor) -> Tensor:
        if self.shift is not None:
            return self.shift(x)
        assert self.conv is not None
        x, length = x.transpose(1, 2), x.shape[1]
        x = self.conv(F.pad(x, (self.width, 0))) if self.before else self.conv(x)[..., :length]
        return x.transpose(1, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = x + self.mixed(x)
        return self.head(x + self.mixed(torch.tanh(x)))  # type: ignore[no-any-return]


SELDOM = [pytest.mark.exhaustive]


@pytest.mark.parametrize("form", [pytest.param(f, marks=SELDOM * (f != "joined to zeros")) for f in SHIFTS])
def test_shifts(form: str) -> None:
    result, restricted = check(Model(SHIFTS[form]), VOCAB, CAPACITY, rounds=1)
    assert result.ok and result.reach > 100 * result.floor, result
    assert [str(s.spec) for s in restricted.state.values() if s.kind == "recurrent"] == ["float32[B, 1, 4]"] * 2


@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_convolutions(data: st.DataObject) -> None:
    """Of each channel, or of all with any dilation; padded at both ends and cut, or before."""
    groups = data.draw(st.sampled_from([1, D]))
    sizes = {"kernel_size": data.draw(st.integers(2, 4)), "groups": groups, "bias": data.draw(st.booleans())}
    if groups == 1:
        sizes["dilation"] = data.draw(st.integers(1, 3))
    before = data.draw(st.booleans())
    note(str((sizes, before)))
    result, restricted = check(Model(before=before, **sizes), VOCAB, CAPACITY, rounds=1)
    assert result.ok and result.reach > 100 * result.floor, result
    assert "recurrent" in {state.kind for state in restricted.state.values()}


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "padded with ones": lambda x: F.pad(x, (0, 0, 1, -1), value=1.0),
    "joined to ones": lambda x: torch.cat([torch.ones_like(x[:, :1]), x[:, :-1]], 1),
    "shifted to the front": lambda x: F.pad(x, (0, 0, -1, 1)),
    "cut at the front": lambda x: F.pad(x[:, 1:], (0, 0, 1, 0)),
    "convolved too late": lambda x: F.conv1d(x.transpose(1, 2), torch.ones(D, 1, 2), padding=2, groups=D)[
        ..., : x.shape[1]
    ].transpose(1, 2),
    "over batches": lambda x: F.pad(x, (0, 0, 0, 0, 1, -1)),
    "repeated": lambda x: F.pad(x.transpose(1, 2), (1, 0), mode="replicate")[..., :-1].transpose(1, 2),
}


@pytest.mark.parametrize("form", [pytest.param(f, marks=SELDOM * (f != "padded with ones")) for f in OTHERS])
def test_what_is_no_shift_is_left_alone(form: str) -> None:
    graph, weights = capture_model(Model(OTHERS[form]), VOCAB, CAPACITY)
    assert normalize_convolutions(graph, weights) is graph
    with pytest.raises(Unsupported):
        check(Model(OTHERS[form]), VOCAB, CAPACITY, rounds=1)


@pytest.mark.parametrize("sizes", [{"groups": 2}, {"groups": D, "dilation": 2}, {"padding_mode": "circular"}], ids=str)
def test_other_convolutions_are_refused(sizes: dict[str, Any]) -> None:
    model = Model(before=True, kernel_size=2, **sizes)
    with pytest.raises(Unsupported):
        check(model, VOCAB, CAPACITY, rounds=1)


def test_a_shift_of_another_type_is_not_one() -> None:
    """Joining to zeros in double precision makes all rows double."""
    model = Model(lambda x: torch.cat([torch.zeros(x.shape[0], 1, D, dtype=torch.float64), x[:, :-1]], 1).float())
    graph, weights = capture_model(model, VOCAB, CAPACITY)
    made = normalize_convolutions(graph, weights)
    assert not any(op_name(node) == "aropt::delay" for node in made.fx.nodes if node.op == "call_function")
