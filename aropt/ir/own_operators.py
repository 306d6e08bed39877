"""Which operators of its own ONNX Runtime has: the one question that a translation asks of what is installed."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def own_operators() -> frozenset[str]:
    """The operators that ONNX Runtime has beside the standard ones, on the CPU; none where it is not installed."""
    try:
        from onnxruntime.capi import onnxruntime_pybind11_state as state
    except ImportError:
        return frozenset()
    kernels: list[Any] = getattr(state, "get_all_opkernel_def", list)()
    own = (k for k in kernels if k.domain == "com.microsoft" and k.provider == "CPUExecutionProvider")
    return frozenset(str(kernel.op_name) for kernel in own)
