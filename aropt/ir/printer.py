"""The text form of programs: deterministic, one thing a line, for reading, diffs, goldens and hashes.

Values are `%name`, nodes `%0, %1, ...` in topological order, weights `@name`. The folded form (for people) prints what
repeats once; the unfolded one (hashed by `digest`) prints everything, with the content hash of each weight.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from aropt.ir.control import Call, Control, If, Loop, Seq
from aropt.ir.fold_text import folded
from aropt.ir.program import Graph, Program, Spec
from aropt.ir.torch_compat import dim_text

WIDTH = 120
# other entries of `meta` are about files and examples
META = (
    "modality", "vocab", "input_vocab", "capacity", "null", "unit", "single", "eos", "defaults", "loop", "mask",
    "block", "rules", "ragged", "masks",
)  # fmt: skip
SHORT = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
}  # fmt: skip


def text(program: Program, fold: bool = True) -> str:
    """The whole program as text: header, control, then the graphs in order."""
    return "\n".join("".join(line + "\n" for line in lines) for lines in sections(program, fold).values())


def graph_text(graph: Graph, weights: Mapping[str, Tensor], fold: bool = True) -> str:
    """One graph as text. Weights show their type where first used."""
    return "".join(line + "\n" for line in lines_of(graph, weights, fold))


def digest(program: Program) -> str:
    """sha256 of the unfolded text: same graphs, control, state, ledger and weights, same digest.

    What passes measured, paths and the executor are left out.
    """
    return hashlib.sha256(text(program, fold=False).encode()).hexdigest()


def diff(before: Program, after: Program) -> str:
    """A unified diff for each part that changed; nodes that correspond bear the number they had before.

    Of a graph that is gone, only the name is shown.
    """
    old, new = sections(before, True), sections(after, True)
    parts: list[str] = []
    for name in dict.fromkeys([*old, *new]):
        first = old.get(name, [])
        if name not in new:
            parts += [f"--- before: {name}", f"+++ after: nothing ({len(first)} lines removed)"]
            continue
        second = renumbered(first, new[name]) if first else new[name]
        parts.extend(difflib.unified_diff(first, second, f"before: {name}", f"after: {name}", lineterm=""))
    return "".join(part + "\n" for part in parts)


def sections(program: Program, fold: bool) -> dict[str, list[str]]:
    """The lines of each part of the text."""
    parts = {"program": folded(header(program)) if fold else list(header(program))}
    for graph in program.graphs.values():
        parts[f"graph {graph.name}"] = lines_of(graph, program.weights, fold)
    return parts


# --- header and control ----------------------------------------------------------------------------------------------


def header(program: Program) -> Iterator[str]:
    yield f"program {program.name}"
    for name, given in program.inputs.items():
        yield f"  input %{name}: {spec_text(given.spec)}" + ("" if given.default is None else f" = {given.default}")
    for name, state in program.state.items():
        axis = "" if state.axis is None else f" axis {state.axis}"
        init = "" if state.init is None else f" = {state.init}"
        yield f"  state %{name}: {state.kind} {spec_text(state.spec)}{axis}{init}"
    for name in program.outputs:
        yield f"  output %{name}"
    known = dict(program.meta)
    for key in (key for key in META if key in known):
        yield f"  meta {key} = {json.dumps(known[key], sort_keys=True)}"
    for entry in program.ledger:
        options = "".join(f" {key}={json.dumps(value, sort_keys=True)}" for key, value in sorted(entry.options.items()))
        yield f"  ledger {entry.name} {entry.level}{options}"
    yield "  control"
    yield from control_lines(program.control, " " * 4)


def control_lines(control: Control, indent: str) -> Iterator[str]:
    """The control as an indented tree."""
    deeper = indent + "  "
    match control:
        case Call(graph, reads, writes):
            pairs = [[f"%{v}" if n == v else f"{n}=%{v}" for n, v in side.items()] for side in (reads, writes)]
            yield from wrap(f"{indent}call {graph}", *pairs)
        case Seq(body):
            yield f"{indent}seq"
            for part in body:
                yield from control_lines(part, deeper)
        case If(cond, then, orelse):
            yield f"{indent}if %{cond}"
            yield from control_lines(then, deeper)
            yield f"{indent}else"
            yield from control_lines(orelse, deeper)
        case Loop(kind, until, body, emits, params):
            given = "".join(f" {k}={v}" for k, v in params.items())
            kept = "".join(f" emits %{value} as %{name}" for value, name in emits.items())
            roles = [(role, getattr(control, role)) for role in ("decides", "evidence", "at")]
            told = "".join(f" {role} %{name}" for role, name in roles if name) + " internal" * control.internal
            told += f" drawn {control.drawn}" if control.drawn else ""
            told += " drafts " + " ".join(f"%{name}" for name in control.drafts) if control.drafts else ""
            yield f"{indent}loop {kind}{given} until %{until}{told}{kept}"
            yield from control_lines(body, deeper)


def wrap(head: str, left: Sequence[str], right: Sequence[str]) -> Iterator[str]:
    """head(left) -> (right), over several lines if it's long."""
    line = f"{head}({', '.join(left)}) -> ({', '.join(right)})"
    if len(line) <= WIDTH:
        yield line
        return
    margin = " " * (len(head) - len(head.lstrip()))
    yield f"{head}("
    yield from (f"{margin}    {item}" for item in left)
    yield f"{margin}) -> ("
    yield from (f"{margin}    {item}" for item in right)
    yield f"{margin})"


# --- graphs ----------------------------------------------------------------------------------------------------------


def lines_of(graph: Graph, weights: Mapping[str, Tensor], fold: bool) -> list[str]:
    lines = graph_lines(graph, weights, hashes=not fold)
    return folded(lines) if fold else list(lines)


def graph_lines(graph: Graph, weights: Mapping[str, Tensor], hashes: bool) -> Iterator[str]:
    inputs = [f"%{name}: {spec_text(spec)}" for name, spec in graph.inputs.items()]
    shared = {o: f" in %{i}" for o, i in graph.aliases.items()}
    outputs = [f"{name}: {spec_text(spec)}{shared.get(name, '')}" for name, spec in graph.outputs.items()]
    yield from wrap(f"graph {graph.name}: {graph.role}", inputs, outputs)
    yield from (f"  {part}" for line in node_lines(graph, weights, hashes).values() for part in line.split("\n"))


def node_lines(graph: Graph, weights: Mapping[str, Tensor], hashes: bool = False) -> dict[fx.Node | str, str]:
    """{call: its line, output name: its return line}."""
    names = symbol_names(graph)
    ids: dict[fx.Node, str] = {}
    typed: set[str] = set()
    lines: dict[fx.Node | str, str] = {}

    def show(node: fx.Node) -> str:
        if node.op != "get_attr":
            return ids.get(node, f"%{node.name}")
        name = str(node.target)
        if name in typed or name not in weights:
            return f"@{name}"
        typed.add(name)
        return f"@{name}: {value_text(weights[name], {})}" + (f" #{content_hash(weights[name])}" if hashes else "")

    for node in graph.fx.nodes:
        if node.op == "call_function":
            args = [arg_text(a, show) for a in node.args] + [f"{k}={arg_text(a, show)}" for k, a in node.kwargs.items()]
            ids[node], kind = f"%{len(ids)}", value_text(node.meta.get("val"), names)
            lines[node] = f"{ids[node]}: {kind} = {op_text(node.target)}({', '.join(args)})"
    for name, node in zip(graph.outputs, graph.results()):
        lines[name] = f"return {name} = {arg_text(node, show)}"
    return lines


def symbol_names(graph: Graph) -> dict[Any, str]:
    """{symbol of the graph's fake values: its name in the graph's inputs}."""
    names: dict[Any, str] = {}
    for node in graph.fx.nodes:
        if node.op == "placeholder" and node.name in graph.inputs and isinstance(node.meta.get("val"), Tensor):
            for dim, size in zip(graph.inputs[node.name].dims, node.meta["val"].shape):
                if isinstance(dim, str) and isinstance(size, torch.SymInt):
                    names.setdefault(size.node.expr, dim)
    return names


def spec_text(spec: Spec) -> str:
    return f"{dtype_text(spec.dtype)}[{', '.join(map(str, spec.dims))}]"


def dtype_text(dtype: torch.dtype) -> str:
    return SHORT.get(dtype, str(dtype).removeprefix("torch."))


def value_text(value: Any, names: Mapping[Any, str]) -> str:
    """The type of a fake value."""
    if isinstance(value, Tensor):
        return f"{dtype_text(value.dtype)}[{', '.join(str(dim_text(s, names)) for s in value.shape)}]"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(value_text(v, names) for v in value)})"
    if isinstance(value, (torch.SymInt, int)) and not isinstance(value, bool):
        return f"int {dim_text(value, names)}"
    return {bool: "bool", float: "float", torch.SymBool: "bool", torch.SymFloat: "float"}.get(type(value), "?")


def op_text(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return f"operator.{getattr(target, '__name__', '?')}"


def arg_text(value: Any, show: Callable[[fx.Node], str]) -> str:
    """An argument as text: never an address or a module path."""
    if isinstance(value, fx.Node):
        return show(value)
    if isinstance(value, (list, tuple)):
        inner = ", ".join(arg_text(v, show) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if isinstance(value, torch.dtype):
        return dtype_text(value)
    if isinstance(value, str) and "\n" in value:  # the body of a scan, below its call
        return "\n    " + value.replace("\n", "\n    ") + "\n  "
    if isinstance(value, str):
        return json.dumps(value)
    return str(value).removeprefix("torch.")


def content_hash(value: Tensor) -> str:
    """8 hex digits over the bytes."""
    data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()[:8]


# --- diff ------------------------------------------------------------------------------------------------------------


def renumbered(before: list[str], after: list[str]) -> list[str]:
    """`after` with the ids of corresponding lines of `before`; ids without a counterpart get a prime."""
    old, new = [[re.sub(r"%\d+\b", "%", line) for line in lines] for lines in (before, after)]
    ids: dict[str, str] = {}
    for block in difflib.SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks():
        for i in range(block.size):
            pair = [re.match(r"\s*%(\d+):", lines[at + i]) for lines, at in ((before, block.a), (after, block.b))]
            if pair[0] and pair[1]:
                ids[pair[1][1]] = pair[0][1]
    return [re.sub(r"%(\d+)\b", lambda m: f"%{ids[m[1]]}" if m[1] in ids else f"%{m[1]}'", line) for line in after]
