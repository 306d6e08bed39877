"""What counts as equal: ties, the noise floor, lengths, non-finite logits; and how a failure is shrunk and reported."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aropt
from aropt.errors import MissingTool
from aropt.frontend.trace import capture_model
from aropt.ir.executor import Executor, Values
from aropt.ir.interpreter import Eager
from aropt.ir.program import Program
from aropt.ir.units import rows_for, window
from aropt.loops.positions import autoregressive
from aropt.loops.scheme import Round
from aropt.pipeline.checks import describe
from aropt.validate.compare import TOLERANCE, Case, Oracle, Trace, Verdict, cases, compare, shrink, validate
from aropt.validate.oracle import Forward
from aropt.validate.replay import answer
from aropt.validate.shrink import simpler
from tests.mutants import MUTANTS, check, optimized, reference
from tests.mutants.surgery import CAPACITY, swap

VOCAB = 11
argmax = torch.ops.aten.argmax.default


class Table(nn.Module):
    """Logits are a table's row for each token, so that a test chooses them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


@pytest.fixture(scope="module")
def plain() -> Program:
    graph, weights = capture_model(Table(), VOCAB, CAPACITY)
    return autoregressive(graph, weights, {"vocab": VOCAB, "capacity": CAPACITY}, ("temperature",))


def table(**columns: float) -> Tensor:
    """Small logits, and these columns at given values: table(t3=5.0)."""
    rows = torch.rand(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))
    for name, value in columns.items():
        rows[:, int(name[1:])] = value
    return rows


def with_table(program: Program, rows: Tensor) -> Program:
    return program.replace(weights={**program.weights, "table.weight": rows})


def picks_last(program: Program) -> Program:
    """The program with a greedy rule that takes the last of the largest logits."""
    return swap(program, argmax, lambda x, axis: x.shape[axis] - 1 - x.flip(axis).argmax(axis), graph="greedy")


GREEDY = [Case(((1, 2), (4, 5)), 5, name="greedy")]


def test_equal_logits_are_a_tie(plain: Program) -> None:
    tied = with_table(plain, table(t3=5.0, t7=5.0))
    rounded = with_table(plain, table(t3=5.0, t7=5.0 * (1 + 2**-22)))
    for candidate in (rounded, picks_last(tied)):
        verdict = validate(tied, candidate, chosen=GREEDY)
        assert verdict.passed, verdict.outcomes[-1]
        assert verdict.metrics()["ties"] == 10
    assert validate(tied, tied, chosen=GREEDY).metrics()["ties"] == 0


def test_logits_that_are_exactly_zero_have_a_floor(plain: Program) -> None:
    """Then fp32 and fp64 agree, and the floor of a request is not 0: equal ones pass, others fail."""
    zeros = with_table(plain, torch.zeros(VOCAB, VOCAB))
    assert validate(zeros, zeros, chosen=GREEDY).passed
    other = with_table(plain, torch.full((VOCAB, VOCAB), 1e-6))
    assert "logits differ by 1e-06" in validate(zeros, other, chosen=GREEDY).outcomes[-1].problem


def test_a_difference_above_the_floor_is_no_tie(plain: Program) -> None:
    clear = with_table(plain, table(t3=5.001, t7=5.0))
    lower = swap(clear, argmax, lambda x, axis: x.index_fill(1, torch.tensor(3), 0).argmax(axis), graph="greedy")
    failed = validate(clear, lower, chosen=GREEDY).outcomes[-1]
    assert "new token 0 is 7, the reference's rule picks 3" in failed.problem
    failed = validate(clear, with_table(plain, table(t3=5.001, t7=5.002)), chosen=GREEDY).outcomes[-1]
    assert "logits differ by 0.002" in failed.problem
    assert "times the noise floor; new token 0 is 7" in failed.problem


def test_sampled_ties_count_too(plain: Program) -> None:
    """A draw that the tolerance can change is a tie; one that it can't is not."""
    case = Case(((1,),), 8, 3, (("temperature", 1.0),), kind="sampled")
    oracle = Oracle(with_table(plain, table()))
    assert compare(oracle, oracle.program, oracle.eager, case).passed
    nearly = with_table(plain, oracle.program.weights["table.weight"] * (1 + 1e-7))
    assert compare(oracle, nearly, Eager(nearly), case).passed
    far = with_table(plain, oracle.program.weights["table.weight"] * 1.01)
    assert not compare(oracle, far, Eager(far), case).passed


class Casting(nn.Module):
    """Half of the work in fp32 whatever the weights are, as many models do for norms and softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.up = nn.Embedding(VOCAB, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.up(self.emb(ids))
        mixed = torch.softmax(hidden.to(torch.float32), -1, dtype=torch.float32).to(hidden.dtype)
        return self.head(mixed * torch.full((1,), 3.0, dtype=torch.float32))


def test_noise_floor_is_measured_in_fp64_throughout() -> None:
    torch.manual_seed(0)
    model = Casting()
    graph, weights = capture_model(model, VOCAB, CAPACITY)
    program = autoregressive(graph, weights, {"vocab": VOCAB, "capacity": CAPACITY}, ("temperature",))
    ids = torch.randint(0, VOCAB, (2, 9))
    single, double = (found["logits"] for found in Oracle(program).forward({"ids": ids}))
    exact = model.double()
    expected = exact.head(torch.softmax(exact.up(exact.emb(ids)), -1) * 3.0)
    assert double.dtype == torch.float64
    assert (double - expected).abs().max() < 1e-14
    assert 1e-9 < (single.double() - double).abs().max() < 1e-6


@pytest.mark.parametrize(
    "base", ["rotary", *(pytest.param(b, marks=pytest.mark.exhaustive) for b in ("guided", "window"))]
)
def test_ragged_batches_equal_single_prompts(base: str) -> None:
    program = optimized(base)
    params: tuple[tuple[str, float], ...] = (("temperature", 0.9),)
    case = Case(((1, 2, 3, 4, 5, 6), (7,), (8, 9, 10)), 9, 5, params, streams=(4, 0, 2), kind="ragged")
    batch = Trace(program, case, Eager(program))
    for i, prompt in enumerate(case.prompts):
        alone = Trace(
            program, Case((prompt,), 9, 5, params, streams=case.streams[i : i + 1], kind="sampled"), Eager(program)
        )
        assert alone.answers[0] == batch.answers[i]
        mine, theirs = (torch.stack([r.evidence for r in found]) for found in (alone.rounds[0], batch.rounds[i]))
        assert mine.allclose(theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "problem"), [
    ("limit_plus_one", "does not end after 1 tokens"), ("limit_minus_one", "stops after 1 tokens"),
    ("limit_ignored", "does not end after 1 tokens"), ("stop_ignored", "tokens, the reference after"),
    ("end_forgotten", "which is none"),
])  # fmt: skip
def test_wrong_lengths_are_named(name: str, problem: str) -> None:
    assert problem in check(name, "rotary", quick=True).outcomes[-1].problem


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_logits_fail(plain: Program, value: float) -> None:
    right = with_table(plain, table(t3=5.0))
    failed = validate(right, with_table(plain, table(t3=5.0, t7=value)), chosen=GREEDY).outcomes[-1]
    assert failed.problem == "prompt 0: logits of new token 0 are not finite"


def test_hidden_tokens_stay_hidden_and_do_not_widen_the_tolerance(plain: Program) -> None:
    """A model may give -inf to tokens that it never emits."""
    hidden = with_table(plain, table(t3=5.0, t7=-torch.inf))
    verdict = validate(hidden, hidden, chosen=cases(hidden, quick=True))
    assert verdict.passed, verdict.outcomes[-1]
    assert verdict.outcomes[0].floor < 1e-5
    assert not validate(hidden, with_table(plain, table(t3=5.001, t7=-torch.inf)), chosen=GREEDY).passed


def test_tolerance_is_a_multiple_of_the_floor(plain: Program) -> None:
    right = with_table(plain, table(t3=4.0))
    floor = 4 * torch.finfo(torch.float32).eps * 4.0
    for factor, passed in ((0.5, True), (2.0, False)):
        wrong = with_table(plain, table(t3=4.0 + factor * TOLERANCE * floor))
        assert validate(right, wrong, chosen=GREEDY).passed is passed


def test_a_candidate_that_raises_has_failed(plain: Program) -> None:
    class Broken(Executor):
        def call(self, graph: str, inputs: Values) -> Values:
            raise error

    error: Exception = IndexError("index 7 is out of range\nmore")
    verdict = validate(plain, plain, Broken(), GREEDY)
    assert "the program raises IndexError: index 7 is out of range" in verdict.outcomes[-1].problem
    error = MissingTool("no compiler")
    with pytest.raises(MissingTool):
        validate(plain, plain, Broken(), GREEDY)


def test_what_compares_nothing_has_not_passed(plain: Program) -> None:
    verdict = validate(plain, plain, chosen=[])
    assert not verdict.passed and not Verdict().passed
    assert describe(verdict) == "nothing was compared"


def test_guidance_without_a_null_class_is_validated() -> None:
    """The cases then bring unconditional prompts of their own."""
    plain = reference("guided")
    meta = {k: v for k, v in plain.meta.items() if k != "null"}
    candidate = optimized("guided")
    without = plain.replace(meta=meta), candidate.replace(meta={k: v for k, v in candidate.meta.items() if k != "null"})
    chosen = cases(without[0], quick=True)
    assert all(len(c.negative) == len(c.prompts) for c in chosen)
    assert validate(*without, chosen=chosen).passed
    wrong = MUTANTS["negative_prompt_ignored"].change(without[1])
    verdict = validate(without[0], wrong, chosen=chosen)
    assert verdict.diverges is not None
    assert verdict.diverges["module"] == "emb"
    assert "negative=" in verdict.diverges["repro"]


@pytest.mark.parametrize("base", ["rotary", "guided"])
def test_repro_lines_run(base: str) -> None:
    program = optimized(base)
    for case in cases(reference(base), quick=True):
        tokens = Trace(program, case, Eager(program)).answers
        scope: dict[str, Any] = {"program": program, "aropt": aropt}
        exec(f"result = {case.repro('program')}", scope)
        found = scope["result"]
        assert [[t for t in row if t >= 0] for row in found] == tokens, case.name


def test_shrink_keeps_what_fails_and_drops_the_rest() -> None:
    case = Case(
        ((1,) * 8, (2, 13, 2, 2), (3,) * 3),
        24,
        7,
        (("temperature", 1.0), ("top_k", 4)),
        (5, 6),
        (1, 2, 3),
    )
    tried: list[Case] = []

    def fails(smaller: Case) -> bool:
        tried.append(smaller)
        return any(13 in p for p in smaller.prompts) and smaller.n >= 3 and "top_k" in dict(smaller.params)

    small = shrink(fails, case)
    assert small.prompts == ((2, 13, 2, 2),)
    assert small.n == 3
    assert small.params == (("top_k", 4),)
    assert (small.stop, small.streams, small.seed) == ((), (), 7)
    assert len(tried) <= 20
    assert shrink(lambda _: False, case) == case
    tried.clear()
    shrink(lambda c: bool(tried.append(c)) or True, case, runs=3)
    assert len(tried) == 3


def test_simpler_cases_are_valid() -> None:
    case = Case(((1, 2, 3), (4,)), 4, 0, (("temperature", 1.0),), (1,), (8, 9), ((5, 6, 7), (8,)), kind="ragged")
    for _, one in simpler(case):
        assert one != case
        assert [len(p) for p in one.negative] == [len(p) for p in one.prompts]
        assert len(one.streams) in (0, len(one.prompts))
        assert one.n > 0


def test_reported_cases_are_small() -> None:
    stop = check("stop_ignored", "rotary", quick=True).outcomes[-1].case
    assert len(stop.prompts) == 1
    assert stop.stop
    padding = check("sees_padding", "rotary", quick=True).outcomes[-1].case
    assert len(padding.prompts) >= 2, "one prompt alone has no padding"
    assert padding.n == 1
    row = check("noise_by_row", "rotary", quick=True).outcomes[-1].case
    assert row.streams, "the default streams hide it"


def test_cases_fit_the_capacity() -> None:
    plain = reference("rotary")
    for capacity in (1, 2, 3, 8, 32, 63, 64, 65, 200):
        program = plain.replace(meta={**plain.meta, "capacity": capacity})
        for quick in (False, True):
            chosen = cases(program, quick=quick)
            assert all(max(map(len, c.prompts)) + c.n - 1 <= capacity for c in chosen if c.n)
            assert all(len(p) <= capacity for c in chosen for p in c.prompts)
            assert len({c.name for c in chosen}) == len(chosen)


def test_the_reference_answers_a_request_once(plain: Program) -> None:
    oracle = Oracle(plain)
    first = validate(oracle, plain, chosen=GREEDY)
    assert oracle.double is None, "fp64 weights are not kept between validations"

    def never(*_: Any) -> Any:
        raise AssertionError("asked again")

    oracle.forward = never  # type: ignore[method-assign]
    again = validate(oracle, plain, chosen=GREEDY)
    assert (again.passed, again.metrics()) == (first.passed, first.metrics())
    other = with_table(plain, table(t3=9.0))  # other tokens are another question
    assert "asked again" in validate(oracle, other, chosen=GREEDY, explain=False).outcomes[-1].problem


@pytest.mark.parametrize("room", [1, 100, 300])
def test_logits_of_two_cases_take_little_memory(plain: Program, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """Of a large vocabulary, the logits of a few prompts are gigabytes."""
    oracle, most = Oracle(plain), 0
    monkeypatch.setattr("aropt.validate.oracle.AT_ONCE", room)
    fresh = oracle.foresee

    def measured(rows: Sequence[Tensor]) -> list[Forward]:
        nonlocal most
        found = fresh(rows)
        kept = [made.single["logits"] for case in (oracle.ahead, oracle.before) for made in case.values()]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() // x.itemsize for x in kept}
        most = max(most, sum(storages.values()))
        return found

    oracle.foresee = measured  # type: ignore[method-assign]
    prompts = ((1, 2), (4, 5), (3, 1, 2), (7,), (8, 9))
    chosen = [Case(tuple((*p, n % VOCAB) for p in prompts), n, name=f"of {n}") for n in (5, 6, 3, 4)]
    ended = [Case(chosen[-1].prompts, 4, stop=(t,), kind="stop") for t in range(3)]
    assert validate(oracle, plain, chosen=[*chosen, *ended]).passed
    assert most <= 2 * room
    assert most > room or room == 1, "some are kept"


def given_rounds(program: Program, tokens: list[int]) -> list[Round]:
    """Rounds that decide these tokens, from no evidence."""
    branches = torch.arange(2 if "negative" in program.inputs else 1)
    decided = torch.tensor(tokens).reshape(-1, *window(program.meta))
    return [Round("token", ids, torch.zeros(len(branches), VOCAB), branches) for ids in decided]


@pytest.mark.parametrize("base", ["rotary", "guided", "window"])
def test_a_rule_takes_all_rounds_at_once(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It picks what it picks round by round, also after tokens that are not its own."""
    program, calls = reference(base), 0
    params: list[tuple[str, float]] = [("temperature", 1.0), ("top_k", 4), ("repetition_penalty", 1.5), ("guidance", 3)]
    given = tuple((n, v) for n, v in params if n in program.inputs)
    case = Case(((1, 2, 3), (4,)), 8, 5, given, kind="sampled")
    tokens = [[(5 * i + j) % int(program.meta["vocab"]) for j in range(8)] for i in range(2)]
    whole, single = Oracle(program), Oracle(program)
    call = whole.eager.call

    def counted(graph: str, inputs: Values) -> Values:
        nonlocal calls
        calls += graph == "sample"
        return call(graph, inputs)

    whole.eager.call = counted  # type: ignore[method-assign]
    found = [answer(whole, case.inputs(program, [i]), given_rounds(program, tokens[i])) for i in range(2)]
    monkeypatch.setattr("aropt.validate.oracle.AT_ONCE", 1)
    apart = [answer(single, case.inputs(program, [i]), given_rounds(program, tokens[i])) for i in range(2)]
    assert calls == 2 and [r.problem for r in found] == ["", ""]
    picked = [[None if one.theirs is None else one.theirs.tolist() for one in r.rounds] for r in (*found, *apart)]
    assert picked[:2] == picked[2:]
    assert all(len(p) == rows_for(program.meta, 8) and any(p) for p in picked)
