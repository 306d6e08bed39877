"""The errors that a user is meant to read; each class carries the exit status of the command line."""

from __future__ import annotations

from typing import ClassVar


class AroptError(Exception):
    """Base class. Raised as such it means an internal error (exit status 1).

    `what` went wrong, in a sentence; `where` (pass, graph, node, module path, file); `why`, where that is
    known; and a `hint`: what to try next, a command if there is one.
    """

    code: ClassVar[int] = 1

    def __init__(self, what: str, where: str = "", why: str = "", hint: str = "") -> None:
        super().__init__(what, where, why, hint)  # all four, so that pickling keeps them
        self.what, self.where, self.why, self.hint = what, where, why, hint

    def __str__(self) -> str:
        lines = [self.what]
        for label, text in (("where", self.where), ("why", self.why), ("try", self.hint)):
            if text:
                lines.append(f"  {label + ':':<7}" + text.replace("\n", "\n         "))
        return "\n".join(lines)


class UsageError(AroptError):
    """An argument, option or input file is wrong."""

    code = 2


class VerificationFailed(AroptError):
    """A program does not compute what its reference computes."""

    code = 3


class Unsupported(AroptError):
    """The model, or an op in it, cannot be handled soundly, so it is refused."""

    code = 4


class MissingTool(AroptError):
    """A toolchain, driver or optional package is not installed."""

    code = 5


class WrongMachine(AroptError):
    """The artifact was built for other hardware or other library versions."""

    code = 6


class BudgetMissed(AroptError):
    """A lossy program exceeds its stated budget."""

    code = 7
