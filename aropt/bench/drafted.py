"""What drafts are worth, counted: how many verifications the ids of an answer take, and whether they are the same.

Programs generate one sequence. Greedy ids may differ only where the model's logits of both are nearly equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from aropt.errors import VerificationFailed

TIE = 1e-3  # logits this near may be ordered either way


def unchecked(program: Any, chosen: Sequence[str], threads: int = 1) -> Any:
    """The program with default and chosen passes, in ONNX Runtime; lossy ones need no budget, as none is measured.

    Raises UsageError where one does not apply.
    """
    import aropt
    from aropt.errors import UsageError
    from aropt.pipeline.checks import Instruments
    from aropt.pipeline.registry import parse, pipeline

    instruments = Instruments(check=False, trust=True)
    made = aropt.optimize(
        program, "onnxruntime", pipeline(chosen), check=False, threads=threads, instruments=instruments
    )
    applied = {entry.name for entry in made.program.ledger}
    if missing := [text for text in chosen if parse(text)[0] not in applied]:
        raise UsageError(f"{missing[0]} does not apply to {program.meta.get('name')}")
    return made


def rounds(program: Any, prompt: list[int], new: int, **params: Any) -> tuple[list[int], int]:
    """The ids, greedy unless `params` of `generate` say otherwise, and how many rounds wrote them."""
    seen: list[int] = []
    ids: list[int] = program.generate([prompt], new, plain=True, on_round=lambda _: seen.append(1), **params)[0]
    return ids, len(seen)


def difference(model: nn.Module, prompt: list[int], want: list[int], got: list[int]) -> dict[str, float] | None:
    """Where ids first differ, and how far apart the model's logits of both are. Raises VerificationFailed if far."""
    if got == want:
        return None
    at = next((i for i, (a, b) in enumerate(zip(want, got)) if a != b), -1)
    with torch.inference_mode():
        found: Any = model(torch.tensor([prompt + want[:at]]))
        logits = getattr(found, "logits", found)[0, -1]
    gap = float((logits[want[at]] - logits[got[at]]).abs())
    if gap > TIE or len(want) != len(got):
        raise VerificationFailed(f"other ids from number {at} on, whose logits differ by {gap:.2g}", where=str(prompt))
    return {"at": at, "gap": gap}


def counted(
    programs: Mapping[str, Any], model: nn.Module, prompts: Sequence[list[int]], new: int
) -> Iterator[dict[str, Any]]:
    """For each prompt, of each way: the rounds after the prompt's, which gives the first id ("checks"), and where its
    ids differ from those of the first way ("differs"). Raises VerificationFailed where that is no tie."""
    for prompt in prompts:
        found = {way: rounds(program, prompt, new) for way, program in programs.items()}
        want = next(iter(found.values()))[0]
        differs = {way: difference(model, prompt, want, ids) for way, (ids, _) in found.items()}
        yield {"checks": {way: count - 1 for way, (_, count) in found.items()}, "differs": differs}
