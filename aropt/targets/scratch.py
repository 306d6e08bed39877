"""Temporary folders that don't outlive their process, even one that was killed: the next process removes them."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import weakref
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

PREFIX, MARK = "aropt-", ".aropt-scratch"  # a folder of that name with such a file, locked as long as its process lives
PLACE = "AROPT_SCRATCH"  # the environment variable that says where, for processes that their parent kills
NAME, MODE = re.compile(PREFIX + "[a-z0-9_]{8}"), stat.S_IFDIR | 0o700  # as mkdtemp makes a folder


class Scratch(TemporaryDirectory[str]):
    """A temporary folder; `name` is its path."""

    def __init__(self) -> None:
        sweep_scratch()
        while True:
            super().__init__(prefix=PREFIX, dir=os.environ.get(PLACE))
            try:
                self.lock = marked(Path(self.name, MARK))
                break
            except FileNotFoundError:  # without a locked mark, another process took it for a dead one's
                super().cleanup()
        self.unlock = weakref.finalize(self, os.close, self.lock)  # once, also where nobody calls `cleanup`

    def cleanup(self) -> None:
        super().cleanup()
        self.unlock()


def marked(mark: Path) -> int:
    """Makes the mark and locks it; returns its descriptor. Raises FileNotFoundError if it was removed meanwhile."""
    lock = os.open(mark, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        mark.lstat()
    except BaseException:
        os.close(lock)
        raise
    return lock


@cache  # once a process is enough
def sweep_scratch() -> None:
    """Removes the folders of dead processes of the same user."""
    for folder in Path(gettempdir()).glob(PREFIX + "*"):
        for remove in (remove_marked, remove_empty):
            with suppress(OSError):  # it is in use, or gone
                remove(folder)


def remove_marked(folder: Path) -> None:
    """Removes a folder with a mark that no process holds. Raises OSError where one does, or where there is none."""
    lock = os.open(folder / MARK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(lock)
        if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not folder.is_symlink():
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def remove_empty(folder: Path) -> None:
    """Removes a folder whose process died before it made the mark. Raises OSError where something is in it."""
    found = folder.lstat()
    if NAME.fullmatch(folder.name) and found.st_mode == MODE and found.st_uid == os.geteuid():
        folder.rmdir()
