"""`aropt::canvas_select` and `aropt::canvas_commit` are the functions that their text states, corners included."""

import functools
import math
import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from aropt.frontend.trace import capture_function
from aropt.ir import ops
from aropt.ir.program import Spec
from aropt.kernels import canvas_commit, canvas_select
from aropt.loops.unmask.commit import CONFIDENCES

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
INF, NAN = math.inf, math.nan
select = ops.load("canvas_select").overload
commit = ops.load("canvas_commit").overload
on_samples = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@functools.cache
def session(name: str, specs: tuple[Spec, ...], held: tuple[Any, ...]) -> Any:
    """ONNX Runtime on a graph of nothing but the op, captured and exported as a program's are."""
    runtime = pytest.importorskip("onnxruntime", reason="the ONNX forms need aropt[onnx]")
    pytest.importorskip("onnxscript", reason="the ONNX forms need aropt[onnx]")
    import onnx_ir as ir

    from aropt.exporters.onnx import translate

    inputs = {f"x{i}": spec for i, spec in enumerate(specs)}
    outputs = ["candidate", "confidence"] if name == "canvas_select" else ["tokens"]
    call = ops.load(name).overload
    graph = capture_function("op", lambda **values: call(*values.values(), *held), inputs, outputs)
    model = ir.to_proto(translate(graph, {}))
    return runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def run(session: Any, *given: Tensor) -> list[Tensor]:
    feeds = {spec.name: x.numpy() for spec, x in zip(session.get_inputs(), given, strict=True)}
    return [torch.from_numpy(x) for x in session.run(None, feeds)]


def select_in_onnx(logits: Tensor, mask_id: int) -> list[Tensor]:
    if logits.dtype == torch.bfloat16:
        pytest.skip("numpy has no bfloat16")
    return run(session("canvas_select", (Spec(logits.dtype, ("N", "V")),), (mask_id,)), logits)


def commit_in_onnx(*args: Any) -> Tensor:
    names = [("B", "T")] * 4 + [("B",), ()]
    specs = tuple(Spec(x.dtype, dims) for x, dims in zip(args, names, strict=False))
    return run(session("canvas_commit", specs, args[6:]), *args[:6])[0]


def forms(reference: Any, onnx: Any, launch: Any) -> Any:
    """The reference and the ONNX translation; in the process where Triton interprets, the kernel."""
    return pytest.mark.parametrize("form", [launch] if INTERPRET else [reference, onnx])


every_select = forms(select, select_in_onnx, canvas_select.launch)
every_commit = forms(commit, commit_in_onnx, canvas_commit.launch)


def chosen(row: list[float], mask_id: int) -> tuple[int, float]:
    """`canvas_select` of a row in Python's float64."""
    tokens = [t for t in range(len(row)) if t != mask_id]
    best = max(tokens, key=lambda t: (row[t], -t))
    if row[best] == -INF:
        return best, -INF
    ratio = (1.0 if row[t] == row[best] else math.exp(row[t] - row[best]) for t in tokens if t != best)
    return best, -math.log1p(math.fsum(ratio))


def written(length: int, score: list[float], segment: list[int], limit: int, threshold: float, best: bool) -> list[int]:
    """The rows of one canvas that `canvas_commit` writes."""
    order = sorted((t for t in range(length) if segment[t] >= 0), key=lambda t: (-score[t], t))
    rows = {t for t in order if score[t] >= threshold} | set(order[: max(limit, 0)])
    if best:
        rows |= {next(t for t in order if segment[t] == number) for number in {segment[t] for t in order}}
    return sorted(rows)


@on_samples
@given(ops.load("canvas_select").samples())
def test_select_equals_the_oracle(args: tuple[Tensor, int]) -> None:
    logits, mask_id = args
    candidate, confidence = select(*args)
    for row, token, got in zip(logits.double().tolist(), candidate.tolist(), confidence.tolist(), strict=True):
        best, want = chosen(row, mask_id)
        assert token == best
        assert got == pytest.approx(want, rel=3e-6, abs=1e-37)


@on_samples
@given(ops.load("canvas_commit").samples())
def test_commit_equals_the_oracle(args: tuple[Any, ...]) -> None:
    tokens, candidate, confidence, segment, limit, threshold, best = args
    got, score = commit(*args), confidence.nan_to_num(nan=-INF, neginf=-INF)
    for b in range(tokens.shape[0]):
        row = score[b].tolist(), segment[b].tolist(), int(limit[b]), float(threshold), best
        rows = written(tokens.shape[1], *row)
        assert (got[b] != tokens[b]).nonzero().flatten().tolist() == rows
        assert torch.equal(got[b, rows], candidate[b, rows])


def test_select_is_the_rule_it_replaces() -> None:
    logits = torch.randn(2, 30, 50, generator=torch.Generator().manual_seed(0)) * 5
    _, confidence = select(logits.reshape(-1, 50), -1)
    torch.testing.assert_close(confidence.reshape(2, 30), CONFIDENCES["probability"](logits), rtol=1e-6, atol=0.0)


@every_select
@pytest.mark.parametrize("dtype", canvas_select.FLOATS)
@pytest.mark.parametrize("width", [1, 7, canvas_select.BLOCK - 1, canvas_select.BLOCK, 2 * canvas_select.BLOCK + 5])
def test_dtypes(form: Any, dtype: torch.dtype, width: int) -> None:
    """A logit counts as the float32 that it is equal to."""
    logits = (torch.randn(3, width, generator=torch.Generator().manual_seed(width)) * 6).to(dtype)
    candidate, confidence = form(logits, -1)
    want = [chosen(row, -1) for row in logits.double().tolist()]
    assert candidate.tolist() == [token for token, _ in want] and confidence.dtype == torch.float32
    assert confidence.tolist() == pytest.approx([log for _, log in want], rel=1e-5)


@every_select
@pytest.mark.parametrize("width", [2, 3000])
def test_confidence_near_one_keeps_its_resolution(form: Any, width: int) -> None:
    """log(1 + x) would be 0 from a gap of 17 on."""
    logits = torch.zeros(60, width)
    gap = logits[:, width - 1] = torch.linspace(0.01, 80.0, 60)
    candidate, confidence = form(logits, -1)
    assert candidate.tolist() == [width - 1] * 60
    want = -torch.log1p((width - 1) * torch.exp(-gap.double()))
    torch.testing.assert_close(confidence.double(), want, rtol=1e-5, atol=0.0)


@every_select
def test_infinite_logits(form: Any) -> None:
    rows = torch.tensor(
        [
            [-INF, -INF, 2.0, -INF],  # one token is possible
            [-INF, -INF, -INF, -INF],  # none is
            [INF, 0.0, INF, 1.0],  # two share
            [0.0, 0.0, 0.0, INF],  # one is certain
        ]
    )
    for mask_id, tokens, logs in [
        (-1, [2, 0, 0, 3], [0.0, -INF, -math.log(2), 0.0]),
        (0, [2, 1, 2, 3], [0.0, -INF, 0.0, 0.0]),
        (2, [0, 0, 0, 3], [-INF, -INF, 0.0, 0.0]),
    ]:
        candidate, confidence = form(rows, mask_id)
        assert candidate.tolist() == tokens, mask_id
        assert confidence.tolist() == pytest.approx(logs), mask_id


@every_select
@pytest.mark.parametrize("width", [4, 3 * canvas_select.BLOCK])
@pytest.mark.parametrize("rest", [0.0, -INF, NAN])
def test_nan_is_not_hidden(form: Any, width: int, rest: float) -> None:
    for where in (0, width // 2, width - 1):
        logits = torch.full((1, width), rest)
        logits[0, where] = NAN
        candidate, confidence = form(logits, -1)
        assert math.isnan(confidence) and 0 <= int(candidate) < width
        logits[0, :2] = torch.tensor([rest, NAN])
        assert math.isnan(form(logits, 0)[1]), "the fallback where all is -inf"
        if not math.isnan(rest) and where > 1:
            logits[0, 1] = rest
            assert not math.isnan(form(logits, where)[1]), "the mask's own logit counts for nothing"


@every_select
def test_ties_and_the_mask(form: Any) -> None:
    """The lowest of equal tokens, in whichever block of the kernel; the mask neither wins nor takes probability."""
    width = 3 * canvas_select.BLOCK
    logits = torch.zeros(1, width)
    ties = [5, canvas_select.BLOCK + 2, 2 * canvas_select.BLOCK + 5]  # the last in the same lane as the first
    logits[0, ties] = 9.0
    for mask_id, token, equal in [(-1, 5, 3), (5, ties[1], 2), (7, 5, 3), (width + 5, 5, 3), (2**32 + 5, 5, 3)]:
        candidate, confidence = form(logits, mask_id)
        assert int(candidate) == token
        tokens = width - (0 <= mask_id < width)
        assert float(confidence) == pytest.approx(-math.log(equal + (tokens - equal) * math.exp(-9.0)), rel=1e-5)
    assert form(torch.zeros(1, 3), 0)[0].tolist() == [1]


@every_select
def test_one_token(form: Any) -> None:
    for logit, confidence in [(3.0, 0.0), (-INF, -INF)]:
        got = form(torch.tensor([[logit]]), -1)
        assert got[0].tolist() == [0] and got[1].tolist() == [confidence]
    assert form(torch.zeros(1, 2), 0)[0].tolist() == [1]
    assert [x.shape for x in form(torch.zeros(0, 5), -1)] == [(0,), (0,)]


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"\[N, V\]"):
        select(torch.zeros(3), -1)
    for width, mask_id in [(0, -1), (1, 0)]:
        with pytest.raises(RuntimeError, match="no token but the mask"):
            select(torch.zeros(3, width), mask_id)
    with pytest.raises(TypeError, match="float32, float16 or bfloat16"):
        select(torch.zeros(1, 3).double(), -1)
    good = canvas([[-0.1, -0.2]], [[0, 0]])
    for place, bad, error in [
        (0, good[0][0], RuntimeError),
        (1, good[1][:, :1], RuntimeError),
        (4, good[4].expand(2), RuntimeError),
        (5, good[4], RuntimeError),
        (3, good[3].int(), TypeError),
        (2, good[2].double(), TypeError),
        (5, torch.tensor(0.0).double(), TypeError),
    ]:
        with pytest.raises(error, match=r"must be|differ in shape"):
            commit(*good[:place], bad, *good[place + 1 :])


def canvas(confidence: Any, segment: Any, limit: int = 0, threshold: float = INF, best: bool = False) -> list[Any]:
    """Arguments whose tokens are -1 and whose candidates are the positions."""
    score, number = torch.as_tensor(confidence), torch.as_tensor(segment)
    position = torch.arange(score.shape[1]).expand(score.shape)
    limits = torch.full((score.shape[0],), limit)
    return [torch.full_like(position, -1), position, score, number, limits, torch.tensor(threshold), best]


def rows(got: Tensor) -> list[int]:
    """The rows of a canvas that were written, from the tokens of `canvas`."""
    assert all(token in (-1, t) for t, token in enumerate(got[0].tolist()))
    return [t for t in got[0].tolist() if t >= 0]


@every_commit
@pytest.mark.parametrize(
    ("confidence", "segment", "limit", "threshold", "best", "want"),
    [
        ([-0.1, -0.2, -0.3], [0, 0, 0], 0, -0.2, False, [0, 1]),  # at least the threshold
        ([-0.1, -0.2, -0.3], [-1, -9, 0], 0, -INF, True, [2]),  # what isn't eligible is never written
        ([-0.1, -0.2, -0.3], [-1, 0, 0], 1, INF, False, [1]),  # nor takes a rank
        ([-0.3, -0.2, -0.1], [0, 1, 2], 2, INF, False, [1, 2]),  # rank is over all segments
        ([-0.2, -0.2, -0.2], [0, 0, 0], 2, INF, False, [0, 1]),  # the first of equal ones
        ([-0.2, -0.2, -0.1], [0, 0, 1], 0, INF, True, [0, 2]),  # so for the best of a segment
        ([-0.3, -0.1, -0.2, -0.4], [4, 7, 4, 7], 0, INF, True, [1, 2]),  # which may lie apart
        ([0.0, -0.0], [0, 0], 1, INF, False, [0]),  # zeros are equal
        ([-0.1, -0.2], [0, 0], 9, INF, False, [0, 1]),  # more than there are
        ([-0.1, -0.2], [0, 0], -1, INF, False, []),  # fewer than none
        ([-0.1, -0.2], [0, 0], 0, NAN, False, []),  # a threshold that nothing reaches
        ([NAN, -9.0], [0, 0], 1, INF, False, [1]),  # NaN comes last
        ([NAN, -9.0, -INF], [0, 0, 0], 2, INF, False, [0, 1]),  # as -inf does, and the first of those
        ([-INF, -9.0, NAN], [0, 0, 1], 0, -99.0, True, [1, 2]),  # but the best where there is no other
    ],
)
def test_rules(form: Any, confidence: Any, segment: Any, limit: int, threshold: float, best: bool, want: Any) -> None:
    assert rows(form(*canvas([confidence], [segment], limit, threshold, best))) == want


@every_commit
def test_empty_canvases(form: Any) -> None:
    for shape in [(0, 5), (2, 0), (0, 0)]:
        given = canvas(torch.zeros(shape), torch.zeros(shape, dtype=torch.int64), 1, -1.0, True)
        assert form(*given).shape == shape


@every_commit
@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("length", [700, pytest.param(canvas_commit.LONGEST, marks=pytest.mark.exhaustive)])
def test_long_canvas(form: Any, length: int, best: bool) -> None:
    """Ties in all tiles; ids and segments that 32 bits don't hold."""
    generator = torch.Generator().manual_seed(0)
    confidence = -torch.randint(1, 50, (1, length), generator=generator).float()
    segment = torch.randint(-1, 30, (1, length), generator=generator)
    segment = torch.where(segment < 0, -(2**40), segment * 2**33)
    given = canvas(confidence, segment, length // 30, -1.0, best)
    given[1] = given[1] + 2**40
    want = written(length, confidence[0].tolist(), segment[0].tolist(), length // 30, -1.0, best)
    got = form(*given)
    assert (got[0] >= 0).nonzero().flatten().tolist() == want
    assert torch.equal(got[0, want], given[1][0, want])


def test_longer_canvases_take_the_reference() -> None:
    tokens = torch.zeros(1, canvas_commit.LONGEST + 1, dtype=torch.int64)
    assert "at most" in str(canvas_commit.supports(tokens))
    assert canvas_commit.HAS_TRITON is (canvas_commit.supports(tokens[:, 1:]) is None)
