"""What a .pt2 holds, before torch opens it: torch unpickles parts of one, and evaluates the sizes and guards in it.

Data alone is loaded without being asked: plain weights, ops by name, sizes and guards of a few words. Anything else
needs trust. What was looked at is written anew, so that torch reads nothing but that.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch

from aropt.errors import UsageError

PLAIN = re.compile(r"archive_format|archive_version|byteorder|\.data/\w+|data/(weights/weight|constants/tensor)_\d+")
CONFIG = re.compile(r"data/(weights|constants)/\w+_(weights|constants)_config\.json")
MODEL, SAMPLES = re.compile(r"models/\w+\.json"), re.compile(r"data/sample_inputs/\w+\.pt")
TARGET = re.compile(r"torch\.ops\.(aten|aropt|higher_order)(\.\w+){1,2}|_operator\.\w+|math\.\w+")
EXPRESSION = re.compile(r"[\w\s.()\[\]'<>=!+\-*/%,]*", re.ASCII)
QUOTED = re.compile(r"'\w+'", re.ASCII)
WORD = re.compile(r"[A-Za-z_]\w*")
SIZES = """
Symbol positive negative nonnegative nonpositive integer real finite True False Integer Rational Add Mul Pow Max Min
Mod PythonMod ModularIndexing FloorDiv CeilDiv CleanDiv IntTrueDiv FloatTrueDiv LShift RShift ToFloat TruncToInt Eq
Ne Equality Unequality LessThan GreaterThan StrictLessThan StrictGreaterThan Not And Or Where L self size stride
storage_offset and or not
"""
WORDS = frozenset(SIZES.split())
NAME = re.compile(r"[su]\d+")
TYPE = re.compile(r"builtins\.\w+|collections\.OrderedDict|transformers(\.\w+)+")


def vetted(path: Path) -> io.BytesIO:
    """The file's parts that are data, as a file. Raises UsageError where loading it could run code."""
    made = io.BytesIO()
    try:
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(made, "w") as copy:
            entries = archive.infolist()
            if len({e.filename for e in entries}) < len(entries):
                refuse(path, "it holds a part twice")
            for entry in entries:
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > path.stat().st_size:
                    refuse(path, f"'{entry.filename[:60]}' is compressed")
                data = archive.read(entry)
                check_part(path, entry.filename.partition("/")[2], data)
                copy.writestr(entry.filename, data)
    except (zipfile.BadZipFile, OSError, ValueError, RecursionError, NotImplementedError) as error:
        raise UsageError(
            what="the .pt2 file can't be loaded", where=str(path), why=str(error)[:300],
            hint="write it with torch.export.save",
        ) from error  # fmt: skip
    made.seek(0)
    return made


def check_part(path: Path, name: str, data: bytes) -> None:
    """Raises UsageError for a part that is not data alone."""
    if PLAIN.fullmatch(name):
        return
    if CONFIG.fullmatch(name):
        for weight, said in json.loads(data).get("config", {}).items():
            stored = str(said.get("path_name"))
            if said.get("use_pickle") is not False or not re.fullmatch(r"(weight|tensor)_\d+", stored):
                refuse(path, f"the weight '{weight[:60]}' is pickled")
    elif MODEL.fullmatch(name):
        check_model(path, json.loads(data))
    elif SAMPLES.fullmatch(name):
        try:
            torch.load(io.BytesIO(data), weights_only=True)
        except Exception as error:  # pickles of all kinds; torch would unpickle them all the same
            refuse(path, f"its sample inputs are no tensors: {(str(error).splitlines() or [''])[0]}")
    else:
        refuse(path, f"it holds '{name[:60]}', which is no part of plain weights and ops")


def check_model(path: Path, model: Any) -> None:
    """Raises UsageError for what torch would look up or evaluate, unless it is an op, a size or a guard."""
    for key, value in items(model):
        if key == "target" and not (isinstance(value, str) and TARGET.fullmatch(value)):
            refuse(path, f"it calls {str(value)[:60]!r}, which is no op")
        if key == "expr_str":
            check_expression(path, value)
        if key == "guards_code":
            for guard in value:
                check_expression(path, guard)
        if key == "range_constraints":
            for name in value:
                check_expression(path, name)
        if key in ("in_spec", "out_spec") and isinstance(value, str) and value:
            for inner, kind in items(json.loads(value)):
                if (inner == "type" and kind is not None and not TYPE.fullmatch(str(kind))) or "__enum__" in str(kind):
                    refuse(path, f"it takes or returns a {str(kind)[:60]}")


def check_expression(path: Path, text: Any) -> None:
    """Raises UsageError unless the text is made of numbers, sizes and a few functions of them."""
    words = WORD.findall(QUOTED.sub("''", text)) if isinstance(text, str) and EXPRESSION.fullmatch(text) else ["?"]
    words += ["?"] if "**" in str(text) else []
    if any(word not in WORDS and not NAME.fullmatch(word) for word in words):
        refuse(path, f"it holds an expression that is no size: {str(text)[:60]!r}")


def items(value: Any) -> Iterator[tuple[str, Any]]:
    """All keys and values within JSON."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield from one.items()
        waiting.extend(one.values() if isinstance(one, dict) else one if isinstance(one, list) else ())


def refuse(path: Path, why: str) -> NoReturn:
    """Raises UsageError."""
    raise UsageError(
        what="the .pt2 file is not data alone: loading it may run code",
        where=str(path),
        why=why[:300],
        hint="read what made it, then add --trust-remote-code (trust_remote_code=True in Python)",
    )
