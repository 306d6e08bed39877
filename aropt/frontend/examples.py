"""Examples of a task, read from a file: what quality is measured on (see validate/quality.py).

An example is {"prompt": ids, "answer": ids, "masked": [[start, end], ...]}: the ids of the answer in these spans are to
be found (all of it, where "masked" is left out), the others are given. A file has one a line, as JSON; prompt and
answer may be texts there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aropt.errors import UsageError

Example = dict[str, Any]


FORM = '{"prompt": "def f(", "answer": "x):", "masked": [[0, 2]]}'


def wrong(example: Any) -> str:
    """What is wrong with the form of an example whose texts are ids by now; empty if nothing is."""
    if not isinstance(example, dict) or not {"prompt", "answer"} <= set(example) <= {"prompt", "answer", "masked"}:
        return 'it has "prompt" and "answer", may have "masked", and nothing else'
    for name in ("prompt", "answer"):
        ids = example[name]
        if not isinstance(ids, list) or not ids or any(type(i) is not int for i in ids):
            return f'"{name}" is neither a text nor a list of ids, or it is empty'
    spans = example.get("masked", [[0, 1]])
    if not isinstance(spans, list) or not spans or not all(is_span(s, len(example["answer"])) for s in spans):
        return f'"masked" is a list of [start, end] with 0 <= start < end <= {len(example["answer"])}'
    return ""


def is_span(span: Any, length: int) -> bool:
    """Whether it is [start, end] within an answer of so many ids."""
    pair = isinstance(span, (list, tuple)) and len(span) == 2 and all(type(i) is int for i in span)
    return pair and 0 <= span[0] < span[1] <= length


def read(path: Path, prompt: Callable[[str], list[int]] | None, answer: Callable[[str], list[int]] | None
         ) -> list[Example]:  # fmt: skip
    """The examples of a file; `prompt` and `answer` encode texts. Raises UsageError for a file or line that is none."""
    return [example(text, where, prompt, answer) for text, where in lines(path, "examples", "write lines as " + FORM)]


def lines(path: Path, what: str, form: str) -> list[tuple[str, str]]:
    """The lines of a file that are not blank, each with its place. Raises UsageError where there are none."""
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(what=f"the {what} can't be read", where=str(path), why=str(error)) from error
    found = [(text, f"{path}, line {i}") for i, text in enumerate(texts, 1) if text.strip()]
    if not found:
        raise UsageError(what=f"there are no {what}", where=str(path), hint=form)
    return found


def example(line: str, where: str, *coders: Callable[[str], list[int]] | None) -> Example:
    """The example of a line, its texts as ids. Raises UsageError."""
    try:
        made = json.loads(line)
    except ValueError as error:
        raise refused(where, f"no JSON: {error}") from error
    for name, coder in zip(("prompt", "answer"), coders, strict=True):
        text = made.get(name) if isinstance(made, dict) else None
        if isinstance(text, str) and coder is None:
            raise refused(where, f'"{name}" is a text, and the model has no tokenizer')
        if isinstance(text, str) and coder is not None:
            made[name] = coder(text)
    if problem := wrong(made):
        raise refused(where, problem)
    return made  # type: ignore[no-any-return]


def refused(where: str, why: str) -> UsageError:
    return UsageError(what="an example can't be used", where=where, why=why, hint="write it as " + FORM)


def texts(coder: Any) -> Sequence[Callable[[str], list[int]] | None]:
    """How a tokenizer encodes prompts (as `aropt run` does) and answers (without special tokens); None without one."""
    if coder is None:
        return None, None
    return coder.encode, lambda t: coder.encode(t, special=False)


def prompts(path: Path, encode: Callable[[str], list[int]] | None) -> list[list[int]]:
    """The prompts of a file, a JSON text or list of ids a line. Raises UsageError for a file or line that is none."""

    form = 'write one a line, as "def f(" or [1, 2, 3]'

    def refused(where: str, why: str) -> UsageError:
        return UsageError(what="a prompt can't be used", where=where, why=why, hint=form)

    def ids(text: str, where: str) -> list[int]:
        try:
            given = json.loads(text)
        except ValueError as error:
            raise refused(where, f"no JSON: {error}") from error
        if isinstance(given, str) and encode is None:
            raise refused(where, "it is a text, and the model has no tokenizer")
        made = encode(given) if isinstance(given, str) and encode is not None else given
        if not isinstance(made, list) or not made or not all(type(i) is int for i in made):
            raise refused(where, "it is neither a text nor a list of ids, or empty")
        return made

    return [ids(text, where) for text, where in lines(path, "prompts", form)]
