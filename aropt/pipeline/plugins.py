"""Files of others that bring a pass, an op or a loop: `aropt optimize --plugin FILE`, and `plugins=` in Python.

A file holds one or more of `PASS`, `OP` and `SCHEME`. It is run as any Python file is: give only those that you trust.
Installed packages need no option: their entry points of the groups "aropt.passes", "aropt.ops" and "aropt.loops" are
found by themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from aropt.errors import UsageError
from aropt.ir import ops
from aropt.loops import scheme
from aropt.pipeline import registry
from aropt.rewriting.contract import broken

ADDERS: dict[str, Callable[[Any], None]] = {"OP": ops.add, "SCHEME": scheme.add, "PASS": registry.add}


def load(path: str | Path) -> None:
    """Adds what the file holds; the second time nothing. Raises UsageError with the line where that fails."""
    file = Path(path).resolve()
    name = f"aropt_plugin_{file.stem}"
    if not file.is_file():
        raise UsageError(
            what=f"no file '{path}'", where="--plugin", hint="give a Python file that holds PASS, OP or SCHEME"
        )
    known = sys.modules.get(name)
    if known is not None and known.__file__ == str(file):
        return
    try:
        module = executed(name, file)
        held = [kind for kind in ADDERS if hasattr(module, kind)]
        if not held:
            raise TypeError(f"it holds none of {', '.join(ADDERS)}")
        for kind in held:
            ADDERS[kind](getattr(module, kind))
    except Exception as error:  # whatever its author wrote
        sys.modules.pop(name, None)
        raise broken(f"the plugin '{file.name}'", str(file), error) from error


def executed(name: str, file: Path) -> ModuleType:
    """The file as a module: dataclasses look theirs up by its name."""
    spec = spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise TypeError("it is no Python file")
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
