"""Requests for loops that unmask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from aropt.cases import Case
from aropt.excluded import others
from aropt.program import Program


def cases(program: Program, seed: int = 0, quick: bool = False) -> list[Case]:
    """Boundary lengths, ragged batches, several blocks, greedy and sampled, the rule's parameters."""
    capacity, vocab, mask = (int(program.meta[k]) for k in ("capacity", "vocab", "mask"))
    own = int(program.meta.get("block") or 0)
    generator = torch.Generator().manual_seed(seed)
    known = others(vocab, [mask, *program.meta.get("never", ())])
    made: list[Case] = []

    def prompt(length: int) -> tuple[int, ...]:
        return tuple(known[torch.randint(0, len(known), (length,), generator=generator)].tolist())

    def case(
        name: str,
        kind: str,
        lengths: Sequence[int],
        n: int,
        given: Mapping[str, float] = {},
        seed: int = 0,
        fill: Callable[[int], tuple[int, ...]] = lambda n: (),
    ) -> None:
        room, params = max(1, min(n, capacity - max(lengths))), dict(given)
        block = int(min(params.pop("block", 8), room))
        if not own:
            room, params["block"] = room - room % block, block
        made.append(Case(name, kind, tuple(map(prompt, lengths)), room, seed, tuple(params.items()), fill=fill(room)))

    def gaps(n: int) -> tuple[int, ...]:
        """Masks first, then what is given whole for longer than a block, then masks in between."""
        ids, size = prompt(n), own or 8
        return tuple(mask if i < size // 2 or (i >= 3 * size and i % 3) else ids[i] for i in range(n))

    # where blocks are the model's own, steps are those of each
    usual = {"steps": max(2.0, own // 2) if own else 8.0, "threshold": 0.05, "factor": 1.0}
    usual |= {"guide_k": vocab // 2, "guide_share": 0.1, "guide_threshold": 0.5 / vocab}
    usual |= {"guide_weight": 0.5, "guide_margin": 0.1}
    several = {n: v for n, v in usual.items() if n in program.inputs}
    once = {n: 1.0 if n == "steps" else v for n, v in several.items()}
    third = max(1, min(9, capacity // 3))
    case("one token", "boundary", [1], 1)
    case("one block", "greedy", [3], 8, several)
    case("ragged greedy", "ragged", [third, 1, 2], 16, several)
    case("infilled", "ragged", [third, 1], 5 * (own or 8), {} if own else {"block": 4}, 0, gaps)
    case("sampled", "sampled", [3], 16, {"temperature": 1.0}, seed + 1)
    case("ragged sampled", "ragged", [1, third], 16, {"temperature": 0.8, **several}, seed + 2)
    case("to capacity", "boundary", [max(1, capacity - 8)], 8, once)
    if not quick:
        case("one token a round", "greedy", [2], 24)
        case("blocks of two", "ragged", [4, 2], 12, {"block": 2})
        case("other seed", "sampled", [2, 2], 16, {"temperature": 1.3, **several}, 2**40 + seed)
    return made
