"""Builds the unmasking program: a forward over a canvas and a commit rule become a whole generation in the IR.

A canvas int64 [B, T] holds the prompt and, where nothing is written yet, the mask id. Each round runs the forward over
all of it, and writes some of the masked rows of the block at hand: for each row of the batch the first block that has
masks, so that the rows of a batch don't wait for each other. Generation ends when no mask is left (LLaDA, Nie et al.
2025, algorithm 4). Masks may stand anywhere (infilling).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from aropt.frontend.trace import capture_function
from aropt.ir import ops
from aropt.ir.control import Call
from aropt.ir.edit import call_by_name
from aropt.ir.program import Graph, Input, Meta, Program, Spec, StateSpec
from aropt.loops.nest import Level, nest
from aropt.loops.rules import BOOL, F32, I64, gumbel_noise
from aropt.loops.unmask import ar_verifier as guides
from aropt.loops.unmask import smoothing as smooth
from aropt.loops.unmask.blocks import block_of, current_block, places
from aropt.loops.unmask.commit import CONFIDENCES, CREDIT, SMOOTH, Round, Rule, chosen
from aropt.restrict.excluded import without

SCALAR, ROWS, CANVAS, PICKED = Spec(I64), Spec(I64, ("B",)), Spec(I64, ("B", "T")), Spec(I64, ("B", "R"))
STATE = ("cursor", "step", "masks")
HELD = Spec(F32, ("B", "T"))


def unmasking(
    model: Graph,
    weights: dict[str, Tensor],
    meta: Meta,
    rules: tuple[str, ...] = (),
    guide: guides.Guide | None = None,
) -> Program:
    """The plain loop. `meta` holds vocab, capacity, mask (the id), and may hold shift (row i predicts id i + 1).

    `guide` judges what each round would write. Raises UsageError where rules, guide and model don't fit together.
    """
    ops.load_all()
    rules = guides.completed(rules, guide)
    rule, vocab, mask = chosen(rules), int(meta["vocab"]), int(meta["mask"])
    graphs = {"model": model, "start": start(mask), "commit": commit(rule, mask), "answer": answer()}
    smoothed: dict[str, StateSpec] = {}
    if rule.smooth:
        made, smoothed["expected"] = smooth.graphs(model, weights, meta)
        graphs |= made
    kept = rule.credit or rule.smooth or rule.guide == guides.PRODUCT
    graphs |= {"every_row": every_row(kept)} | ({"align": align()} if meta.get("shift") else {})
    if guide is not None:
        guides.check(guide, meta)
        graphs |= guides.graphs(guide, rule.guide, mask)
        weights, meta = {**weights, **guide.weights}, {**meta, "guide": guide.name}
    for name, sampled in (("greedy", False), ("sample", True)):
        graphs[name] = pick(rule, name, vocab, mask, sampled, bool(meta.get("shift")), meta.get("never", ()))
    counter, flag = StateSpec("counter", SCALAR), StateSpec("flag", Spec(BOOL))
    state = {"tokens": StateSpec("tokens", CANVAS), "rounds": counter, "finished": flag}
    state |= {name: StateSpec("counter", ROWS) for name in STATE}
    state |= {"held": StateSpec("flag", HELD, 1.0)} if rule.rcr else {}
    state |= {"credit": StateSpec("recurrent", Spec(F32, ("B", "T", vocab)), 0.0)} if rule.credit else {}
    state |= smoothed
    level = Level(
        "unmask", graphs, program_inputs(rule, int(meta.get("block") or 0)), state, ("generated", "rounds"),
        partial(unmask, graphs), params={"block": "block"}, decides="tokens", evidence="logits",
    )  # fmt: skip
    return nest(level, weights, {**meta, "loop": "unmask", "rules": list(rules), "ragged": False})


def program_inputs(rule: Rule, block: int) -> dict[str, Input]:
    """What the caller of a generation gives."""
    return {
        "canvas": Input(CANVAS, doc="token ids, the mask id where one is to be found, padded on the left"),
        "lengths": Input(ROWS, doc="ids of each canvas without padding"),
        "answers": Input(ROWS, doc="position of the first id of the answer"),
        "origin": Input(ROWS, doc="position where the first block begins"),
        "block": Input(SCALAR, block or 32, "rows of a block", 1),
        "stop": Input(Spec(I64, ("K",)), doc="tokens that fill the rest of the canvas; -1 never matches"),
        "greedy": Input(Spec(BOOL), True, "argmax instead of a draw"),
        "temperature": Input(Spec(F32), 0.0, "0 is greedy", 0.0),
        "seed": Input(SCALAR, 0, "seed of the noise"),
        "streams": Input(ROWS, doc="which sequence each row is, for the noise"),
        **rule.params,
    }


def unmask(graphs: dict[str, Graph], rule: str) -> list[Call]:
    """A round with the named way to pick candidates."""
    chosen = call_by_name(graphs[rule])
    body = (
        [call_by_name(graphs["every_row"])] if "blend" in graphs or {"positions", "slots"} & set(chosen.reads) else []
    )
    model = call_by_name(graphs["model"])
    model = replace(model, reads={**model.reads, "ids": "tokens"})
    body += [call_by_name(graphs["blend"]), model, call_by_name(graphs["expect"])] if "blend" in graphs else [model]
    if "align" in graphs:
        body += [chosen, call_by_name(graphs["align"])]
    else:
        body.append(replace(chosen, writes=chosen.writes | {"picked": "candidate", "sure": "confidence"}))
    body += guides.calls(graphs) if "guide" in graphs else []
    return [*body, call_by_name(graphs["commit"])]


def start(mask: int) -> Graph:
    """The state before the first round."""

    def function(canvas: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        nothing = lengths - lengths
        left = (canvas == mask) & (places(canvas, lengths) >= 0)
        return canvas.clone(), nothing - 1, nothing, nothing, nothing.sum(), ~left.any()

    return capture_function(
        "start",
        function,
        {"canvas": CANVAS, "lengths": ROWS},
        ["tokens", *STATE, "rounds", "finished"],
        "prologue",
    )


def pick(rule: Rule, name: str, vocab: int, mask: int, sampled: bool, shift: bool, never: Sequence[int] = ()) -> Graph:
    """logits [B, R, V] -> what each row predicts and the rule's confidence in it; not the mask itself, nor `never`."""

    both = rule.guide == guides.PRODUCT

    def allowed(logits: Tensor) -> Tensor:
        return torch.where(torch.arange(vocab) == mask, -torch.inf, logits.to(F32))

    def offered(logits: Tensor, noise: Tensor | None, values: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return guides.offers(logits, noise, values["slots"], values["tokens"], values["guide_weight"])

    def select(logits: Tensor, values: dict[str, Tensor]) -> tuple[Tensor, ...]:
        if not sampled and rule.confidence == "probability":
            return *likeliest(logits, mask), *(offered(allowed(logits), None, values) if both else ())
        logits, noise = allowed(logits), None
        if sampled:
            logits = logits / values["temperature"].clamp(min=1e-6)
            noise = gumbel(vocab, values, values["positions"] + int(shift))
        candidate = (logits if noise is None else logits - noise).argmax(-1)
        if sampled and rule.confidence == "probability":
            sure = torch.log_softmax(logits, -1).gather(-1, candidate.unsqueeze(-1)).squeeze(-1)
        else:
            sure = CONFIDENCES[rule.confidence](logits)
        return candidate, sure, *(offered(logits, noise, values) if both else ())

    def function(logits: Tensor, **values: Tensor) -> tuple[Tensor, ...]:
        logits = without(logits, never)
        if not rule.credit:
            return select(logits, values)
        logits, credit = credited(logits, values, mask, shift)
        return *select(logits, values), credit

    inputs = {"logits": Spec(F32, ("B", "R", vocab))}
    if sampled:
        inputs |= {"positions": PICKED, "temperature": Spec(F32), "seed": SCALAR, "streams": ROWS}
        inputs |= {"rounds": SCALAR}
    if both:
        inputs |= {"slots": PICKED, "tokens": CANVAS, "guide_weight": Spec(F32)}
    if rule.credit:
        inputs |= {"credit": Spec(F32, ("B", "T", vocab)), "slots": PICKED, "tokens": CANVAS, "block": SCALAR}
        inputs |= {"lengths": ROWS, "origin": ROWS} | {n: i.spec for n, i in CREDIT.items()}
    more = ["offers", "chances"] if both else []
    outputs = ["picked", "sure", *more, *(["credit"] if rule.credit else [])]
    return capture_function(name, function, inputs, outputs, "rule")


def likeliest(logits: Tensor, mask: int) -> tuple[Tensor, Tensor]:
    """The most likely id of each row but the mask, int64 [B, R], and its log-probability, float32 [B, R]."""
    ids, logs = torch.ops.aropt.canvas_select(logits.reshape(-1, logits.shape[2]), mask)
    return ids.reshape(logits.shape[:2]), logs.reshape(logits.shape[:2])


def credited(logits: Tensor, values: dict[str, Tensor], mask: int, shift: bool) -> tuple[Tensor, Tensor]:
    """Logits fused with credit, float32 [B, R, V], and the credit of all rows after this round, float32 [B, T, V].

    The credit of an id in a row is the sum of p^gamma over the rounds in which it was the most likely one there, p its
    probability; each round multiplies what there was by beta. Masked rows of the block at hand gain, and to logits
    alpha log(1 + credit) is added: an id that stays ahead is sure earlier (credit decoding, dInfer, 2510.08666; the
    matrix is dense as in its code, CreditThresholdParallelDecoder, and of the whole canvas, as each sequence is in a
    block of its own: 4 T V bytes a sequence). `values`: credit, slots of the rows, the canvas, and the parameters.
    """
    tokens, slots, vocab = values["tokens"], values["slots"], logits.shape[2]
    batch, length = tokens.shape
    active = current_block(tokens, values["lengths"], values["origin"], values["block"], mask)[0]
    if shift:  # the row before a mask predicts it
        active = active.index_select(1, (torch.arange(length) + 1).clamp(max=length - 1))
    at = slots.clamp(max=length - 1)
    ids, logs = likeliest(logits, mask)
    gains = torch.where(active.gather(1, at) & (slots < length), torch.exp(values["credit_power"] * logs), 0.0)
    kept = (values["credit"] * values["credit_decay"]).reshape(batch, length * vocab)
    credit = kept.scatter_add(1, at * vocab + ids, gains).reshape(batch, length, vocab)
    own = credit.gather(1, at.unsqueeze(2).expand(-1, -1, vocab))
    return logits.to(F32) + values["credit_weight"] * torch.log1p(own), credit


def every_row(slots: bool) -> Graph:
    """The position of each row of a canvas, -1 in padding; and its slot, where a rule keeps something by row."""

    def function(tokens: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        batch, length = tokens.shape
        positions = places(tokens, lengths).clamp(min=-1)
        return (positions, torch.arange(length).expand(batch, length).clone()) if slots else (positions,)

    inputs = {"tokens": CANVAS, "lengths": ROWS}
    return capture_function("every_row", function, inputs, ["positions", *(["slots"] if slots else [])])


def align() -> Graph:
    """Where row i predicts id i + 1: what is predicted for each row."""

    def function(picked: Tensor, sure: Tensor) -> tuple[Tensor, ...]:
        before = (torch.arange(picked.shape[1]) - 1).clamp(min=0)
        return picked.index_select(1, before), sure.index_select(1, before)

    inputs = {"picked": CANVAS, "sure": Spec(F32, ("B", "T"))}
    return capture_function("align", function, inputs, ["candidate", "confidence"])


def gumbel(vocab: int, values: dict[str, Tensor], at: Tensor) -> Tensor:
    """What is subtracted from the logits of rows `at` to draw from them, [B, R, V], by seed and place."""
    position = values["rounds"] * 2**20 + at.clamp(min=0)
    streams = values["streams"].unsqueeze(1).expand(at.shape)
    return gumbel_noise(vocab, values["seed"], streams.reshape(-1), position.reshape(-1)).reshape(*at.shape, vocab)


def commit(rule: Rule, mask: int) -> Graph:
    """Writes candidates where the rule says so, fills the rest after a stop token, and counts."""

    def function(
        tokens: Tensor,
        candidate: Tensor,
        confidence: Tensor,
        lengths: Tensor,
        answers: Tensor,
        origin: Tensor,
        block: Tensor,
        stop: Tensor,
        cursor: Tensor,
        step: Tensor,
        masks: Tensor,
        rounds: Tensor,
        **params: Tensor,
    ) -> tuple[Tensor, ...]:
        at = places(tokens, lengths)
        active, current = current_block(tokens, lengths, origin, block, mask)
        here = (block_of(at, origin, block) == current.unsqueeze(1)) & (at >= 0)
        fresh, left = current != cursor, active.to(I64).sum(1)
        step, masks = torch.where(fresh, 0, step), torch.where(fresh, left, masks)
        if rule.eoser:
            confidence = confidence + early(candidate, stop, step, masks, params)
        round = Round(active, confidence, *(x.unsqueeze(1) for x in (step, masks, left, left - left)))
        kept = params.get("held")
        if kept is not None:
            tokens, kept = revised(rule, round, tokens, candidate, here, mask, params)
        elif rule.guide:
            beyond = rule.guide == guides.PRODUCT
            tokens = torch.where(guides.accepted_rows(active, params["accepted"], beyond), candidate, tokens)
        else:
            if rule.remask:
                tokens, round = doubted(round, tokens, here, mask, params)
            tokens = written(rule, round, tokens, candidate, params)
        ended = filled(tokens, stop, mask, at, answers)
        if rule.rcr or rule.remask:  # while its block is open, a stop token may be masked again
            ended = torch.where(((tokens == mask) & here).any(1, keepdim=True), tokens, ended)
        results = (ended, current, step + 1, masks, rounds + 1, ~((ended == mask) & (at >= 0)).any())
        return results if kept is None else (*results, kept)

    rows = {n: ROWS for n in ("lengths", "answers", "origin", *STATE)}
    inputs = {"tokens": CANVAS, "candidate": CANVAS, "confidence": Spec(F32, ("B", "T")), **rows}
    inputs |= {"block": SCALAR, "stop": Spec(I64, ("K",)), "rounds": SCALAR}
    params = {n: i.spec for n, i in rule.params.items() if n not in {**CREDIT, **SMOOTH}}
    held = {"held": HELD} if rule.rcr else {}
    inputs |= ({"accepted": Spec(BOOL, ("B", "T"))} if rule.guide else params) | held
    inputs |= {"canvas": CANVAS} if rule.remask else {}
    return capture_function("commit", function, inputs, ["tokens", *STATE, "rounds", "finished", *held], "commit")


def written(rule: Rule, round: Round, tokens: Tensor, candidate: Tensor, params: dict[str, Tensor]) -> Tensor:
    """The canvas with the rows that the rule writes."""
    if rule.test not in ("", "threshold"):
        return torch.where(rule.select(round, **params), candidate, tokens)
    least, sure = rule.limits(round, **params)  # quotas and thresholds are one op; the others rank by themselves
    op: Callable[..., Tensor] = torch.ops.aropt.canvas_commit
    segment = torch.where(round.active, 0, -1)
    return op(tokens, candidate, round.confidence, segment, least.squeeze(1), sure, False)


def doubted(round: Round, tokens: Tensor, here: Tensor, mask: int, params: dict[str, Tensor]) -> tuple[Tensor, Round]:
    """The canvas with written rows of low confidence masked again, and the round in which they are active.

    Low is a confidence in what the row predicts now below `remask_threshold`. The rule then writes at least one row
    more than was masked again, so that masks get fewer in each round, and no more stay than a schedule leaves (dInfer,
    2510.08666, get_transfer_index_hierarchy_remask of its code). `here`: rows of the block at hand, bool [B, T]; of
    these, ids that `params["canvas"]` gave stay.
    """
    low = round.confidence < torch.log(params["remask_threshold"])
    again = here & (params["canvas"] == mask) & (tokens != mask) & low
    count = again.to(I64).sum(1, keepdim=True)
    return torch.where(again, mask, tokens), replace(round, active=round.active | again, again=count)


def revised(
    rule: Rule, round: Round, tokens: Tensor, candidate: Tensor, here: Tensor, mask: int, params: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """All masks of the block are written; then the least sure of its written rows are masked again, as many as the
    schedule leaves (RCR, MDPO, 2508.13148; the confidence is that of a row's last writing, as in its code).

    `held` float32 [B, T]: these confidences, 1 where nothing was written. `here`: as for `doubted`.
    """
    held = torch.where(round.active, round.confidence, params["held"])
    ours = here & (held <= 0)
    kept = ours.to(I64).sum(1, keepdim=True) - (round.left - rule.limits(round, **params)[0])
    again = ours & (replace(round, active=ours, confidence=held).rank >= kept)
    return torch.where(again, mask, torch.where(round.active, candidate, tokens)), held


def early(candidate: Tensor, stop: Tensor, step: Tensor, masks: Tensor, params: dict[str, Tensor]) -> Tensor:
    """What is added to the confidence of end tokens: log gamma, which rises to 0 over the block (EOSER, 2509.23924)."""
    rounds = torch.where(params["steps"] > 0, params["steps"], masks) if "steps" in params else masks
    gamma = params["eos_gamma"] + (1 - params["eos_gamma"]) * (step.to(F32) / (rounds - 1).clamp(min=1).to(F32))
    ends = (candidate.unsqueeze(2) == stop).any(2)
    return torch.where(ends, torch.log(gamma.clamp(max=1.0)).unsqueeze(1), 0.0)


def filled(tokens: Tensor, stop: Tensor, mask: int, at: Tensor, answers: Tensor) -> Tensor:
    """After a stop token in the answer with no mask before it, all masks become that token."""
    inside = at >= answers.unsqueeze(1)
    open_before = ((tokens == mask) & (at >= 0)).to(I64).cumsum(1)
    ends = (tokens.unsqueeze(2) == stop).any(2) & inside & (open_before == 0)
    last = torch.where(ends, tokens, -1).amax(1, keepdim=True)
    return torch.where((tokens == mask) & inside & ends.any(1, keepdim=True), last, tokens)


def answer() -> Graph:
    """The answer's ids up to the first stop token, -1 elsewhere."""

    def function(tokens: Tensor, lengths: Tensor, answers: Tensor, stop: Tensor) -> Tensor:
        inside = places(tokens, lengths) >= answers.unsqueeze(1)
        ended = ((tokens.unsqueeze(2) == stop).any(2) & inside).to(I64)
        return torch.where(inside & (ended.cumsum(1) - ended == 0), tokens, -1)

    inputs = {"tokens": CANVAS, "lengths": ROWS, "answers": ROWS, "stop": Spec(I64, ("K",))}
    return capture_function("answer", function, inputs, ["generated"], "epilogue")
