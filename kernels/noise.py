"""`aropt::noise`: uniform random numbers that are a pure function of (seed, stream, position, index).

    noise(Tensor seed, Tensor stream, Tensor position, SymInt n) -> Tensor

* `seed` int64 []: which run, 0 <= seed < 2**62 (seeds below p**2 never coincide).
* `stream` int64 [B]: which sequence of the run; `position` int64 [B]: which position in it the noise is for.
  Both non-negative; values below p never coincide.
* result float32 [B, n]: element i of row b is uniform on the 2**23 midpoints (k + 1/2) / 2**23, so strictly between
  0 and 1, and `-log(-log(u))` is always finite. Out-of-range words give numbers without any promise of quality.

There is no generator state, so a sampled program replays exactly: whatever the batch order, the chunking, the rows
recomputed, and the backend. Results are equal bit for bit in torch, ONNX Runtime and Triton, because all of it is
integer arithmetic modulo p = 2**31 - 1, where no intermediate reaches 2**63: ONNX has no int64 shifts or xor, TensorRT
has no unsigned 64-bit integers, but all have Mul, Add, Mod and Div.

Construction. A generalized Feistel step maps two words (a, b) to (b, b*b + a + k mod p), a bijection of the pair for
any k and of k for any pair. Rows absorb seed, stream and position as k and mix on, columns start from the index; both
end in a pair of words, cheap because they are as small as [B] and [n] (and backends fold the columns into a constant).
Only the last three steps, which join row and column, run on [B, n]: a multiply-add hash and two squarings. As a
polynomial modulo p the result has degree 64 in position, 128 in stream and more in the index, so that no short linear
relation links neighbours. Checked by the statistics in tests/kernels/test_noise.py. It is not cryptographic.

After Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), for the counter-based scheme.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aropt.ir.opdef import Aot, Cost, OpDef

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

P = 2**31 - 1
SEED_ROUNDS = 2  # without, seed 1 with stream s + 2 would be seed p - 1 with stream s
ROUNDS = 4  # dieharder sees correlated positions at 0 rounds and nothing from 1 on; the rest is margin
SEED_KEY, INDEX_KEY = 0x243F6A88, 0x05A308D3  # the fraction of pi in hexadecimal, 31 bits each
BLOCK = 256


# `Any` in these five is an int64 tensor of torch or a value of an ONNX graph: one text is both definitions.


def _square(x: Any) -> Any:
    # For Inductor: it inlines x twice into x * x, so a chain of steps would take exponential time to compile.
    return torch.square(x) if isinstance(x, Tensor) else x * x


def _step(a: Any, b: Any, k: Any = None) -> tuple[Any, Any]:
    return b, (_square(b) + (a if k is None else a + k)) % P


def _row_words(seed: Any, seed_high: Any, stream: Any, position: Any) -> tuple[Any, Any]:
    """Two words a row, from seed modulo p, seed divided by p, stream and position."""
    a, b = _step(seed_high + SEED_KEY, seed)
    for _ in range(SEED_ROUNDS):
        a, b = _step(a, b)
    a, b = _step(a, b, stream)
    a, b = _step(a, b, position)
    for _ in range(ROUNDS):
        a, b = _step(a, b)
    return a, b


def _column_words(index: Any) -> tuple[Any, Any]:
    a, b = _step(INDEX_KEY, index)
    for _ in range(ROUNDS - 1):
        a, b = _step(a, b)
    return a, b


def _join(row: tuple[Any, Any], column: tuple[Any, Any]) -> Any:
    (a, b), (u, v) = row, column
    y = (a * u + b) % P
    z = (_square(y) + v) % P
    # Adding b again makes the result exactly uniform over the row words for each index.
    return (_square(z) + b) % P


def _check(seed: Tensor, stream: Tensor, position: Tensor) -> None:
    torch._check(seed.dim() == 0 and stream.dim() == 1, lambda: "seed must be [], stream and position [B]")
    torch._check(position.shape == stream.shape, lambda: "stream and position differ in shape")
    words = all(word.dtype == torch.int64 for word in (seed, stream, position))
    torch._check_type(words, lambda: "seed, stream and position must be int64")


def reference(seed: Tensor, stream: Tensor, position: Tensor, n: int) -> Tensor:
    """The definition: see the module's text for shapes and ranges.

    Raises:
        RuntimeError: on other shapes.
        TypeError: on other dtypes, in which the products would overflow.
    """
    _check(seed, stream, position)
    row = _row_words(seed % P, seed // P, stream[:, None], position[:, None])
    column = _column_words(torch.arange(n, device=seed.device))
    word: Tensor = _join(row, column)
    # 2k+1 has 24 bits and the factors are powers of two: both float32 operations are exact.
    return (word // 256).to(torch.float32) * 2.0**-23 + 2.0**-24


def fake(seed: Tensor, stream: Tensor, position: Tensor, n: int) -> Tensor:
    """Shape [B, n], float32, contiguous."""
    _check(seed, stream, position)
    return stream.new_empty((stream.shape[0], n), dtype=torch.float32)


def onnx(seed, stream, position, n):  # type: ignore[no-untyped-def]
    """The same with ONNX ops (Add, Mul, Mod, Div, Range, Unsqueeze, Cast)."""
    from onnxscript import opset18 as op

    row = _row_words(op.Mod(seed, P), op.Div(seed, P), op.Unsqueeze(stream, [1]), op.Unsqueeze(position, [1]))
    word = _join(row, _column_words(op.Range(0, n, 1)))
    return op.Cast(op.Div(word, 256), to=1) * 2.0**-23 + 2.0**-24


if HAS_TRITON:
    _P, _SEED_KEY, _INDEX_KEY = tl.constexpr(P), tl.constexpr(SEED_KEY), tl.constexpr(INDEX_KEY)
    _SEED_ROUNDS, _ROUNDS = tl.constexpr(SEED_ROUNDS), tl.constexpr(ROUNDS)

    @triton.jit
    def _mod(x):  # type: ignore[no-untyped-def]
        """x modulo p for 0 <= x < 2**63. As 2**31 is 1 modulo p, high bits are added to the low ones: no division."""
        x = (x & _P) + (x >> 31)
        x = (x & _P) + (x >> 31)
        return tl.where(x >= _P, x - _P, x)

    @triton.jit
    def uniform(seed, stream, position, index):  # type: ignore[no-untyped-def]
        """Elements `index` (a tensor) of the row of a stream and position: what `reference` says, for other kernels."""
        a = seed % _P
        b = _mod(a * a + seed // _P + _SEED_KEY)
        for _ in tl.static_range(_SEED_ROUNDS):
            a, b = b, _mod(b * b + a)
        a, b = b, _mod(b * b + a + stream)
        a, b = b, _mod(b * b + a + position)
        for _ in tl.static_range(_ROUNDS):
            a, b = b, _mod(b * b + a)

        u = index.to(tl.int64)
        v = _mod(u * u + _INDEX_KEY)
        for _ in tl.static_range(_ROUNDS - 1):
            u, v = v, _mod(v * v + u)

        y = _mod(a * u + b)
        z = _mod(y * y + v)
        word = _mod(z * z + b)
        return (word >> 8).to(tl.float32) * (2.0**-23) + (2.0**-24)

    @triton.jit
    def _noise_kernel(seed_ptr, stream_ptr, position_ptr, out_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        words = tl.load(seed_ptr), tl.load(stream_ptr + row), tl.load(position_ptr + row)
        tl.store(out_ptr + row * n + index, uniform(words[0], words[1], words[2], index), mask=index < n)


def supports(seed: Tensor, stream: Tensor, position: Tensor, n: int) -> str | None:
    """Why the kernel can't run, or None."""
    if not HAS_TRITON:
        return "triton isn't installed"
    return "index arithmetic is 32-bit" if n > 2**31 - BLOCK else None


def launch(seed: Tensor, stream: Tensor, position: Tensor, n: int) -> Tensor:
    """Runs the Triton kernel: one program for a row and `BLOCK` columns."""
    out = fake(seed, stream, position, n)
    if out.numel():
        grid = (out.shape[0], triton.cdiv(n, BLOCK))
        _noise_kernel[grid](seed, stream.contiguous(), position.contiguous(), out, n, BLOCK=BLOCK)
    return out


def aot() -> Sequence[Aot]:
    """The one variant there is."""
    pointers = {"seed_ptr": "*i64", "stream_ptr": "*i64", "position_ptr": "*i64", "out_ptr": "*fp32"}
    signature = {**pointers, "n": "i32", "BLOCK": "constexpr"}
    return [Aot(_noise_kernel, signature, {"BLOCK": BLOCK})]


def cost(seed: Tensor, stream: Tensor, position: Tensor, n: int) -> Cost:
    """About 60 integer operations an element, columns included; only the result is worth counting as traffic."""
    return Cost(flops=60.0 * stream.numel() * n, bytes=4.0 * stream.numel() * n + 16.0 * stream.numel())


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """Argument tuples: words at and around p and at the ends of their ranges, empty and non-contiguous rows."""
    from hypothesis import strategies as st

    word = st.sampled_from([0, 1, P - 1, P, P + 1, 2**62 - 1]) | st.integers(0, 2**62 - 1)
    rows = st.lists(st.tuples(word, word), max_size=5)
    width = (
        st.sampled_from([0, 1, BLOCK - 1, BLOCK, BLOCK + 1]) | st.integers(0, 600) if like is None else st.just(like[3])
    )

    def build(seed: int, pairs: list[tuple[int, int]], n: int) -> tuple[Any, ...]:
        table = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
        return torch.tensor(seed), table[:, 0], table[:, 1], n

    return st.builds(build, word, rows, width)


OP = OpDef(
    name="noise",
    schema="(Tensor seed, Tensor stream, Tensor position, SymInt n) -> Tensor",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
    launch=launch,
    supports=supports,
    aot=aot,
)
