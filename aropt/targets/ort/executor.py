"""Runs a program's graphs as sessions, state bound to them and updated in place.

Where its plan says so, another session runs several rounds a call, on the same buffers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aropt.errors import Unsupported
from aropt.ir.control import Call, Loop, calls, loops
from aropt.ir.dims import resolve
from aropt.ir.executor import Executor, OnRound, Values
from aropt.ir.interpreter import Eager, most_rounds
from aropt.ir.program import Program, StateSpec, donated
from aropt.targets.ort import multi_step, single_call
from aropt.targets.ort.files import file
from aropt.targets.ort.graphs import hot_graphs, starting_graphs
from aropt.targets.ort.pick import pick
from aropt.targets.ort.plan import Plan, Planned
from aropt.targets.ort.rounds import Emitted, take_turns
from aropt.targets.ort.session import SHAPES, Session
from aropt.targets.ort.single_call import SingleCall
from aropt.targets.ort.threads import options, share
from aropt.targets.scratch import Scratch


class OnnxRuntime(Planned):
    """Runs the graphs as sessions, those inside loops on buffers of their own.

    `kept`: a temporary folder that lives as long as this.
    """

    shows_values = True

    def __init__(
        self, program: Program, folder: Path, threads: int | None, plan: Plan, kept: Scratch | None = None
    ) -> None:
        self.eager = Eager(program)
        threads = threads or torch.get_num_threads()  # now: while sessions generate, torch itself has one
        self.program, self.folder, self.threads, self.plan, self.kept = program, folder, threads, plan, kept
        share(threads)
        self.sessions: dict[str, Session] = {}
        self.hot, self.aliases = hot_graphs(program), donated(program)
        self.turns = {c.graph for p in loops(program.control) for c in calls(p.body) if not isinstance(p.body, Call)}
        ran = Counter(p.body.graph for p in loops(program.control) if isinstance(p.body, Call))
        self.turns |= {graph for graph, count in ran.items() if count > 1}  # another loop runs in between
        self.way, self.whole = plan.way, SingleCall(plan.single_call, threads) if plan.single_call else None
        self.several: dict[Path, Session] = {}
        self.states: dict[tuple[Any, ...], Tensor] = {}
        self.starts = starting_graphs(program)

    def host_threads(self) -> int:
        """One: those of the sessions wait busily, and torch's would have to wait for a core."""
        return 1

    def generate(self, inputs: Values) -> Tensor | None:
        return self.whole.generate(inputs) if self.whole is not None else None

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
        path = self.plan.multi_step.get(graph)
        if path is not None and path not in self.several:
            self.several[path] = Session(self.program.graphs[graph], self.aliases[graph], path, self.threads)
        return self.several[path] if path is not None else None

    def translated(self, graph: str) -> Any:
        """A graph's ONNX model as it was built for its session, or None."""
        import onnx_ir as ir

        path = file(self.folder, graph)
        return ir.load(path) if path.exists() else None

    def executed(self) -> dict[str, dict[str, int]]:
        return {graph: self.nodes(graph) for graph in self.hot if self.program.graphs[graph].role == "forward"}

    def nodes(self, graph: str) -> dict[str, int]:
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

    def with_plan(self, plan: Plan) -> OnnxRuntime:
        return OnnxRuntime(self.program, self.folder, self.threads, plan, self.kept)

    def stepping(self) -> OnnxRuntime:
        return self.with_plan(Plan())

    def multi_step(self, program: Program) -> OnnxRuntime:
        try:
            return self.with_plan(Plan(multi_step.build(program, self)))
        except Unsupported:  # no graph can be repeated, or it can't pay
            return self

    def single_call(self, program: Program) -> OnnxRuntime:
        kept = Scratch()
        path = Path(kept.name) / "model.onnx"
        single_call.build(program, self.stepping(), path)
        return self.with_plan(Plan(single_call=path, kept=kept))

    def tuned(self, program: Program, say: Callable[[str], None]) -> tuple[Executor, dict[str, Any]]:
        return pick(program, self, say)

    def without_probe(self, program: Program) -> OnnxRuntime:
        """The same models with fewer outputs: what validation looked at is not in the product."""
        import onnx

        for name in self.hot:
            outputs = {"out." + o for o in program.graphs[name].outputs}
            if len(outputs) < len(self.program.graphs[name].outputs):
                model = onnx.load(file(self.folder, name), load_external_data=False)
                kept = [o for o in model.graph.output if o.name in outputs]
                del model.graph.output[:]
                model.graph.output.extend(kept)
                onnx.save(model, file(self.folder, name))
        return OnnxRuntime(program, self.folder, self.threads, self.plan, self.kept)

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
