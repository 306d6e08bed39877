"""Files of others that bring a pass or an op along: `aropt optimize --plugin FILE`, and `plugins=` in Python.

A file holds `PASS`, `OP`, or both. It is run as any Python file is: give only those that you trust. Installed packages
need no option: their entry points of the groups "aropt.passes" and "aropt.ops" are found by themselves.
"""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from aropt.errors import UsageError
from aropt.ir import ops
from aropt.pipeline import registry
from aropt.rewriting.contract import broken

ADDERS = {"PASS": registry.add, "OP": ops.add}


def load(path: str | Path) -> None:
    """Adds what the file holds; the second time nothing. Raises UsageError with the line where that fails."""
    file = Path(path).resolve()
    name = f"aropt_plugin_{file.stem}"
    if not file.is_file():
        raise UsageError(what=f"no file '{path}'", where="--plugin", hint="give a Python file that holds PASS or OP")
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
