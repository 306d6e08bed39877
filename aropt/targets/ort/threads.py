"""ONNX Runtime's threads: a pool a session, or one for all sessions of the process.

Threads wait busily for their session's next call, for some ten milliseconds, which is rounds. With a pool each,
sessions that take turns hold the cores that others need. One pool for all is faster, but ONNX Runtime then refuses
every session that is made in the usual way: it is for processes that run nothing but aropt.
"""

from __future__ import annotations

from typing import Any

_own = False  # whether this process is aropt's
_shared = 0  # threads of the pool that all sessions share; 0: there is none


def own_process() -> None:
    """Says that no other code of this process makes ONNX Runtime sessions: aropt's then share one pool of threads.

    Sessions of other code would need `SessionOptions.use_per_session_threads = False`.
    """
    global _own
    _own = True


def share(threads: int) -> None:
    """Makes the shared pool in a process of aropt's own. There is one, of the size that is asked for first."""
    global _shared
    import onnxruntime as ort

    if _own and not _shared and hasattr(ort, "set_global_thread_pool_sizes"):  # older ones don't have it
        ort.set_global_thread_pool_sizes(threads, 1)
        _shared = threads


def options(threads: int, turns: bool = False) -> Any:
    """Options of a session. Its threads are those of the shared pool, if there is one.

    turns: other sessions run between this one's calls. With a pool of its own its threads then don't wait busily.
    """
    import onnxruntime as ort

    made = ort.SessionOptions()
    made.log_severity_level = 3
    if _shared:
        made.use_per_session_threads = False
        return made
    made.intra_op_num_threads, made.inter_op_num_threads = threads, 1
    if turns:
        made.add_session_config_entry("session.force_spinning_stop", "1")
    return made
