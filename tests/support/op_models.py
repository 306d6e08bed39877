"""An op as a model to export, its tensors as inputs of any size; and the comparison of its results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from aropt.ir.opdef import OpDef


def tensors(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def assert_matches(op: OpDef, got: Any, want: Any) -> None:
    """Equality within the op's tolerance; bit for bit where it states none."""
    assert len(tensors(got)) == len(tensors(want))
    for g, w in zip(tensors(got), tensors(want)):
        rtol, atol = op.tolerance.get(w.dtype, (0.0, 0.0))
        torch.testing.assert_close(g.cpu(), w.cpu(), rtol=rtol, atol=atol, equal_nan=True)


class Call(torch.nn.Module):
    """The op as a model of its tensor arguments, the others held; `constant`: those that the op wants held, too."""

    def __init__(self, op: OpDef, args: tuple[Any, ...], constant: bool = False) -> None:
        super().__init__()
        self.overload, self.args = op.overload, args
        self.held = set(op.held) if constant else set()
        self.names = [argument.name for argument in op.overload._schema.arguments]

    def forward(self, *given: torch.Tensor) -> Any:
        rest, named = iter(given), zip(self.names, self.args)
        return self.overload(*(arg if n in self.held else filled(arg, rest) for n, arg in named))


def varies(arg: Any) -> bool:
    return isinstance(arg, torch.Tensor)


def filled(arg: Any, rest: Iterator[torch.Tensor]) -> Any:
    """The argument, the next tensors in the place of its own."""
    if isinstance(arg, list):
        return [filled(a, rest) for a in arg]
    return next(rest) if varies(arg) else arg


def flat(arg: Any) -> list[torch.Tensor]:
    """The tensors of an argument, which may be a list."""
    return [a for a in (arg if isinstance(arg, list) else [arg]) if varies(a)]


def free(op: OpDef, args: tuple[Any, ...]) -> list[torch.Tensor]:
    """The tensors that a translation takes as inputs."""
    names = [argument.name for argument in op.overload._schema.arguments]
    return [tensor for name, arg in zip(names, args) if name not in op.held for tensor in flat(arg)]


def sizable(op: OpDef) -> Any:
    """Samples without sizes 0 and 1, which export and compilation would make constants."""
    return op.samples().filter(lambda args: all(size > 1 for tensor in free(op, args) for size in tensor.shape))


def symbolic(op: OpDef, args: tuple[Any, ...]) -> Any:
    """Every size of every tensor as a symbol, but those that the op takes as constants."""
    names = [argument.name for argument in op.overload._schema.arguments]
    given = [(name, tensor) for name, arg in zip(names, args) if name not in op.held for tensor in flat(arg)]
    auto = torch.export.Dim.AUTO
    return tuple({d: auto for d in range(arg.dim()) if d not in op.fixed.get(name, ())} for name, arg in given)
