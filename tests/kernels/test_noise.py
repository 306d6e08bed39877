"""`aropt::noise` is the function its text states, and its numbers are random enough to sample from.

The op is a pure function and the inputs here are fixed, so the statistics come out the same each time.
"""

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from aropt.ir import ops
from aropt.kernels import noise

P = noise.P
DRAWS = 2**20
sample = ops.load("noise").overload


def oracle(seed: int, stream: int, position: int, index: int) -> float:
    """The construction in Python's integers, which can't overflow."""
    a, b = seed % P, ((seed % P) ** 2 + seed // P + noise.SEED_KEY) % P
    for word in (*[0] * noise.SEED_ROUNDS, stream, position, *[0] * noise.ROUNDS):
        a, b = b, (b * b + a + word) % P
    u, v = index, (index * index + noise.INDEX_KEY) % P
    for _ in range(noise.ROUNDS - 1):
        u, v = v, (v * v + u) % P
    y = (a * u + b) % P
    word = (((y * y + v) % P) ** 2 + b) % P
    return (2 * (word // 256) + 1) / 2**24


@settings(deadline=None)
@given(ops.load("noise").samples())
def test_equals_the_oracle(args: tuple[Tensor, Tensor, Tensor, int]) -> None:
    seed, stream, position, n = args
    got = noise.reference(*args)
    assert got.shape == (stream.numel(), n)
    for row, s, p in zip(got.tolist(), stream.tolist(), position.tolist()):
        for i in {0, n // 2, n - 1} & set(range(n)):
            assert row[i] == oracle(int(seed), s, p, i)
    assert bool(((got > 0) & (got < 1)).all())


def test_numbers_never_change() -> None:
    """Saved artifacts promise replay, so other numbers would need another op."""
    drawn = sample(torch.tensor(2**62 - 1), torch.tensor([0, 1]), torch.tensor([0, 2**40]), 4)
    golden = [[10877781, 6016297, 3202263, 11547049], [16546217, 8847909, 3752649, 4189763]]
    assert (drawn.double() * 2**24).long().tolist() == golden


def test_wrong_arguments_are_refused() -> None:
    seed, row = torch.tensor(0), torch.tensor([0])
    for bad in [(row, row, row), (seed, seed, seed), (seed, row, torch.tensor([0, 1]))]:
        with pytest.raises(RuntimeError, match=r"seed must be|differ in shape"):
            sample(*bad, 4)
    with pytest.raises(TypeError, match="int64"):
        sample(seed, row.int(), row, 4)


def test_ends_are_open() -> None:
    ends = torch.tensor([0, P - 1]) // 256
    uniform = ends.to(torch.float32) * 2.0**-23 + 2.0**-24
    assert uniform.tolist() == [2.0**-24, 1 - 2.0**-24]
    assert bool((-torch.log(-torch.log(uniform))).isfinite().all())


def test_rows_and_columns_are_independent_of_their_company() -> None:
    seed, stream, position = torch.tensor(5), torch.arange(6) % 3, torch.arange(6) * 11
    whole = sample(seed, stream, position, 300)
    order = torch.tensor([4, 0, 2])
    assert torch.equal(whole[order], sample(seed, stream[order], position[order], 300))
    assert torch.equal(whole[:, :77], sample(seed, stream, position, 77))


def test_each_word_counts() -> None:
    """Seeds next to each other, opposite or equal in a part, and small streams and positions: all rows differ."""
    seeds = [0, 1, 2, P - 2, P - 1, P, P + 1, P + 2, 2 * P, 2**32, 2**61]
    stream, position = torch.cartesian_prod(torch.arange(8), torch.arange(8)).T
    drawn = torch.cat([sample(torch.tensor(seed), stream, position, 8) for seed in seeds])
    assert drawn.unique(dim=0).shape == drawn.shape
    # Of 5632 draws from 2**23 values about 2 coincide by chance.
    assert drawn.unique().numel() >= drawn.numel() - 10


def test_onnx_with_a_symbolic_width() -> None:
    """The width may come from another tensor's shape, as a vocabulary's does in a graph for several models."""
    pytest.importorskip("onnxscript", reason="needs aropt[onnx]")
    runtime = pytest.importorskip("onnxruntime", reason="needs aropt[onnx]")

    class Like(torch.nn.Module):
        def forward(self, seed: Tensor, position: Tensor, logits: Tensor) -> Tensor:
            return logits - torch.log(-torch.log(sample(seed, position, position, logits.shape[1])))

    rows, width = torch.export.Dim("rows"), torch.export.Dim("width")
    args = (torch.tensor(3), torch.tensor([5, 9]), torch.zeros(2, 7))
    shapes = ({}, {0: rows}, {0: rows, 1: width})
    program = torch.onnx.export(
        Like().eval(),
        args,
        dynamo=True,
        dynamic_shapes=shapes,
        custom_translation_table=ops.translation_table(),
        verbose=False,
    )
    session = runtime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for n in (1, 300):
        args = (torch.tensor(4), torch.tensor([8]), torch.zeros(1, n))
        feeds = {spec.name: tensor.numpy() for spec, tensor in zip(session.get_inputs(), args, strict=True)}
        got = torch.from_numpy(session.run(None, feeds)[0])
        assert got.shape == (1, n)
        torch.testing.assert_close(got, Like()(*args))


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """The p-value of Pearson's test."""
    expected = probabilities.double() * counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((counts.numel() - 1) / 2.0).double(), statistic / 2))


def plausible(p: float) -> bool:
    return 1e-4 < p < 1 - 1e-4  # too even is not random either


def axis(name: str) -> Tensor:
    """`DRAWS` numbers that follow one word with the others held, or a realistic mixture."""
    count, zero = torch.arange(DRAWS), torch.zeros(DRAWS, dtype=torch.int64)
    if name == "index":
        return noise.reference(torch.tensor(0), zero[:1], zero[:1], DRAWS)[0]
    if name == "position":
        return noise.reference(torch.tensor(0), zero, count, 1)[:, 0]
    if name == "stream":
        return noise.reference(torch.tensor(0), count, zero, 1)[:, 0]
    if name == "seed":  # the op takes one seed a call, so this is spelled out
        word = noise._join(noise._row_words(count % P, count // P, zero, zero), noise._column_words(zero))
        return (word // 256).to(torch.float32) * 2.0**-23 + 2.0**-24
    return noise.reference(torch.tensor(42), count[: DRAWS // 16] % 8, count[: DRAWS // 16] // 8, 16).flatten()


@pytest.mark.parametrize("name", ["index", "position", "stream", "seed", "mixture"])
def test_uniform_and_uncorrelated(name: str) -> None:
    drawn = axis(name)
    whole = (drawn.double() * 2**23).long()
    for bits in (whole >> 11, whole & 4095):
        assert plausible(chi_square(torch.bincount(bits, minlength=4096), torch.full((4096,), 1 / 4096)))
    for lag in (1, 2, 16, 17, 256):
        x, y = drawn[:-lag].double() - 0.5, drawn[lag:].double() - 0.5
        assert abs(float((x * y).mean() * 12 * (DRAWS - lag) ** 0.5)) < 4, f"correlation at lag {lag}"
        pairs = (whole[:-lag] >> 17) * 64 + (whole[lag:] >> 17)
        assert plausible(chi_square(torch.bincount(pairs, minlength=4096), torch.full((4096,), 1 / 4096)))
    triples = (whole.unfold(0, 3, 3) >> 19) @ torch.tensor([256, 16, 1])  # what RANDU fails
    assert plausible(chi_square(torch.bincount(triples, minlength=4096), torch.full((4096,), 1 / 4096)))


def gumbel_p_value() -> float:
    """200,000 tokens drawn as a sampler draws them, one a position, against the distribution they are drawn from."""
    logits = torch.linspace(-3, 2, 50) + torch.sin(torch.arange(50.0))
    position = torch.arange(50_000)
    counts = torch.zeros(50, dtype=torch.int64)
    for stream in range(4):
        uniform = noise.reference(torch.tensor(7), torch.full_like(position, stream), position, 50)
        tokens = (logits - torch.log(-torch.log(uniform))).argmax(-1)
        counts += torch.bincount(tokens, minlength=50)
    return chi_square(counts, torch.softmax(logits.double(), -1))


def test_gumbel_argmax_samples_the_distribution() -> None:
    assert plausible(gumbel_p_value())


@pytest.mark.parametrize("flaw", ["unmixed rows", "few values", "repeats"])
def test_a_broken_generator_is_caught(flaw: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the test above."""
    reference = noise.reference
    if flaw == "unmixed rows":  # without the rounds, next to a position comes nearly the same noise
        monkeypatch.setattr(noise, "ROUNDS", 0)
        monkeypatch.setattr(noise, "_join", lambda row, column: (row[0] * column[0] + row[1]) % P)
    elif flaw == "few values":
        monkeypatch.setattr(noise, "reference", lambda *args: (reference(*args) * 64).floor() / 64 + 1 / 128)
    else:
        monkeypatch.setattr(noise, "reference", lambda seed, s, p, n: reference(seed, s, p // 8, n))
    assert not plausible(gumbel_p_value())
