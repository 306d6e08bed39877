"""Where a round's time goes: ONNX Runtime's own profile by kind of node, for aropt and for onnxruntime-genai's graph.

    python -m perf.nodes [MODEL]

MODEL is one of perf.run's that was timed before (its artifact is under build/bench). Three columns: a step, the same
step inside the loop that is exported as one model, and the step of onnxruntime-genai where its files are in the cache.
Batch 1, in the middle of a generation. Writes perf/results/nodes.json.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "perf" / "results" / "nodes.json"
SLOTS, RUNS = 256, 100
TURNS, SETTLE = 6, 50  # turns of each model; calls of a turn that are not counted
TYPES = {"float": np.float32, "int64": np.int64, "int32": np.int32, "bool": np.bool_}


def session(path: Path, threads: int, profile: str = "") -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def bound(made: Any, filled: int, size: int) -> tuple[Any, dict[str, Any]]:
    """A binding for one row after `filled` ones, heads of `size`; caches in place. The arrays must be kept alive."""
    binding, kept = made.io_binding(), {}
    values = {"last": filled, "total": filled + 1, "limit": SLOTS, "stop": -1}
    for given in made.get_inputs():
        shape = [d if isinstance(d, int) else 1 for d in given.shape]
        if len(shape) == 4:
            shape[2:] = [SLOTS, size]
        if given.name == "attention_mask":
            shape[1] = filled + 1
        kind = TYPES[given.type[7:-1]]
        kept[given.name] = np.full(shape, values.get(given.name, given.name == "attention_mask"), kind)
    for name, array in kept.items():
        binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    for result in made.get_outputs():
        same = kept.get(result.name.removeprefix("out.").replace("present", "past_key_values"))
        if same is not None and same.ndim == 4:
            binding.bind_output(result.name, "cpu", 0, same.dtype, same.shape, same.ctypes.data)
        else:
            binding.bind_output(result.name, "cpu")
    return binding, kept


def kinds(paths: dict[str, Path], threads: int, filled: int, size: int) -> dict[str, dict[str, Any]]:
    """Of one step of each model: {"us": median of a call, "nodes": {kind: [number, microseconds]}}.

    Times of nodes are from profiled sessions. The models take turns, as the machine's speed changes from second to
    second; the first calls of a turn are not counted, while the threads of the other model's session still spin.
    """
    found: dict[str, dict[str, Any]] = {name: {} for name in paths}
    for profiled in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            made = {n: session(path, threads, f"{folder}/{i}" * profiled) for i, (n, path) in enumerate(paths.items())}
            calls = {name: bound(one, filled, size) for name, one in made.items()}
            times: dict[str, list[float]] = {name: [] for name in paths}
            for name in list(paths) * TURNS:
                for call in range(SETTLE + RUNS):
                    start = time.perf_counter()
                    made[name].run_with_iobinding(calls[name][0])
                    if call >= SETTLE:
                        times[name].append((time.perf_counter() - start) * 1e6)
            for name, one in made.items():
                if profiled:
                    found[name]["nodes"] = sums(Path(one.end_profiling()), (SETTLE + RUNS) * TURNS)
                else:
                    ordered = sorted(times[name])
                    found[name] |= {"us": statistics.median(ordered), "least": ordered[len(ordered) // 20]}
    return found


def sums(trace: Path, rounds: int) -> dict[str, list[float]]:
    """{kind: [nodes a round, microseconds a round]} of a profile, the longest first."""
    number, spent = Counter[str](), Counter[str]()
    for event in json.loads(trace.read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            kind = event["args"]["op_name"]
            number[kind] += 1
            spent[kind] += event["dur"]
    return {k: [number[k] / rounds, us / rounds] for k, us in spent.most_common() if number[k] > rounds / 2}


def whole_loop(artifact: Path, threads: int) -> dict[str, Any]:
    """The same of a round in one call: the loop's subgraph."""
    from aropt import load
    from aropt.exporters.whole_loop import export_program
    from aropt.loops.request import Request
    from aropt.loops.runtime import make_inputs

    program = load(artifact).program
    prompt = [int(t) for t in program.meta["prompts"][0]][:1]
    rounds = min(SLOTS, int(program.meta["capacity"])) - 1
    feeds = {n: v.numpy() for n, v in make_inputs(program, Request((tuple(prompt),), rounds)).items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        export_program(program, path, contrib=True)
        plain, profiled = session(path, threads), session(path, threads, folder + "/p")
        times = []
        for _ in range(6):
            start = time.perf_counter()
            plain.run(["generated"], feeds)
            times.append((time.perf_counter() - start) * 1e6 / rounds)
        profiled.run(["generated"], feeds)
        nodes = sums(Path(profiled.end_profiling()), rounds)
    outer = {"Loop", "If"}  # their time is that of what is inside
    return {"us": statistics.median(times[1:]), "nodes": {k: v for k, v in nodes.items() if k not in outer}}


def peer(source: Path) -> Path | None:
    """onnxruntime-genai's model of the same directory, if it was built."""
    from aropt.bench import peers

    home = os.environ.get("AROPT_CACHE") or Path.home() / ".cache" / "aropt"
    found = sorted(Path(home, "peers", peers.digest(source)).glob("ort-genai-*/model.onnx"))
    return found[-1] if found else None


def table(columns: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row for each kind of node."""
    rows = list(dict.fromkeys(kind for column in columns.values() for kind in column["nodes"]))
    lines = [f"| node | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for kind in rows:
        cells = [column["nodes"].get(kind) for column in columns.values()]
        lines.append(f"| {kind} | {' | '.join(f'{c[0]:.0f}: {c[1]:.0f} us' if c else '' for c in cells)} |")
    inside = [sum(us for _, us in column["nodes"].values()) for column in columns.values()]
    lines.append(f"| all nodes, profiled | {' | '.join(f'{us:.0f} us' for us in inside)} |")
    calls = [column["us"] for column in columns.values()]
    lines.append(f"| a round, not profiled | {' | '.join(f'{us:.0f} us' for us in calls)} |")
    return "\n".join(lines)


def main() -> None:
    from aropt.bench.peers import directory
    from aropt.pipeline.reading import load

    model = (sys.argv[1:] or ["text-ar"])[0]
    artifact, threads = ROOT / "build" / "bench" / model, 2
    if not artifact.is_dir():
        sys.exit(f"{artifact} is not there: run python -m perf.run {model}")
    program = load(artifact).program
    size = int(program.state["k_0"].spec.dims[3])
    middle = min(SLOTS, int(program.meta["capacity"])) // 2, size
    paths = {"aropt, a step": artifact / "models/step_greedy/onnxruntime/model.onnx"}
    source = directory(str(program.meta["source"]))
    other = peer(source) if source else None
    if other:
        paths["onnxruntime-genai, a step"] = other
    columns = {**kinds(paths, threads, *middle), "aropt, one call": whole_loop(artifact, threads)}
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    RESULTS.write_text(json.dumps(known | {model: columns}, indent=1) + "\n")
    print(table(columns))


if __name__ == "__main__":
    main()
