"""What holds for every op of aropt. An op that lies in kernels/ gets all of these tests."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import library
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from aropt.ir import opdef, ops
from aropt.ir.opdef import OpDef
from aropt.targets.ort import files
from tests.support.op_models import Call, assert_matches, filled, flat, free, sizable, symbolic, tensors

ROOT = Path(__file__).parents[2]
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
# Ops that compilers get in the exhaustive suite alone. The quick one has others that are built as they are:
# gated_delta (in ONNX), rg_lru and wkv; ssd_commit; tree_delay; cached_attention and token_shuffle.
RECURRENT = ("kda", "scan", "selective_scan", "ssd_scan")
TREES = (
    "gdn_tree_scan",
    "kda_tree_scan",
    "rg_lru_tree",
    "scan_tree",
    "selective_tree_scan",
    "ssd_tree_scan",
    "tree_conv1d",
    "wkv_tree",
)
ALIKE = ("attention", "delay", "gdn_commit", "token_unshuffle")
HELD = ("canvas_commit", "canvas_select", "causal_conv1d", "fused_sample", "noise", "wkv")  # by other tests in ONNX


def but(*seldom: str) -> Any:
    """Every op; these in the exhaustive suite alone."""
    marks = {name: pytest.mark.exhaustive for name in seldom}
    return pytest.mark.parametrize(
        "op", [pytest.param(op, id=name, marks=marks.get(name, ())) for name, op in ops.load_all().items()]
    )


def examples(few: int, many: int) -> Any:
    """`few` examples in the quick suite, `many` in the exhaustive one."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.exhaustive)])


def holds(count: int, check: Callable[[st.DataObject], None]) -> None:
    """Runs a property on `count` examples, the same each time; the first is the simplest that there is."""
    quiet = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    chosen = settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=quiet, print_blob=True
    )
    chosen(given(data=st.data())(check))()


every_op = but()


def only(args: tuple[Any, ...]) -> Iterator[torch.Tensor]:
    return (tensor for arg in args for tensor in flat(arg))


def test_every_file_is_an_op_of_its_name() -> None:
    assert {path.stem for path in (ROOT / "kernels").glob("[!_]*.py")} == set(ops.NAMES)
    assert all(name == op.name for name, op in ops.load_all().items())


def test_an_op_is_defined_once() -> None:
    op = ops.load(ops.NAMES[0])
    opdef.register(op)
    with pytest.raises(ValueError, match="twice"):
        opdef.register(OpDef(op.name, op.schema, op.reference, op.fake, op.cost, op.samples))


@every_op
@examples(3, 10)
def test_registration(op: OpDef, count: int) -> None:
    """Schema, fake and tracing, by torch's own checks."""

    def check(data: st.DataObject) -> None:
        library.opcheck(op.overload, data.draw(op.samples()))

    holds(count, check)


@every_op
@examples(10, 30)
def test_reference(op: OpDef, count: int) -> None:
    """Pure, and of the shape, dtype and strides that the fake promises; its cost is sane."""

    def check(data: st.DataObject) -> None:
        args = data.draw(op.samples())
        want = op.reference(*args)
        for again in (op.reference(*args), op.overload(*args)):
            torch.testing.assert_close(again, want, rtol=0, atol=0, equal_nan=True)
        with FakeTensorMode(shape_env=ShapeEnv()) as mode:
            fakes = iter([mode.from_tensor(tensor) for tensor in only(args)])
            promised = op.overload(*(filled(arg, fakes) for arg in args))
        for fake, real in zip(tensors(promised), tensors(want), strict=True):
            if op.own_size:
                assert (fake.dim(), fake.dtype) == (real.dim(), real.dtype)
            else:
                assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
        flops, size = op.cost(*args)
        assert flops >= 0 and size >= sum(real.nbytes for real in tensors(want))

    holds(count, check)


@every_op
def test_overwrite(op: OpDef) -> None:
    """In place it computes the same, in the buffers that it says."""
    if op.overwrite is None:
        pytest.skip("not an op that updates something")

    def check(data: st.DataObject) -> None:
        args = data.draw(op.samples())
        want = op.reference(*args)
        given = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
        got = op.overwrite(*given)
        assert_matches(op, got, want)
        names = [argument.name for argument in op.overload._schema.arguments]
        for index, name in op.in_place.items():
            assert list(tensors(got))[index].data_ptr() == given[names.index(name)].data_ptr()

    holds(10, check)


@every_op
@examples(2, 5)
def test_decomposition(op: OpDef, count: int) -> None:
    """`ops.decompositions` replaces the op by plain ones without a change of result."""
    if op.whole:
        pytest.skip("compilers leave it whole")

    def check(data: st.DataObject) -> None:
        args = data.draw(op.samples())
        traced = make_fx(Call(op, args), decomposition_table=ops.decompositions())(*only(args))
        assert op.overload not in {node.target for node in traced.graph.nodes}
        assert_matches(op, traced(*only(args)), op.reference(*args))

    holds(count, check)


@but(*RECURRENT, *TREES, *ALIKE, "canvas_attention", "canvas_commit", "gated_delta")
def test_inductor(op: OpDef) -> None:
    """Inductor on the decomposition, in reasonable time: an op may expand exponentially as it inlines operands."""
    if op.whole:
        pytest.skip("compilers leave it whole")

    def check(data: st.DataObject) -> None:
        args = data.draw(sizable(op))
        traced = make_fx(Call(op, args), decomposition_table=ops.decompositions())(*only(args))
        began = time.process_time()
        assert_matches(op, torch.compile(traced)(*only(args)), op.reference(*args))
        assert time.process_time() - began < 60

    holds(1, check)


@but(*RECURRENT, *TREES, *ALIKE, *HELD)
@pytest.mark.parametrize("contrib", [False, True])
@examples(2, 4)
def test_onnx(op: OpDef, contrib: bool, count: int) -> None:
    """ONNX Runtime on the translation, exported once with symbolic sizes and run on other sizes."""
    pytest.importorskip("onnxscript", reason="needs aropt[onnx]")
    runtime = pytest.importorskip("onnxruntime", reason="needs aropt[onnx]")
    if (op.contrib if contrib else op.onnx) is None:
        pytest.skip("no such translation")

    def check(data: st.DataObject) -> None:
        args = data.draw(sizable(op))
        model = torch.onnx.export(
            Call(op, args, constant=True).eval(),
            tuple(free(op, args)),
            dynamo=True,
            dynamic_shapes=(symbolic(op, args),),
            custom_translation_table=ops.translation_table(contrib),
            verbose=False,
        ).model_proto
        assert contrib or {node.domain for node in model.graph.node} == {""}, "standard ops only"
        for graph in files.graphs(model.graph):  # an artifact that has them can be read again
            files.check_nodes(Path("model.onnx"), graph)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1
        session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        for _ in range(5):
            inputs = zip(session.get_inputs(), free(op, args), strict=True)
            feeds = {spec.name: tensor.numpy() for spec, tensor in inputs}
            got = [torch.from_numpy(array) for array in session.run(None, feeds)]
            assert_matches(op, got, op.reference(*args))
            args = data.draw(op.samples(args))

    holds(count, check)


@every_op
@examples(6, 30)
def test_kernel(op: OpDef, count: int) -> None:
    """The Triton kernel, on a GPU or in Triton's interpreter."""
    pytest.importorskip("triton", reason="needs aropt[triton], which is for Linux alone")
    if not (INTERPRET or torch.cuda.is_available()):
        pytest.skip("needs a GPU; `test_kernels_in_the_interpreter` does it on the CPU")
    if op.launch is None:
        pytest.skip("no Triton kernel")

    def check(data: st.DataObject) -> None:
        args = data.draw(op.samples())
        if not INTERPRET:
            args = tuple(arg.cuda() if isinstance(arg, torch.Tensor) else arg for arg in args)
        if op.supports(*args) is None:
            assert_matches(op, op.launch(*args), op.reference(*args))

    holds(count, check)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRET, reason="runs itself")
@pytest.mark.parametrize("marked", ["not exhaustive", pytest.param("exhaustive", marks=pytest.mark.exhaustive)])
def test_kernels_in_the_interpreter(marked: str) -> None:
    """`test_kernel`, and tests of forms on kernels in other files, in a process of their own.

    Triton decides when it's imported whether to compile or to interpret.
    """
    pytest.importorskip("triton", reason="needs aropt[triton], which is for Linux alone")
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in ("ops", "fused_sample", "canvas_select")]
    command = [sys.executable, "-m", "pytest", "-v", "-m", marked, "-k", "test_kernel or launch", *files]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for file in files:
        assert re.search(rf"{Path(file).name}\S* PASSED", done.stdout), f"nothing ran in {file}"


@but(
    *RECURRENT, *TREES[:4], "gdn_commit", "tree_conv1d", "wkv_tree"
)  # gated_delta, ssd_tree_scan and tree_delay are such too
@pytest.mark.parametrize("arch", [80, *(pytest.param(arch, marks=pytest.mark.exhaustive) for arch in (90, 100))])
def test_ahead_of_time(op: OpDef, arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels compile for GPUs that aren't there, keep all values in registers and use the instructions meant."""
    triton = pytest.importorskip("triton", reason="needs aropt[triton], which is for Linux alone")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not op.aot():
        pytest.skip("nothing to compile")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    for number, variant in enumerate(op.aot()):
        source = ASTSource(variant.kernel, dict(variant.signature), dict(variant.constants))
        options = {"num_warps": variant.num_warps}
        built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        cubin = tmp_path / f"{op.name}-{number}.cubin"
        cubin.write_bytes(built.asm["cubin"])
        usage = subprocess.run([cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
        used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        print(f"sm_{arch} {variant.kernel.__name__}: {used}")
        assert used.pop("REG") < 255 and used == {"STACK": 0, "LOCAL": 0}, usage
        assert all(text in built.asm["ptx"] for text in variant.expects.get(arch, ()))
