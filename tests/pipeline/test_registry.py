"""Which passes there are, in which order they run, and what contracts promise."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aropt.errors import AroptError, UsageError
from aropt.ir.program import Program
from aropt.pipeline import registry
from aropt.pipeline.checks import Instruments
from aropt.pipeline.manager import run_passes
from aropt.pipeline.registry import before, check_order, inserted, make, names, pass_class, pipeline
from aropt.rewriting.contract import Applies, Contract, Fact, Skips
from aropt.rewriting.target import Target

SUBSETS = st.lists(st.sampled_from(names()), unique=True)


@dataclass(frozen=True)
class Idle:
    """A pass that changes nothing but its own mark; subclasses have other contracts."""

    name: ClassVar[str] = "idle"
    contract: ClassVar[Contract] = Contract("bitwise")

    def plan(self, program: Program, target: Target) -> Applies | Skips:
        return Applies(("nothing",))

    def run(self, program: Program) -> Program:
        return program.replace(meta={**program.meta, self.name: True})


NEVER = Fact("a wonder", lambda _: "wonders are rare")


@dataclass(frozen=True)
class Needy(Idle):
    contract: ClassVar[Contract] = Contract("bitwise", requires=(NEVER,))


@dataclass(frozen=True)
class Boaster(Idle):
    contract: ClassVar[Contract] = Contract("bitwise", establishes=(NEVER,))


def test_the_default_pipeline() -> None:
    """The order is computed; a pass that moves in it should be meant to."""
    assert " ".join(names("default")) == (
        "canonicalize block-cache cfg-batch guide-cache kv-cache token-shuffle-fusion merge-linears fuse-attention "
        "fuse-canvas fuse-tree fuse-sampler prune"
    )
    assert names("tried") == ["int8-draft", "ngram-draft", "tree-draft"]
    assert sorted(names("default") + names("tried") + names("asked")) == sorted(registry.known())


@pytest.mark.parametrize("name", names())
def test_contracts_name_passes_that_there_are(name: str) -> None:
    contract = pass_class(name).contract
    assert set(contract.after) <= set(names())
    options = {f.name for f in dataclasses.fields(pass_class(name))}
    assert not contract.refresh or "refresh" in options
    for way in contract.tries:
        make(*registry.parse(f"{name}:{way}"))


@given(SUBSETS)
@settings(deadline=None, max_examples=30)
def test_a_pipeline_is_in_order(chosen: list[str]) -> None:
    made = pipeline(chosen)
    check_order(made)
    for number, one in enumerate(made):
        assert not before(one) & {p.name for p in made[number:]}
        check_order(inserted([*made[:number], *made[number + 1 :]], one))


@given(st.permutations([make(name) for name in names()]))
@settings(deadline=None, max_examples=30)
def test_another_order_is_refused_before_anything_runs(passes: list[Any]) -> None:
    right = all(not before(one) & {p.name for p in passes[i:]} for i, one in enumerate(passes))
    try:
        check_order(passes)
    except UsageError as error:
        assert not right and error.code == 2 and "comes after" in error.why
    else:
        assert right


def test_a_wrong_order_runs_nothing(tiny_program: Program) -> None:
    with pytest.raises(UsageError, match="prune can't run before fuse-sampler"):
        run_passes(tiny_program, [Idle(), make("prune"), make("fuse-sampler")], "eager")


def test_a_fact_that_does_not_hold_is_a_reason_to_skip(tiny_program: Program) -> None:
    made = run_passes(tiny_program, [Needy()], "eager", Instruments(check=False))
    (result,) = made[1]
    assert (result.status, result.reason) == ("skipped", "wonders are rare") and made[0] is tiny_program


def test_a_fact_that_is_not_established_is_an_internal_error(tiny_program: Program) -> None:
    with pytest.raises(AroptError, match="the pass idle fails") as error:
        run_passes(tiny_program, [Boaster()], "eager", Instruments(check=False))
    assert "establishes 'a wonder', but wonders are rare" in error.value.why and error.value.code == 1


def test_contracts_are_checked() -> None:
    wrong: list[dict[str, Any]] = [
        {"level": "exact"}, {"level": "lossy"}, {"level": "lossy", "budget": ("kl",)}, {"level": "retrained"},
        {"level": "bitwise", "when": "never"}, {"level": "bitwise", "when": "tried"},
        {"level": "bitwise", "tries": ("drafts=4",)},
    ]  # fmt: skip
    for arguments in wrong:
        with pytest.raises(ValueError, match=r"contract's level|a pass runs when|runs where it is asked for"):
            Contract(**arguments)


def test_passes_that_wait_for_each_other_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pass_class("kv-cache"), "contract", Contract("rounding", after=("prune",)))
    with pytest.raises(UsageError, match="come after each other"):
        names()


def test_a_broken_pass_names_its_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    folder = tmp_path / "passes"
    folder.mkdir()
    monkeypatch.setattr("aropt.passes.__path__", [str(folder)])
    monkeypatch.setattr(registry, "known", registry.known.__wrapped__)
    for text, words in (("x = 1\nPASS = nothing\n", "mine.py:2"), ("def (:\n", "mine.py:1"), ("", "mine.py"),
                        ("class PASS:\n    pass\n", "PASS is no dataclass with name, contract")):  # fmt: skip
        (folder / "mine.py").write_text(text)
        sys.modules.pop("aropt.passes.mine", None)
        with pytest.raises(UsageError, match=r"the pass 'mine' can't be loaded[\s\S]*passes/mine.py") as told:
            pass_class("mine")
        assert words in str(told.value) and told.value.code == 2
