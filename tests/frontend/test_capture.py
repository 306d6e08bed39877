"""Capture: what a forward may return, what happens to the caller's module, and graphs that are not what it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import aropt
from aropt.errors import Unsupported, UsageError
from aropt.frontend.compute import owned
from aropt.frontend.faithful import SHORT, lengths
from aropt.frontend.trace import capture_function
from aropt.ir.interpreter import Executor
from aropt.ir.program import Program, Spec
from aropt.ir.torch_compat import propagate
from aropt.pipeline.registry import make
from aropt.targets import lower
from tests.support.run import generate

VOCAB = 20
exhaustive = pytest.mark.exhaustive


class Words(nn.Module):
    """Each id and its place give logits. `form`: how they are returned."""

    capacity = 24

    def __init__(self, form: str = "alone") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.embed, self.head, self.drop = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB), nn.Dropout(0.5)
        self.places = nn.Embedding(24, 8)
        self.register_buffer("scale", torch.full((8,), 3.0))

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids) + self.places(torch.arange(ids.shape[1]))
        x = x * self.scale
        x = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5).to(x.dtype)
        logits = self.head(self.drop(x))
        forms = {"alone": logits, "tuple": (logits, None), "dict": {"loss": None, "logits": logits}}
        return {**forms, "list": [logits, x], "loss": {"loss": x}, "nothing": (), "text": "logits"}[self.form]


def answer(program: Program, executor: Executor | None = None) -> list[list[int]]:
    return generate(program, [[1, 2], [3]], 6, executor=executor)


def weights(module: nn.Module) -> dict[str, tuple[int, torch.dtype, Tensor]]:
    return {n: (v.data_ptr(), v.dtype, v.clone()) for n, v in module.state_dict().items()}


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=exhaustive), torch.bfloat16])
def test_the_callers_module_stays_as_it_is(dtype: torch.dtype) -> None:
    module = Words().to(dtype).train()
    module.head.eval()
    module.places.weight.requires_grad_(False)
    module(torch.tensor([[1, 2]])).sum().backward()
    before, grad = weights(module), module.head.weight.grad
    program = aropt.capture(module)
    after = weights(module)
    assert all(before[n][:2] == after[n][:2] and torch.equal(before[n][2], after[n][2]) for n in before)
    assert module.training and module.drop.training and not module.head.training
    assert {n for n, p in module.named_parameters() if not p.requires_grad} == {"places.weight"}
    assert module.head.weight.grad is grad and grad is not None
    first = answer(program)
    with torch.no_grad():
        module.head.weight.neg_()
    assert answer(program) == first
    assert {w.dtype for w in program.weights.values() if w.is_floating_point()} == {torch.float32}


def test_what_hooks_compute_is_copied_and_what_cannot_be_is_named() -> None:
    module = Words()
    module.computed = module.head.weight * 2  # as weight_norm leaves it: no leaf
    assert torch.equal(owned(module).computed, module.computed)
    module.stream = (i for i in range(3))
    with pytest.raises(UsageError, match=r"Words can't be copied[\s\S]*generator[\s\S]*file.py:function"):
        aropt.capture(module)


@pytest.fixture(scope="module")
def plain() -> Program:
    return aropt.capture(Words())


@pytest.mark.parametrize("form", ["tuple", "dict", pytest.param("list", marks=exhaustive)])
def test_logits_are_found_in_what_is_returned(form: str, plain: Program) -> None:
    assert answer(aropt.capture(Words(form))) == answer(plain)


@pytest.mark.parametrize(("form", "what"), [("loss", "dict with loss"), ("nothing", "tuple"), ("text", "str")])
def test_a_forward_without_logits_is_told_what_to_return(form: str, what: str) -> None:
    with pytest.raises(Unsupported, match=rf"returns a {what}[\s\S]*return logits\[batch, length, vocabulary\]"):
        aropt.capture(Words(form))


def saved(module: nn.Module, folder: Path, batch: Any = None, length: Any = None) -> str:
    """The module as a .pt2."""
    shapes = ({0: batch or Dim("batch"), 1: length or Dim("length", max=24)},)
    exported = torch.export.export(module.eval(), (torch.ones(4, 8, dtype=torch.int64),), dynamic_shapes=shapes)
    torch.export.save(exported, folder / "words.pt2")
    return str(folder / "words.pt2")


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=exhaustive)])
def test_weights_of_16_bits_by_every_door(dtype: torch.dtype, tmp_path: Path) -> None:
    """They compute in float32, as a directory's do: a module, a factory and a .pt2 give the same."""
    wanted = aropt.capture(Words().to(dtype).float())
    (tmp_path / "words.py").write_text(
        f"import torch\nfrom tests.frontend.test_capture import Words\n\ndef make():\n    return Words().to({dtype})\n"
    )
    given = (Words().to(dtype), f"{tmp_path / 'words.py'}:make", saved(Words("tuple").to(dtype), tmp_path))
    for program in map(aropt.capture, given):
        assert answer(program) == answer(wanted)
        dtypes = {
            n.meta["val"].dtype for n in program.graphs["model"].fx.nodes if isinstance(n.meta.get("val"), Tensor)
        }
        assert not dtypes & {torch.bfloat16, torch.float16}
    assert answer(program, lower(program, "onnxruntime")) == answer(program)


def test_casts_to_16_bits_compute_in_single() -> None:
    class Casting(Words):
        def forward(self, ids: Tensor) -> Any:
            x = self.embed(ids).to(torch.bfloat16).relu()
            return self.head(x.float())

    program = aropt.capture(Casting())
    assert answer(program, lower(program, "onnxruntime")) == answer(program)


def test_ranges_of_an_exported_program(tmp_path: Path) -> None:
    program = aropt.capture(saved(Words("list"), tmp_path, Dim("batch", max=4), Dim("length", max=9)))
    assert (program.meta["capacity"], program.meta["batch"]) == (9, 4)
    prompts = [[i, i + 1] for i in range(9)]
    sizes = []
    generate(program, prompts, 2, on_round=lambda values: sizes.append(len(values["prompt"])))
    assert max(sizes) == 4 and len(generate(program, prompts, 2)) == 9
    with pytest.raises(UsageError, match="capacity 10 is more than the model takes"):
        aropt.capture(str(tmp_path / "words.pt2"), capacity=10)


@pytest.mark.parametrize("length", [Dim("length", min=4, max=20), 2 * Dim("half", max=9)], ids=["from 4 on", "even"])
def test_lengths_that_an_exported_program_leaves_out(length: Any, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="does not take every length"):
        aropt.capture(saved(Words(), tmp_path, length=length))


def test_without_attention_nothing_is_stored_and_nothing_missed(plain: Program) -> None:
    fast = aropt.optimize(plain, target="eager", passes=[make("kv-cache"), make("prune")], check=False)
    assert {p["status"] for p in fast.report["passes"]} == {"applied"} and not fast.report["uncached"]
    assert aropt.optimize(plain, target="eager", passes=[], check=False).report["uncached"].startswith("NO CACHE")


class Counting(Words):
    def forward(self, ids: Tensor) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(ids) * (1 + 0.01 * self.calls)


class Looking(Words):
    """A table that is looked up by the length's text."""

    table: ClassVar[dict[str, float]] = {"13": 1.5}

    def forward(self, ids: Tensor) -> Any:
        return super().forward(ids) * self.table.get(str(ids.shape[1]), 1.0)


class Short(Words):
    capacity = 40


def test_a_table_of_positions_that_ends_before_the_capacity() -> None:
    program = aropt.capture(Short())
    assert program.meta["capacity"] == 24 and "table of positions ends there" in program.meta["limit"]
    with pytest.raises(UsageError, match="capacity 40 is more than the model takes"):
        aropt.capture(Short(), capacity=40)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Counting, "other logits for the same ids when it is called again"),
        (Looking, "the captured graph gives other logits than the module itself"),
    ],
)
def test_a_graph_that_is_not_what_the_module_computes(module: type[nn.Module], why: str) -> None:
    with pytest.raises(Unsupported, match=why):
        aropt.capture(module())


def test_lengths_that_are_compared() -> None:
    assert set(range(1, SHORT + 1)) < set(lengths(200, 10**5)) and 200 in lengths(200, 10**5)
    assert len(lengths(2000, 10**10)) == 3, "of a large model three short ones"
    assert lengths(2, 10) == [1, 2]


HELD = torch.ones(2)
WIDE = {"x": Spec(torch.float32, ("N", 2)), "y": Spec(torch.float32, ("2*N", 2))}


@pytest.mark.parametrize(
    ("rule", "kind", "why"),
    [
        (lambda x, y: x * 2 if x.shape[0] > 2 else x, Unsupported, "it takes N > 2 for granted"),
        (lambda x, y: x[: int(x.shape[0])] * len(y), Unsupported, "for granted"),
        (lambda x, y: x + HELD, UsageError, "holds tensors"),
        (lambda x, y: x * 2 if x.sum() > 0 else x, Unsupported, "branches on the values of a tensor"),
    ],
)
def test_rules_that_are_none_for_all_inputs(rule: Any, kind: type[Exception], why: str) -> None:
    with pytest.raises(kind, match=why):
        capture_function("rule", rule, WIDE, ["z"])


def test_sizes_of_a_rule_stay_symbols() -> None:
    made = capture_function("rule", lambda x, y: torch.cat([x, y[: x.shape[0]]]) + x.shape[0], WIDE, ["z"])
    assert made.outputs["z"].dims == ("2*N", 2)
    x, y = torch.randn(1, 2), torch.randn(2, 2)
    assert torch.equal(made.bind({})(x, y)[0], torch.cat([x, y[:1]]) + 1)


def test_shapes_are_propagated_again_where_a_graph_changed() -> None:
    made = capture_function("rule", lambda x, y: (x * 2).unsqueeze(1), WIDE, ["z"])
    before = [n.meta["val"] for n in made.fx.nodes if n.op != "output"]
    propagate(made.fx, made.inputs, {})
    assert all(n.meta["val"] is v for n, v in zip(made.fx.nodes, before)), "nobody changed it"
    node = next(n for n in made.fx.nodes if n.target is torch.ops.aten.unsqueeze.default)
    node.args = (node.args[0], 0)
    propagate(made.fx, made.inputs, {})
    assert node.meta["val"].shape[0] == 1
    propagate(made.fx, {"x": Spec(torch.float64, ("N", 2)), "y": WIDE["y"]}, {})
    assert node.meta["val"].dtype == torch.float64
