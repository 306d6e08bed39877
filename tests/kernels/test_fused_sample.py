"""`aropt::fused_sample` is the rules of aropt/loops/rules.py for a whole window, corners included."""

import functools
import math
import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from aropt.frontend.trace import capture_function
from aropt.ir import ops
from aropt.ir.program import Spec
from aropt.kernels import fused_sample
from aropt.kernels.fused_sample import NAMES
from aropt.loops import rules

ops.load_all()
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
INF = math.inf
sample = ops.load("fused_sample").overload
DRAWS = ("temperature", "top_k", "top_p", "min_p")
on_samples = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def arguments(logits: Tensor, **given: Any) -> tuple[Any, ...]:
    """All arguments of the op; numbers become tensors."""
    types = fused_sample.DTYPES
    made = {n: torch.as_tensor(v, dtype=types.get(n, torch.float32)) for n, v in given.items()}
    return logits, *(made.get(n) for n in NAMES[1:])


def drawn(logits: Tensor, **given: Any) -> tuple[Any, ...]:
    """The same with a seed and a stream and position for each row."""
    batch = logits.shape[0] // (2 if "guidance" in given else 1)
    return arguments(logits, **{"seed": 7, "streams": list(range(batch)), "position": [3] * batch, **given})


@functools.cache
def session(held: tuple[bool, ...]) -> Any:
    """ONNX Runtime on a graph of nothing but the op, with the arguments that are held."""
    runtime = pytest.importorskip("onnxruntime", reason="the ONNX forms need aropt[onnx]")
    pytest.importorskip("onnxscript", reason="the ONNX forms need aropt[onnx]")
    import onnx_ir as ir

    from aropt.exporters.onnx import translate

    dims: dict[str, tuple[int | str, ...]] = {
        "logits": ("2*B" if held[1] else "B", "W", "V"), "seen": ("B", "V"), "bias": ("V",), "streams": ("B",),
        "position": ("B",),
    }  # fmt: skip
    types = {**dict.fromkeys(NAMES, torch.float32), **fused_sample.DTYPES}
    inputs = {n: Spec(types[n], dims.get(n, ())) for n, on in zip(NAMES, held, strict=True) if on}
    graph = capture_function("op", lambda **values: sample(*(values.get(n) for n in NAMES)), inputs, ["token"])
    model = ir.to_proto(translate(graph, {}))
    return runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def in_onnx(*given: Any) -> Tensor:
    made = session(tuple(x is not None for x in given))
    feeds = {
        spec.name: x.numpy() for spec, x in zip(made.get_inputs(), (x for x in given if x is not None), strict=True)
    }
    return torch.from_numpy(made.run(None, feeds)[0])


# In the process where Triton interprets, the kernel alone.
every_form = pytest.mark.parametrize("form", [fused_sample.launch] if INTERPRET else [sample, in_onnx])
SLOW = [pytest.mark.exhaustive] * INTERPRET  # seconds there
CORNERS = [(2, 2), (1, 17), *(pytest.param(2, n, marks=SLOW) for n in (1, 17, 4096, 4097, 9000))]


@on_samples
@given(args=fused_sample.samples().filter(lambda args: args[0].numel()))
def test_it_is_the_rules(args: tuple[Any, ...]) -> None:
    """Bit for bit the function that programs are made of, with its noise."""
    values = {n: v for n, v in zip(NAMES, args, strict=True) if v is not None}
    logits = values.pop("logits")
    chosen = [n for n, p in rules.PROCESSORS.items() if set(p.params) <= values.keys()]
    processors = {n: rules.PROCESSORS[n] for n in chosen}
    row, vocab = (logits.shape[1],), logits.shape[2]
    function, inputs = rules.rule(processors, vocab, "seed" in values, row)
    assert set(inputs) - {"logits"} == set(values)
    assert torch.equal(function(logits, **values), sample(*args))


@every_form
@settings(max_examples=2 if INTERPRET else 10, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(args=fused_sample.samples().filter(lambda args: args[9] is not None and len(args[10]) > 1))
def test_the_rest_of_a_batch_changes_nothing(form: Any, args: tuple[Any, ...]) -> None:
    """Each sequence alone gives the ids that it gives in a batch, whatever its place there."""
    whole, batch = form(*args), len(args[10])
    for b in range(batch):
        one = list(args)
        one[0] = args[0][b::batch]
        for i in (2, 10, 11):
            one[i] = args[i][b : b + 1] if args[i] is not None else None
        assert torch.equal(form(*one), whole[b : b + 1])


@every_form
def test_each_id_of_a_window_has_noise_of_its_own(form: Any) -> None:
    """Flat logits: the ids of a window are independent, and are those of windows of one at the same positions."""
    logits = torch.zeros(1, 4, 50)
    window = form(*drawn(logits, position=[6]))[0].tolist()
    assert len(set(window)) > 1
    assert window == [int(form(*drawn(logits[:, :1], position=[24 + j]))) for j in range(4)]


@every_form
@pytest.mark.parametrize(("window", "vocab"), CORNERS)
def test_corners(form: Any, window: int, vocab: int) -> None:
    logits = torch.randn(1, window, vocab, generator=torch.Generator().manual_seed(vocab))
    best, free = logits.argmax(-1), form(*drawn(logits, temperature=1.0))
    for name, value in (("top_k", 1), ("top_p", 0.0), ("min_p", 1.0), ("temperature", 0.0)):
        assert torch.equal(form(*drawn(logits, **{name: value})), best), name
    for name, value in (("top_k", 0), ("top_k", vocab), ("top_k", vocab + 5), ("top_p", 1.0), ("min_p", 0.0)):
        assert torch.equal(form(*drawn(logits, temperature=1.0, **{name: value})), free), name
    assert torch.equal(form(*arguments(logits)), best)
    last = torch.full((vocab,), -INF)
    last[-1] = 0.0
    assert (form(*drawn(logits, bias=last, temperature=0.7, top_k=3, top_p=0.5)) == vocab - 1).all()


@every_form
@pytest.mark.parametrize(("batch", "window"), [(1, 1), pytest.param(2, 3, marks=SLOW)])
def test_no_id_left_is_id_0(form: Any, batch: int, window: int) -> None:
    nothing = torch.full((batch, window, 6), -INF)
    for args in (arguments(nothing), drawn(nothing), drawn(nothing, top_k=2, top_p=0.5, min_p=0.1, temperature=0.5)):
        assert (form(*args) == 0).all()


@every_form
@pytest.mark.parametrize("places", [4, pytest.param(60, marks=SLOW)])
def test_ties_of_top_k_and_min_p_are_kept_and_the_lowest_wins(form: Any, places: int) -> None:
    """So many draws give all of two ids that are kept, 60 all of five."""
    logits = torch.tensor([0.0, 2.0, -0.0, 2.0, 1.0]).repeat(1, places, 1)
    assert (form(*arguments(logits)) == 1).all()
    for rule in ({"top_k": 1}, {"top_p": 0.6}, {"min_p": 1.0}):
        assert set(form(*drawn(logits, **rule)).flatten().tolist()) == {1, 3}, rule
    zeros = logits[..., [0, 2]]
    assert set(form(*drawn(zeros, top_k=1)).flatten().tolist()) == {0, 1}, "0 and -0 are equal"
    if places == 60:
        assert set(form(*drawn(logits, top_k=4, temperature=3.0)).flatten().tolist()) == {0, 1, 2, 3, 4}


@every_form
@pytest.mark.parametrize(("places", "vocab"), [(8, 8), *(pytest.param(24, n, marks=SLOW) for n in (8, 4097))])
def test_top_p_keeps_the_smallest_set(form: Any, places: int, vocab: int) -> None:
    """Of equal logits it keeps the lowest ids, and with 0 one; so many draws give all that are kept."""
    logits = torch.full((1, places, vocab), -INF)
    logits[..., [2, 3, 5, vocab - 1]] = 1.0
    for p, kept in ((0.0, [2]), (0.3, [2, 3]), (0.5, [2, 3]), (0.7, [2, 3, 5])):
        assert sorted(set(form(*drawn(logits, top_p=p)).flatten().tolist())) == kept, p


@every_form
def test_guidance_scales_between_the_branches(form: Any) -> None:
    branches = torch.tensor([[[1.0, 0.0, 0.6]], [[0.0, 0.7, 0.6]]])
    assert [int(form(*arguments(branches, guidance=g))) for g in (0.0, 0.4, 1.0, 3.0)] == [1, 2, 0, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 1.0}, "no seed"), ({"seed": 1}, "go together"), ({"seen": [[True] * 5]}, "go together"),
        ({"bias": [0.0]}, "another shape"), ({"guidance": 1.5}, "two branches"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        fused_sample.reference(*arguments(torch.zeros(1, 2, 5), **changes))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**20))
def test_top_k_keeps_k(k: int, seed: int) -> None:
    """Of distinct logits no draw ever gives one below the k largest, and all of these are possible."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randperm(40, generator=generator).float() / 40
    ids = sample(*drawn(logits.expand(1, 2000, 40), top_k=k, seed=seed)).flatten()
    assert set(ids.tolist()) == set(logits.topk(k).indices.tolist())
