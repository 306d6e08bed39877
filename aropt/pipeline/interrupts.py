"""Signals that end a command: each is raised as KeyboardInterrupt, so that whatever was begun is cleaned up."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_caught = 0  # the number of the last one; 0: none


def caught() -> int:
    """The number of the signal that was seen since `listening` began; 0 if there was none."""
    return _caught


def catch(number: int, _: object) -> None:
    """The handler."""
    global _caught
    _caught = number
    raise KeyboardInterrupt


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """In the block the signals are raised, but for those that the caller has this process ignore (as nohup does)."""
    global _caught
    _caught = 0
    main = threading.current_thread() is threading.main_thread()
    before = {n: signal.getsignal(n) for n in ENDING if main and signal.getsignal(n) is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, catch)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Keeps the signals until the block has ended: for what must not stop halfway."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[int] = []
    before = {n: signal.getsignal(n) for n in ENDING if callable(signal.getsignal(n))}
    for number in before:
        signal.signal(number, lambda n, _: seen.append(n))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in seen[:1]:
            signal.raise_signal(number)
