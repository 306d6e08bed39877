"""The artifacts that are changed, and the changes."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aropt
from aropt.ir.program import Program
from aropt.pipeline.artifact import write
from aropt.pipeline.registry import make, names
from aropt.rewriting.contract import Applies, planned
from aropt.targets import lower
from aropt.targets.ort.files import file
from tests.conftest import make_program, make_stages
from tests.support.targets import EAGER

JUNK: list[Any] = [
    None, True, -1, 0, 1, 7, 2**31, 2**62, 2**70, 1.5, "", "B", "S*1000000000", "x y", "..", "/etc/passwd", [], [[]],
    {}, {"node": "x"}, {"float": "nan"}, "float64", "int64", "model", "__import__('os')", "a" * 10_000, [1] * 5000,
    -(2**63),
]  # fmt: skip
OPS = [
    "aten.add.Tensor", "aten.empty_like.default", "aten.as_strided.default", "aten.new_zeros.default",
    "aten.repeat.default", "aten.expand.default", "aten.embedding.default", "aten.neg.default", "aten.cumsum.default",
    "operator.getitem", "operator.mul", "aropt.noise.default", "aten.index_copy.default", "aten.arange.default",
]  # fmt: skip


def artifacts(folder: Path) -> dict[str, Path]:
    """A program of each kind, written once: text, a canvas, guidance with all rules, and a whole loop in ONNX."""
    tiny = list(make_stages(make_program(1)).values())[-1]
    rules = ("guidance", "repetition-penalty", "bias", "top-k", "top-p", "min-p")
    guided = list(make_stages(make_program(1, rules)).values())[-1]
    made = {"text": (tiny, "onnxruntime"), "guided": (guided, "eager"), "canvas": (canvas(), "eager")}
    outs = {name: written(program, target, folder / name / "out") for name, (program, target) in made.items()}
    outs["whole"] = written(tiny, "onnxruntime", folder / "whole" / "out", loop=True)
    return outs


def canvas() -> Program:
    from tests.support.canvases import tiny

    program = aropt.capture(tiny(), mask=259, capacity=16)
    for name in names("default"):
        one = make(name)
        program = one.run(program) if isinstance(planned(one, program, EAGER), Applies) else program
    return program


def written(program: Program, target: str, out: Path, loop: bool = False) -> Path:
    """The artifact, as the command line writes it."""
    from aropt.exporters.whole_loop import export_program

    out.mkdir(parents=True)
    meta = {**program.meta, "target": target, "prompts": [[1, 2], [3, 4]]}
    program = program.replace(meta=meta)
    lower(program, target, out)
    if loop:
        export_program(program, file(out, "whole"), contrib=True)
    write(program, out, {})
    return out


def mutate(out: Path, chosen: random.Random) -> str:
    """Changes an artifact in place; says what was changed."""
    ways: list[tuple[int, Callable[[Path, random.Random], str]]] = [
        (8, in_program),
        (1, in_manifest),
        (2, in_weights),
        (2, in_files),
    ]
    if list(out.glob("models/*/onnxruntime/*.onnx")):
        ways.append((6, in_model))
    way = chosen.choices([w for _, w in ways], [n for n, _ in ways])[0]
    said = way(out, chosen)
    if way in (in_program, in_weights, in_model):
        relist(out)
    return f"{way.__name__.removeprefix('in_')}: {said}"


def relist(out: Path) -> None:
    """Writes sizes and hashes of what is there into the manifest."""
    manifest = json.loads((out / "manifest.json").read_text())
    for entry in manifest["files"]:
        data = (out / entry["path"]).read_bytes()
        entry |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (out / "manifest.json").write_text(json.dumps(manifest))


def in_program(out: Path, chosen: random.Random) -> str:
    data = json.loads((out / "program.json").read_text())
    said = in_json(data, chosen)
    if chosen.random() < 0.2:
        said += "; " + in_json(data, chosen)
    (out / "program.json").write_text(json.dumps(data))
    return said


def in_manifest(out: Path, chosen: random.Random) -> str:
    data = json.loads((out / "manifest.json").read_text())
    said = in_json(data, chosen)
    (out / "manifest.json").write_text(json.dumps(data))
    return said


def in_json(data: Any, chosen: random.Random) -> str:
    """A random place gets junk, a neighbour's value, a number nearby, another op; or goes, or comes twice."""
    place, path = data, []
    while True:
        key = chosen.choice(list(place)) if isinstance(place, dict) else chosen.randrange(len(place))
        path.append(str(key))
        inner = place[key]
        if not (isinstance(inner, (dict, list)) and inner) or (len(path) > 1 and chosen.random() < 0.15):
            break
        place = inner
    way = chosen.choice(["junk", "near", "near", "near", "swap", "drop", "twice"])
    if way == "drop":
        del place[key]
    elif way == "twice" and isinstance(place, list):
        place.insert(key, copy.deepcopy(inner))
    elif way == "swap":
        other = chosen.choice(list(place)) if isinstance(place, dict) else chosen.randrange(len(place))
        place[key], place[other] = place[other], place[key]
    elif way == "near" and isinstance(inner, bool):
        place[key] = not inner
    elif way == "near" and isinstance(inner, (int, float)):
        place[key] = chosen.choice([inner + 1, inner - 1, inner * 2, -inner, inner * 1000, 0])
    elif way == "near" and isinstance(inner, str):
        graphs = data.get("graphs")  # which a change before this one may have made anything
        nodes = [g.get("nodes") for g in graphs.values() if isinstance(g, dict)] if isinstance(graphs, dict) else []
        names = [
            n["name"] for part in nodes if isinstance(part, list) for n in part if isinstance(n, dict) and "name" in n
        ]
        place[key] = chosen.choice(
            [*(OPS if inner.startswith(("aten", "operator", "aropt")) else names or [""]), inner[:-1]]
        )
    else:
        place[key] = copy.deepcopy(chosen.choice(JUNK))
    return f"{way} at {'.'.join(path)}"[:200]


def in_weights(out: Path, chosen: random.Random) -> str:
    """The header's JSON, or bytes."""
    path = out / "weights.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    if chosen.random() < 0.5:
        path.write_bytes(flipped(data, chosen))
        return "bytes"
    header = json.loads(data[8 : 8 + size])
    said = in_json(header, chosen)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    return said


def flipped(data: bytes, chosen: random.Random) -> bytes:
    """Some bytes are others; or the end is missing."""
    if chosen.random() < 0.2:
        return data[: chosen.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(chosen.choice([1, 1, 4, 40])):
        changed[chosen.randrange(len(changed))] = chosen.randrange(256)
    return bytes(changed)


def in_files(out: Path, chosen: random.Random) -> str:
    """A file goes, becomes a link, a pipe or a folder, or is cut without a word; or one comes that nobody listed."""
    path = chosen.choice(sorted(p for p in out.rglob("*") if p.is_file()))
    way = chosen.choice(["drop", "link", "pipe", "folder", "cut", "come", "dangle"])
    data = path.read_bytes()
    if way == "come":
        name = chosen.choice(
            ["models/whole/onnxruntime/model.onnx", "models/step/onnxruntime/rounds-4.onnx", "note.txt"]
        )
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)
        return f"{name} comes"
    path.unlink()
    if way == "link":
        (out.parent / "elsewhere").write_bytes(data)
        path.symlink_to(out.parent / "elsewhere")
    elif way == "dangle":
        path.symlink_to(out.parent / "nowhere")
    elif way == "pipe":
        os.mkfifo(path)
    elif way == "folder":
        path.mkdir()
    elif way == "cut":
        path.write_bytes(data[: len(data) // 2])
    return f"{path.relative_to(out)}: {way}"


def in_model(out: Path, chosen: random.Random) -> str:
    """A node, an attribute, a weight, an input or output of an ONNX model; or bytes."""
    import onnx

    path = chosen.choice(sorted(out.glob("models/*/onnxruntime/*.onnx")))
    if chosen.random() < 0.25:
        path.write_bytes(flipped(path.read_bytes(), chosen))
        return f"{path.parent.parent.name}: bytes"
    model = onnx.load(path)
    graph = model.graph
    graphs = [graph, *(a.g for n in graph.node for a in n.attribute if a.HasField("g"))]
    part = chosen.choice(graphs)
    way = chosen.choice(["op", "domain", "input", "drop", "number", "weight", "type", "outside", "output"])
    node = chosen.choice(list(part.node)) if part.node else None
    if way == "op" and node is not None:
        node.op_type = chosen.choice(["Add", "Identity", "Loop", "RandomNormal", "Expand", "Run", "Scan", "Gather"])
    elif way == "domain" and node is not None:
        node.domain = chosen.choice(["com.microsoft", "evil", "ai.onnx.ml"])
    elif way in ("input", "output") and node is not None and (values := getattr(node, way)):
        names = [o for n in part.node for o in n.output] + [""]
        values[chosen.randrange(len(values))] = chosen.choice(names)
    elif way == "drop" and node is not None:
        part.node.remove(node)
    elif way == "number" and node is not None and node.attribute:
        attribute = chosen.choice(list(node.attribute))
        attribute.i = chosen.choice([0, -1, 2**31, 2**62, attribute.i + 1])
        if attribute.ints:
            attribute.ints[0] = chosen.choice([0, -1, 2**31, 2**62])
    elif way == "weight" and part.initializer:
        tensor = chosen.choice(list(part.initializer))
        if tensor.dims and chosen.random() < 0.5:
            tensor.dims[0] = chosen.choice([0, -1, 2**31, 2**62, tensor.dims[0] + 1])
        else:
            tensor.raw_data = flipped(tensor.raw_data or b"0", chosen)
    elif way == "type":
        value = chosen.choice([*graph.input, *graph.output])
        value.type.tensor_type.elem_type = chosen.choice([0, 1, 7, 8, 9, 11, 99])
    elif way == "outside" and part.initializer:
        tensor = chosen.choice(list(part.initializer))
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=chosen.choice(["/etc/passwd", "../../x", path.name + ".data"]))
    path.write_bytes(model.SerializeToString())
    return f"{path.parent.parent.name}: {way}"


def mutant(out: Path, to: Path, seed: int) -> tuple[Path, str]:
    """A changed copy, and what was changed."""
    shutil.rmtree(to, ignore_errors=True)
    copied = Path(shutil.copytree(out, to / "out"))
    return copied, mutate(copied, random.Random(seed))
