"""torch's `scan` of a captured forward as `aropt::scan`, its body as text; what of it has no state is refused by name.

torch scans [T, B, ...] and returns the carry first. The op has [B, T, ...] and returns it last, so that rows lie as
those of any other op; where the model itself swapped these axes, both swaps go.
"""

from __future__ import annotations

import operator
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import fx, nn

from aropt.errors import Unsupported
from aropt.ir import ops

aten = torch.ops.aten
HINT = "scan over the sequence, from its first row to its last: docs/adding_a_mixer.md"
FILLED: dict[Any, int] = {
    aten.zeros_like.default: 0,
    aten.ones_like.default: 1,
}  # of what is there before any row: sizes alone count
Copy = Callable[[fx.Graph, fx.Node, dict[fx.Node, Any]], None]  # a call, copied into a graph


def is_scan(node: fx.Node) -> bool:
    return node.target is torch.ops.higher_order.scan


def place(node: fx.Node) -> str:
    """The module that calls it, with its class."""
    stack = node.meta.get("nn_module_stack") or {}
    path, kind = list(stack.values())[-1] if stack else ("", "")
    kind = kind if isinstance(kind, str) else kind.__name__
    return f"{path.removeprefix('model.') or 'the top level'} ({kind.rsplit('.')[-1]})"


def refuse(node: fx.Node, why: str, hint: str = HINT) -> NoReturn:
    raise Unsupported(
        what="a scan of the model can't be a recurrence over the sequence", where=place(node), why=why, hint=hint
    )


def copy_scan(
    graph: fx.Graph, node: fx.Node, copied: dict[fx.Node, Any], root: nn.Module, sizes: Mapping[str, Any], copy: Copy
) -> list[fx.Node]:
    """The scan's results, carries first, each as a node of the new graph. `sizes`: B and T of the forward.

    Raises Unsupported where it runs over anything but the sequence, or has a carry that is no state.
    """
    combine, init, xs, extra = (*node.args, ())[:4]
    known_extra: Any = extra
    assert isinstance(combine, fx.Node) and isinstance(init, list) and isinstance(xs, list)
    batch, length = (str(sizes.get(name)) for name in "BT")
    for x in xs:
        shape = x.meta["val"].shape
        if x.target is aten.flip.default and 0 in x.args[1]:
            refuse(node, "it runs from the last row to the first, so that each row depends on later ones")
        if str(shape[0]) != length:
            refuse(node, f"it runs over an axis of size {shape[0]}, which is not the sequence")
        if len(shape) < 2 or str(shape[1]) != batch:
            refuse(
                node, "a row of its xs does not begin with the batch", "scan over xs [T, B, ...], or dim=1 of [B, T]"
            )
    for one in init:
        shape = one.meta["val"].shape
        if not shape or str(shape[0]) != batch or not all(isinstance(n, int) for n in shape[1:]):
            refuse(node, f"a carry has shape [{', '.join(map(str, shape))}], and a state is [B, ...] of fixed sizes",
                   "give each carry the batch first, and no size that depends on the length")  # fmt: skip
    if not xs or not init:
        refuse(node, "it has no carry, or no xs", "compute it without a scan, or scan over rows of the sequence")
    body, known = body_of(node, getattr(root, str(combine.target)), len(init), list(known_extra), batch, copy)
    swapped = [call(graph, aten.transpose.int, copied[x], 0, 1) for x in xs]
    start = [shaped(graph, one, copied) for one in init]
    scan = call(graph, ops.load("scan").overload, body, start, swapped, [copied[e] for e in known], [], None)
    scan.meta = {"where": place(node), "origin": node.name}
    each: Any = node.meta["val"]
    ys = [call(graph, operator.getitem, scan, i) for i in range(len(each) - len(init))]
    carries = [call(graph, operator.getitem, scan, len(ys) + i) for i in range(len(init))]
    return [*carries, *(call(graph, aten.transpose.int, y, 0, 1) for y in ys)]


def call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    return graph.call_function(target, args)


def shaped(graph: fx.Graph, node: fx.Node, copied: Mapping[fx.Node, Any]) -> fx.Node:
    """An initial carry; zeros like a row are zeros of its sizes, whatever the row holds."""
    value = node.meta["val"]
    filled = node.args[1] if node.target is aten.full_like.default else FILLED.get(node.target)
    if filled is None:
        found: fx.Node = copied[node]
        return found
    source = next(n for n in graph.nodes if n.op == "placeholder")
    made = graph.call_function(
        aten.new_full.default,
        (source, [call(graph, aten.sym_size.int, source, 0), *value.shape[1:]], filled),
        {"dtype": value.dtype},
    )
    return made


def body_of(
    scan: fx.Node, module: fx.GraphModule, carries: int, extra: list[Any], batch: str, copy: Copy
) -> tuple[str, list[fx.Node]]:
    """The body's text, and those of the extras that are tensors: the size of the batch is read from a carry."""
    from aropt.kernels.scan import written

    graph, copied = fx.Graph(), dict[fx.Node, Any]()
    inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
    first, count = len(inputs) - len(extra), 0
    known = [e for e in extra if isinstance(e, fx.Node) and isinstance(e.meta["val"], torch.Tensor)]
    for i, node in enumerate(inputs):
        kind, number = ("c", i) if i < carries else ("x", i - carries) if i < first else ("e", count)
        if kind != "e" or extra[i - first] in known:
            copied[node] = graph.placeholder(f"{kind}{number}")
            count += kind == "e"
    begin = copied[inputs[0]]
    for node in inputs[first:]:
        if node not in copied and str(node.meta.get("val")) != batch:
            refuse(scan, f"its body reads a size that is not the batch: {node.meta.get('val')}",
                   "read no length of the sequence in the body of a scan")  # fmt: skip
        if node not in copied:
            copied[node] = call(graph, aten.sym_size.int, begin, 0)
    output = next(n for n in reversed(module.graph.nodes) if n.op == "output")
    results: Any = output.args[0]
    needed, todo = set[fx.Node](), list(results)
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo += node.all_input_nodes
    for node in module.graph.nodes:
        if node in needed and node.op == "get_attr":
            refuse(scan, f"its body makes a constant tensor ({node.target})",
                   "make it once, as a buffer of the module, and read it in the body")  # fmt: skip
        if node in needed and node.op == "call_function":
            node.meta["nn_module_stack"] = scan.meta.get("nn_module_stack")
            if is_scan(node):
                refuse(scan, "its body scans again", "write the inner recurrence out, or scan one after the other")
            if node.target is aten.clone.default:  # torch asks for it; results of the op share nothing
                copied[node] = copied[node.args[0]]
            else:
                copy(graph, node, copied)
    graph.output(tuple(copied[n] for n in results))
    try:
        return written(graph, carries), known
    except ValueError as error:
        refuse(scan, str(error), "use ATen ops with numbers and lists as arguments")


def unswap(graph: fx.Graph) -> None:
    """Removes a swap of rows and batch that undoes another."""
    for node in list(graph.nodes):
        source = node.args[0] if swaps(node) else None
        if isinstance(source, fx.Node) and swaps(source):
            node.replace_all_uses_with(source.args[0])


def swaps(node: fx.Node) -> bool:
    """Whether it is x with axes 0 and 1 swapped."""
    if node.target is aten.transpose.int:
        return sorted(node.args[1:]) == [0, 1]  # type: ignore[type-var]
    return node.target is aten.permute.default and list(node.args[1]) == [1, 0, *range(2, len(node.args[1]))]  # type: ignore[arg-type]


def untraced(error: Exception, module: nn.Module) -> Unsupported | None:
    """What to tell of a body that torch can't trace: which module scans, and torch's own sentence; None: no scan."""
    text = str(error)
    if "higher order op" not in text.lower() or "higher_order.scan" not in text:
        return None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    why = next((line for line in lines if line.startswith(("Encountered", "Got", "Unsupported"))), lines[0])
    hint = next((line.removeprefix("Hint: ") for line in lines if line.startswith("Hint: Replace")), "")
    return Unsupported(
        what="the body of a scan can't be captured",
        where=owner(error, module),
        why=why[:300],
        hint=hint or "write the body as a pure function (carry, row) -> (carry, y), without changes in place",
    )


def owner(error: BaseException, module: nn.Module) -> str:
    """The innermost module in whose forward it was raised, with its class."""
    names = {id(part): name for name, part in module.named_modules()}
    found = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    inner = [part for part in found if id(part) in names]
    if not inner:
        return "forward"
    return f"{names[id(inner[-1])].removeprefix('model.') or 'the top level'} ({type(inner[-1]).__name__})"
