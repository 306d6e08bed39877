"""The program: graphs, state, control and ledger (all frozen; a pass returns a new Program).

A `Graph` is a functional ATen graph without hidden state. A `Program` says which graphs run in which order
(`control`), which values survive an iteration (`state`), and what was done to it (`ledger`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, get_args

import torch
from torch import Tensor, fx
from torch.fx import GraphModule, Node  # the field `fx` of Graph hides the module's name

from aropt.ir.control import Call, Control, calls
from aropt.ir.dims import Dim, resolve, solved, symbols

# What a graph is for, the most telling first, which is that of a fused one. The model runs in a forward, a rule decides
# from what it gives, a commit takes the decision into the state. A prologue runs before a loop, an epilogue after it.
Role = Literal["forward", "rule", "commit", "prologue", "epilogue", "bookkeeping"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True)
class Spec:
    """The type of a value: dtype and dims (ints, or expressions over named symbols)."""

    dtype: torch.dtype
    dims: tuple[Dim, ...] = ()

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.dims))}]"


@dataclass(frozen=True, eq=False)
class Graph:
    """A pure function over tensors: placeholders are `inputs`, `get_attr` nodes are weights by name.

    `aliases[output] = input`: the output may be written into that input's buffer, because no other node reads it.
    """

    name: str
    fx: fx.Graph
    inputs: dict[str, Spec]
    outputs: dict[str, Spec]
    aliases: dict[str, str] = field(default_factory=dict)
    role: Role = "bookkeeping"

    def weights(self) -> list[str]:
        """Names of the weights that the graph reads, in order of first use."""
        return list(dict.fromkeys(str(n.target) for n in self.fx.nodes if n.op == "get_attr"))

    def results(self) -> list[Node]:
        """The nodes returned, in the order of `outputs`."""
        return list(output_node(self.fx).args[0])  # type: ignore[arg-type]

    def bind(self, weights: Mapping[str, Tensor]) -> GraphModule:
        """A module that runs the graph eagerly: positional inputs in, a tuple of outputs out."""
        return GraphModule(dict_root(self.weights(), weights), self.fx, class_name="aropt_" + self.name)


@dataclass(frozen=True)
class StateSpec:
    """A value that survives an iteration. `init` fills it before the program starts (None: a graph writes it first).

    Kinds: tokens, append-kv, canvas-kv, recurrent, counter, flag, lengths, logits. `axis` is that of slots.
    """

    kind: str
    spec: Spec
    init: float | None = None
    axis: int | None = None

    def create(self, sizes: Mapping[str, int]) -> Tensor:
        """A fresh value, symbols resolved by `sizes`."""
        if self.init is None:
            raise ValueError("this state has no initial value")
        return torch.full([resolve(d, sizes) for d in self.spec.dims], self.init, dtype=self.spec.dtype)

    def grow(self, value: Tensor, size: int) -> Tensor:
        """The value with `size` slots along `axis`, new slots holding `init`."""
        if self.axis is None or self.init is None:
            raise ValueError("this state does not grow")
        shape = list(value.shape)
        kept, shape[self.axis] = shape[self.axis], size
        bigger = value.new_full(shape, self.init)
        bigger.narrow(self.axis, 0, kept).copy_(value)
        return bigger

    @property
    def rewinds(self) -> bool:
        """Whether rows that are written again at their slots take rejected ones back."""
        return self.kind != "recurrent"

    def nbytes(self, sizes: Mapping[str, int]) -> int:
        """Bytes that the value takes."""
        count = 1
        for dim in self.spec.dims:
            count *= resolve(dim, sizes)
        return count * self.spec.dtype.itemsize


@dataclass(frozen=True)
class Input:
    """A value that the caller gives; `default` makes it optional, `minimum` and `maximum` are the range it may have."""

    spec: Spec
    default: float | int | bool | None = None
    doc: str = ""
    minimum: float | int | None = None
    maximum: float | int | None = None

    def problem(self, value: Any) -> str:
        """Why a value can't be given; "" if it can."""
        try:
            given = torch.as_tensor(value, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            return f"it takes numbers, not {type(value).__name__}"
        dims = [d for d in self.spec.dims if isinstance(d, int)]
        several = len(dims) < len(self.spec.dims)  # a list of any length
        if given.dim() and (given.dim() != len(self.spec.dims) or (not several and list(given.shape) != dims)):
            return f"it takes {dims or 'one number'}, not {list(given.shape)}"
        if given.isnan().any() or (given.isinf().any() and not dims):
            return "it is not a finite number"
        if not self.spec.dtype.is_floating_point and not (given == given.round()).all():
            return "it takes whole numbers"
        if self.minimum is not None and (given < float(self.minimum)).any():
            return f"the least is {self.minimum}"
        if self.maximum is not None and (given > float(self.maximum)).any():
            return f"the most is {self.maximum}"
        return ""


@dataclass(frozen=True)
class Entry:
    """One line of the ledger: a pass, its level and what was measured."""

    name: str
    level: str
    options: dict[str, Any] = field(default_factory=dict)
    evidence: dict[str, Any] = field(default_factory=dict)


class Meta(TypedDict, total=False):
    """What is known of a program's model and options; `limits.check_meta` checks what is read from a file."""

    name: str
    source: str  # where the model came from: a directory, a file, a reference model
    modality: Literal["image", "text", "tokens"]
    vocab: int  # of the logits
    input_vocab: int  # of the ids that are read, if more
    capacity: int  # positions of a sequence
    limit: str  # why the capacity is less than the model states
    batch: int  # the largest that an exported program takes
    rules: list[str]  # of sampling
    prompts: list[list[int]]  # examples, which a model of text or of ids has
    examples: list[Any]
    heldout: dict[str, Any]  # what the model was measured on
    defaults: dict[str, Any]  # parameters of generation, as the model states them
    eos: list[int]
    bos: int
    never: list[int]  # ids that no text holds
    mask: int  # the id of an empty row
    null: int  # the id of no condition
    loop: str
    block: int
    single: int
    shift: bool
    unit: int
    side: int
    window: int
    ragged: bool
    masks: list[str]
    guide: str
    guidance_free: bool
    draft_mask: int  # the id of rows that predict themselves, by which a causal model drafts
    eliminated: bool
    needs_finetune: str  # the command that does it
    target: str
    left_out: list[str]


@dataclass(frozen=True, eq=False)
class Program:
    """A whole generation. `outputs` are the values that it returns; `meta` is JSON-able (modality, capacity, ...)."""

    name: str
    graphs: dict[str, Graph]
    inputs: dict[str, Input]
    state: dict[str, StateSpec]
    control: Control
    outputs: tuple[str, ...]
    weights: dict[str, Tensor]
    meta: Meta = field(default_factory=Meta)
    ledger: tuple[Entry, ...] = ()

    def replace(self, **changes: Any) -> Program:
        return dataclasses.replace(self, **changes)

    def of_role(self, role: Role) -> list[Graph]:
        """The graphs that have this role."""
        return [graph for graph in self.graphs.values() if graph.role == role]


def output_node(graph: fx.Graph) -> Node:
    """The graph's single output node."""
    node: Node = next(n for n in reversed(graph.nodes) if n.op == "output")
    return node


def dict_root(names: list[str], weights: Mapping[str, Tensor]) -> torch.nn.Module:
    """A module tree that holds the named weights (shared, not copied) as frozen parameters or buffers."""
    root = torch.nn.Module()
    for name in names:
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = module.get_submodule(part)
        module.register_buffer(leaf, weights[name])
    return root


def own_sizes(graph: Graph) -> set[str]:
    """Symbols of a graph's results that its inputs don't give: sizes that only the values tell."""
    given = set().union(*(symbols(d) for spec in graph.inputs.values() for d in spec.dims))
    return set().union(*(symbols(d) for spec in graph.outputs.values() for d in spec.dims)) - given


def growing(call: Call, graph: Graph) -> set[str]:
    """Values that a call makes longer: it reads and writes them, and their new size depends on the old one."""
    read = {value: graph.inputs[name].dims for name, value in call.reads.items()}
    found = set()
    for output, value in call.writes.items():
        dims = graph.outputs[output].dims
        if any(old != new and symbols(new) for old, new in zip(read.get(value, dims), dims, strict=True)):
            found.add(value)
    return found


def donated(program: Program) -> dict[str, dict[str, str]]:
    """For each graph, the aliases that a target may update in place: every call writes the very value that it reads."""
    found = {n: dict(g.aliases) for n, g in program.graphs.items()}
    for call in calls(program.control):
        for output, source in list(found[call.graph].items()):
            if call.writes.get(output) != call.reads[source]:
                del found[call.graph][output]
    return found


def sizes_of(specs: Mapping[str, Spec], values: Mapping[str, Tensor]) -> dict[str, int]:
    """Binds the symbols of `specs` to the sizes of `values`: those that stand alone, or in expressions like "2*B"."""
    sizes: dict[str, int] = {}
    others: dict[str, int] = {}
    for name, spec in specs.items():
        for dim, size in zip(spec.dims, values[name].shape, strict=True):
            if isinstance(dim, str) and dim.isidentifier():
                sizes.setdefault(dim, size)
            else:
                others |= solved(dim, size)
    return others | sizes
