"""Guided diffusion: what the guide decides and what it can't, its cache, and input that is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import aropt
from aropt.errors import UsageError
from aropt.ir.program import Program
from aropt.ir.verify import verify
from aropt.loops.unmask.ar_verifier import OFFERS, PRODUCT
from aropt.models.canvas import MASK, VOCAB
from aropt.passes.guide_cache import GuideCache
from aropt.pipeline.checks import Instruments
from aropt.pipeline.registry import make
from aropt.rewriting.contract import Applies, Skips, planned
from aropt.validate.compare import cases, validate, with_probe
from tests.support.canvases import rounds, source, tiny
from tests.support.run import generate
from tests.support.targets import EAGER


class Judge(nn.Module):
    """A small causal model. `causal=False`: a guide that no cache fits."""

    def __init__(self, causal: bool = True, vocab: int = VOCAB, capacity: int = 64) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed, self.query, self.head = nn.Embedding(vocab, 32), nn.Linear(32, 32), nn.Linear(32, vocab)
        self.embed.weight.data *= 3
        self.causal, self.capacity, self.vocab = causal, capacity, vocab

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)[:, None]
        mixed = F.scaled_dot_product_attention(self.query(x), x, x, is_causal=self.causal)
        logits: Tensor = self.head((x + mixed)[:, 0])
        return logits


@cache
def guided(judge: str, guide: nn.Module | None = None) -> Program:
    return aropt.capture(source(tiny()), mask=MASK, guide=guide or Judge(), rules=(judge,))


@pytest.fixture(scope="module")
def plain() -> Program:
    return guided("guide-top-k")


@pytest.fixture(scope="module")
def fast(plain: Program) -> Program:
    return GuideCache().run(plain)


Write = Callable[[Tensor, list[int], Tensor, Tensor, Tensor], None]  # canvas, its masks, logits, drafts, scores


@torch.no_grad()
def naive(prompt: list[int], n: int, block: int, write: Write) -> tuple[list[int], int]:
    """A guided loop in plain words: drafts, what the guide makes of them, what is written; and how many rounds."""
    model, judge = tiny(), Judge().eval()
    x, count = torch.tensor([prompt + [MASK] * n]), 0
    for begin in range(len(prompt), len(prompt) + n, block):
        while masks := [i for i in range(begin, begin + block) if x[0, i] == MASK]:
            logits = model(x)[0]
            logits[:, MASK] = -torch.inf
            drafts = torch.where(x[0] == MASK, logits.argmax(-1), x[0])
            inside = torch.tensor([i in masks for i in range(x.shape[1])])
            write(x[0], masks, logits, drafts, judge(torch.where(inside, drafts, x[0])[None])[0])
            count += 1
    return x[0, len(prompt) :].tolist(), count


def plainly(prompt: list[int], n: int, block: int, accepts: Callable[[Tensor, int], bool]) -> tuple[list[int], int]:
    """FlashDLM's loop in the words of the paper: drafts are judged from the left, at least one is kept."""

    def write(x: Tensor, masks: list[int], logits: Tensor, drafts: Tensor, scores: Tensor) -> None:
        kept = next((k for k, i in enumerate(masks) if not accepts(scores[i - 1], int(drafts[i]))), len(masks))
        for i in masks[: max(kept, 1)]:
            x[i] = drafts[i]

    return naive(prompt, n, block, write)


ACCEPTS: dict[str, tuple[dict[str, float], Callable[[Tensor, int], bool]]] = {
    "guide-argmax": ({}, lambda s, d: int(s.argmax()) == d),
    "guide-top-k": ({"guide_k": 120}, lambda s, d: int((s > s[d]).sum()) < 120),
    "guide-relative": (
        {"guide_share": 0.2},
        lambda s, d: int((s > s[d]).sum()) < 2 and bool(s[d].exp() >= 0.2 * s.exp().max()),
    ),
    "guide-threshold": ({"guide_threshold": 1e-3}, lambda s, d: bool(s.softmax(-1)[d] >= 1e-3)),
}  # fmt: skip


@pytest.mark.parametrize("judge", [*sorted(ACCEPTS)[1:], pytest.param("guide-argmax", marks=pytest.mark.exhaustive)])
def test_the_loop_is_the_papers(judge: str) -> None:
    params, accepts = ACCEPTS[judge]
    program = guided(judge)
    for prompt in ([1, 2, 3], [77]):
        want, count = plainly(prompt, 12, 6, accepts)
        assert rounds(program, [prompt], 12, block=6, **params) == ([want], count)


def together(prompt: list[int], n: int, block: int, weight: float, margin: float) -> tuple[list[int], int]:
    """Both models decide: the first draft that is not near the best by their product gives way to what is."""

    def write(x: Tensor, masks: list[int], logits: Tensor, drafts: Tensor, scores: Tensor) -> None:
        for i in masks:
            worth = (1 - weight) * logits[i].log_softmax(-1) + weight * scores[i - 1].log_softmax(-1)
            best = max(logits[i].topk(OFFERS).indices.tolist(), key=lambda t: float(worth[t]))
            if worth[drafts[i]] < worth[best] - margin:
                x[i] = best
                break
            x[i] = drafts[i]

    return naive(prompt, n, block, write)


@pytest.fixture(scope="module")
def both() -> Program:
    return guided(PRODUCT)


@pytest.mark.parametrize(("weight", "margin"), [(0.0, 0.0), (0.3, 0.0), (0.6, 0.0), (0.6, 0.4), (1.0, 0.0), (1.0, 0.7)])
def test_both_models_decide(both: Program, weight: float, margin: float) -> None:
    for prompt in ([1, 2, 3], [77]):
        want = together(prompt, 12, 6, weight, margin)
        got, count = rounds(both, [prompt], 12, block=6, guide_weight=weight, guide_margin=margin)
        assert (got[0], count) == want
        assert count == 2 or weight > 0


def test_a_wide_margin_keeps_every_draft(both: Program, plain: Program) -> None:
    got, count = rounds(both, [[5, 6]], 12, block=6, guide_margin=1e9)
    assert (got, count) == rounds(plain, [[5, 6]], 12, block=6, guide_k=VOCAB) and count == 2


def test_a_draw_leans_to_the_guide(both: Program, plain: Program) -> None:
    """With weight 0 it is the canvas model's own; with more weight the guide finds it likelier, draw by draw."""
    prompt, count = [5, 6], 300
    with torch.no_grad():
        scores = Judge().eval()(torch.tensor([prompt]))[0, 1].log_softmax(-1)
    options: dict[str, Any] = {"temperature": 1.0, "block": 1, "seed": 7}
    own = generate(plain, [prompt] * count, 1, **options)
    drawn = {w: generate(both, [prompt] * count, 1, guide_weight=w, **options) for w in (0.0, 0.3, 0.9)}
    assert drawn[0.0] == own and len(set(map(tuple, own))) > 50
    means = [float(torch.stack([scores[ids[0]] for ids in drawn[w]]).mean()) for w in (0.0, 0.3, 0.9)]
    assert means[0] < means[1] < means[2]


def test_a_guide_that_rejects_all_leaves_the_first_mask(plain: Program) -> None:
    """E9: one id a round, from the left; and one that accepts all fills each block in one round."""
    want = plainly([5, 6], 12, 6, lambda *_: False)
    got, count = rounds(plain, [[5, 6]], 12, block=6, guide_k=0)
    assert (got[0], count) == want and count == 12
    got, count = rounds(plain, [[5, 6]], 12, block=6, guide_k=VOCAB)
    assert (got[0], count) == plainly([5, 6], 12, 6, lambda *_: True) and count == 2


def test_more_acceptance_needs_no_more_rounds(plain: Program) -> None:
    counts = [rounds(plain, [[5, 6]], 12, block=12, guide_k=k)[1] for k in (0, VOCAB)]
    assert counts == [12, 1]


prompts = st.lists(st.lists(st.integers(0, 250), min_size=1, max_size=7), min_size=1, max_size=4)
given_ids = st.lists(st.sampled_from([MASK, MASK, 7, 8]), min_size=12, max_size=12)


@settings(deadline=None, max_examples=12)
@given(prompts, st.sampled_from([0, 60, 150, VOCAB]), st.sampled_from([3, 4, 12]), given_ids)
def test_the_cached_guide_judges_alike(
    plain: Program, fast: Program, ids: list[list[int]], k: int, block: int, fill: list[int]
) -> None:
    """Prompts one by one, some ids given: rows that no mask follows are computed when a later one needs them."""
    for prompt in ids:
        options: dict[str, Any] = {"fill": [fill], "guide_k": k, "block": block}
        assert generate(fast, [prompt], 12, **options) == generate(plain, [prompt], 12, **options)


@settings(deadline=None, max_examples=15)
@given(
    prompts,
    st.sampled_from([(0.0, 0.0), (0.5, 0.0), (0.9, 0.0), (0.9, 0.4)]),
    st.sampled_from([0.0, 0.7]),
    st.sampled_from([3, 12]),
    given_ids,
)
@pytest.mark.exhaustive
def test_the_cached_guide_chooses_alike(
    both: Program, ids: list[list[int]], judge: tuple[float, float], temperature: float, block: int, fill: list[int]
) -> None:
    fast = GuideCache().run(both)
    for prompt in ids:
        options: dict[str, Any] = dict(zip(("guide_weight", "guide_margin"), judge, strict=True))
        options |= {"fill": [fill], "block": block, "temperature": temperature}
        assert generate(fast, [prompt], 12, **options) == generate(both, [prompt], 12, **options)


@cache
def passed(judge: str, names: tuple[str, ...]) -> Program:
    before = guided(PRODUCT if judge == "both" else "guide-top-k") if len(names) == 1 else passed(judge, names[:-1])
    return make(names[-1]).run(before)


ORDERS = [("free-cache",), ("dual-cache", "guide-cache"), ("guide-cache", "free-cache")]
EVERY = [(judge, names) for names in ORDERS for judge in ("plain", "both")]
QUICK = (("both", ORDERS[1]), ("plain", ORDERS[2]))  # each of the other things once


@pytest.mark.parametrize(
    ("judge", "names"), [pytest.param(*c, marks=[pytest.mark.exhaustive] * (c not in QUICK)) for c in EVERY]
)
@settings(deadline=None, max_examples=3)
@given(ids=prompts, low=st.booleans())
def test_batches_equal_the_request_alone(judge: str, names: tuple[str, ...], ids: list[list[int]], low: bool) -> None:
    """Whatever comes first, the guide's cache or the canvas's; and with the canvas's alone."""
    program = passed(judge, names)
    chosen = {"guide_weight": 0.5 + 0.4 * low, "guide_margin": 0.2}
    options: dict[str, Any] = {"guide_k": 60 if low else 150} if judge == "plain" else chosen
    together = generate(program, ids, 12, block=4, **options)
    assert together == [generate(program, [p], 12, block=4, **options)[0] for p in ids]


def test_the_cache_is_legal_by_the_mask(plain: Program, fast: Program) -> None:
    assert isinstance(planned(GuideCache(), plain, EAGER), Applies)
    assert isinstance(planned(GuideCache(), fast, EAGER), Skips)
    both_ways = planned(GuideCache(), guided("guide-top-k", Judge(causal=False)), EAGER)
    assert isinstance(both_ways, Skips) and both_ways.reason == "row 0 of the guide sees row 63"


def test_validation_sees_a_wrong_judge(plain: Program, fast: Program) -> None:
    """Drafts that are judged by the row they stand in, instead of the one before, are kept by other rules."""
    chosen = cases(plain, quick=True)
    verify(fast)
    assert validate(plain, with_probe(fast), chosen=chosen).passed
    agree = fast.graphs["agree"]
    off = fast.replace(graphs={**fast.graphs, "agree": broken(agree)})
    assert not validate(plain, with_probe(off), chosen=chosen).passed


def broken(graph: Any) -> Any:
    """The graph with an addition of 0 in the place of 1."""
    import copy

    from torch import fx

    new, nodes = fx.Graph(), {}  # type: ignore[var-annotated]
    new.output(new.graph_copy(graph.fx, nodes))
    for node in new.nodes:
        if node.target is torch.ops.aten.add.Tensor:
            node.args = (node.args[0], 0)
    made = copy.copy(graph)
    object.__setattr__(made, "fx", new)
    return made


@pytest.mark.parametrize("judge", [PRODUCT, pytest.param("guide-top-k", marks=pytest.mark.exhaustive)])
def test_it_lowers(judge: str) -> None:
    done = aropt.optimize(guided(judge), target="onnxruntime", instruments=Instruments(check=False))
    assert done.report["verify"]["status"] == "pass"
    names = {p["name"] for p in done.report["passes"] if p["status"] == "applied"}
    assert {"guide-cache", "fuse-sampler"} <= names


@pytest.mark.parametrize(
    ("make_it", "why"),
    [
        (lambda: guided("guide-top-k", Judge(vocab=100)), "vocabulary of 100"),
        (lambda: guided("guide-top-k", Judge(capacity=8)), "takes 8 ids"),
        (lambda: aropt.capture(source(tiny()), mask=MASK, rules=("guide-argmax",)), "needs a guide"),
        (lambda: aropt.capture(source(tiny()), mask=MASK, guide=Judge(), rules=("threshold",)), "don't go together"),
        (lambda: aropt.capture(Judge(), guide=Judge()), "judges the rounds of a canvas"),
        (lambda: aropt.capture(source(tiny()), mask=MASK, shift=1, guide=Judge()), "predict the next id"),
    ],
)
def test_bad_input(make_it: Callable[[], Program], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        make_it()
