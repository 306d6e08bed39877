"""Designs cover what they say, and requests are what their levels say."""

import itertools
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest

from aropt.cli import main as cli
from aropt.exporters import onnx
from aropt.loops.given import check
from aropt.loops.request import room
from aropt.loops.requests.cases import Requests, bias, requests
from aropt.loops.requests.design import cover
from aropt.validate.slices import after_pass, touched
from tests.conftest import VOCAB, make_program
from tests.mutants import optimized, reference
from tests.support.canvases import capture, tiny
from tests.support.commands import MODEL

FACTORS = {"a": ("0", "1", "2"), "b": ("0", "1"), "c": ("0", "1", "2", "3"), "d": ("0", "1", "2")}


def never(one: tuple[str, str], other: tuple[str, str]) -> str:
    row = dict([one, other])
    return "a of 1 needs d of 0" if row.get("a") == "1" and row.get("d", "0") != "0" else ""


@pytest.mark.parametrize("seed", range(4))
def test_every_pair_that_can_meet_does(seed: int) -> None:
    made = cover(FACTORS, never, seed)
    pairs = {
        (x, y)
        for f, g in itertools.combinations(FACTORS, 2)
        for x in ((f, level) for level in FACTORS[f])
        for y in ((g, level) for level in FACTORS[g])
        if not never(x, y)
    }
    found = {pair for row in made.rows for pair in itertools.combinations(row.items(), 2)}
    assert found == pairs
    assert (made.pairs, made.covered) == (len(pairs), len(pairs))
    assert made.excluded == {"a of 1 needs d of 0": 2}
    assert len(made.rows) <= 18
    assert made.rows == cover(FACTORS, never, seed).rows


def test_what_is_fixed_counts_and_rows_are_limited() -> None:
    whole = cover(FACTORS)
    rest = cover(FACTORS, fixed=whole.rows)
    assert (rest.rows, rest.covered) == ([], rest.pairs)
    few = cover(FACTORS, most=3)
    assert len(few.rows) == 3
    assert few.covered < few.pairs


@pytest.mark.parametrize("base", ["rotary", "guided"])
def test_requests_reach_what_constants_never_did(base: str) -> None:
    found = Requests(reference(base), 0).everything(False)
    spread = [max(map(len, c.prompts)) - min(map(len, c.prompts)) for c in found]
    assert {5, 6, 7, 8} & set(spread)
    assert max(spread) > 8
    assert any(len(c.prompts) > 3 and len(set(map(len, c.prompts))) == 1 for c in found)
    assert any(len(c.prompts) > 3 and c.ends for c in found), "a row ends early in a larger batch"
    assert any(c.seed >= 2**40 for c in found)
    assert any(s >= 2**31 for c in found for s in c.streams)
    values = {name: {dict(c.params).get(name) for c in found} - {None} for name in dict(reference(base).inputs)}
    assert any(0 < float(t) < 0.8 for t in values["temperature"])
    if base == "rotary":
        assert max(values["top_k"]) > 8
    else:
        assert any(1 < float(p) < 1.2 for p in values["repetition_penalty"])


@pytest.mark.parametrize("block", [0, 4])
def test_requests_on_canvases(block: int) -> None:
    program = capture(tiny(block))
    found = requests(program).everything(False)
    assert any(len(c.prompts) > 3 for c in found)
    assert block or any(int(dict(c.params)["block"]) > 8 for c in found)
    assert any(c.ends and len(c.prompts) > 3 for c in found)
    for case in found:
        most = min(room(program, p) for p in case.prompts)
        check(program, case.prompts, case.n, most, dict(case.params), None, case.fill or None)
        case.inputs(program, range(len(case.prompts)))
        assert int(program.meta["mask"]) not in {t for p in case.prompts for t in p}
    whole = requests(program, thorough=True)
    assert whole.design.covered == whole.design.pairs
    assert len(whole.pairs) > 3 * len(requests(program).pairs)


def test_after_a_pass_requests_vary_what_it_can_have_changed() -> None:
    before, after = reference("rotary"), optimized("rotary-cached")
    assert touched(before, before) >= {"length", "sequences"}
    assert "top_k" not in touched(before, before)
    assert "stop" in touched(before, after)
    requests = Requests(before, 0)
    chosen, other = (after_pass(requests, before, after, turn) for turn in (0, 1))
    assert len(chosen) < len(requests.everything(False)) / 2
    assert {c.prompts for c in chosen} != {c.prompts for c in other}


def test_levels_come_at_both_ends_where_these_differ() -> None:
    found = Requests(make_program(1, ("bias", "suppress-tokens", "top-k")), 0)
    seen = {value for case in found.single for name, value in case.params if name == "bias"}
    assert seen == {bias(kind, VOCAB) for kind in range(1, 5)} and len(seen) == 4
    assert Counter(found.singled) == {"bias": 4, "suppress_tokens": 1, "top_k": 6}


@pytest.mark.exhaustive
def test_top_k_above_8_broken_in_the_translation_fails_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = import_module("aropt.kernels.keep_top")

    def wrong(logits, k=None, p=None):  # type: ignore[no-untyped-def]
        from onnxscript import opset20 as op

        return right.onnx(logits, k if k is None else op.Min(k, op.Constant(value_int=8)), p)

    table = onnx.translations
    monkeypatch.setattr(onnx, "translations", lambda contrib: {**table(contrib), right.OP.overload: wrong})
    (tmp_path / "model.py").write_text(MODEL)
    given = ["optimize", f"{tmp_path}/model.py:good", "-o", f"{tmp_path}/out", "--runs=0"]
    monkeypatch.setattr("sys.argv", ["aropt", *given])
    onnx.registry.cache_clear()
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        onnx.registry.cache_clear()
    assert ended.value.code == 3
    assert "top_k" in capsys.readouterr().err
