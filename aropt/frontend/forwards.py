"""What a model's forward gives: logits alone, first in a tuple, or by that name in a dict or an object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from aropt.errors import Unsupported

HINT = "return logits[batch, length, vocabulary] from forward(ids): alone, first in a tuple, or as {'logits': ...}"


class Forward(nn.Module):
    """Calls a model as `forward(ids)` and returns its logits, whatever its output type."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.huggingface = hasattr(model, "config") and hasattr(model, "prepare_inputs_for_generation")

    def forward(self, ids: Tensor) -> Tensor:
        output = self.model(input_ids=ids, use_cache=False) if self.huggingface else self.model(ids)
        found: Tensor = logits_in(output, Tensor)
        return found


def logits_in(output: Any, kind: type) -> Any:
    """The logits of an output whose tensors are of this kind. Raises Unsupported where there are none."""
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif isinstance(output, (tuple, list)) and not hasattr(output, "logits"):
        found = output[0] if output else None
    elif not isinstance(output, kind):
        found = getattr(output, "logits", None)
    if not isinstance(found, kind):
        names = f" with {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
        raise Unsupported(
            what="the forward does not return logits",
            why=f"it returns a {type(output).__name__}{names}",
            hint=HINT,
        )
    return found
