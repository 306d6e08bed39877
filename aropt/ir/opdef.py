"""One op, one definition: everything aropt knows about an op of its own, in a frozen `OpDef`.

The eager reference is the meaning of the op. The rest (fake, Triton launcher, ONNX translation) is compared with it
by one parametrized test that every op gets by being listed in `aropt.ir.ops`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import library

NAMESPACE = "aropt"


class Cost(NamedTuple):
    """What one call costs at least, for the roofline: arithmetic operations and bytes moved."""

    flops: float
    bytes: float


class Aot(NamedTuple):
    """One ahead-of-time compilation of a Triton kernel: a `triton.jit` function and how to specialise it.

    `signature` maps parameter names to Triton's types ("*fp32", "i64", "constexpr"), `constants` gives the constexprs,
    `expects` holds pieces of assembly that must occur for a GPU architecture: `{90: ("wgmma",)}`.
    """

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    expects: Mapping[int, Sequence[str]] = {}


@dataclass(frozen=True)
class Mixer:
    """How an op that mixes the rows of a sequence is computed for new rows, against what is kept of earlier ones.

    A causal program keeps `slots` by position, or `state` of one size. A row at position -1 is padding: it changes no
    state, and no other row sees it. Axes are counted from the right; axis 0 is the batch.

    Attributes:
        rows: {argument: its axis of rows}; the first result has its rows where the first of these has them.
        slots: {argument: its axis of rows} that new rows see whole: keys and values.
        mask: the argument [..., rows, slots] that says what a row sees: a bool, or what is added to scores.
        causal: the argument that is True where rows see no later ones without a mask.
        state: arguments that are None in a plain forward and hold what earlier rows left behind (Gu & Dao 2023); the
            results after the first are their new values, in this order. They start as zeros.
        initial: the list of values that the state starts from, where these aren't zeros (`kernels/scan.py`). Then
            `state` is one list, empty in a plain forward, `rows` are lists whose axes count from the left, and of the
            results the last ones are the state.
        positions: the argument int64 [B, R] with the rows' positions; None in a plain forward, without padding.
        tree: the op with the same arguments but for `pairs` bool [B, R, R] in the place of `positions`, whose only
            result is the first: rows are the nodes of a tree that goes on from `state`, a node's parent before it, and
            `pairs` says which are above each or itself. "" where there is none.
        commit: the op that gives the state (one value) after a path of such a tree from arguments of these names and
            `leaf` int64 [B], its last node, -1 without one; where its `pairs` may be None, nodes are then a chain.
    """

    rows: Mapping[str, int]
    slots: Mapping[str, int] = field(default_factory=dict)
    mask: str = ""
    causal: str = ""
    state: Sequence[str] = ()
    positions: str = ""
    initial: str = ""
    tree: str = ""
    commit: str = ""


@dataclass(frozen=True)
class OpDef:
    """The definition of `torch.ops.aropt.<name>`. All ops are functional: no argument is written to.

    Attributes:
        name: the op's name, also the name of its file in `kernels/`.
        schema: arguments and results in torch's schema language, without the name.
        reference: the eager implementation in plain torch ops, on any device; Inductor may inline it.
        fake: shapes and dtypes of the results, from those of the arguments.
        cost: from the same arguments to `Cost`.
        samples: makes a hypothesis strategy of argument tuples on CPU, including the edge cases. `samples(like)` takes
            what is not a tensor or is `held`, and the sizes in `fixed`, from another tuple. Imports hypothesis itself.
        onnx: translation for `torch.onnx.export(custom_translation_table=...)`, standard ONNX ops only.
        contrib: the same with the operators that only ONNX Runtime has, where it has a better one.
        needs: the operator of ONNX Runtime's own that `contrib` writes, if some versions that aropt takes lack it.
        overwrite: as `reference`, but it writes the results named in `in_place` into their arguments.
        in_place: {index of a result: argument} that a target may update in place.
        fixed: {argument: its dims} whose sizes a translation takes as constants.
        held: arguments that a translation takes as constants: weights.
        launch: runs the Triton kernel; only called on arguments for which `supports` returns None.
        supports: why the Triton kernel can't take these arguments, or None if it can.
        aot: ahead-of-time compilations to check without a GPU.
        steps: the argument that is rounded coarsely: results jump where it moves a little (see `validate.in_double`).
        calls: the calls (target, args, kwargs) that an argument of text makes, which a graph must be allowed to hold.
        inside: the values of these calls, on the op's own arguments.
        mixer: how it is computed for new rows alone, if it mixes those of a sequence.
        own_size: whether a size of the result depends on values; compilers then leave the op whole.
        tolerance: (rtol, atol) per dtype of a result; a dtype that isn't named must match bit for bit.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    cost: Callable[..., Cost]
    samples: Callable[..., Any]
    onnx: Callable[..., Any] | None = None
    contrib: Callable[..., Any] | None = None
    needs: str = ""
    overwrite: Callable[..., Any] | None = None
    in_place: Mapping[int, str] = field(default_factory=dict)
    fixed: Mapping[str, Sequence[int]] = field(default_factory=dict)
    held: Sequence[str] = ()
    launch: Callable[..., Any] | None = None
    supports: Callable[..., str | None] = lambda *_: None
    aot: Callable[[], Sequence[Aot]] = tuple
    steps: str = ""
    calls: Callable[..., Any] | None = None
    inside: Callable[..., Any] | None = None
    mixer: Mixer | None = None
    own_size: bool = False
    tolerance: Mapping[torch.dtype, tuple[float, float]] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether compilers leave the op as it is: a size depends on values, or what it computes is text."""
        return self.own_size or self.calls is not None

    @property
    def overload(self) -> torch._ops.OpOverload:
        """The registered op, as it stands in captured graphs."""
        register(self)
        packet = getattr(getattr(torch.ops, NAMESPACE), self.name)
        overload: torch._ops.OpOverload = packet.default
        return overload


_registered: dict[str, OpDef] = {}
_numbers = itertools.count()  # of ONNX graphs, whose names differ


def register(op: OpDef) -> None:
    """Defines the op in torch; the second time for the same definition does nothing.

    Raises:
        ValueError: if another definition has taken the name.
    """
    known = _registered.get(op.name)
    if known is op:
        return
    if known is not None:
        raise ValueError(f"op {NAMESPACE}::{op.name} is defined twice")

    def on_cuda(*args: Any) -> Any:
        if op.launch is None or op.supports(*args) is not None:
            return op.reference(*args)
        return op.launch(*args)

    custom = library.custom_op(f"{NAMESPACE}::{op.name}", op.reference, mutates_args=(), schema=op.schema)
    custom.register_fake(op.fake)
    custom.register_kernel("cuda")(on_cuda)
    _registered[op.name] = op


def onnx_node(domain: str, kind: str, inputs: list[Any], outputs: int, **attributes: Any) -> list[Any]:
    """In an ONNX translation: a node that onnxscript can't write (another domain, several outputs). None: left out."""
    import onnx_ir as ir
    from onnxscript import evaluator

    while inputs and inputs[-1] is None:
        inputs = inputs[:-1]
    given = [ir.convenience.convert_attribute(k, v) for k, v in attributes.items()]
    node = ir.Node(domain, kind, inputs=inputs, attributes=given, num_outputs=outputs, version=1 if domain else None)
    evaluator.default().nodes.append(node)
    return list(node.outputs)


def onnx_linear_attention(
    q: Any, k: Any, v: Any, state: Any, decay: Any, beta: Any, rule: str, heads: int, width: int
) -> tuple[Any, Any]:
    """In an ONNX translation: ONNX Runtime's LinearAttention, a recurrence of all heads in one kernel.

    q, k [B, R, H, K], v [B, R, H, V], state [B, H, K, V] or None, decay [B, R, H] or [B, R, H * K] (its logarithm) and
    beta [B, R, H] or None -> o [B, R, H, V], the state after the rows. `rule` is "gated" or "gated_delta".
    """
    from onnxscript import opset20 as op

    packed = [op.Reshape(x, op.Constant(value_ints=[0, 0, -1])) for x in (q, k, v)]
    sizes = {"q_num_heads": heads, "kv_num_heads": heads}
    given = [*packed, state, decay, beta]
    o, left = onnx_node("com.microsoft", "LinearAttention", given, 2, scale=1.0, update_rule=rule, **sizes)
    return op.Reshape(o, op.Constant(value_ints=[0, 0, heads, width])), left


def onnx_valid(positions: Any) -> Any:
    """In an ONNX translation: float [B, R, 1], 1 for rows and 0 for padding."""
    from onnxscript import opset20 as op

    counts = op.Cast(op.GreaterOrEqual(positions, op.Constant(value_int=0)), to=1)
    return op.Unsqueeze(counts, op.Constant(value_ints=[2]))


def onnx_scan(
    step: Callable[..., tuple[Any, ...]],
    states: Sequence[Any],
    rows: Sequence[Any],
    axis: int,
    out: int,
    kinds: Sequence[Any] = (),
) -> list[Any]:
    """In an ONNX translation: a Scan along `axis` of all rows: `step(*states, *row)` -> (*states, *y).

    `kinds` are the types of states and rows, fp32 where they are left out. Returns the last states and each y, stacked
    at axis `out`.
    """
    import onnx_ir as ir

    name, kinds = f"scan_{next(_numbers)}", kinds or [ir.DataType.FLOAT] * (len(states) + len(rows))
    given = [ir.Value(name=f"{name}.{i}", type=ir.TensorType(kind)) for i, kind in enumerate(kinds)]
    body, count = onnx_body(name, lambda: step(*given), given), len(states)
    axes = {"scan_input_axes": [axis] * len(rows), "scan_output_axes": [out] * (len(body.outputs) - count)}
    return onnx_node("", "Scan", [*states, *rows], len(body.outputs), body=body, num_scan_inputs=len(rows), **axes)


def onnx_rows(x: Any, axis: int, one: Callable[[], Any], several: Callable[[], Any]) -> Any:
    """In an ONNX translation: what `one` writes where x has one row at `axis`, else what `several` writes.

    Where the graph serves both prefill and decode, an If chooses; both write as many values.
    """
    from onnxscript import opset20 as op

    if isinstance(x.shape[axis], int):
        return one() if x.shape[axis] == 1 else several()
    name = f"rows_{next(_numbers)}"
    decode, prefill = (onnx_body(f"{name}.{branch}", write, []) for branch, write in (("one", one), ("more", several)))
    single = op.Equal(op.Shape(x, start=axis, end=axis + 1), op.Constant(value_ints=[1]))
    return onnx_node("", "If", [op.Squeeze(single)], len(decode.outputs), then_branch=decode, else_branch=prefill)


def onnx_body(name: str, write: Callable[[], Any], inputs: Sequence[Any]) -> Any:
    """The nodes that `write` makes as a graph of their own, whose outputs are its results."""
    import onnx_ir as ir
    from onnxscript import evaluator

    recorder = evaluator.default()
    outside, recorder.nodes = recorder.nodes, []
    try:
        made = write()
    finally:
        inside, recorder.nodes = recorder.nodes, outside
    for i, node in enumerate(inside):
        for j, value in enumerate(node.outputs):
            value.name = f"{name}.{i}.{j}"
    return ir.Graph(inputs, list(made), nodes=inside, name=name)
