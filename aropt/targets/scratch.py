"""Temporary folders that don't outlive their process, even one that was killed: the next process removes them."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

PREFIX, MARK = "aropt-", ".aropt-scratch"  # a folder of that name with such a file, locked as long as its process lives
PLACE = "AROPT_SCRATCH"  # the environment variable that says where, for processes that their parent kills


class Scratch(TemporaryDirectory[str]):
    """A temporary folder; `name` is its path."""

    def __init__(self) -> None:
        sweep_scratch()
        super().__init__(prefix=PREFIX, dir=os.environ.get(PLACE))
        mark = Path(self.name, MARK)
        self.lock = mark.with_suffix(".new").open("x")
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        mark.with_suffix(".new").rename(mark)  # locked before it can be found

    def cleanup(self) -> None:
        super().cleanup()
        self.lock.close()


@cache  # once a process is enough
def sweep_scratch() -> None:
    """Removes the folders of dead processes of the same user."""
    for folder in Path(gettempdir()).glob(PREFIX + "*"):
        with suppress(OSError):  # it is in use, or gone
            lock = os.open(folder / MARK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                found = os.fstat(lock)
                if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not folder.is_symlink():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
