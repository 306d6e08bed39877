"""Calls of this project's ops."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from aropt.ir import ops
from aropt.restrict.dims import Factor
from tests.support.op_values import (
    Call,
    Draw,
    Value,
    axes,
    maybe,
    rarely,
    value,
    weight,
)


def single(one: Value | None) -> Value | None:
    return one and Value(one.tensor.float(), one.axes)


def linear_int8(draw: Draw) -> Call:
    x = value(draw, (*axes(draw), (Factor(".", 32),)))
    if rarely(draw, 6):  # the axis that is multiplied is a product of rows
        x = value(draw, (*axes(draw, kinds="b"), (Factor("r"), Factor(".", 32))))
    w = weight(draw, 3, x.tensor.shape[-1] // 32, 32, kind="int", below=256)
    scales = weight(draw, 3, w.tensor.shape[1])
    return Call(ops.load("linear_int8").overload, (x, Value(w.tensor.to(torch.uint8), w.axes), scales))


def token_shuffle(draw: Draw) -> Call:
    ids = value(draw, axes(draw, tail=0 if rarely(draw, 6) else 1), "int", 4)
    return Call(ops.load("token_shuffle").overload, (ids, single(weight(draw, 4, 3)), draw(st.booleans())))


def token_unshuffle(draw: Draw) -> Call:
    x = value(draw, axes(draw, tail=0 if rarely(draw, 6) else 1))
    head = weight(draw, 3, 4), maybe(draw, weight(draw, 3))
    rest = (None, *(head if draw(st.booleans()) else (None, None)))
    args = (x, weight(draw, 2, 4, x.tensor.shape[-1]), *rest)
    return Call(ops.load("token_unshuffle").overload, tuple(map(single, args)))
