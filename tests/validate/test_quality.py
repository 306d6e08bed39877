"""Quality on a task: files of examples, what is counted, and what a budget makes of the loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import aropt
from aropt.cli.console import show_report
from aropt.errors import UsageError
from aropt.frontend.examples import read, texts
from aropt.ir.program import Program
from aropt.models import CHECKPOINTS, REFERENCES, text, train_canvas
from aropt.models.canvas import MASK
from aropt.pipeline.checks import Instruments
from aropt.pipeline.manager import run_passes
from aropt.pipeline.registry import make, pipeline
from aropt.pipeline.report import html
from aropt.validate import quality
from aropt.validate.compare import with_probe
from aropt.validate.drift import budget, measure
from tests.support.canvases import capture, tiny
from tests.support.run import generate


def coded(text: str) -> list[int]:
    return list(text.encode())


@pytest.fixture(scope="module")
def plain() -> Program:
    """A program whose examples are its own answers but for 5 of the 40 ids to be found."""
    program = capture(tiny(0), "threshold")
    examples, wrong = [], [3, 1, 1]
    for number, n in enumerate((8, 16, 16)):
        prompt = [5 + number] * (2 + number)
        (answer,) = generate(program, [prompt], n)
        for i in range(wrong[number]):
            answer[i] = (answer[i] + 1) % 250
        examples.append({"prompt": prompt, "answer": answer})
    return program.replace(meta={**program.meta, "prompts": [[1, 2, 3]], "examples": examples})


def test_ids_to_be_found_are_counted(plain: Program) -> None:
    assert quality.measure(plain) == (35 / 40, 40)
    lossy = make("dual-cache").run(plain)
    found = measure(plain, with_probe(lossy))
    assert found.exact_quality == 35 / 40 and found.judged == 40
    assert found.quality == quality.measure(lossy)[0] < 35 / 40


def test_given_ids_are_given_and_not_counted(plain: Program) -> None:
    """With masks in some places alone, the others are on the canvas from the start."""
    answer = generate(plain, [[7, 8]], 8, fill=[[1, MASK, MASK, 2, 3, 4, MASK, 5]])[0]
    example = {"prompt": [7, 8], "answer": answer, "masked": [[1, 3], [6, 7]]}
    assert answer[0] == 1 and answer[3:6] == [2, 3, 4] and answer[7] == 5
    assert quality.measure(plain.replace(meta={**plain.meta, "examples": [example]})) == (1.0, 3)
    other = {**example, "answer": [*answer[:6], (answer[6] + 1) % 250, answer[7]]}
    assert quality.measure(plain.replace(meta={**plain.meta, "examples": [example, other]})) == (5 / 6, 6)


def test_a_file_of_examples(tmp_path: Path) -> None:
    file = tmp_path / "task.jsonl"
    file.write_text('{"prompt": "ab", "answer": [1, 2, 3], "masked": [[0, 2]]}\n\n{"prompt": [9], "answer": "c"}\n')
    want = [{"prompt": [97, 98], "answer": [1, 2, 3], "masked": [[0, 2]]}, {"prompt": [9], "answer": [99]}]
    assert read(file, coded, coded) == want
    assert [quality.to_find(e) for e in want] == [{0, 1}, {0}]


LINES = [
    ("{", "no JSON"),
    ("[1]", '"prompt" and "answer"'),
    ('{"prompt": [1]}', '"prompt" and "answer"'),
    ('{"prompt": [1], "answer": [2], "fill": [3]}', "nothing else"),
    ('{"prompt": [], "answer": [2]}', '"prompt" is neither'),
    ('{"prompt": [1], "answer": ""}', '"answer" is neither'),
    ('{"prompt": [1.5], "answer": [2]}', '"prompt" is neither'),
    ('{"prompt": [true], "answer": [2]}', '"prompt" is neither'),
    ('{"prompt": [1], "answer": [2], "masked": [[0, 2]]}', '0 <= start < end <= 1'),
    ('{"prompt": [1], "answer": [2], "masked": []}', '"masked" is a list'),
    ('{"prompt": [1], "answer": [2], "masked": [0, 1]}', '"masked" is a list'),
]  # fmt: skip


@pytest.mark.parametrize(("line", "why"), LINES)
def test_a_bad_line_is_named(tmp_path: Path, line: str, why: str) -> None:
    file = tmp_path / "task.jsonl"
    file.write_text('{"prompt": [1], "answer": [2]}\n' + line + "\n")
    with pytest.raises(UsageError) as error:
        read(file, coded, coded)
    assert "task.jsonl, line 2" in error.value.where and why in error.value.why and error.value.code == 2


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can't be read"):
        read(tmp_path / "none.jsonl", coded, coded)
    file = tmp_path / "task.jsonl"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="can't be read"):
        read(file, coded, coded)
    file.write_text("\n")
    with pytest.raises(UsageError, match="no examples"):
        read(file, coded, coded)
    file.write_text('{"prompt": "a", "answer": [2]}')
    with pytest.raises(UsageError, match="no tokenizer"):
        read(file, *texts(None))


BAD: list[tuple[Any, str]] = [
    ([], "nothing to measure quality on"),
    ([{"prompt": [1], "answer": [2]}, {"prompt": [1], "answer": [260]}], "example 2.*\n.*outside the vocabulary"),
    ([{"prompt": [MASK], "answer": [2]}], f"id {MASK} is the mask"),
    ([{"prompt": [1], "answer": [2] * 64}], "65 ids, and the model takes 64"),
    ([{"prompt": "a", "answer": [2]}], '"prompt" is neither'),
]


@pytest.mark.parametrize(("examples", "why"), BAD)
def test_what_a_model_cannot_take_is_refused_before_anything_runs(plain: Program, examples: Any, why: str) -> None:
    program = plain.replace(meta={**plain.meta, "examples": examples})
    with pytest.raises(UsageError, match=why):
        run_passes(program, [make("dual-cache")], "eager", Instruments(budget={"quality": 1.0}))


@pytest.mark.exhaustive
def test_the_budget_bounds_the_loss(plain: Program) -> None:
    """Enough: as asked. Less: refreshed until as many ids are right; each bound is on exact minus lossy."""
    assert budget("quality=0.01") == {"quality": 0.01}
    for bad, why in (("quality=2", "no bound"), ("quality=-1", "no bound")):
        with pytest.raises(UsageError, match=why):
            budget(bad)
    drift = measure(plain, with_probe(make("dual-cache").run(plain)))
    assert drift.exact_quality is not None and drift.quality is not None
    lost = drift.exact_quality - drift.quality
    assert lost > 0 and not drift.misses({"quality": lost + 1e-9})
    assert f"quality {lost:.4g}, at most" in drift.misses({"quality": lost / 2})
    _, (tight,), _ = run_passes(plain, [make("dual-cache")], "eager", Instruments(budget={"quality": 0.0}))
    assert tight.status == "applied" and tight.options["refresh"] != 0 and tight.verify["quality"] >= 35 / 40


def test_without_examples_no_quality_is_claimed(plain: Program) -> None:
    bare = plain.replace(meta={**plain.meta, "examples": []})
    drift = measure(bare, with_probe(make("dual-cache").run(bare)))
    assert drift.quality is None and "quality" not in drift.metrics() and drift.misses({"quality": 1.0})


@pytest.mark.exhaustive
def test_the_report_shows_it(plain: Program, capsys: pytest.CaptureFixture[str]) -> None:
    done = aropt.optimize(plain, passes=pipeline(["dual-cache"]), target="eager", budget={"quality": 1.0})
    found = done.report["drift"]
    entry = next(p for p in done.report["passes"] if p["name"] == "dual-cache")
    assert (entry["status"], entry["options"]["refresh"]) == ("applied", 0)
    assert entry["verify"]["quality"] == found["quality"]
    assert found["judged"] == 40 and found["quality"] < found["exact_quality"] == 35 / 40
    assert f"{100 * found['quality']:.1f} %, exact 87.5 % of 40 ids right" in html(done.report)
    show_report(done.report, Path("out"), False, 1.0)
    assert f"{found['quality']:.1%} of 40 ids of the examples are right, exact: 87.5%" in capsys.readouterr().out


def test_a_file_of_the_command_line(tmp_path: Path) -> None:
    from aropt.cli.optimize import captured, find
    from aropt.cli.options import Reading

    file = tmp_path / "task.jsonl"
    file.write_text(json.dumps({"prompt": "def ", "answer": "f(x)"}))
    found = find(Reading("text-mdlm", examples=file)).meta["examples"]
    assert found == [{"prompt": coded("def "), "answer": coded("f(x)")}]  # by the model's tokenizer
    wrong = Reading("digits-ar", examples=tmp_path / "ids.jsonl")
    wrong.examples.write_text('{"prompt": [1], "answer": [2]}')  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="unmask a canvas"):
        captured(wrong, find(wrong))


@pytest.fixture(scope="module")
def trained() -> Program:
    return aropt.capture("text-mdlm", rules=("threshold",), capacity=96)


def test_the_shipped_task_is_of_held_out_text(trained: Program) -> None:
    """The file is what train_canvas writes, where this Python has the documents of the record."""
    examples = trained.meta["examples"]
    masked = [len(quality.to_find(e)) for e in examples]
    assert len(examples) == 32 and {len(e["answer"]) for e in examples} == {64} and set(masked) == {32}
    held = text.split()[1]
    ids = bytes(t for t in text.stream(held) if t < 256)
    if text.digest(held) == REFERENCES["text-mdlm"].heldout["data_sha256"]:
        assert (CHECKPOINTS / "infilling.jsonl").read_text().splitlines() == train_canvas.infilling()
        assert all(bytes([*e["prompt"], *e["answer"]]) in ids for e in examples)


@pytest.mark.exhaustive
def test_a_broken_program_loses_what_the_model_learnt(trained: Program) -> None:
    """A deliberate break: one layer reads no values. The dual cache loses next to nothing."""
    torch.set_num_threads(1)
    exact, judged = quality.measure(trained)
    assert judged == 1024 and exact > 0.3  # always a blank: 0.28
    dual, _ = quality.measure(make("dual-cache").run(trained))
    (name,) = [n for n in trained.weights if "layers.2.value" in n]
    broken = trained.replace(weights={**trained.weights, name: torch.zeros_like(trained.weights[name])})
    assert exact - dual < 0.01 < 0.02 < exact - quality.measure(broken)[0]
