"""A .pt2 that is not data alone is not loaded without trust: torch would unpickle it, or evaluate what it says."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import aropt
from aropt.errors import UsageError
from aropt.frontend.pt2_data import vetted
from aropt.frontend.sources import resolve
from tests.support.run import generate


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 4), nn.Linear(4, 11)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids) * self.scale)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "small.pt2"
    torch.manual_seed(0)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=32)}
    made = torch.export.export(Small().eval(), (torch.zeros(2, 5, dtype=torch.int64),), dynamic_shapes=(sizes,))
    torch.export.save(made, path)
    return path


class Evil:
    """Pickled, it writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def rewrite(path: Path, out: Path, change: Callable[[str, bytes], bytes], more: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path) as given, zipfile.ZipFile(out, "w") as made:
        for entry in given.infolist():
            made.writestr(entry.filename, change(entry.filename, given.read(entry)))
        for name, data in more.items():
            made.writestr(name, data)
    return out


def test_data_alone_is_loaded(saved: Path) -> None:
    assert vetted(saved).getbuffer().nbytes > 1000
    source = resolve(str(saved))
    assert source.meta["vocab"] == 11 and source.meta["capacity"] == 32
    assert len(generate(aropt.capture(str(saved)), [[1, 2]], 3)[0]) == 3


def in_model(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Callable[[str, bytes], bytes]]:
    def made(_: Path) -> Callable[[str, bytes], bytes]:
        def apply(name: str, data: bytes) -> bytes:
            if not name.endswith("models/small.json") and "/models/" not in name:
                return data
            model = json.loads(data)
            change(model)
            return json.dumps(model).encode()

        return apply

    return made


def expression(text: str) -> Callable[[dict[str, Any]], Any]:
    def change(model: dict[str, Any]) -> None:
        values = model["graph_module"]["graph"]["tensor_values"]
        size = next(s for v in values.values() for s in v["sizes"] if "as_expr" in s)
        size["as_expr"]["expr_str"] = text

    return change


def pickled_samples(written: Path) -> Callable[[str, bytes], bytes]:
    buffer = io.BytesIO()
    torch.save({"x": Evil(written)}, buffer)
    return lambda name, data: buffer.getvalue() if "sample_inputs" in name else data


def pickled_weight(written: Path) -> Callable[[str, bytes], bytes]:
    buffer = io.BytesIO()
    torch.save(Evil(written), buffer)

    def apply(name: str, data: bytes) -> bytes:
        if name.endswith("weights_config.json"):
            return data.replace(b'"use_pickle": false', b'"use_pickle": true')
        return buffer.getvalue() if name.endswith("weight_0") else data

    return apply


RUNS = "__import__('pathlib').Path({path!r}).touch()"
HOSTILE: dict[str, Callable[[Path], Callable[[str, bytes], bytes]]] = {
    "pickled samples": pickled_samples,
    "a pickled weight": pickled_weight,
    "code as a size": lambda path: in_model(expression(RUNS.format(path=str(path))))(path),
    "a call as a size": in_model(expression("exec(chr(120))")),
    "an attribute as a size": in_model(expression("Symbol('s48').__class__")),
    "a power as a size": in_model(expression("9**9**9**9")),
    "code as a guard": lambda path: in_model(lambda m: m["guards_code"].append(RUNS.format(path=str(path))))(path),
    "a function that is no op": in_model(
        lambda m: m["graph_module"]["graph"]["nodes"][0].update(target="torch.serialization.load")
    ),
    "a class of its own": in_model(
        lambda m: m["graph_module"]["module_call_graph"][0]["signature"].update(
            in_spec='[1, {"type": "evil.Class", "context": null, "children_spec": []}]'
        )
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_could_run_code_is_refused(kind: str, saved: Path, tmp_path: Path) -> None:
    written = tmp_path / "written"
    bad = rewrite(saved, tmp_path / "bad.pt2", HOSTILE[kind](written), {})
    with pytest.raises(UsageError, match="trust-remote-code"):
        resolve(str(bad))
    assert not written.exists()


def test_parts_of_other_kinds_are_refused(saved: Path, tmp_path: Path) -> None:
    for name, data in (("small/data/constants/opaque_obj_0", pickle.dumps(1)), ("serialized_state_dict.pt", b"x")):
        with pytest.raises(UsageError, match="no part of plain weights"):
            vetted(rewrite(saved, tmp_path / "bad.pt2", lambda _, data: data, {name: data}))
    (tmp_path / "bad.pt2").write_bytes(saved.read_bytes()[:100])
    with pytest.raises(UsageError, match="can't be loaded"):
        vetted(tmp_path / "bad.pt2")


def test_trust_loads_what_torch_loads(saved: Path, tmp_path: Path) -> None:
    """The control: with trust a pickle does run, so that the tests above would have seen it."""
    written = tmp_path / "written"
    bad = rewrite(saved, tmp_path / "bad.pt2", pickled_samples(written), {})
    with contextlib.suppress(ValueError):  # what was unpickled is no input
        resolve(str(bad), trust_remote_code=True)
    assert written.exists()
