"""The layout that makes `aropt.passes` and friends importable everywhere, and an import that stays light."""

import importlib
import pickle
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from aropt import errors

ROOT = Path(__file__).parent.parent
LINKED = ("passes", "kernels", "exporters")
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
