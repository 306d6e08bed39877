"""The targets by name, for tests that plan passes."""

from __future__ import annotations

from aropt.targets import find_target

EAGER, INDUCTOR, ORT = (find_target(name) for name in ("eager", "inductor", "onnxruntime"))
