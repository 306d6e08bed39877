"""The layout that makes `aropt.passes` and friends importable everywhere, and an import that stays light."""

import ast
import importlib
import pickle
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from aropt import errors
from tests.support.layout import ROOT

LINKED = ("passes", "kernels", "exporters")
LINES = {"passes": 150, "kernels": 400, "exporters": 400, "aropt": 400, "perf": 400, "tests": 400}  # of a file
BODY = 50  # lines of a function without its docstring and the functions inside it
LONG = {"kernels/fused_sample.py: _sample_kernel"}  # Triton inlines no graph of its own: one kernel, one function
HEAVY = ("triton", "onnx", "onnxruntime", "tensorrt", "transformers")


@pytest.mark.parametrize("name", LINKED)
def test_linked_package(name: str) -> None:
    assert not (ROOT / name / "__init__.py").exists(), f"a package named {name!r} would shadow others' (see pyproject)"
    link = ROOT / "aropt" / name
    assert link.is_symlink() and link.resolve() == ROOT / name
    module = importlib.import_module(f"aropt.{name}")
    assert (ROOT / name) in [Path(path).resolve() for path in module.__path__]


def test_every_package_is_listed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {"aropt", *(f"aropt.{name}" for name in LINKED)}
    for top in ("aropt", *LINKED):
        for init in (ROOT / top).rglob("__init__.py"):
            package = ".".join(init.parent.relative_to(ROOT).parts)
            found.add(package if top == "aropt" else f"aropt.{package}")
    assert found == set(settings["packages"])
    assert settings["package-dir"] == {"aropt": "aropt", **{f"aropt.{name}": name for name in LINKED}}


def files() -> Iterator[tuple[str, Path]]:
    """(folder at the top, file), links left out."""
    for top in LINES:
        for file in (ROOT / top).rglob("*.py"):
            if not any(folder.is_symlink() for folder in file.parents):
                yield top, file


def body(function: ast.FunctionDef) -> int:
    """How many lines a function has for itself."""
    first = function.body[1] if ast.get_docstring(function) and len(function.body) > 1 else function.body[0]
    lines = set(range(first.lineno, (function.end_lineno or 0) + 1))
    for inner in ast.walk(function):
        if isinstance(inner, ast.FunctionDef) and inner is not function:
            lines -= set(range(inner.lineno, (inner.end_lineno or 0) + 1))
    return len(lines)


def test_files_are_short() -> None:
    assert [str(f.relative_to(ROOT)) for top, f in files() if len(f.read_text().splitlines()) > LINES[top]] == []


def test_functions_are_short() -> None:
    found = {
        f"{file.relative_to(ROOT)}: {node.name}"
        for _, file in files()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and body(node) > BODY
    }
    assert found == LONG


def test_no_test_imports_a_test() -> None:
    found = [
        f"{file.relative_to(ROOT)}: {node.module}"
        for top, file in files()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom)
        and top == "tests"
        and any(part.startswith("test_") for part in [*(node.module or "").split("."), *(a.name for a in node.names)])
    ]
    assert found == [], "what tests share lies in tests/support"


@pytest.mark.parametrize(("module", "forbidden"), [("aropt", HEAVY), ("aropt.cli.main", (*HEAVY, "torch"))])
def test_import_is_light(module: str, forbidden: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(*(m for m in {forbidden!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


def test_errors_have_the_documented_exit_codes() -> None:
    codes = {c.__name__: c.code for c in errors.AroptError.__subclasses__()}
    assert codes == {
        "UsageError": 2,
        "VerificationFailed": 3,
        "Unsupported": 4,
        "MissingTool": 5,
        "WrongMachine": 6,
        "BudgetMissed": 7,
    }
    error = errors.MissingTool("no compiler", where="target triton", why="triton isn't installed", hint="pip install x")
    text = "no compiler\n  where: target triton\n  why:   triton isn't installed\n  try:   pip install x"
    assert str(error) == str(pickle.loads(pickle.dumps(error))) == text
