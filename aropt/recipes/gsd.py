"""GSD (So et al. 2025, 2508.07747): drafts are accepted by the chances of groups of ids, which shifts what is drawn."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from aropt.bench.drafted import counted, rounds, unchecked
from aropt.bench.ratios import over
from aropt.ir.program import Program
from aropt.loops.accept import ACCEPT
from aropt.models import load, text
from aropt.recipes import Recipe, Row, Say
from aropt.validate.draws import RARE, Draws, place, shifted

MODEL, DRAFT, SHAPE = "text-ar", "text-ar-draft", "chain:3"
PLAIN, EXACT, GROUPED = "none", "rejection", "grouped"
PROMPTS, PROMPT, NEW = 16, 64, 200
IMAGES, WINDOW = "digits-ar", "chain:8"
DRAWN = 160  # prompts of draws, if quick too: of fewer ids such a shift could be chance


def check(say: Say, quick: bool) -> Iterator[Row]:
    """Equal greedy ids by each rule; of draws by two of them ids a verification, shifts and labels."""
    import aropt

    program, model, made = aropt.capture(MODEL), load(MODEL), {}
    for rule in (PLAIN, *ACCEPT):
        say(f"accepted by {rule}: optimizing")
        chosen = [] if rule == PLAIN else [f"tree-draft:draft={DRAFT},shape={SHAPE},accept={rule}"]
        made[rule] = unchecked(program, chosen)
    greedy, answers = [], []
    for row in counted(made, model, prompts := text.heldout(4 if quick else PROMPTS, PROMPT), NEW):
        greedy.append(row)
        say(f"greedy, {len(greedy)} of {len(prompts)} prompts")
    yield same(greedy)
    two = {rule: made[rule] for rule in (EXACT, GROUPED)}
    for row in answered(two, model, prompts := text.heldout(DRAWN, PROMPT), NEW):
        answers.append(row)
        say(f"drawing, {len(answers)} of {len(prompts)} prompts")
    yield faster(answers, "ids", "prompts")
    images = []
    for image in windowed(say, 16 if quick else DRAWN):
        images.append(image)
        say(f"drawing, {len(images)} images")
    yield faster(images, "ids of images, whose drafts are of a Jacobi window (speculative Jacobi decoding),", "images")
    yield shifts(answers)
    yield labels({rule: one.program for rule, one in two.items()})


def windowed(say: Say, count: int) -> Iterator[dict[str, Any]]:
    """As `answered`, of images of all classes in turn, with drafts of a Jacobi window."""
    import aropt

    program, model, made = aropt.capture(IMAGES), load(IMAGES), {}
    for rule in (EXACT, GROUPED):
        say(f"a Jacobi window, accepted by {rule}: optimizing")
        made[rule] = unchecked(program, [f"tree-draft:draft=jacobi,shape={WINDOW},accept={rule}"])
    known = program.meta["prompts"]
    yield from answered(
        made, model, [known[i % len(known)][:1] for i in range(count)], int(program.meta["capacity"]) - 1
    )


def answered(
    programs: Mapping[str, Any], model: nn.Module, prompts: Sequence[list[int]], new: int
) -> Iterator[dict[str, Any]]:
    """For each prompt, of each rule: the rounds after the prompt's ("checks") and the places of ids ("places")."""
    uniform = random.Random(0)
    for stream, prompt in enumerate(prompts):  # a noise of its own, else places of two answers are alike
        draw = partial(rounds, prompt=prompt, new=new, temperature=1.0, streams=[stream])
        found = {rule: draw(program) for rule, program in programs.items()}
        yield {
            "checks": {rule: count - 1 for rule, (_, count) in found.items()},
            "places": {rule: places(model, prompt, ids, uniform) for rule, (ids, _) in found.items()},
        }


@torch.inference_mode()
def places(model: nn.Module, prompt: list[int], ids: list[int], uniform: random.Random) -> list[float]:
    """Where each id but the first, which no draft is accepted for, stands among the model's chances."""
    found: Any = model(torch.tensor([prompt + ids]))
    logits = getattr(found, "logits", found)[0, len(prompt) : -1]
    return [place(p, token, uniform.random()) for p, token in zip(logits.double().softmax(1), ids[1:], strict=True)]


def same(greedy: Sequence[dict[str, Any]]) -> Row:
    """Whether temperature 0 leaves each rule the ids of the plain loop."""
    ties = sum(one is not None for row in greedy for one in row["differs"].values())
    return Row(
        f"greedy ids are those of plain decoding by each rule: {', '.join(ACCEPT)}",
        f"all {NEW} ids of each answer are the same" + (f", but for {ties} ties of logits" if ties else ""),
        len(greedy), "prompts", True,
    )  # fmt: skip


def faster(answers: Sequence[dict[str, Any]], drawn: str, unit: str) -> Row:
    """What a verification of draws gives by both rules."""
    each = {
        rule: over([(len(row["places"][rule]), row["checks"][rule]) for row in answers]) for rule in (EXACT, GROUPED)
    }
    gain = over([(row["checks"][EXACT], row["checks"][GROUPED]) for row in answers])
    told = [f"{one['all']:.2f} (95 %: {one['low']:.2f} to {one['high']:.2f})" for one in each.values()]
    return Row(
        f"of {drawn} drawn with temperature 1 a verification gives more by grouped acceptance than by rejection",
        f"{told[1]} ids, by rejection {told[0]}: {gain['all']:.2f} times as many"
        f" (95 %: {gain['low']:.2f} to {gain['high']:.2f})",
        len(answers), unit, gain["low"] > 1,
    )  # fmt: skip


def shifts(answers: Sequence[dict[str, Any]]) -> Row:
    """How far draws by both rules are from the model's own; one of them is the control."""
    found = {}
    for rule in (EXACT, GROUPED):
        all_places = [x for row in answers for x in row["places"][rule]]
        found[rule] = Draws(shifted(torch.tensor(all_places, dtype=torch.float64)), len(all_places))
    told = [f"{one.shift:.3f}, which comes by chance with a probability of at most {one.chance:.1g}"
            for one in found.values()]  # fmt: skip
    return Row(
        "grouped acceptance shifts what is drawn to likelier or less likely ids; rejection (the control) does not",
        f"shifted by {told[1]}; by rejection {told[0]}",
        found[GROUPED].count, "ids", found[GROUPED].chance < RARE <= found[EXACT].chance,
    )  # fmt: skip


def labels(programs: Mapping[str, Program]) -> Row:
    """What the programs' ledgers say of their draws."""
    found = {rule: next(e for e in one.ledger if e.name == "tree-draft").level for rule, one in programs.items()}
    return Row(
        "the program says so: grouped acceptance is lossy, rejection keeps the distribution",
        "; ".join(f"{rule}: {level}" for rule, level in found.items()),
        len(found), "programs", found == {EXACT: "distribution", GROUPED: "lossy"},
    )  # fmt: skip


RECIPE = Recipe(
    title="drafts accepted by groups of ids",
    paper="Grouped Speculative Decoding, So et al. 2025, 2508.07747",
    runs="aropt compiles all of it, with `tree-draft:draft=jacobi,accept=grouped`, which asks for a budget of shift; "
    "other drafts may be accepted so too",
    proxy="images of 8 x 8 grey levels (digits-ar, a window of 8) in the place of image tokens, and bytes of held-out "
    "text by a draft model (text-ar, text-ar-draft, chain:3); groups by rank and chance alone, as these models have no "
    "codebook.",
    check=check,
)
