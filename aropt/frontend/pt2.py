"""Programs that torch.export saved: what they take and return, and for which lengths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree

from aropt.errors import Unsupported
from aropt.frontend.export import quiet
from aropt.frontend.forwards import logits_in
from aropt.frontend.trace import check_rows, from_exported
from aropt.ir.program import Graph, Spec

SHORTEST = 2  # torch tells 0 and 1 from no other size: a range from 2 on holds for 1 too


def capture_exported(exported: ExportedProgram) -> tuple[Graph, dict[str, Tensor]]:
    """As capture_model, from a program that torch.export made: one input ids[B, T], logits among its results."""
    given_ids(exported)
    with torch.no_grad(), quiet():
        functional = exported.run_decompositions({})
    ids = {"ids": Spec(torch.int64, ("B", "T"))}
    graph, weights = from_exported("model", functional, ids, ["logits"], logits_index(exported))
    check_rows(graph)
    return graph, weights


def given_ids(exported: ExportedProgram) -> fx.Node:
    """The input. Raises Unsupported unless the program takes ids[B, T] alone, with both sizes dynamic."""
    given = [n for n in exported.graph.nodes if n.name in exported.graph_signature.user_inputs]
    shape = getattr(given[0].meta.get("val"), "shape", ()) if len(given) == 1 else ()
    if len(shape) != 2:
        raise Unsupported(
            what="the exported program does not take ids alone",
            where=", ".join(n.name for n in given),
            why="aropt needs forward(ids[batch, length])",
            hint="export a module whose forward takes ids only",
        )
    fixed = [name for name, size in zip(("batch", "length"), shape, strict=True) if isinstance(size, int)]
    if fixed:
        raise Unsupported(
            what=f"the exported program fixes the {' and the '.join(fixed)}",
            where=given[0].name,
            why=f"ids have shape {list(shape)}",
            hint="export with dynamic_shapes=({0: Dim('b'), 1: Dim('s')},)",
        )
    found: fx.Node = given[0]
    return found


def most(exported: ExportedProgram, axis: int) -> int | None:
    """The largest batch (axis 0) or length (axis 1) that the program was exported for; None where nothing bounds it.

    Raises Unsupported where it leaves out sizes below that.
    """
    node, name = given_ids(exported), ("batch", "length")[axis]
    size: Any = node.meta["val"].shape[axis].node.expr
    allowed = exported.range_constraints.get(size)
    if not size.is_Symbol or (allowed is not None and allowed.lower > SHORTEST):
        raise Unsupported(
            what=f"the exported program does not take every {name}",
            where=node.name,
            why=f"its {name} is {size}" if not size.is_Symbol else f"its {name} is at least {allowed.lower}",
            hint=f"export it with Dim('{name}') alone, or with a maximum: a generation begins with one id",
        )
    return int(allowed.upper) if allowed is not None and allowed.upper.is_Integer else None


def logits_index(exported: ExportedProgram) -> int:
    """Which of the program's results are its logits. Raises Unsupported where none are."""
    spec = exported.call_spec.out_spec
    assert spec is not None
    results = [s.arg for s in exported.graph_signature.output_specs][-spec.num_leaves :]
    held = [i if hasattr(arg, "name") and arg.name else None for i, arg in enumerate(results)]  # others are constants
    found: int = logits_in(_pytree.tree_unflatten(held, spec), int)
    return found
