"""Builds the unmasking program: a forward over a canvas and a commit rule become a whole generation in the IR.

A canvas int64 [B, T] holds the prompt and, where nothing is written yet, the mask id. Each round runs the forward over
all of it, and writes some of the masked rows of the block at hand: for each row of the batch the first block that has
masks, so that the rows of a batch don't wait for each other. Generation ends when no mask is left (LLaDA, Nie et al.
2025, algorithm 4). Masks may stand anywhere (infilling).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aropt import guide as guides
from aropt import ops
from aropt.commit import CONFIDENCES, Round, Rule, chosen
from aropt.program import Call, Graph, If, Input, Loop, Program, Seq, Spec, StateSpec
from aropt.rules import BOOL, F32, I64, draw
from aropt.trace import capture_function

SCALAR, ROWS, CANVAS = Spec(I64), Spec(I64, ("B",)), Spec(I64, ("B", "T"))
FAR = 2**20  # a block that no canvas reaches
STATE = ("cursor", "step", "masks")
HELD = Spec(F32, ("B", "T"))


def unmasking(
    model: Graph,
    weights: dict[str, Tensor],
    meta: dict[str, Any],
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
    graphs |= {"every_row": every_row()} | ({"align": align()} if meta.get("shift") else {})
    if guide is not None:
        guides.check(guide, meta)
        graphs |= guides.graphs(guide, rule.guide, mask)
        weights, meta = {**weights, **guide.weights}, {**meta, "guide": guide.name}
    for name, sampled in (("greedy", False), ("sample", True)):
        graphs[name] = pick(rule, name, vocab, mask, sampled, bool(meta.get("shift")))
    control = Seq(
        (
            same(graphs["start"]),
            If("greedy", loop(graphs, "greedy"), loop(graphs, "sample")),
            same(graphs["answer"]),
        )
    )
    counter, flag = StateSpec("counter", SCALAR), StateSpec("flag", Spec(BOOL))
    state = {"tokens": StateSpec("tokens", CANVAS), "rounds": counter, "finished": flag}
    state |= {name: StateSpec("counter", ROWS) for name in STATE}
    state |= {"held": StateSpec("flag", HELD, 1.0)} if rule.rcr else {}
    return Program(
        meta.get("name", "program"),
        graphs,
        program_inputs(rule, int(meta.get("block") or 0)),
        state,
        control,
        ("generated", "rounds"),
        weights,
        {**meta, "loop": "unmask", "rules": list(rules), "ragged": False},
    )


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


def same(graph: Graph) -> Call:
    """A call whose values are named as the graph's inputs and outputs."""
    return Call(graph.name, {n: n for n in graph.inputs}, {n: n for n in graph.outputs})


def loop(graphs: dict[str, Graph], rule: str) -> Loop:
    """Rounds with the named way to pick candidates."""
    body = [Call("model", {"ids": "tokens"}, {"logits": "logits"})]
    if rule == "sample":
        body.append(same(graphs["every_row"]))
    if "align" in graphs:
        body += [same(graphs[rule]), same(graphs["align"])]
    else:
        reads = {n: n for n in graphs[rule].inputs}
        body.append(Call(rule, reads, {"picked": "candidate", "sure": "confidence"}))
    body += guides.calls(graphs) if "guide" in graphs else []
    return Loop("unmask", "finished", Seq((*body, same(graphs["commit"]))), {}, {"block": "block"})


def start(mask: int) -> Graph:
    """The state before the first round."""

    def function(canvas: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        nothing = lengths - lengths
        left = (canvas == mask) & (places(canvas, lengths) >= 0)
        return canvas.clone(), nothing - 1, nothing, nothing, nothing.sum(), ~left.any()

    return capture_function(
        "start", function, {"canvas": CANVAS, "lengths": ROWS}, ["tokens", *STATE, "rounds", "finished"]
    )


def places(canvas: Tensor, lengths: Tensor) -> Tensor:
    """The position of each row, counted from the first id; negative in padding: int64 [B, T]."""
    return torch.arange(canvas.shape[1]) - (canvas.shape[1] - lengths.unsqueeze(1))


def pick(rule: Rule, name: str, vocab: int, mask: int, sampled: bool, shift: bool) -> Graph:
    """logits [B, R, V] -> what each row predicts and the rule's confidence in it; never the mask itself."""

    def function(logits: Tensor, **values: Tensor) -> tuple[Tensor, ...]:
        if not sampled and rule.confidence == "probability":
            found = torch.ops.aropt.canvas_select(logits.reshape(-1, vocab), mask)
            return tuple(x.reshape(logits.shape[:2]) for x in found)
        logits = torch.where(torch.arange(vocab) == mask, -torch.inf, logits.to(F32))
        confidence = CONFIDENCES[rule.confidence]
        if not sampled:
            return logits.argmax(-1), confidence(logits)
        logits = logits / values["temperature"].clamp(min=1e-6)
        candidate = drawn(logits, values, values["positions"] + int(shift))
        if rule.confidence != "probability":
            return candidate, confidence(logits)
        return candidate, torch.log_softmax(logits, -1).gather(-1, candidate.unsqueeze(-1)).squeeze(-1)

    inputs = {"logits": Spec(F32, ("B", "R", vocab))}
    if sampled:
        inputs |= {"positions": Spec(I64, ("B", "R")), "temperature": Spec(F32), "seed": SCALAR, "streams": ROWS}
        inputs |= {"rounds": SCALAR}
    return capture_function(name, function, inputs, ["picked", "sure"])


def every_row() -> Graph:
    """The position of each row of a canvas, -1 in padding."""
    inputs = {"tokens": CANVAS, "lengths": ROWS}
    return capture_function(
        "every_row", lambda tokens, lengths: places(tokens, lengths).clamp(min=-1), inputs, ["positions"]
    )


def align() -> Graph:
    """Where row i predicts id i + 1: what is predicted for each row."""

    def function(picked: Tensor, sure: Tensor) -> tuple[Tensor, ...]:
        before = (torch.arange(picked.shape[1]) - 1).clamp(min=0)
        return picked.index_select(1, before), sure.index_select(1, before)

    inputs = {"picked": CANVAS, "sure": Spec(F32, ("B", "T"))}
    return capture_function("align", function, inputs, ["candidate", "confidence"])


def drawn(logits: Tensor, values: dict[str, Tensor], at: Tensor) -> Tensor:
    """A sample of each row [B, T]; the noise depends on seed, sequence, position and round."""
    rows, length, vocab = logits.shape
    position = values["rounds"] * 2**20 + at.clamp(min=0)
    streams = values["streams"].unsqueeze(1).expand(rows, length)
    tokens = draw(logits.reshape(-1, vocab), values["seed"], streams.reshape(-1), position.reshape(-1))
    return tokens.reshape(rows, length)


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
        fresh = current != cursor
        left = active.to(I64).sum(1)
        step, masks = torch.where(fresh, 0, step), torch.where(fresh, left, masks)
        if rule.eoser:
            confidence = confidence + early(candidate, stop, step, masks, params)
        numbers = tuple(x.unsqueeze(1) for x in (step, masks, left))
        if rule.rcr:
            index = block_of(at, origin, block)
            tokens, held = revised(rule, tokens, candidate, confidence, active, numbers, params, mask, index)
            open_block = (tokens == mask) & (index == current.unsqueeze(1))
            tokens = torch.where(open_block.any(1, keepdim=True), tokens, filled(tokens, stop, mask, at, answers))
            done = ~((tokens == mask) & (at >= 0)).any()
            return tokens, current, step + 1, masks, rounds + 1, done, held
        if rule.guide:
            tokens = torch.where(guides.accepted_rows(active, params["accepted"]), candidate, tokens)
        else:
            tokens = written(rule, tokens, candidate, confidence, active, numbers, params)
        tokens = filled(tokens, stop, mask, at, answers)
        done = ~((tokens == mask) & (at >= 0)).any()
        return tokens, current, step + 1, masks, rounds + 1, done

    grid = {"candidate": CANVAS, "confidence": Spec(F32, ("B", "T"))}
    rows = {n: ROWS for n in ("lengths", "answers", "origin", *STATE)}
    inputs = {"tokens": CANVAS, **grid, **rows, "block": SCALAR, "stop": Spec(I64, ("K",)), "rounds": SCALAR}
    inputs |= {"accepted": Spec(BOOL, ("B", "T"))} if rule.guide else {n: i.spec for n, i in rule.params.items()}
    inputs |= {"held": HELD} if rule.rcr else {}
    outputs = ["tokens", *STATE, "rounds", "finished", *(["held"] if rule.rcr else [])]
    return capture_function("commit", function, inputs, outputs)


def written(
    rule: Rule,
    tokens: Tensor,
    candidate: Tensor,
    confidence: Tensor,
    active: Tensor,
    numbers: tuple[Tensor, ...],
    params: dict[str, Tensor],
) -> Tensor:
    """The canvas with the rows that the rule writes; `numbers` are step, masks and left of `Round`."""
    if rule.test in ("", "threshold"):  # quotas and thresholds are one op; the others rank, and test by themselves
        segment = torch.where(active, 0, -1)
        least, sure = rule.limits(Round(active, confidence, segment, *numbers), **params)
        op: Callable[..., Tensor] = torch.ops.aropt.canvas_commit
        return op(tokens, candidate, confidence, segment, least.squeeze(1), sure, False)
    worst = torch.finfo(F32).min  # a row that may be written comes before those that may not, whatever it is worth
    rank = ranked(torch.where(active, confidence.clamp(min=worst), -torch.inf))
    return torch.where(rule.select(Round(active, confidence, rank, *numbers), **params), candidate, tokens)


def revised(
    rule: Rule,
    tokens: Tensor,
    candidate: Tensor,
    confidence: Tensor,
    active: Tensor,
    numbers: tuple[Tensor, ...],
    params: dict[str, Tensor],
    mask: int,
    index: Tensor,
) -> tuple[Tensor, Tensor]:
    """All masks of the block are written; then the least sure of its written rows are masked again, as many as the
    schedule leaves (RCR, MDPO, 2508.13148; the confidence is that of a row's last writing, as in its code).

    `held` float32 [B, T]: these confidences, 1 where nothing was written.
    """
    least = rule.limits(Round(active, confidence, active, *numbers), **params)[0]
    held = torch.where(active, confidence, params["held"])
    current = torch.where(active, index, FAR).amin(1, keepdim=True)
    ours = (index == current) & (held <= 0)
    rank = ranked(torch.where(ours, held.clamp(min=torch.finfo(F32).min), -torch.inf))
    kept = ours.to(I64).sum(1, keepdim=True) - (numbers[2] - least)
    return torch.where(ours & (rank >= kept), mask, torch.where(active, candidate, tokens)), held


def block_of(at: Tensor, origin: Tensor, block: Tensor) -> Tensor:
    """The block of each row; rows before the first count to it: int64 [B, T]."""
    return torch.div((at - origin.unsqueeze(1)).clamp(min=0), block, rounding_mode="floor")


def current_block(tokens: Tensor, lengths: Tensor, origin: Tensor, block: Tensor, mask: int) -> tuple[Tensor, Tensor]:
    """The first block with masks of each canvas, int64 [B] (FAR: none), and its masked rows, bool [B, T]."""
    at = places(tokens, lengths)
    masked = (tokens == mask) & (at >= 0)
    index = block_of(at, origin, block)
    current = torch.where(masked, index, FAR).amin(1)
    return masked & (index == current.unsqueeze(1)), current


def ranked(score: Tensor) -> Tensor:
    """The rank of each value in its row, 0 the highest; of equal ones the first is higher: int64 [B, T]."""
    order = torch.sort(score, dim=1, descending=True, stable=True).indices
    return torch.sort(order, dim=1).indices


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
    return capture_function("answer", function, inputs, ["generated"])
