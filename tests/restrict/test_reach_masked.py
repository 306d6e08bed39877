"""Masked language models of transformers on a canvas: chosen rows against stored ones equal the whole forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aropt
from aropt.errors import Unsupported, UsageError
from aropt.frontend.forwards import Forward
from aropt.frontend.trace import capture_model
from aropt.ir.ops import load_all
from aropt.pipeline.registry import make
from aropt.restrict.excluded import counted
from aropt.restrict.normalize import normalize_attention
from aropt.restrict.rewrite import Restricted, restrict
from tests.support.run import generate

pytest.importorskip("transformers", reason="needs aropt[hf]")
VOCAB, CAPACITY, MASK, LONGEST = 40, 24, 3, 48
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 16, "embedding_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 16, "max_position_embeddings": LONGEST, "pad_token_id": 0, "mask_token_id": MASK,
}  # fmt: skip


def model(kind: str, **sizes: Any) -> nn.Module:
    """A tiny random one, its weights so large that attention is far from uniform."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **sizes})
    made: nn.Module = transformers.AutoModelForMaskedLM.from_config(config)
    for value in made.parameters():
        value.data = value.data + 0.1 * torch.randn_like(value) if value.dim() == 1 else value.data * 5
    return made.eval()


def rewritten(module: nn.Module) -> Restricted:
    """The forward for chosen rows, attention as one op where it can be."""
    load_all()
    graph, weights = capture_model(module, VOCAB, CAPACITY)
    graph, _ = normalize_attention(graph, weights, CAPACITY)
    found = restrict(graph, weights, CAPACITY, canvas=True, never=counted(graph))
    found.constants.update(weights)
    return found


def difference(module: nn.Module, found: Restricted, least: int = 4) -> float:
    """The largest one between logits of chosen rows and of the whole forward; rows come in several calls.

    Two sequences of different lengths; ids from `least` on.
    """
    lengths, width = (CAPACITY - 7, 5), CAPACITY - 3
    ids = torch.randint(least, VOCAB, (2, width), generator=torch.Generator().manual_seed(1))
    places = torch.arange(width) - (width - torch.tensor(lengths)[:, None])
    state = {name: spec.create({"B": 2, "S": width + 1}) for name, spec in found.state.items()}
    graph, forward, worst = found.graph.bind(found.constants), Forward(module), 0.0
    everything = torch.arange(width).expand(2, -1)
    with torch.no_grad():
        full = [forward(row[width - n :][None])[0] for row, n in zip(ids, lengths, strict=True)]
        for slots in (everything, everything[:, -3:], everything[:, [-1, -4]], everything[:, -1:]):
            given = {"ids": ids.gather(1, slots), "slots": slots, "positions": places.gather(1, slots).clamp(min=-1)}
            given |= state
            logits, *new = graph(*(given[name] for name in found.graph.inputs))
            state = dict(zip(found.state, new, strict=True))
            for i, n in enumerate(lengths):
                at = slots[i] - (width - n)
                worst = max(worst, float((logits[i, at >= 0] - full[i][at[at >= 0]]).abs().max()))
    return worst


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("bert", marks=pytest.mark.exhaustive),
        "mpnet",  # written out, with a bias by buckets; rows numbered without padding
        pytest.param("yoso", marks=pytest.mark.exhaustive),  # weights that no softmax makes
        *(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in ("deberta", "mobilebert", "squeezebert")),
    ],
)
def test_chosen_rows_equal_the_whole_forward(kind: str) -> None:
    module = model(kind)
    found = rewritten(module)
    assert found.facts["masks"] == ["all"] and found.facts["attentions"] == 2
    assert difference(module, found) < 1e-4


def test_a_bias_that_hides_nothing_keeps_its_value() -> None:
    """SDPA with a bias of both positions that hides nothing: the rows take theirs from a table."""

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)
            self.far = nn.Embedding(7, 2)

        def forward(self, ids: Tensor) -> Tensor:
            x, at = self.embed(ids), torch.arange(ids.shape[1])
            bias = self.far((at[:, None] - at[None]).clamp(-3, 3) + 3).permute(2, 0, 1)[None] * 3
            heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
            mixed = nn.functional.scaled_dot_product_attention(heads, heads, heads, bias)
            return self.head(x + mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    module = Biased().eval()
    found = rewritten(module)
    assert found.facts["masks"] == ["all"]
    assert difference(module, found) < 1e-4


class Neighbours(nn.Module):
    """Attention over rows that their neighbours were joined to: by slices and zeros, or by convolutions."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.embed, self.head = kind, nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)
        self.joined = nn.Linear(24, 8)
        self.wide, self.single = nn.Conv1d(8, 8, 5, padding=2, groups=8), nn.Conv1d(8, 8, 1, groups=2)
        self.over = nn.Conv2d(2, 2, (3, 1), padding=(1, 0), groups=2, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.kind == "slices":
            after = nn.functional.pad(x[:, 1:], [0, 0, 0, 1])
            x = self.joined(torch.cat([after, x, nn.functional.pad(x[:, :-1], [0, 0, 1, 0])], 2))
        elif self.kind == "lost":
            x = x + nn.functional.pad(x[:, 1:], [0, 0, 1, 0])
        else:
            x = self.single(self.wide(x.transpose(1, 2)).relu()).transpose(1, 2)
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(heads, heads, heads)
        mixed = mixed + self.over(heads) if self.kind == "values" else mixed
        return self.head(x + mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["slices", pytest.param("rows", marks=pytest.mark.exhaustive), "values"])
def test_rows_see_their_neighbours(kind: str) -> None:
    module = Neighbours(kind).eval()
    found = rewritten(module)
    assert difference(module, found) < 1e-5
    assert any(name.startswith("rows_") for name in found.state)


def test_rows_that_are_dropped_at_one_end_and_padded_there_are_refused() -> None:
    """Rows before the first are empty slots: the first one itself would not be dropped."""
    with pytest.raises(Unsupported, match="moves rows along the sequence in a way that is not known"):
        rewritten(Neighbours("lost").eval())


@pytest.mark.exhaustive
def test_a_mask_that_hides_nothing_is_no_mask() -> None:
    """BERT's caches are planned, applied and verified; its rows see which slots are written, and nothing else."""
    plain = aropt.capture(model("bert", num_hidden_layers=1), mask=MASK, capacity=CAPACITY)
    made = aropt.optimize(plain, target="eager", passes=[make("canonicalize"), make("dual-cache")], budget={"kl": 1e9})
    assert [p["status"] for p in made.report["passes"] if p["name"] == "dual-cache"] == ["applied"]
    assert made.report["verify"]["status"] == "pass"


def test_rows_are_numbered_by_place_where_no_padding_occurs() -> None:
    """RoBERTa counts ids but padding: that one is in no prompt and no answer, and caches are exact."""
    plain = aropt.capture(model("roberta", num_hidden_layers=1, pad_token_id=1), mask=MASK, capacity=CAPACITY)
    assert plain.meta["never"] == [1] and plain.meta["prompts"] == [[0]]
    made = aropt.optimize(plain, target="eager", passes=[make("canonicalize"), make("dual-cache")], budget={"kl": 1e9})
    assert [p["status"] for p in made.report["passes"] if p["name"] == "dual-cache"] == ["applied"]
    assert made.report["verify"]["status"] == "pass"
    with pytest.raises(UsageError, match="token 1 is the model's padding"):
        generate(made, [[5, 1, 6]], 4)
    with torch.no_grad():
        plain.weights["lm_head.bias"][1] = 1e3  # it would win each row
    assert 1 not in generate(plain, [[5, 6]], 6)[0] + generate(plain, [[5, 6]], 6, temperature=5.0)[0]
