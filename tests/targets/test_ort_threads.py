"""One pool of threads for all of aropt's sessions, in processes of its own only."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

SCRIPT = """
import json, sys
import onnx.helper as h, onnxruntime as ort
from aropt.targets.ort import threads
from pathlib import Path

def tasks():
    return len(list(Path("/proc/self/task").iterdir()))

node = h.make_node("Relu", ["x"], ["y"])
values = [h.make_tensor_value_info(n, 1, [1]) for n in "xy"]
graph = h.make_graph([node], "g", values[:1], values[1:])
model = h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=9)
if sys.argv[1] == "own":
    threads.own_process()
threads.share(3)
before = tasks()
sessions = [ort.InferenceSession(model.SerializeToString(), threads.options(3)) for _ in range(4)]
started = tasks() - before
threads.share(2)
try:
    ort.InferenceSession(model.SerializeToString())
    usual = True
except RuntimeError:
    usual = False
results = [s.run(None, {"x": [2.0]})[0].tolist() for s in sessions]
print(json.dumps({"started": started, "usual": usual, "results": results}))
"""


def ran(whose: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, whose], capture_output=True, text=True, check=True)
    assert "ignored" not in done.stderr, "ONNX Runtime warns of options that the shared pool overrules"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_sessions_share_their_threads_in_an_own_process_only() -> None:
    own, other = ran("own"), ran("other")
    assert own["results"] == other["results"] == [[2.0]] * 4
    assert own["started"] == 0 and other["started"] == 4 * 2, "a pool has the calling thread and two more"
    assert other["usual"], "elsewhere other code may make sessions as it always did"
