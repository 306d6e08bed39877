"""Slips of the ONNX translation: the program is right, and what it is lowered to is not."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from onnxscript import opset20 as op
from torch import Tensor

from aropt.errors import VerificationFailed
from aropt.exporters import onnx as exporter
from aropt.exporters.whole_loop import export_program
from aropt.ir import ops
from aropt.ir.executor import Executor, Values
from aropt.ir.program import Program
from aropt.targets import lower
from aropt.targets.ort import run_loop
from aropt.targets.ort.single_call import SingleCall
from tests.mutants.corners import slips
from tests.mutants.corners.slips import Request, ask

Translation = Callable[..., Any]
FLOAT, INT = 1, 7  # of ONNX
aten = torch.ops.aten
NOISE, KEEP, CACHED, COMMIT, SELECT = (
    ops.load(name).overload
    for name in ("noise", "keep_top", "cached_attention", "canvas_commit", "canvas_select")
)  # fmt: skip


class AsOne(Executor):
    """Runs a program as one loop, in no other way."""

    way = "single-call"

    def __init__(self, whole: SingleCall) -> None:
        self.whole = whole

    def generate(self, inputs: Values) -> Tensor:
        return self.whole.generate(inputs)


@contextmanager
def translated(target: Any, function: Translation) -> Iterator[None]:
    """With function(the right translation, ...) in the place of an op's translation."""
    right = exporter.translations

    def translations(contrib: bool = False) -> dict[Any, Translation]:
        table = right(contrib)
        return {**table, target: functools.wraps(table[target])(functools.partial(function, table[target]))}

    exporter.registry.cache_clear()
    with mock.patch.object(exporter, "translations", translations):
        yield
    exporter.registry.cache_clear()


@contextmanager
def lowered(target: Any, function: Translation, whole: bool, program: Program) -> Iterator[tuple[Any, str]]:
    """What runs the program, by sessions of its graphs or as one loop; of that also what comparing it finds wrong."""
    with tempfile.TemporaryDirectory() as folder, translated(target, function):
        if not whole:
            yield lower(program, "onnxruntime", Path(folder), threads=1), ""
            return
        path, problem = Path(folder) / "model.onnx", ""
        export_program(program, path, contrib=True)
        try:
            run_loop.compare(path, program)
        except VerificationFailed as error:
            problem = str(error)
        yield AsOne(SingleCall(path, 1)), problem


def slip(
    name: str, of: str, shown: Request, target: Any, function: Translation, whole: bool = False
) -> None:  # fmt: skip
    """Registers a slip of the translation of one op."""
    run = functools.partial(lowered, target, function, whole)
    slips.SLIPS[name] = slips.Slip("translations", of, lambda p: p, shown, run)


def number(value: float) -> Any:
    return op.Constant(value_float=float(value))


def integer(value: int) -> Any:
    return op.Constant(value_int=value)


def many(x: Any, least: int = 4, axis: int = 0) -> Any:
    """Whether an axis has so many rows: bool [1]."""
    return op.GreaterOrEqual(op.Shape(x, start=axis, end=axis + 1), op.Constant(value_ints=[least]))


def filters(k: Callable[[Any], Any] = lambda k: k, p: Callable[[Any], Any] = lambda p: p) -> Translation:
    """The filter with other parameters."""
    return lambda right, x, given, share=None: right(
        x, None if given is None else k(given), None if share is None else p(share)
    )


def drawn(n: int = 30, rows: int = 1, **options: Any) -> Request:
    return ask(rows, n, **{"temperature": 1.5, **options})


for whole in (False, True):
    place = "loop" if whole else "graphs"
    slip(f"{place}_top_k_beyond_8_is_8", "dense", drawn(30, 2, top_k=20), KEEP,
         filters(k=lambda k: op.Min(k, integer(8))), whole)  # fmt: skip
    slip(f"{place}_seed_bits_beyond_41_lost", "dense", drawn(seed=2**50 + 3), NOISE,
         lambda right, seed, *rest: right(op.Mod(seed, integer(2**41)), *rest), whole)  # fmt: skip
    slip(f"{place}_third_stop_id_unused", "dense", ask(1, 20, ["none", "none", (0, 4)]), aten.any.dim,
         lambda right, x, *rest: right(op.Slice(x, [0], [2], [1]), *rest), whole)  # fmt: skip
    slip(f"{place}_prompts_of_17_to_62_louder", "dense", ask([30], 12), CACHED,
         lambda right, q, *rest: right(op.Mul(q, op.Where(many(q, 17, 1), number(1.2), number(1.0))), *rest),
         whole)  # fmt: skip
slip("graphs_top_p_beyond_0.92_is_1", "dense", drawn(80, 4, top_p=0.95, temperature=2.0), KEEP,
     filters(p=lambda p: op.Where(op.Greater(p, number(0.92)), number(1.0), p)))  # fmt: skip
slip("graphs_noise_repeats_after_64", "dense", ask([60], 16, temperature=1.0), NOISE,
     lambda right, seed, stream, at, n: right(seed, stream, op.Mod(at, integer(64)), n))  # fmt: skip
slip("graphs_small_streams_modulo_4", "dense", drawn(20, 2, streams=[5, 60]), NOISE,
     lambda right, seed, stream, at, n: right(
         seed, op.Where(op.Less(stream, integer(64)), op.Mod(stream, integer(4)), stream), at, n))  # fmt: skip
slip("graphs_batches_end_with_three", "dense", ask(4, 20, [(0, 1), (1, 1), (2, 1)]), aten.all.default,
     lambda right, x: right(op.Slice(x, [0], [3], [0])))  # fmt: skip
slip("graphs_ragged_rows_not_stored", "dense", ask([9, 4, 6, 2], 12), aten.index_copy.default,
     lambda right, store, dim, index, rows: op.Where(many(rows), store, right(store, dim, index, rows)))  # fmt: skip
slip("graphs_canvas_threshold_of_a_half_at_most", "free", ask([4], 32, block=16, threshold=0.97), COMMIT,
     lambda right, tokens, candidate, sure, segment, limit, threshold, best: right(
         tokens, candidate, sure, segment, limit, op.Min(threshold, number(-3.0)), best))  # fmt: skip
slip("graphs_canvas_fourth_row_writes_two", "free", ask(4, 16, block=8, threshold=0.9), COMMIT,
     lambda right, tokens, candidate, sure, segment, limit, *rest: right(
         tokens, candidate, sure, segment, op.Add(limit, op.Cast(many(tokens), to=INT)), *rest))  # fmt: skip
