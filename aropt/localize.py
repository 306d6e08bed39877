"""Localisation: which op is the first to differ, by its module path (design section 7).

Nodes of a restricted graph remember the node of the captured forward that they came from ("origin"). Both are run on
the failing case and compared value by value, each against its own noise floor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from aropt.axes import op_name
from aropt.interpreter import Eager, Executor, Values, run
from aropt.program import Graph, Program
from aropt.runtime import make_inputs, slots

if TYPE_CHECKING:
    from aropt.validate import Case, Oracle


class Recorder(Eager):
    """Executes eagerly and keeps every node's value of the latest call of each graph."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.values: dict[str, dict[fx.Node, Any]] = {}
        self.rounds: list[dict[str, dict[fx.Node, Any]]] = []

    def call(self, graph: str, inputs: Values) -> Values:
        g = self.program.graphs[graph]
        found = node_values(g, [inputs[n] for n in g.inputs], {w: self.program.weights[w] for w in g.weights()})
        self.values[graph] = found
        return {o: found[n] for o, n in zip(g.outputs, g.results(), strict=True)}


def node_values(graph: Graph, inputs: list[Tensor], weights: dict[str, Tensor]) -> dict[fx.Node, Any]:
    """Every node's value."""
    module = fx.GraphModule(graph.bind(weights), graph.fx)
    found: dict[fx.Node, Any] = {}

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            found[n] = super().run_node(n)
            return found[n]

    with torch.no_grad():
        Keep(module, garbage_collect_values=False).run(*inputs)
    return found


def localize(oracle: Oracle, candidate: Program, executor: Executor, case: Case) -> dict[str, Any] | None:
    """The first op that differs: {module, node, op, error, round, case}. None: the graphs agree op by op."""
    found = first_in_program(oracle, candidate, case)
    if found is None:
        found = first_in_target(candidate, executor, case)
    if found is None:
        return {"module": "", "node": "", "op": "", "error": 0.0, "where": "outside the model: rule, loop or state",
                "repro": case.repro("program")}  # fmt: skip
    return {**found, "repro": case.repro("program")}


def first_in_program(oracle: Oracle, candidate: Program, case: Case) -> dict[str, Any] | None:
    """Compares the candidate's graphs, run eagerly, with the captured forward."""
    prompt = case.prompts[0]
    recorder = Recorder(candidate)
    inputs = make_inputs(candidate, [prompt], case.n, case.seed, case.stop, [0], None, dict(case.params))
    rounds: list[dict[fx.Node, Any]] = []
    tokens: list[int] = []

    def keep(values: Values) -> None:
        rounds.append({n: v for graph in recorder.values.values() for n, v in graph.items() if "origin" in n.meta})
        tokens.append(int(values["token"][0]) if "token" in values else int(values["emitted"][0]))

    run(candidate, inputs, slots(candidate, inputs), recorder, keep)
    captured = oracle.program.graphs[oracle.model.graph]
    weights = {w: oracle.program.weights[w] for w in captured.weights()}
    by_name = {n.name: n for n in captured.fx.nodes}
    full = list(prompt)
    for number, mine in enumerate(rounds):
        ids = torch.tensor([full])
        single = node_values(captured, [ids], weights)
        exact = exact_values(oracle, captured, ids)
        for node, value in mine.items():
            origin = by_name.get(node.meta["origin"])
            if origin is None or not isinstance(value, Tensor) or not value.is_floating_point():
                continue
            error, floor = distance(value, single[origin], exact[origin])
            if error > 16 * floor:
                return {"module": node.meta.get("where", ""), "node": node.name, "op": op_name(node), "error": error,
                        "floor": floor, "round": number}  # fmt: skip
        full.append(max(tokens[number], 0))
    return None


def exact_values(oracle: Oracle, captured: Graph, ids: Tensor) -> dict[fx.Node, Any]:
    """The captured forward's values in fp64, by the nodes of the fp32 graph."""
    found: dict[fx.Node, Any] = {}
    twins = dict(zip(oracle.exact.graph.nodes, captured.fx.nodes, strict=True))

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            found[twins[n]] = super().run_node(n)
            return found[twins[n]]

    with torch.no_grad():
        Keep(oracle.exact, garbage_collect_values=False).run(ids)
    return found


def distance(mine: Tensor, theirs: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest difference over the rows that both have, and the noise floor of that value."""
    eps = torch.finfo(torch.float32).eps
    if mine.dim() != theirs.dim():
        return 0.0, 1.0
    for axis, (a, b) in enumerate(zip(mine.shape, theirs.shape, strict=True)):
        if a < b:  # rows: the candidate has the last ones
            theirs, exact = theirs.narrow(axis, b - a, a), exact.narrow(axis, b - a, a)
        elif a > b:  # columns: the candidate has more slots
            mine = mine.narrow(axis, 0, b)
    finite = torch.isfinite(theirs) & torch.isfinite(exact)
    if not finite.any():
        return 0.0, 1.0
    mine, theirs, exact = (x[finite].double() for x in (mine, theirs, exact))
    floor = max(float((theirs - exact).abs().max()), 4 * eps * float(theirs.abs().max()), 1e-30)
    error = (mine - theirs).abs().max()
    return (float(error) if torch.isfinite(error) else float("inf")), floor


def first_in_target(candidate: Program, executor: Executor, case: Case) -> dict[str, Any] | None:
    """Compares what the target's graphs compute with the same graphs run eagerly, if the target can show it."""
    show = getattr(executor, "intermediates", None)
    if show is None:
        return None
    recorder = Recorder(candidate)
    inputs = make_inputs(candidate, [case.prompts[0]], case.n, case.seed, case.stop, [0], None, dict(case.params))
    problem: list[dict[str, Any]] = []

    class Both:
        def call(self, graph: str, values: Values) -> Values:
            kept = {n: v.clone() for n, v in values.items()}
            results = recorder.call(graph, values)
            names = {n.name: v for n, v in recorder.values[graph].items() if isinstance(v, Tensor) and v.is_floating_point()}
            for name, value in (show(graph, kept, list(names)) if not problem else {}).items():
                error, floor = distance(value, names[name], names[name].double()) if value.shape == names[name].shape else (0.0, 1.0)
                if error > 64 * floor and not problem:
                    node = next(n for n in recorder.values[graph] if n.name == name)
                    problem.append({"module": node.meta.get("where", ""), "node": name, "op": op_name(node), "error": error,
                                    "floor": floor, "where": f"in the target's graph {graph}"})  # fmt: skip
            return results

    run(candidate, inputs, slots(candidate, inputs), Both())
    return problem[0] if problem else None
