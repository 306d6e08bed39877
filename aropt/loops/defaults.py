"""Defaults of a generation: what a model's generation_config.json says, followed wherever its program runs.

They are data on the program: `meta["eos"]`, the ids that end a text, and `meta["defaults"]`, values of the rule's
parameters, with `max_new_tokens` or `max_length` for how long a text gets. What a caller asks for goes before them, and
what they leave open is the parameter's own default, which does nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aropt.frontend.generation_config import LENGTHY
from aropt.loops.rules import DEFAULT, PROCESSORS


def followed_rules(meta: Mapping[str, Any]) -> tuple[str, ...]:
    """The rules of a program that nobody chose: the usual ones, and those that its model's defaults take."""
    given = meta.get("defaults", {})
    return (*DEFAULT, *(n for n, p in PROCESSORS.items() if n not in DEFAULT and set(p.params) & set(given)))


def unfollowed(meta: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The facts without defaults that the program's rules have no parameter for, and a note on these."""
    kept = {n: v for n, v in meta.get("defaults", {}).items() if n in inputs or n in LENGTHY}
    lost = [f"{n} {v}" for n, v in meta.get("defaults", {}).items() if n not in kept]
    if "defaults" not in meta or not lost:
        return {}
    note = f"The model's own defaults that the chosen rules don't follow: {', '.join(lost)}."
    return {"defaults": kept, "left_out": [*meta.get("left_out", []), note]}


def with_defaults(
    meta: Mapping[str, Any], params: Mapping[str, Any], stop: Any, plain: bool
) -> tuple[dict[str, Any], Any]:
    """Parameters and stop ids of a request, with the model's own where it says nothing; `plain`: without them."""
    own = {} if plain else {n: v for n, v in meta.get("defaults", {}).items() if n not in LENGTHY}
    ends = () if plain else [i for i in meta.get("eos", ()) if 0 <= i < int(meta["vocab"])]  # no others are written
    return {**own, **params}, ends if stop is None else stop


def exported_defaults(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a program's inputs that an exported loop takes where its caller gives none."""
    params, stop = with_defaults(meta, {}, None, False)
    drawn = {"greedy": params["temperature"] <= 0} if "temperature" in params else {}
    return {**params, **drawn, "stop": list(stop) or [-1]}


def usual_length(meta: Mapping[str, Any], prompt: int, room: int) -> int:
    """New tokens of a request that says no number, after a prompt of so many, where there is room for `room`."""
    own = meta.get("defaults", {})
    most = own.get("max_new_tokens") or (own["max_length"] - prompt if own.get("max_length") else 200)
    return max(1, min(int(most), room))
