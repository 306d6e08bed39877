"""The onnxruntime target: one session a graph, state bound to it and updated in place.

Inputs and outputs are torch buffers that the session reads and writes directly. An aliased output (a cache update) is
bound to its input's own buffer, which the operator then doesn't copy. Other outputs alternate between two sets of
buffers, which are kept for the next generation of the same shape: then nothing is bound again. Where
`aropt.targets.ort.multi_step` found it to be faster, another session runs several rounds a call, on the same buffers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aropt.errors import MissingTool, Unsupported
from aropt.ir.control import Call, Control, Loop, calls, loops, rewrite
from aropt.ir.dims import resolve
from aropt.ir.interpreter import Eager, Executor, OnRound, Values, endless, most_rounds
from aropt.ir.program import Graph, Program, Spec, StateSpec, donated, growing, own_sizes, sizes_of
from aropt.rewriting.target import Target
from aropt.targets.ort import files, multi_step, single_call
from aropt.targets.ort.single_call import Whole
from aropt.targets.ort.threads import options, share
from aropt.targets.scratch import Scratch

ABLE = ("autotuning", "grouped-query-attention", "int8-drafts", "int8-weights", "multi-head-attention")
TARGET = Target("onnxruntime", "ONNX Runtime", frozenset(ABLE))
KEPT = 64  # bindings kept a graph
SHAPES = 2  # shapes of generations whose buffers are kept: each holds caches


class Session:
    """One graph's session and its bindings.

    Of several rounds it may have more outputs than the graph: an earlier round's, as `<output>@<round>`.
    `turns`: other sessions run between its calls (see `aropt.targets.ort.threads`).
    """

    def __init__(self, graph: Graph, aliases: dict[str, str], path: Path, threads: int, turns: bool = False) -> None:
        import onnxruntime as ort

        made = options(threads, turns)
        self.session = ort.InferenceSession(str(path), made, providers=["CPUExecutionProvider"])
        self.taken = {i.name for i in self.session.get_inputs()}
        base = {n: n.partition("@")[0] for n in (o.name.removeprefix("out.") for o in self.session.get_outputs())}
        self.graph = replace(graph, outputs={name: graph.outputs[output] for name, output in base.items()})
        self.aliases = {name: aliases[output] for name, output in base.items() if output in aliases}
        self.rounds = 1 + max((int(n.partition("@")[2]) + 1 for n in base if "@" in n), default=0)
        self.types = {name: numpy_type(spec) for name, spec in {**self.graph.outputs, **graph.inputs}.items()}
        self.names = list(graph.inputs)
        self.bindings: dict[tuple[Any, ...], tuple[Any, Values, Values]] = {}
        self.turn = 0
        self.own_sizes = bool(own_sizes(graph))
        self.buffers: dict[tuple[Any, ...], Tensor] = {}
        self.entries: dict[tuple[Any, ...], Values] = {}
        self.turns: dict[tuple[int, ...], Any] = {}

    def call(self, inputs: Values) -> Values:
        """A round; its results stay as they are until the one after the next."""
        if self.own_sizes:
            return {n: self.buffer(n, r.shape, r.dtype).copy_(r) for n, r in self.once(inputs).items()}
        inputs = {n: inputs[n].contiguous() for n in self.names}
        key = (self.turn, *[(t.data_ptr(), t.shape) for t in inputs.values()])
        found = self.bindings.get(key)
        if found is None:
            if len(self.bindings) >= KEPT:
                self.bindings.clear()
            found = self.bindings[key] = self.bind(inputs)
        self.turn ^= 1
        binding, outputs, _ = found
        self.session.run_with_iobinding(binding)
        return dict(outputs)

    def buffer(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Where a result goes in this turn: the same place each time, so that its readers need no new binding."""
        key = (self.turn, name, *shape)
        if key not in self.buffers:
            if len(self.buffers) >= KEPT * len(self.types):
                self.buffers.clear()
            self.buffers[key] = torch.empty(tuple(shape), dtype=dtype)
        return self.buffers[key]

    def entry(self, inputs: Values, own: Collection[str] = ()) -> Values:
        """The values in buffers that are the same each time, so that a generation like an earlier one binds nothing.

        `own`: inputs whose buffers are the same each time already, and may be kept.
        """
        key = tuple(t.shape for t in inputs.values())
        if key not in self.entries:
            if len(self.entries) >= SHAPES:  # caches are large, and bindings and turns hold them too
                for kept_values in (self.entries, self.bindings, self.turns, self.buffers):
                    kept_values.clear()
            self.entries[key] = {n: t if n in own else torch.empty_like(t) for n, t in inputs.items()}
        for name, kept in self.entries[key].items():
            if kept is not inputs[name]:
                kept.copy_(inputs[name])
        self.turn = 0
        return dict(self.entries[key])

    def once(self, inputs: Values) -> Values:
        """A call without bindings, for what runs once a generation: its buffers never come back."""
        feeds = {n: v.numpy() for n, v in inputs.items() if n in self.taken}
        results = self.session.run(None, feeds)
        return {n: torch.from_numpy(r) for n, r in zip(self.graph.outputs, results, strict=True)}

    def bind(self, inputs: Values, given: Values | None = None) -> tuple[Any, Values, Values]:
        """A binding for these buffers, and the outputs' buffers: those given, else new ones."""
        binding = self.session.io_binding()
        inputs = {n: t.contiguous() for n, t in inputs.items()}
        sizes = sizes_of(self.graph.inputs, inputs)
        outputs: Values = {}
        for name, value in inputs.items():
            if name in self.taken:
                binding.bind_input(name, "cpu", 0, self.types[name], tuple(value.shape), pointer(value))
        for name, spec in self.graph.outputs.items():
            alias = self.aliases.get(name)
            shape = [resolve(d, sizes) for d in spec.dims]
            known = inputs[alias] if alias else (given or {}).get(name)
            value = self.buffer(name, shape, spec.dtype) if known is None else known
            binding.bind_output("out." + name, "cpu", 0, self.types[name], tuple(value.shape), pointer(value))
            outputs[name] = value
        return binding, outputs, inputs  # the inputs stay alive as long as their binding


def pointer(value: Tensor) -> int:
    return value.data_ptr() or torch.empty(1).data_ptr()


def numpy_type(spec: Spec) -> Any:
    import numpy as np

    return np.dtype(str(spec.dtype).removeprefix("torch.").replace("bool", "bool_"))


class OnnxRuntime:
    """Runs the graphs as sessions, those inside loops on buffers of their own."""

    def __init__(self, program: Program, folder: Path, threads: int | None) -> None:
        self.eager = Eager(program)
        threads = threads or torch.get_num_threads()  # now: while sessions generate, torch itself has one
        self.program, self.folder, self.threads = program, folder, threads
        share(threads)
        self.sessions: dict[str, Session] = {}
        self.hot, self.aliases = hot_graphs(program), donated(program)
        self.turns = {c.graph for p in loops(program.control) for c in calls(p.body) if not isinstance(p.body, Call)}
        ran = Counter(p.body.graph for p in loops(program.control) if isinstance(p.body, Call))
        self.turns |= {graph for graph, count in ran.items() if count > 1}  # another loop runs in between
        self.host_threads = 1  # of torch, while sessions generate
        self.kept: Any = None  # a temporary folder that lives as long as this
        self.whole = Whole(single_call.file(folder), threads) if single_call.file(folder).exists() else None
        self.rounds = multi_step.files(folder, self.hot)  # graphs that have models of several rounds
        self.several: dict[Path, Session] = {}
        self.ran = ""  # the graph of the last loop
        self.states: dict[tuple[Any, ...], Tensor] = {}
        self.starts = starting_graphs(program)

    def call(self, graph: str, inputs: Values) -> Values:
        if graph in self.hot:
            return self.session(graph).call(inputs)
        if graph not in self.sessions and not file(self.folder, graph).exists():
            return self.eager.call(graph, inputs)
        session = self.session(graph)
        return session.call(session.entry(inputs)) if graph in self.starts else session.once(inputs)

    def create(self, name: str, state: StateSpec, sizes: Mapping[str, int]) -> Tensor:
        """An initial value, in a buffer that generations of these sizes share."""
        shape = tuple(resolve(d, sizes) for d in state.spec.dims)
        if (name, shape) not in self.states:
            if sum(known == name for known, _ in self.states) >= SHAPES:
                self.states.clear()
            self.states[name, shape] = state.create(sizes)
        return self.states[name, shape].fill_(state.init or 0)

    def loop(self, control: Loop, values: Values, on_round: OnRound | None) -> bool:
        """Runs a loop over one graph; its rounds cost the host little more than ONNX Runtime's call.

        The prompt's round runs as any call, and so do all that `on_round` wants to see. After them two sets of buffers
        take turns: a round reads one and writes the other, through bindings made once. Where `on_round` sees none, a
        session of several rounds runs them, if there is one: another session's threads would first have to wake up.
        """
        call = control.body
        if not isinstance(call, Call) or call.graph not in self.hot or bool(values[control.until]):
            return False
        kept = {id(t) for t in self.states.values()}
        own = [name for name, value in call.reads.items() if id(values[value]) in kept]
        self.ran, session = call.graph, self.more(call.graph) if on_round is None else None
        left = int(values[control.params["limit"]]) if session else 0
        if session is None or left < session.rounds:
            session = self.session(call.graph)
        spare = multi_step.spare(self.program, call, values) if session.rounds > 1 else 0
        emitted = Emitted(control, call, left, spare, most_rounds(values))
        reads = session.entry({name: values[value] for name, value in call.reads.items()}, own)
        done = False
        while not done:
            outputs = session.call(reads)
            values.update({value: outputs[o] for o, value in call.writes.items()})
            if on_round is not None and on_round(values) is False:
                on_round = None
            emitted.keep(emitted.rows_of(outputs, session.rounds))
            done = bool(values[control.until])
            while on_round is None and not done:  # a second time for the last rounds, fewer than the session runs
                reads |= {name: values[value] for name, value in call.reads.items() if value in call.writes.values()}
                session = session if emitted.fit(session.rounds) else self.session(call.graph)
                done = take_turns(session, call, control, reads, values, emitted)
            reads |= {name: values[value] for name, value in call.reads.items() if value in call.writes.values()}
        values.update(emitted.stacked())
        return True

    def session(self, graph: str) -> Session:
        if graph not in self.sessions:
            spec = self.program.graphs[graph]
            threads = self.threads if graph in self.hot and spec.weights() else 1  # what runs once is small
            path, turns = file(self.folder, graph), graph in self.turns
            self.sessions[graph] = Session(spec, self.aliases[graph], path, threads, turns)
        return self.sessions[graph]

    def more(self, graph: str) -> Session | None:
        """The session that runs several rounds of a graph a call, if there is one."""
        path = self.rounds.get(graph)
        if path is not None and path not in self.several:
            self.several[path] = Session(self.program.graphs[graph], self.aliases[graph], path, self.threads)
        return self.several[path] if path is not None else None

    def translated(self, graph: str) -> Any:
        """A graph's ONNX model as it was built for its session, or None."""
        import onnx_ir as ir

        path = file(self.folder, graph)
        return ir.load(path) if path.exists() else None

    def executed(self, graph: str) -> dict[str, int]:
        """Kinds of nodes that a graph's session runs, read back after ONNX Runtime's optimization: {kind: count}."""
        import onnx
        import onnxruntime as ort

        with Scratch() as folder:
            made = options(self.threads)
            made.optimized_model_filepath = str(Path(folder) / "model.onnx")
            made.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
            ort.InferenceSession(str(file(self.folder, graph)), made, providers=["CPUExecutionProvider"])
            model = onnx.load(made.optimized_model_filepath, load_external_data=False)
        return dict(Counter(node.op_type for node in model.graph.node).most_common())

    def like(self, several: dict[str, Path], one: Whole | None) -> OnnxRuntime:
        """The same with other ways to generate, and sessions of its own."""
        other = OnnxRuntime(self.program, self.folder, self.threads)
        other.rounds, other.whole, other.kept = several, one, self.kept
        return other

    def without(self, output: str) -> OnnxRuntime:
        """The same sessions with an output less: what validation looked at is not in the product."""
        import onnx

        graphs = dict(self.program.graphs)
        for name in self.hot:
            if output in graphs[name].outputs:
                model = onnx.load(file(self.folder, name), load_external_data=False)
                kept = [o for o in model.graph.output if o.name != "out." + output]
                del model.graph.output[:]
                model.graph.output.extend(kept)
                onnx.save(model, file(self.folder, name))
                graphs[name] = replace(
                    graphs[name], outputs={o: s for o, s in graphs[name].outputs.items() if o != output}
                )

        def shorter(call: Call) -> list[Control]:
            return [replace(call, writes={o: v for o, v in call.writes.items() if o in graphs[call.graph].outputs})]

        control = rewrite(self.program.control, shorter)
        executor = OnnxRuntime(self.program.replace(graphs=graphs, control=control), self.folder, self.threads)
        executor.kept = self.kept
        return executor

    def intermediates(self, graph: str, inputs: Values, names: list[str]) -> Values:
        """Values inside a graph's session by name, for localisation; those that the session still has."""
        import onnx
        import onnxruntime as ort

        if graph not in self.hot:
            return {}
        model = onnx.load(file(self.folder, graph))
        made = {o for n in model.graph.node for o in n.output}
        wanted = [n for n in names if n in made]
        if not wanted:  # as of a draft's graph: nothing of the reference computes it
            return {}
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in wanted)
        session = ort.InferenceSession(
            model.SerializeToString(), options(self.threads), providers=["CPUExecutionProvider"]
        )
        taken = {i.name for i in session.get_inputs()}
        results = session.run(wanted, {n: v.numpy() for n, v in inputs.items() if n in taken})
        return {n: torch.from_numpy(r) for n, r in zip(wanted, results, strict=True)}


class Emitted:
    """What the rounds of a loop emit. With several rounds a call: `left` until the limit, `spare` after it."""

    def __init__(self, control: Loop, call: Call, left: int, spare: int, most: int) -> None:
        self.targets = list(control.emits.values())
        self.names = [o for name in control.emits for o, value in call.writes.items() if value == name]
        self.rows: list[list[Any]] = []
        self.left, self.spare = left, spare
        self.control, self.most = control, most

    def rows_of(self, outputs: Values, count: int) -> list[list[Any]]:
        """The arrays that each of a call's rounds writes."""
        marks = [*(f"@{number}" for number in range(count - 1)), ""]
        return [[outputs[name + mark].numpy() for name in self.names] for mark in marks]

    def fit(self, count: int) -> bool:
        """Whether so many rounds may run: they are left, or the caches have slots for those that are too many."""
        return count == 1 or self.left + self.spare >= count

    def keep(self, rows: list[list[Any]]) -> None:
        """Of several rounds not those after the limit, nor those after the end, when every sequence emits -1."""
        if len(rows) > 1:
            rows, self.left = rows[: self.left], self.left - len(rows)
            while len(rows) > 1 and all((array < 0).all() for array in rows[-1]):
                rows = rows[:-1]
        self.rows.extend([array.copy() for array in arrays] for arrays in rows)
        if len(self.rows) > self.most:
            raise endless(self.control, self.most)

    def stacked(self) -> Values:
        import numpy as np

        columns = zip(*self.rows, strict=True)
        return {t: torch.from_numpy(np.stack(rows, 1)) for t, rows in zip(self.targets, columns, strict=True)}


def take_turns(session: Session, call: Call, control: Loop, reads: Values, values: Values, emitted: Emitted) -> bool:
    """Calls after one that left its results in `values` and what the next one reads in `reads`.

    Until done, which is returned, or until fewer rounds are left than the session runs.
    """
    key = tuple(t.data_ptr() for t in reads.values())
    if key not in session.turns:
        session.turns[key] = two_sides(session, call, control, reads, values, emitted)
    run, sides, turn, done = session.session.run_with_iobinding, session.turns[key], 0, False
    named: Values = {}
    while not done and emitted.fit(session.rounds):
        binding, named, finished, rows, _ = sides[turn]
        run(binding)
        emitted.keep(rows)
        done, turn = bool(finished), turn ^ 1
    values.update(named)
    return done


def two_sides(
    session: Session, call: Call, control: Loop, reads: Values, values: Values, emitted: Emitted
) -> list[Any]:
    """A call from the results in `values` to other buffers, and one back: (binding, results, until, emitted) each."""
    first = {o: values[value] for o, value in call.writes.items()}
    there, second, _ = session.bind(reads)
    readers = {value: name for name, value in call.reads.items()}
    fed = {readers[value]: second[o] for o, value in call.writes.items() if value in readers}
    back, third, _ = session.bind(reads | fed, first)
    sides = []
    for binding, outputs in ((there, second), (back, third)):
        named = {value: outputs[o] for o, value in call.writes.items()}
        rows = emitted.rows_of(outputs, session.rounds)
        sides.append((binding, named, named[control.until].numpy(), rows, reads))  # the last, to stay alive
    return sides


def hot_graphs(program: Program) -> list[str]:
    """Graphs that run in a loop, once each; not those that make a value longer in each round."""
    found = {c.graph: c for loop in loops(program.control) for c in calls(loop.body)}
    return [name for name, call in found.items() if not growing(call, program.graphs[name])]


def starting_graphs(program: Program) -> set[str]:
    """Graphs that run once a generation, whose results nobody has after it: the next one may overwrite them."""
    found = Counter(c.graph for c in calls(program.control))
    results = {c.graph for c in calls(program.control) if set(c.writes.values()) & set(program.outputs)}
    results |= {c.graph for loop in loops(program.control) for c in calls(loop.body)}
    return {g for g, n in found.items() if n == 1 and g not in results and not own_sizes(program.graphs[g])}


def file(folder: Path, graph: str) -> Path:
    return folder / "models" / graph / "onnxruntime" / "model.onnx"


def build(program: Program, folder: Path | None, progress: Callable[[str], None], threads: int | None) -> Executor:
    """Exports the graphs that are missing in `folder` (a temporary one by default)."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise MissingTool(
            what="ONNX Runtime is not installed", why=str(error), hint="pip install 'aropt[onnx]'"
        ) from error
    kept = None
    if folder is None:
        kept = Scratch()
        folder = Path(kept.name)
    hot = hot_graphs(program)
    read = program.home == str(folder)  # nothing is written into an artifact that is read
    if read:
        files.check(program, folder)
    for name in [*hot, *(g for g in program.graphs if g not in hot)]:
        if read and name in hot and not file(folder, name).exists():
            files.refuse(file(folder, name), "it is missing")
        if not read and not file(folder, name).exists():
            from aropt.exporters.onnx import export

            progress(f"export {name}")
            try:
                export(program.graphs[name], program.weights, file(folder, name), contrib=True)
            except Unsupported:
                if name in hot:  # others run eagerly
                    raise
    executor = OnnxRuntime(program, folder, threads)
    executor.kept = kept
    return executor
