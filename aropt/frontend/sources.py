"""Where models come from: a reference model's name, a Hugging Face directory, file.py:factory, or a .pt2."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aropt.errors import UsageError
from aropt.frontend.directory import no_model
from aropt.frontend.export import quiet
from aropt.frontend.facts import LONGEST, UNKNOWN, Source, check_capacity, facts, said, too_long
from aropt.frontend.huggingface import COPIED, huggingface
from aropt.frontend.pt2 import most
from aropt.frontend.pt2_data import vetted
from aropt.frontend.texts import CONFIG, FAST, stored_tokenizer


def resolve(model: str, capacity: int | None = None, trust_remote_code: bool = False, masked: bool = False) -> Source:
    """Loads MODEL. Raises UsageError for what isn't there or is damaged, Unsupported for what aropt can't take."""
    from aropt.models import REFERENCES

    check_capacity(capacity)
    path = Path(model)
    if model in REFERENCES:
        return reference(model, capacity)
    if path.is_dir():
        return huggingface(path, capacity, trust_remote_code, masked)
    if ".py:" in model:
        return factory(model, capacity)
    if path.suffix == ".pt2" and path.is_file():
        return exported(path, capacity, trust_remote_code)
    raise no_model(model)


def findable(model: str) -> bool:
    """Whether there is anything by the name of a model."""
    from aropt.models import REFERENCES

    return model in REFERENCES or Path(model.rpartition(":")[0] if ".py:" in model else model).exists()


def reference(name: str, capacity: int | None) -> Source:
    """A reference model with its trained weights."""
    from aropt.models import REFERENCES, load

    found = REFERENCES[name]
    if capacity is not None and capacity > found.capacity:
        raise too_long(capacity, found.capacity)
    module = load(name)
    meta = {
        "name": name,
        "source": name,
        "modality": found.modality,
        "vocab": found.vocab,
        "input_vocab": found.vocab,
        "capacity": capacity or found.capacity,
        "prompts": [list(p) for p in found.prompts],
        "heldout": found.heldout,
    }
    meta |= said(module)
    if found.mask is not None:
        meta |= {"mask": found.mask, "block": found.block, "examples": infilling()}
    home = REFERENCES["text-ar"].checkpoint if found.mask is not None else found.checkpoint  # canvases hold its bytes
    texts = stored_tokenizer(home / FAST) if (home / FAST).is_file() else None
    own = COPIED if home == found.checkpoint else ()
    return Source(module, meta, [f for name in (*own, CONFIG) if (f := home / name).is_file()], texts)


def infilling() -> list[dict[str, Any]]:
    """Held-out text with spans to be found, in bytes (written by aropt.models.train_canvas)."""
    from aropt.frontend.examples import read
    from aropt.models import CHECKPOINTS

    def encode(text: str) -> list[int]:
        return list(text.encode())

    return read(CHECKPOINTS / "infilling.jsonl", encode, encode)


def factory(model: str, capacity: int | None) -> Source:
    """file.py:factory, where factory() returns an nn.Module with forward(ids) -> logits."""
    file, _, name = model.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise UsageError(what=f"no file '{file}'", hint="give a path such as model.py:factory")
    spec = importlib.util.spec_from_file_location("aropt_user_" + path.stem, path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # dataclasses look their module up
    try:
        with importable(path.resolve().parent):
            spec.loader.exec_module(loaded)
            make = getattr(loaded, name, None)
            module = make() if callable(make) else None
    except Exception as error:  # the user's code may raise anything
        del sys.modules[spec.name]
        raise UsageError(
            what=f"'{model}' fails",
            where=str(path),
            why=f"{type(error).__name__}: {error}",
            hint=f"run it alone: python -c 'import {path.stem}; {path.stem}.{name}()'",
        ) from error
    if make is None:
        raise UsageError(
            what=f"no function '{name}' in {path.name}",
            where=str(path),
            hint="name a function that returns an nn.Module",
        )
    if not isinstance(module, nn.Module):
        raise UsageError(
            what=f"'{name}' does not return an nn.Module",
            where=str(path),
            why=f"it returns {type(module).__name__}",
            hint="return the model itself",
        )
    module = module.float().eval().requires_grad_(False)
    return Source(module, {"name": path.stem, "source": model, "modality": "tokens", **facts(module, capacity)})


@contextlib.contextmanager
def importable(folder: Path) -> Iterator[None]:
    """The modules of a folder can be imported, as by a script in it."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def exported(path: Path, capacity: int | None, trusted: bool = False) -> Source:
    """A program saved by torch.export.save, its sequence length dynamic; of data alone, unless it is trusted."""
    given = path if trusted else vetted(path)
    try:
        with quiet():
            program = torch.export.load(given)
    except Exception as error:  # zip, JSON and pickle errors, by what is damaged
        raise UsageError(
            what="the .pt2 file can't be loaded",
            where=str(path),
            why=str(error).splitlines()[0][:300] if str(error) else "",
            hint="write it with torch.export.save",
        ) from error
    batch, longest = most(program, 0), most(program, 1)
    module = program.module()
    if longest is not None and capacity is not None and capacity > longest:
        raise too_long(capacity, longest)
    known = facts(module, capacity or min(longest or UNKNOWN, LONGEST))
    meta = {"name": path.stem, "source": str(path), "modality": "tokens", **known}
    meta |= {} if batch is None else {"batch": batch}
    return Source(module, meta, exported=program)
