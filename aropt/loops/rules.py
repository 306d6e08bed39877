"""Rules: what happens between the logits and the next token, as small tensor functions that are captured like a model.

Order: guidance, repetition penalty, bias, suppressed ids, temperature, top-k, top-p, min-p, draw. A rule holds no state
and no random generator: noise is the op `aropt::noise`, a function of seed, sequence and position, so that every target
draws alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from aropt.errors import UsageError
from aropt.ir.calls import op_name
from aropt.ir.program import Graph, Input, Spec
from aropt.restrict.excluded import without

F32, I64, BOOL = torch.float32, torch.int64, torch.bool


@dataclass(frozen=True)
class Processor:
    """A step of the rule: `apply(logits[B, V], **params) -> logits[B, V]`. `draws`: only used when sampling."""

    params: dict[str, Input]
    apply: Callable[..., Tensor]
    draws: bool = True
    reads: tuple[str, ...] = ()  # values of the program, besides the parameters


def guidance(logits: Tensor, guidance: Tensor) -> Tensor:
    """Classifier-free guidance: logits [2B, V] (conditional first) -> [B, V] (Ho & Salimans 2022, eq. 6)."""
    branches = logits.reshape(2, -1, *logits.shape[1:])
    return branches[1] + guidance * (branches[0] - branches[1])


def guidance_interval(
    logits: Tensor, guidance: Tensor, guidance_from: Tensor, guidance_to: Tensor, count: Tensor
) -> Tensor:
    """Guidance for new rows from .. to - 1, none (the conditional logits) for others (arXiv 2404.07724)."""
    branches = logits.reshape(2, -1, *logits.shape[1:])
    guided = branches[1] + guidance * (branches[0] - branches[1])
    return torch.where(inside(guidance_from, guidance_to, count), guided, branches[0])


def inside(guidance_from: Tensor, guidance_to: Tensor, count: Tensor) -> Tensor:
    """Whether the next row, after `count` new ones, is guided: bool[]."""
    return (count >= guidance_from) & (count < guidance_to)


def repetition_penalty(logits: Tensor, repetition_penalty: Tensor, seen: Tensor) -> Tensor:
    """Divides positive and multiplies negative logits of tokens seen before (Keskar et al. 2019, section 4.1)."""
    return torch.where(seen, torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty), logits)


def bias(logits: Tensor, bias: Tensor) -> Tensor:
    """Adds bias [V]."""
    return logits + bias


def blocked(logits: Tensor, ids: Tensor) -> Tensor:
    """0 for each id of the vocabulary, -inf for those of `ids` (negative ones are none): float32 [V]."""
    vocab = logits.shape[-1]
    places = torch.where(ids < 0, vocab, ids)
    return torch.zeros(vocab + 1).scatter(0, places, -torch.inf)[:vocab]


def suppress_tokens(logits: Tensor, suppress_tokens: Tensor) -> Tensor:
    """Never writes these ids."""
    return logits + blocked(logits, suppress_tokens)


def begin_suppress_tokens(logits: Tensor, begin_suppress_tokens: Tensor, count: Tensor) -> Tensor:
    """Does not begin with these ids."""
    return torch.where(count == 0, logits + blocked(logits, begin_suppress_tokens), logits)


def min_new_tokens(logits: Tensor, min_new_tokens: Tensor, count: Tensor, stop: Tensor) -> Tensor:
    """Writes no stop id before there are so many new tokens."""
    return torch.where(count < min_new_tokens, logits + blocked(logits, stop), logits)


def temperature(logits: Tensor, temperature: Tensor) -> Tensor:
    return logits / temperature.clamp(min=1e-6)


def top_k(logits: Tensor, top_k: Tensor) -> Tensor:
    """Keeps the k largest logits, and what ties with the last of them; k = 0 keeps all."""
    kept: Tensor = torch.ops.aropt.keep_top(logits, top_k, None)
    return kept


def top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """Keeps the smallest set of most likely tokens whose probability reaches p (Holtzman et al. 2020, section 3.1).

    Of equally likely ones it keeps those with the lowest ids.
    """
    kept: Tensor = torch.ops.aropt.keep_top(logits, None, top_p)
    return kept


def min_p(logits: Tensor, min_p: Tensor) -> Tensor:
    """Keeps tokens at least min_p times as likely as the most likely one (Nguyen et al. 2024, section 3)."""
    return torch.where(logits >= logits.amax(-1, keepdim=True) + torch.log(min_p), logits, -torch.inf)


def draw(logits: Tensor, seed: Tensor, streams: Tensor, position: Tensor) -> Tensor:
    """A sample from softmax(logits) by the Gumbel-max trick: int64 [B]. `position`: int64 [B], of the token drawn."""
    return torch.argmax(logits - gumbel_noise(logits.shape[-1], seed, streams, position), dim=-1)


def draws(graph: Graph) -> bool:
    """Whether a rule draws: it asks for noise."""
    return any(op_name(node) == "aropt::noise" for node in graph.fx.nodes)


def gumbel_noise(vocab: int, seed: Tensor, streams: Tensor, position: Tensor) -> Tensor:
    """What is subtracted from the logits of each row to draw from them: float32 [B, V]."""
    uniform: Tensor = torch.ops.aropt.noise(seed, streams, position, vocab)
    return torch.log(-torch.log(uniform))


def scalar(
    dtype: torch.dtype, default: float | int, doc: str, low: float | None = None, high: float | None = None
) -> Input:
    return Input(Spec(dtype), default, doc, low, high)


SMALLEST = 0.01  # a repetition penalty of 0 would divide by it
ALWAYS = 2**62  # more rows than any generation has
SCALE = {"guidance": scalar(F32, 1.5, "classifier-free guidance scale; 1 is off", 1)}
INTERVAL = {
    "guidance_from": scalar(I64, 0, "the first new row that is guided, from 0 on", 0),
    "guidance_to": scalar(I64, ALWAYS, "the first new row after those that are guided", 0),
}
PROCESSORS: dict[str, Processor] = {
    "guidance": Processor(SCALE, guidance, draws=False),
    "guidance-interval": Processor({**SCALE, **INTERVAL}, guidance_interval, False, ("count",)),
    "repetition-penalty": Processor(
        {"repetition_penalty": scalar(F32, 1.0, "repetition penalty; 1 is off", SMALLEST)},
        repetition_penalty,
        False,
        ("seen",),
    ),
    "bias": Processor({"bias": Input(Spec(F32, ("V",)), 0.0, "added to the logits, one value a token")}, bias, False),
    "suppress-tokens": Processor(
        {"suppress_tokens": Input(Spec(I64, ("X",)), -1, "ids that are never written; -1 is none", -1)},
        suppress_tokens,
        False,
    ),
    "begin-suppress-tokens": Processor(
        {"begin_suppress_tokens": Input(Spec(I64, ("Y",)), -1, "ids that don't begin an answer; -1 is none", -1)},
        begin_suppress_tokens,
        False,
        ("count",),
    ),
    "min-new-tokens": Processor(
        {"min_new_tokens": scalar(I64, 0, "new tokens before a stop id may be written; 0 is off", 0)},
        min_new_tokens,
        False,
        ("count", "stop"),
    ),
    "temperature": Processor({"temperature": scalar(F32, 0.0, "0 is greedy", 0)}, temperature),
    "top-k": Processor({"top_k": scalar(I64, 0, "0 is off", 0)}, top_k),
    "top-p": Processor({"top_p": scalar(F32, 1.0, "1 is off", 0, 1)}, top_p),
    "min-p": Processor({"min_p": scalar(F32, 0.0, "0 is off", 0, 1)}, min_p),
}
SHIPPED = MappingProxyType(dict(PROCESSORS))  # in their order, whatever is registered later
DEFAULT = ("temperature", "top-k", "top-p")
GUIDED = ("guidance", "guidance-interval")  # rules that read two branches


def chosen(names: tuple[str, ...]) -> dict[str, Processor]:
    """The processors of those names, in their fixed order. Raises UsageError for an unknown one."""
    unknown = [n for n in names if n not in PROCESSORS]
    if unknown:
        raise UsageError(
            what=f"unknown rule '{unknown[0]}'",
            why="it is not in the list of rules",
            hint="choose from " + ", ".join(PROCESSORS),
        )
    if set(GUIDED) <= set(names):
        names = tuple(n for n in names if n != "guidance")  # the other one is the same where it covers everything
    return {n: p for n, p in PROCESSORS.items() if n in names or n == "temperature"}


def rule(
    processors: dict[str, Processor],
    vocab: int,
    sampled: bool,
    row: tuple[int, ...] = (),
    never: Sequence[int] = (),
    best: int = 0,
    chances: bool = False,
) -> tuple[Callable[..., Tensor], dict[str, Spec]]:
    """The rule made of these processors and its inputs; logits of 2B rows if guided. Returns token int64 [B].

    `best`: so many ids in its place, int64 [B, best]: those that the rule puts first, its token and the next ones.
    `chances`: the logits in its place that it draws by, float32 [B, V]; then it reads no noise.

    `row` is (W,) for windows: logits [B, W, V] -> token [B, W], each id with noise of its own. `never`: ids that are
    not picked (see aropt.restrict.excluded).
    """
    used = {n: p for n, p in processors.items() if sampled or not p.draws}
    rows = "2*B" if set(GUIDED) & set(used) else "B"
    inputs = {"logits": Spec(F32, (rows, *row, vocab))}
    for processor in used.values():
        for name, given in processor.params.items():
            inputs[name] = Spec(given.spec.dtype, tuple(vocab if d == "V" else d for d in given.spec.dims))
        if "seen" in processor.reads:
            inputs["seen"] = Spec(BOOL, ("B", vocab))
        if "count" in processor.reads:
            inputs["count"] = Spec(I64)
        if "stop" in processor.reads:
            inputs["stop"] = Spec(I64, ("K",))
    if sampled and not chances:
        inputs |= {"seed": Spec(I64), "streams": Spec(I64, ("B",)), "position": Spec(I64, ("B",))}

    def every(values: dict[str, Tensor]) -> dict[str, Tensor]:
        """What belongs to a row, for each id of its window."""
        wide = dict(values)
        for name in {"seen", "streams", "position"} & set(values):
            wide[name] = values[name].repeat_interleave(row[0], 0)
        if "position" in values:
            places = values["position"].unsqueeze(1) * row[0] + torch.arange(row[0])
            wide["position"] = places.flatten()
        return wide

    def function(logits: Tensor, **values: Tensor) -> Tensor:
        if row:
            logits, values = logits.flatten(0, 1), every(values)
        logits = without(logits, never)
        for processor in used.values():
            names = (*processor.params, *processor.reads)
            logits = processor.apply(logits, **{n: values[n] for n in names})
        if chances:
            return logits
        if sampled:
            logits = logits - gumbel_noise(vocab, *(values[n] for n in ("seed", "streams", "position")))
        token = torch.topk(logits, best, dim=-1).indices if best else torch.argmax(logits, dim=-1)
        return token.reshape(-1, *row) if row else token

    return function, inputs
