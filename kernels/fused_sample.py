"""`aropt::fused_sample`: the ids of a round's window from its logits, all rules and the draw in one op.

    fused_sample(Tensor logits, Tensor? guidance, Tensor? seen, Tensor? repetition_penalty, Tensor? bias,
                 Tensor? temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p,
                 Tensor? seed, Tensor? streams, Tensor? position) -> Tensor

* `logits` float32 [B, W, V], V >= 1; [2B, W, V] with `guidance` float32 [], the conditional half first.
* `seen` bool [B, V] with `repetition_penalty` float32 []; `bias` float32 [V]. A rule that is None is off.
* `seed` int64 [], `streams` and `position` int64 [B]: id j of row b is drawn with the noise (`aropt::noise`) of
  position `position[b] * W + j` of its stream. Before that come `temperature`, `top_p`, `min_p` float32 [] and `top_k`
  int64 []. Without a seed the result is the largest logit's id, and those four must be None.
* result int64 [B, W].

The rules are those of loops/rules.py in its order, with its ties: top-k keeps what equals the last logit kept, top-p
the lowest ids of these, the lowest of ids with equal scores is taken. Where all logits are -inf that is id 0, a NaN
gives any id. A top-k above V keeps all, a temperature below 1e-6 counts as 1e-6. What callers should not ask for (such
as a bias that leaves no id) is refused where values are given: `aropt.loops.given.check_parameters`.

The kernel sorts nothing: the last logit kept is found by bisection on the 32 bits of a float, ordered as integers. Its
sums are taken in another order than the definition's, and its logarithms and exponentials are the GPU's: an id may
differ where a probability meets top-p, or two scores are equal, up to that rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aropt.ir.opdef import Aot, Cost, OpDef
from aropt.kernels import noise

try:
    import triton
    import triton.language as tl

    from aropt.kernels.noise import uniform

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

LARGEST = 4096  # logits that a program keeps in registers; of more it reads so many at a time
COLDEST = 1e-6
F32, I64 = torch.float32, torch.int64
NAMES = ("logits", "guidance", "seen", "repetition_penalty", "bias", "temperature", "top_k", "top_p", "min_p", "seed",
         "streams", "position")  # fmt: skip
DTYPES = {"seen": torch.bool, "top_k": I64, "seed": I64, "streams": I64, "position": I64}
Optional = Tensor | None


def _check(*given: Optional) -> tuple[int, int, int]:
    """Raises unless the arguments are as the module's text says; returns B, W and V."""
    x = dict(zip(NAMES, given, strict=True))
    logits = x["logits"]
    assert logits is not None
    torch._check(logits.dim() == 3, lambda: "logits must be [B, W, V]")
    rows, window, vocab = logits.shape
    batch = rows // 2 if x["guidance"] is not None else rows
    if x["guidance"] is not None:
        torch._check(rows == 2 * batch, lambda: "guidance needs logits of two branches")
    shapes = {"seen": (batch, vocab), "bias": (vocab,), "streams": (batch,), "position": (batch,)}
    for name, value in x.items():
        if value is not None:
            torch._check_type(value.dtype == DTYPES.get(name, F32), lambda n=name: f"{n} is of another dtype")
            if name != "logits":
                torch._check(tuple(value.shape) == shapes.get(name, ()), lambda n=name: f"{n} is of another shape")
    for one, other in (("seen", "repetition_penalty"), ("seed", "streams"), ("seed", "position")):
        torch._check((x[one] is None) == (x[other] is None), lambda a=one, b=other: f"{a} and {b} go together")
    drawn = all(x[name] is None for name in ("temperature", "top_k", "top_p", "min_p")) or x["seed"] is not None
    torch._check(drawn, lambda: "temperature, top-k, top-p and min-p are of a draw, and there is no seed")
    return batch, window, vocab


def reference(*given: Optional) -> Tensor:
    """The definition: see the module's text.

    Raises:
        RuntimeError: on other shapes, and for rules that don't go together.
        TypeError: on other dtypes.
    """
    batch, window, vocab = _check(*given)
    logits, guidance, seen, penalty, bias, temperature, top_k, top_p, min_p, seed, streams, position = given
    assert logits is not None
    x = logits.flatten(0, 1)
    if guidance is not None:
        branches = x.reshape(2, batch * window, vocab)
        x = branches[1] + guidance * (branches[0] - branches[1])
    if seen is not None and penalty is not None:
        x = torch.where(seen.repeat_interleave(window, 0), torch.where(x > 0, x / penalty, x * penalty), x)
    if bias is not None:
        x = x + bias
    if temperature is not None:
        x = x / temperature.clamp(min=COLDEST)
    if top_k is not None:
        last = (top_k.clamp(1, vocab) - 1).reshape(1, 1).expand(batch * window, 1)
        ordered = torch.sort(x, dim=-1, descending=True).values
        x = torch.where((x >= ordered.gather(-1, last)) | (top_k <= 0), x, -torch.inf)
    if top_p is not None:
        ordered, order = torch.sort(x, dim=-1, descending=True, stable=True)
        probabilities = torch.softmax(ordered, dim=-1)
        before = torch.cumsum(probabilities, dim=-1) - probabilities
        final, ids = (before < top_p).sum(-1, keepdim=True).clamp(min=1) - 1, torch.arange(vocab, device=x.device)
        last = ordered.gather(-1, final)
        kept = (x > last) | ((x == last) & (ids <= order.gather(-1, final)))
        x = torch.where(kept | (top_p >= 1), x, -torch.inf)
    if min_p is not None:
        x = torch.where(x >= x.amax(-1, keepdim=True) + torch.log(min_p), x, -torch.inf)
    if seed is not None and streams is not None and position is not None:
        places = position.unsqueeze(1) * window + torch.arange(window, device=x.device)
        drawn = noise.reference(seed, streams.repeat_interleave(window), places.flatten(), vocab)
        x = x - torch.log(-torch.log(drawn))
    return torch.argmax(x, dim=-1).reshape(batch, window)


def fake(*given: Optional) -> Tensor:
    """int64 [B, W]."""
    batch, window, _ = _check(*given)
    assert given[0] is not None
    return given[0].new_empty((batch, window), dtype=I64)


def onnx(logits, guidance, seen, repetition_penalty, bias, temperature, top_k, top_p, min_p, seed, streams, position):  # type: ignore[no-untyped-def]
    """The same in standard ONNX ops (opset 20): TopK of all logits is a sort."""
    from onnxscript import opset20 as op

    def number(value: float) -> Any:
        return op.Constant(value_float=value)

    def least(ordered: Any, count: Any) -> Any:
        """Of logits in order (or of their ids), the one that is number `count` from the largest."""
        return op.GatherElements(ordered, op.Sub(count, op.Constant(value_int=1)), axis=2)

    x, vocab = logits, op.Shape(logits, start=2, end=3)
    if guidance is not None:
        half = op.Div(op.Shape(x, start=0, end=1), op.Constant(value_ints=[2]))
        others = op.Slice(x, half, op.Constant(value_ints=[2**62]), op.Constant(value_ints=[0]))
        x = op.Slice(x, op.Constant(value_ints=[0]), half, op.Constant(value_ints=[0]))
        x = op.Add(others, op.Mul(guidance, op.Sub(x, others)))
    if seen is not None:
        wide = op.Unsqueeze(seen, op.Constant(value_ints=[1]))
        bent = op.Where(op.Greater(x, number(0.0)), op.Div(x, repetition_penalty), op.Mul(x, repetition_penalty))
        x = op.Where(wide, bent, x)
    if bias is not None:
        x = op.Add(x, bias)
    if temperature is not None:
        x = op.Div(x, op.Max(temperature, number(COLDEST)))
    low = number(-math.inf)
    if top_k is not None:
        ordered, _ = op.TopK(x, vocab, axis=2, largest=1, sorted=1)
        count = op.Max(op.Min(top_k, vocab), op.Constant(value_int=1))
        count = op.Expand(count, op.Concat(op.Shape(x, start=0, end=2), op.Constant(value_ints=[1]), axis=0))
        off = op.LessOrEqual(top_k, op.Constant(value_int=0))
        x = op.Where(op.Or(op.GreaterOrEqual(x, least(ordered, count)), off), x, low)
    if top_p is not None:
        ordered, order = op.TopK(x, vocab, axis=2, largest=1, sorted=1)
        probabilities = op.Softmax(ordered, axis=2)
        before = op.Sub(op.CumSum(probabilities, 2), probabilities)
        count = op.ReduceSum(op.Cast(op.Less(before, top_p), to=7), [2], keepdims=1)
        count = op.Max(count, op.Constant(value_int=1))
        off, last = op.GreaterOrEqual(top_p, number(1.0)), least(ordered, count)
        early = op.LessOrEqual(op.Range(0, op.Squeeze(vocab), 1), least(order, count))
        kept = op.Or(op.Greater(x, last), op.And(op.Equal(x, last), early))
        x = op.Where(op.Or(kept, off), x, low)
    if min_p is not None:
        x = op.Where(op.GreaterOrEqual(x, op.Add(op.ReduceMax(x, [2], keepdims=1), op.Log(min_p))), x, low)
    if seed is not None:
        window = op.Shape(logits, start=1, end=2)
        places = op.Mul(op.Unsqueeze(position, op.Constant(value_ints=[1])), window)
        places = op.Add(places, op.Range(0, op.Squeeze(window), 1))
        rows = op.Expand(op.Unsqueeze(streams, op.Constant(value_ints=[1])), op.Shape(places))
        flat = op.Constant(value_ints=[-1])
        drawn = noise.onnx(seed, op.Reshape(rows, flat), op.Reshape(places, flat), op.Squeeze(vocab))  # type: ignore[no-untyped-call]
        drawn = op.Reshape(drawn, op.Shape(x), allowzero=1)
        x = op.Sub(x, op.Log(op.Neg(op.Log(drawn))))
    return op.ArgMax(x, axis=2, keepdims=0, select_last_index=0)


if HAS_TRITON:
    _COLDEST = tl.constexpr(COLDEST)

    @triton.jit
    def _logits(  # type: ignore[no-untyped-def]
        at, other, seen_ptr, bias_ptr, index, width, guidance, penalty, heat,
        GUIDED: tl.constexpr, PENALIZED: tl.constexpr, BIASED: tl.constexpr, HEATED: tl.constexpr,
    ):  # fmt: skip
        """Logits `index` of a row after guidance, penalty, bias and temperature; -inf outside of the vocabulary."""
        inside = index < width
        x = tl.load(at + index, mask=inside, other=0.0)
        if GUIDED:
            unconditional = tl.load(other + index, mask=inside, other=0.0)
            x = unconditional + guidance * (x - unconditional)
        if PENALIZED:
            bent = tl.where(x > 0, tl.div_rn(x, penalty), x * penalty)
            x = tl.where(tl.load(seen_ptr + index, mask=inside, other=0) != 0, bent, x)
        if BIASED:
            x += tl.load(bias_ptr + index, mask=inside, other=0.0)
        if HEATED:
            x = tl.div_rn(x, heat)
        return tl.where(inside, x, float("-inf"))

    @triton.jit
    def _order(x):  # type: ignore[no-untyped-def]
        """Integers in the order of the floats; both zeros are one."""
        bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
        return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)

    @triton.jit
    def _share(x, index, above, until, least, best, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
        """What logits above order `above`, or of it before id `until`, count: 1, or their ratio to the likeliest."""
        order = _order(x)
        inside = ((order > above) | ((order == above) & (index < until))) & (order >= least)
        if COUNT:
            return tl.where(inside, 1.0, 0.0)
        return tl.where(inside, tl.where(x == best, 1.0, tl.exp(x - best)), 0.0)

    @triton.jit
    def _sample_kernel(  # type: ignore[no-untyped-def]
        logits_ptr, guidance_ptr, seen_ptr, penalty_ptr, bias_ptr, temperature_ptr, k_ptr, p_ptr, min_ptr,
        seed_ptr, stream_ptr, position_ptr, out_ptr, width, GUIDED: tl.constexpr, PENALIZED: tl.constexpr,
        BIASED: tl.constexpr, HEATED: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
        DRAWN: tl.constexpr, ONE: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program for each id of each row. `ONE`: all of its logits are in registers."""
        row, place, window = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
        at = logits_ptr + (row * window + place) * width
        other = at + tl.num_programs(0).to(tl.int64) * window * width
        seen = seen_ptr + row * width
        lane = tl.arange(0, BLOCK)
        guidance = tl.load(guidance_ptr) if GUIDED else 0.0
        penalty = tl.load(penalty_ptr) if PENALIZED else 1.0
        heat = tl.maximum(tl.load(temperature_ptr), _COLDEST) if HEATED else 1.0
        held = _logits(
            at, other, seen, bias_ptr, lane, width, guidance, penalty, heat, GUIDED, PENALIZED, BIASED, HEATED
        )
        largest = held
        if not ONE:
            for start in range(BLOCK, width, BLOCK):
                x = _logits(at, other, seen, bias_ptr, start + lane, width, guidance, penalty, heat,
                            GUIDED, PENALIZED, BIASED, HEATED)  # fmt: skip
                largest = tl.maximum(largest, x)
        best = tl.max(largest, 0)
        lowest = tl.full([], -2139095041, tl.int64)  # the order of -inf
        least, first, last = lowest, tl.full([], 0, tl.int64), tl.full([], 0, tl.int64) + width
        # stage 0 counts up to k, 1 adds up to p: the least order with less above it, for p its last id with less before
        for stage in tl.static_range(2):
            if (TOP_K and stage == 0) or (TOP_P and stage == 1):
                limit = (tl.load(k_ptr) if stage == 0 else tl.load(p_ptr)).to(tl.float32)
                used = limit > 0 if stage == 0 else limit < 1
                limit = tl.maximum(limit, 1e-37)  # a p of 0 keeps one
                low, high = lowest, tl.where(used, tl.max(_order(largest), 0), lowest)
                whole, turn = tl.full([], 1.0, tl.float32), 0
                while used & ((turn < 33) | ((stage == 1) & (first < last))):
                    # the first turn of stage 1 finds the sum that the others are shares of
                    by_id, middle = turn >= 33, (first + last + 1) >> 1
                    above = tl.where(turn == 0, lowest - 1, tl.where(by_id, high, (low + high) >> 1))
                    until = tl.where(by_id, middle, 0)
                    share = _share(held, lane, above, until, least, best, stage == 0)
                    if not ONE:
                        for start in range(BLOCK, width, BLOCK):
                            x = _logits(at, other, seen, bias_ptr, start + lane, width, guidance, penalty, heat,
                                        GUIDED, PENALIZED, BIASED, HEATED)  # fmt: skip
                            share += _share(x, start + lane, above, until, least, best, stage == 0)
                    total = tl.sum(share, 0)
                    if turn == 0:
                        whole = total if stage == 1 else whole
                    else:
                        less = total / whole < limit
                        low = tl.where(less | by_id, low, above + 1)
                        high = tl.where(less & (turn < 33), above, high)
                        first = tl.where(less & by_id, middle, first)
                        last = tl.where(less | (turn < 33), last, middle - 1)
                    turn += 1
                least = tl.maximum(least, high)
        floor = best + tl.log(tl.load(min_ptr)) if MIN_P else float("-inf")
        score = tl.full([BLOCK], float("-inf"), tl.float32)
        chosen = lane
        for start in range(0, width, BLOCK):
            index = start + lane
            x = held
            if not ONE:
                x = _logits(at, other, seen, bias_ptr, index, width, guidance, penalty, heat,
                            GUIDED, PENALIZED, BIASED, HEATED)  # fmt: skip
            order = _order(x)
            x = tl.where(((order > least) | ((order == least) & (index <= last))) & (x >= floor), x, float("-inf"))
            if DRAWN:
                position = tl.load(position_ptr + row) * window + place
                drawn = uniform(tl.load(seed_ptr), tl.load(stream_ptr + row), position, index)
                x = x - tl.log(-tl.log(drawn))
            chosen = tl.where(x > score, index, chosen)
            score = tl.maximum(score, x)
        token = tl.min(tl.where(score == tl.max(score, 0), chosen, width), 0)
        tl.store(out_ptr + row * window + place, tl.minimum(token, width - 1).to(tl.int64))


def supports(logits: Tensor, *_: Optional) -> str | None:
    """Why the kernel can't run, or None."""
    if not HAS_TRITON:
        return "triton isn't installed"
    return "it counts in float32" if logits.shape[-1] > 2**24 else None


def _flags(given: Sequence[Any]) -> dict[str, bool]:
    """Which rules are on, as the kernel calls them."""
    x = {name: value is not None for name, value in zip(NAMES, given, strict=True)}
    names = {"GUIDED": "guidance", "PENALIZED": "seen", "BIASED": "bias", "HEATED": "temperature", "TOP_K": "top_k",
             "TOP_P": "top_p", "MIN_P": "min_p", "DRAWN": "seed"}  # fmt: skip
    return {flag: x[name] for flag, name in names.items()}


def launch(*given: Any) -> Tensor:
    """Runs the Triton kernel: a program for each id."""
    out, vocab = fake(*given), given[0].shape[2]
    if out.numel():
        block = min(LARGEST, max(16, triton.next_power_of_2(vocab)))
        tensors = [out if t is None else t.contiguous() for t in given]
        # without fusion, products and sums are rounded as the definition's
        rest = {"ONE": vocab <= block, "BLOCK": block, "num_warps": 8 if block > 1024 else 4, "enable_fp_fusion": False}
        _sample_kernel[tuple(out.shape)](*tensors, out, vocab, **_flags(given), **rest)
    return out


def aot() -> Sequence[Aot]:
    """Argmax and a draw with all rules, in registers and from memory."""
    pointers = ["fp32", "fp32", "i1", "fp32", "fp32", "fp32", "i64", "fp32", "fp32", "i64", "i64", "i64", "i64"]
    types = [*(f"*{t}" for t in pointers), "i32", *["constexpr"] * 10]
    signature = dict(zip(_sample_kernel.arg_names, types, strict=True))
    drawn, greedy = [True] * 12, [True] * 5 + [False] * 7
    return [
        Aot(_sample_kernel, signature, {**_flags([t or None for t in on]), "ONE": one, "BLOCK": LARGEST}, num_warps=8)
        for on in (drawn, greedy) for one in (True, False)
    ]  # fmt: skip


def cost(*given: Any) -> Cost:
    """A dozen operations a logit and, for each of top-k and top-p, the comparisons of a sort; logits are read once."""
    out, logits = fake(*given), given[0]
    sorts = sum(given[NAMES.index(name)] is not None for name in ("top_k", "top_p"))
    flops = (12.0 + sorts * math.log2(max(logits.shape[2], 2))) * logits.numel()
    return Cost(flops, float(sum(t.nbytes for t in given if t is not None) + out.nbytes))


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """Argument tuples: every choice of rules, ties, forbidden ids, vocabularies at the block's edge, no rows."""
    from hypothesis import strategies as st

    groups = ("guidance", "seen", "bias", "seed", "temperature", "top_k", "top_p", "min_p")
    held = [st.booleans() if like is None else st.just(like[NAMES.index(n)] is not None) for n in groups]
    sizes = st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(1, 40))
    sizes = sizes | st.tuples(st.just(1), st.just(1), st.sampled_from([LARGEST, LARGEST + 1]))
    values = st.tuples(*(st.sampled_from(v) for v in (
        [0.0, 1.0, 1.5, 3.7], [1.0, 1.3, 0.7], [0.0, 0.3, 1.0, 2.0], [0, 1, 2, 3, 99], [0.0, 0.05, 0.31, 0.9, 1.0],
        [0.0, 0.07, 1.0], [0, 5, 2**61],
    )))  # fmt: skip

    def build(on: tuple[bool, ...], size: tuple[int, int, int], value: tuple[Any, ...], tied: bool, turned: bool,
              seed: int) -> tuple[Any, ...]:  # fmt: skip
        generator, (batch, window, vocab) = torch.Generator().manual_seed(seed), size
        shape = (batch * (2 if on[0] else 1), window, vocab)
        logits = torch.randint(-2, 3, shape, generator=generator).float() if tied else (
            torch.randn(shape, generator=generator) * 3)  # fmt: skip
        forbidden = torch.rand(vocab, generator=generator) < 0.2
        rows = torch.randint(0, 2**40, (2, batch), generator=generator)
        numbers = dict(zip(("guidance", "repetition_penalty", "temperature", "top_k", "top_p", "min_p", "seed"),
                           map(torch.tensor, value)))  # fmt: skip
        made = numbers | {
            "logits": logits.mT.contiguous().mT if turned else logits,
            "seen": torch.rand(batch, vocab, generator=generator) < 0.5,
            "bias": torch.where(forbidden, -torch.inf, torch.randn(vocab, generator=generator)),
            "streams": rows[0],
            "position": rows[1],
        }
        used = {"logits", *(name for name, chosen in zip(groups, on) if chosen)}
        used |= {"repetition_penalty"} if "seen" in used else set()
        used = used | {"streams", "position"} if "seed" in used else used - {"temperature", "top_k", "top_p", "min_p"}
        return tuple(made[name] if name in used else None for name in NAMES)

    return st.builds(build, st.tuples(*held), sizes, values, st.booleans(), st.booleans(), st.integers(0, 2**31))


OP = OpDef(
    name="fused_sample",
    schema="(Tensor logits, Tensor? guidance, Tensor? seen, Tensor? repetition_penalty, Tensor? bias, "
    "Tensor? temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p, Tensor? seed, Tensor? streams, "
    "Tensor? position) -> Tensor",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
    launch=launch,
    supports=supports,
    aot=aot,
)
