"""What targets can do: words that are known, that some target has, and that something asks for."""

from __future__ import annotations

import ast
import re

import pytest

from aropt.rewriting.target import CAPABILITIES, Target
from aropt.targets import TARGETS, find_target
from tests.support.layout import modules


def test_files_are_targets() -> None:
    assert TARGETS == ("eager", "inductor", "onnxruntime")
    assert [find_target(name).name for name in TARGETS] == list(TARGETS)


def test_every_capability_is_had() -> None:
    assert {c for name in TARGETS for c in find_target(name).capabilities} == CAPABILITIES.keys()


def test_every_capability_is_asked_for() -> None:
    """A word that only targets say would be a promise that nobody holds them to."""
    outside = [f for m, f in modules().items() if not m.startswith(("targets", "rewriting.target"))]
    said = {n.value for f in outside for n in ast.walk(ast.parse(f.read_text())) if isinstance(n, ast.Constant)}
    assert CAPABILITIES.keys() - said == set()


def test_unknown_words_are_refused() -> None:
    with pytest.raises(ValueError, match="gqa"):
        Target("new", "new", frozenset({"gqa"}))
    with pytest.raises(ValueError, match="gqa"):
        find_target("eager").has("gqa")


RUNTIME = re.compile(r"\b(onnxruntime|inductor|tensorrt)\b")
SNIFFING = ("getattr", "hasattr", "setattr")
EXECUTOR = re.compile(r"(^|[._])(executor|runner)$")
AT_HOME = ("targets", "exporters")
NAMED = {  # modules elsewhere that may name a runtime
    "bench.drafted": "it counts rounds on the target whose rounds are fast enough to count thousands of them",
    "bench.peers": "it times other engines, one of which is made of onnxruntime",
    "bench.timing": "it describes variants, which are named after what they time",
    "bench.variants": "it says which target a variant is timed on",
    "cli.run": "doctor looks for packages by their names, and tells which targets are ready",
    "pipeline.describe": "the report holds versions of packages",
    "recipes.__main__": "results hold versions of packages",
}


def named(tree: ast.AST) -> set[str]:
    """Runtimes that the strings of a module name, but for its docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = {id(n.body[0].value) for n in ast.walk(tree) if isinstance(n, documented) and n.body
            and isinstance(n.body[0], ast.Expr)}  # fmt: skip
    strings = (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in docs)
    return {found for text in strings if isinstance(text, str) for found in RUNTIME.findall(text)}


def reached_into(tree: ast.AST) -> list[str]:
    """Where code looks for an executor's attributes by name, or sets one of an executor that isn't its own."""
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) in SNIFFING and n.args]
    sniffed = [ast.unparse(n) for n in calls if EXECUTOR.search(ast.unparse(n.args[0]))]
    assigned = [
        t for n in ast.walk(tree) if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Attribute)
    ]
    return sniffed + [ast.unparse(t) for t in assigned if EXECUTOR.search(ast.unparse(t.value))]


def test_runtimes_are_named_at_home() -> None:
    found = {name for name, file in modules().items() if named(ast.parse(file.read_text()))}
    found = {name for name in found if not name.startswith(AT_HOME)}
    assert found - NAMED.keys() == set(), "ask for a capability (aropt.rewriting.target)"
    assert NAMED.keys() - found == set(), "no longer there: take them out of NAMED"


def test_executors_are_asked_by_methods() -> None:
    found = {name: reached_into(ast.parse(file.read_text())) for name, file in modules().items()}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_names_and_sniffing_are_seen() -> None:
    """And neither docstrings nor an executor's own attributes are."""
    bad = 'if target == "onnxruntime": pass\nprogram.executor.rounds = {}\ngetattr(executor, "loop", None)'
    good = '"""For onnxruntime."""\nself.executor = executor\nname = "onnxruntimes"\nexecutor.loop(a, b, c)'
    assert named(ast.parse(bad)) == {"onnxruntime"} and len(reached_into(ast.parse(bad))) == 2
    assert not named(ast.parse(good)) and not reached_into(ast.parse(good))
