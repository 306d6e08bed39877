"""A whole program as one ONNX graph: it generates what the program generates, whatever the control, model or rule."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import aropt
from aropt.errors import MissingTool, Unsupported
from aropt.exporters.whole_loop import ROUNDS, export_program
from aropt.frontend.trace import capture_function
from aropt.ir.control import Call, Control, If, Loop, Seq
from aropt.ir.interpreter import run
from aropt.ir.program import Input, Program, Spec, StateSpec
from aropt.loops import rules
from aropt.loops.guards import STATUS
from aropt.loops.rules import Processor, scalar
from aropt.models.canvas import MASK
from aropt.pipeline.checks import Instruments
from aropt.pipeline.manager import run_passes
from aropt.pipeline.registry import make, pipeline
from aropt.targets.ort import run_loop
from tests.mutants.surgery import Tiny
from tests.support.canvases import tiny
from tests.support.directories import small_llama
from tests.support.run import from_session, generate

PAGE = (Path(__file__).parents[2] / "docs" / "onnx_loop.md").read_text()
I64, BOOL = torch.int64, torch.bool


def small(layers: int = 1) -> Tiny:
    """A model whose attention is fused, and whose sessions are ready at once."""
    torch.manual_seed(5)
    return Tiny(layers, groups=2, width=64, vocab=131, capacity=64)


def optimized(model: Any, **options: Any) -> Program:
    plain = aropt.capture(model, capacity=64, **options)
    return run_passes(plain, pipeline(), "onnxruntime", Instruments(check=False))[0]


@pytest.fixture(
    scope="module",
    params=["small", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in ("digits-ar", "directory", "text-ar"))],
)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Path]:
    folder = tmp_path_factory.mktemp("loop")
    named: dict[str, Any] = {"directory": lambda: small_llama(folder / "model"), "small": small}
    program = optimized(named.get(request.param, lambda: request.param)())
    for ort in (False, True):
        export_program(program, folder / ("ort.onnx" if ort else "out-onnx/model.onnx"), ort)
    return program, folder


def blocks() -> list[str]:
    """The page's Python that runs an exported loop."""
    found = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    return [code for code in found if "session.run" in code]


def asked(code: str, prompts: list[list[int]], greedy: bool) -> str:
    """The page's first block, with these prompts."""
    code = re.sub(r"prompts = .*", f"prompts = {prompts}", code)
    return re.sub(r'"greedy": np.array\(\w+\)', f'"greedy": np.array({greedy})', code)


def test_the_page(exported: tuple[Program, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's own text, in one call and in chunks, gives the program's tokens."""
    program, folder = exported
    monkeypatch.chdir(folder)
    for prompts in ([[1, 2, 3]], [[1, 2, 3], [4, 5]]):
        for greedy in (True, False):
            whole, chunks, _ = blocks()
            space: dict[str, Any] = {}
            exec(asked(whole, prompts, greedy), space)
            params: dict[str, Any] = {} if greedy else {"temperature": 0.8, "seed": 7}
            want = generate(program, prompts, int(space["inputs"]["limit"]), **params)
            assert [row[row >= 0].tolist() for row in space["tokens"]] == want
            assert space["counts"].tolist() == [len(row) for row in want]
            shown: list[Any] = []
            exec(chunks, {**space, "print": shown.append})
            assert len(shown) == -(-max(len(row) for row in want) // 8)
            assert [row[row >= 0].tolist() for row in np.concatenate(shown, 1)] == want


@functools.cache
def canvas_program(name: str, cache: str) -> Program:
    plain = aropt.capture(tiny() if name == "tiny" else name, capacity=64, rules=("threshold",), mask=MASK)
    return run_passes(make(cache).run(plain), pipeline(), "onnxruntime", Instruments(check=False))[0]


@pytest.mark.parametrize(
    ("name", "cache", "ort"),
    [pytest.param("tiny", "dual-cache", False, marks=pytest.mark.exhaustive), ("tiny", "dual-cache", True),
     pytest.param("text-mdlm", "dual-cache", True, marks=pytest.mark.exhaustive),
     pytest.param("text-bd", "block-cache", False, marks=pytest.mark.exhaustive)],
)  # fmt: skip
def test_the_page_on_canvases(
    name: str, cache: str, ort: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's text for a program that unmasks gives the program's tokens: one prompt and several, in chunks."""
    program = canvas_program(name, cache)
    assert any("slots" in g.inputs for g in program.graphs.values())
    monkeypatch.chdir(tmp_path)
    export_program(program, Path("out-onnx/model.onnx"), ort)
    start, chunks, canvas = blocks()
    own = int(program.meta.get("block") or 0)
    size = own or 8
    for prompts in ([[100, 101, 102, 32]], [[100, 101, 102, 32], [105, 102]]):
        for greedy in (True, False):
            space: dict[str, Any] = {}
            exec(asked(start.partition("tokens, counts")[0], prompts, greedy), space)
            space["inputs"] |= {"block": np.array(size), "threshold": np.array(0.3, np.float32)}
            exec(re.sub('("origin": np.array).*', r"\1([0] * len(prompts)),", canvas) if own else canvas, space)
            params = {"threshold": 0.3, **({} if greedy else {"temperature": 0.8, "seed": 7})}
            want = generate(program, prompts, space["n"], block=size, **params)
            assert [row[row >= 0].tolist() for row in space["canvases"]] == want
            shown: list[Any] = []
            exec(re.sub(r"np.array\(8\)", "np.array(2)", chunks), {**space, "print": shown.append})
            assert len(shown) > 1 and [row[row >= 0].tolist() for row in shown[-1]] == want


BAD = [
    ({"limit": 100}, 1),
    ({"lengths": [0]}, 2),
    ({"lengths": [9]}, 2),
    ({"seed": -1}, 3),
    ({"seed": 2**62}, 3),
    ({}, 0),
]


@pytest.mark.parametrize("name", ["out-onnx/model.onnx", "ort.onnx"])
def test_stop_tokens_and_bad_input(exported: tuple[Program, Path], name: str) -> None:
    """Sequences end apart, in any chunks; from what it can't take the model generates nothing, and says why."""
    program, folder = exported
    session = run_loop.session(folder / name, 1)
    prompts = [[1, 2, 3], [4, 5, 6], [7]]
    free = generate(program, prompts, 12)
    stop = [free[0][3], free[2][5]]
    want = generate(program, prompts, 12, stop=stop)
    assert want != free
    for chunk in (None, 1, 5):
        assert from_session(session, program, prompts, 12, stop=stop, chunk=chunk) == want
    assert from_session(session, program, prompts, 0) == [[], [], []]
    for change, status in BAD:
        feeds = {"prompt": [[1, 2, 3]], "lengths": [3], "limit": 4, "streams": [0], **change}
        tokens, counts, found = session.run(
            ["generated", "counts", "status"], {k: np.array(v) for k, v in feeds.items()}
        )
        assert int(found) == status and (status == 0 or status in STATUS)
        assert tokens.shape == (1, 0 if status else 4) and counts.tolist() == [0 if status else 4]


@given(
    name=st.sampled_from(["out-onnx/model.onnx", "ort.onnx"]),
    prompts=st.lists(st.lists(st.integers(0, 15), min_size=1, max_size=4), min_size=1, max_size=3),
    n=st.integers(0, 2 * ROUNDS + 3),
    chunk=st.none() | st.integers(1, 2 * ROUNDS + 3),
    stop=st.none() | st.integers(0, 2 * ROUNDS),
    sampled=st.booleans(),
)
@example("ort.onnx", [[1, 2, 3]], 2 * ROUNDS + 3, ROUNDS - 1, None, False)
@settings(max_examples=30, deadline=None)
def test_any_length_in_any_chunks(
    exported: tuple[Program, Path], name: str, prompts: Any, n: int, chunk: Any, stop: Any, sampled: bool
) -> None:
    """Rounds go several at a time as far as the limit and the chunk allow it, also past the end of a sequence."""
    program, folder = exported
    options: dict[str, Any] = {"temperature": 0.9, "seed": 3} if sampled else {}
    free = generate(program, prompts, n, **options)
    options["stop"] = [free[0][stop]] if stop is not None and stop < n else []
    want = generate(program, prompts, n, **options)
    assert from_session(session(folder / name), program, prompts, n, chunk=chunk, **options) == want
    most = {} if chunk is None else {"chunk": chunk}
    feeds = {"prompt": prompts[:1], "lengths": [len(prompts[0])], "limit": n, "streams": [0], **most}
    (rows,) = session(folder / name).run(["generated"], {k: np.array(v) for k, v in feeds.items()})
    assert rows.shape == (1, min(n, chunk or n))


@functools.cache
def session(path: Path) -> Any:
    return run_loop.session(path, 1)


def bodies(graph: Any) -> Iterator[Any]:
    """The graphs of Loops."""
    import onnx

    for node in graph.node:
        for inner in (a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH):
            if node.op_type == "Loop":
                yield inner
            yield from bodies(inner)


def test_loops_have_weights_and_rounds_of_their_own(exported: tuple[Program, Path]) -> None:
    """ONNX Runtime packs no weights of graphs further out, which makes products up to ten times as slow."""
    import onnx

    for name in ("out-onnx/model.onnx", "ort.onnx"):
        found = list(bodies(onnx.load(exported[1] / name).graph))
        products = []
        for body in found:
            own = {i.name for i in body.initializer}
            linear = [n for n in body.node if n.op_type == "MatMul" and "weight" in n.input[1]]
            assert linear and all(n.input[1] in own for n in linear)
            products.append(len(linear))
        assert sorted(products)[len(products) // 2 :] == [ROUNDS * min(products)] * (len(products) // 2)


@pytest.mark.parametrize("packed", [0, 2**40])
def test_weights_are_written_once(
    exported: tuple[Program, Path], packed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where each graph's own would take room; where they would take too much memory graphs share them."""
    from aropt.exporters import onnx as single
    from aropt.exporters import whole_loop

    monkeypatch.setattr(whole_loop, "PACKED", packed)
    monkeypatch.setattr(single, "COPIES_OVER", 0)
    program, path = exported[0], tmp_path / "model.onnx"
    export_program(program, path, contrib=True)
    apart = tmp_path / "model.onnx.data"
    assert apart.exists() is (packed > 0)
    if packed:
        size = sum(w.nbytes for w in program.weights.values())
        assert 0.9 * size < apart.stat().st_size < 1.2 * size
    made = run_loop.session(path, 1)
    assert from_session(made, program, [[1, 2]], 20) == generate(program, [[1, 2]], 20)


def test_standard_operators_only(exported: tuple[Program, Path]) -> None:
    import onnx

    def domains(graph: Any) -> set[str]:
        inner = [a.g for n in graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH]
        return {n.domain for n in graph.node}.union(*map(domains, inner))

    _, folder = exported
    plain, ort = (onnx.load(folder / name) for name in ("out-onnx/model.onnx", "ort.onnx"))
    assert domains(plain.graph) == {""} and domains(ort.graph) == {"", "com.microsoft"}
    onnx.checker.check_model(plain, full_check=False)


def test_an_exported_loop_is_compared_with_its_program(exported: tuple[Program, Path]) -> None:
    from aropt.errors import VerificationFailed

    program, folder = exported
    assert run_loop.compare(folder / "ort.onnx", program)["status"] == "pass"
    name = max((w for w in program.weights if program.weights[w].dim() == 2), key=lambda w: program.weights[w].numel())
    broken = program.replace(weights={**program.weights, name: program.weights[name].flip(0)})
    with pytest.raises(VerificationFailed, match="other tokens"):
        run_loop.compare(folder / "ort.onnx", broken)


def test_a_rule_defined_here_needs_no_change_in_the_exporter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lower_even(logits: torch.Tensor, even_penalty: torch.Tensor) -> torch.Tensor:
        even = torch.arange(logits.shape[1]) % 2 == 0
        return torch.where(even, logits - even_penalty * logits.abs().amax(-1, keepdim=True), logits)

    given = {"even_penalty": scalar(torch.float32, 0.0, "takes from even tokens")}
    monkeypatch.setitem(rules.PROCESSORS, "even", Processor(given, lower_even, draws=False))
    program = optimized(small(), rules=("even", "temperature"))
    export_program(program, tmp_path / "m.onnx")
    session = run_loop.session(tmp_path / "m.onnx", 1)
    for params in ({}, {"even_penalty": 2.0}, {"even_penalty": 0.4, "temperature": 1.0, "seed": 3}):
        want = generate(program, [[1, 2], [3]], 8, **params)
        assert from_session(session, program, [[1, 2], [3]], 8, **params) == want
    assert all(t % 2 for row in generate(program, [[1, 2]], 8, even_penalty=2.0) for t in row)


def test_a_rule_without_an_onnx_form_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def odd(logits: torch.Tensor) -> torch.Tensor:
        return logits + torch.digamma(logits.abs() + 1)

    monkeypatch.setitem(rules.PROCESSORS, "odd", Processor({}, odd, draws=False))
    plain = make("kv-cache").run(aropt.capture(small(), capacity=64, rules=("odd",)))
    with pytest.raises(Unsupported, match="'greedy' has no ONNX form") as error:
        export_program(plain, tmp_path / "m.onnx")
    assert "digamma" in error.value.why
    assert not (tmp_path / "m.onnx").exists()


def test_an_old_runtime_is_named() -> None:
    with pytest.raises(MissingTool, match=r"1\.16\.3 is too old") as error:
        run_loop.check_version("1.16.3")
    assert "opset 20" in error.value.why and "1.17" in error.value.why
    run_loop.check_version("1.31.1")


# Any control: programs of a few integers, with loops in loops and branches, against the reference interpreter.

X = Spec(I64, ("B",))
GRAPHS = {
    "add": capture_function("add", lambda x, y: x + 3 * y, {"x": X, "y": X}, ["x"]),
    "swap": capture_function("swap", lambda x, y: (y + 0, x + 0), {"x": X, "y": X}, ["x", "y"]),
    "grow": capture_function("grow", lambda x, y: (x * 2 - y, y + 1), {"x": X, "y": X}, ["x", "y"]),
    "odd": capture_function("odd", lambda x: (x % 2 == 1).any(), {"x": X}, ["flag"]),
    "begin": capture_function("begin", lambda x: (x.sum() * 0, x.sum() < -(2**40)), {"x": X}, ["count", "over"]),
    "tick": capture_function("tick", lambda count: (count + 1, count >= 1), {"count": Spec(I64)}, ["count", "over"]),
}


def call(name: str, **renamed: str) -> Call:
    graph = GRAPHS[name]
    return Call(name, {n: renamed.get(n, n) for n in graph.inputs}, {n: renamed.get(n, n) for n in graph.outputs})


@st.composite
def controls(draw: Any, depth: int = 3, loop: int = 0) -> Control:
    kind = draw(st.sampled_from(["call", "call", "seq", "if", "loop"] if depth else ["call"]))
    if kind == "seq":
        return Seq(tuple(draw(st.lists(controls(depth - 1, loop), min_size=1, max_size=3))))
    if kind == "if":
        return Seq((call("odd"), If("flag", draw(controls(depth - 1, loop)), draw(controls(depth - 1, loop)))))
    if kind == "loop" and loop < 2:
        names = {"count": f"count{loop}", "over": f"over{loop}"}
        body = Seq((draw(controls(depth - 1, loop + 1)), call("tick", **names)))
        return Seq((call("begin", **names), Loop("positions", names["over"], body)))
    return call(draw(st.sampled_from(["add", "swap", "grow"])))


@settings(max_examples=12, deadline=None)
@given(controls(), st.lists(st.integers(-9, 9), min_size=1, max_size=3))
def test_any_control_has_one_lowering(
    tmp_path_factory: pytest.TempPathFactory, body: Control, start: list[int]
) -> None:
    """The last loop emits x in each round; loops nest, and branches write different values."""
    last = Loop("positions", "over0", Seq((body, call("tick", count="count0", over="over0"))), {"x": "generated"})
    names = {"count": "count0", "over": "over0"}
    prelude = (call("begin", **names), call("begin", count="count1", over="over1"), call("odd"))
    state = {n: StateSpec("counter", X) for n in ("x", "y")} | {"flag": StateSpec("flag", Spec(BOOL))}
    state |= {f"count{i}": StateSpec("counter", Spec(I64)) for i in (0, 1)} | {
        f"over{i}": StateSpec("flag", Spec(BOOL)) for i in (0, 1)
    }
    copy = capture_function("copy", lambda a, b: (a + 0, b + 0), {"a": X, "b": X}, ["x", "y"])
    first = Call("copy", {"a": "a", "b": "b"}, {"x": "x", "y": "y"})
    inputs = {"a": Input(X), "b": Input(X)}
    control = Seq((first, *prelude, body, *prelude[:2], last))
    program = Program("any", {**GRAPHS, "copy": copy}, inputs, state, control, ("generated",), {}, {"capacity": 8})
    values = {"a": torch.tensor(start), "b": torch.arange(len(start))}
    want = run(program, values, 0)["generated"]
    path = tmp_path_factory.mktemp("control") / "m.onnx"
    export_program(program, path)
    got = run_loop.session(path, 1).run(["generated"], {n: v.numpy() for n, v in values.items()})[0]
    assert got.tolist() == want.tolist()
