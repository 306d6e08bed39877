"""What runs a program's graphs, and what a runtime may do besides: methods that do nothing of their own by default."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from aropt.errors import Unsupported
from aropt.ir.control import Loop
from aropt.ir.program import Program, StateSpec

Values = dict[str, Tensor]
OnRound = Callable[[Values], bool | None]
Way = Literal["stepping", "multi-step", "single-call"]


class Executor:
    """Runs the graphs of one program."""

    way: Way = "stepping"  # a call a round, several rounds a call, or the whole loop in one
    folder: Path | None = None  # where the files lie that it was built of
    shows_values = False  # whether `intermediates` has any

    def call(self, graph: str, inputs: Values) -> Values:
        """The graph's outputs. It may overwrite inputs that the program does not read again (see `donated`)."""
        raise NotImplementedError

    def create(self, name: str, state: StateSpec, sizes: Mapping[str, int]) -> Tensor:
        """A state's initial value, valid until the next generation."""
        return state.create(sizes)

    def loop(self, control: Loop, values: Values, on_round: OnRound | None) -> bool:
        """Runs a whole loop, updating `values`, and returns True; or returns False, and the interpreter runs it."""
        return False

    def generate(self, inputs: Values) -> Tensor | None:
        """The generated rows, of the whole program in one call; None: the interpreter runs its control."""
        return None

    def host_threads(self) -> int | None:
        """How many threads torch may have while it generates; None: as many as it has."""
        return None

    def stepping(self) -> Executor:
        """The same, in a call a round."""
        return self

    def multi_step(self, program: Program) -> Executor:
        """The same, in several rounds a call where the runtime and the program allow it; nothing is compared."""
        return self

    def single_call(self, program: Program) -> Executor:
        """The same, in one call, compared with the program; nothing of it stays in `folder`. Raises Unsupported."""
        raise Unsupported(what="this target runs no whole loop in one call", hint="try another one with --target")

    def tuned(self, program: Program, say: Callable[[str], None]) -> tuple[Executor, dict[str, Any]]:
        """The same in the fastest way that there is, and what was measured."""
        return self, {}

    def without_probe(self, program: Program) -> Executor | None:
        """The same for the program without outputs that only validation reads; None: it has to be built again."""
        return None

    def intermediates(self, graph: str, inputs: Values, names: list[str]) -> Values:
        """Values inside a graph by name, those that there are."""
        return {}

    def executed(self) -> dict[str, dict[str, int]]:
        """{graph that runs in a loop: {kind of node: how many the runtime runs}}, where it can be read back."""
        return {}
