"""Where a result goes: a folder that is there whole or not at all, and that replaces nothing but aropt's own.

While a lock on OUT is held, the result is written beside it, as `.OUT.PID.partial`; one exchange of the two names puts
it in its place. Only what a manifest proves to be aropt's (its schema, and the hash of each file) is replaced or
removed; what is proven is decided when the names are exchanged, and no link is followed. The lock's file says which
process writes, so that whoever gets the lock after a process that was killed finds what that left, and removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from aropt.errors import UsageError
from aropt.pipeline.interrupts import held
from aropt.pipeline.manifest import contents, mark_failed, refuse_foreign, remove, remove_failed, write_manifest

DISK = ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "ENOTDIR", "ENAMETOOLONG", "ELOOP", "ENOLCK", "EIO")
NO_REPLACE, EXCHANGE = 1, 2  # of renameat2
HERE = -100  # AT_FDCWD


@contextlib.contextmanager
def staged(out: Path, force: bool, inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """A folder beside `out` to write into; it gets the name `out` if the block ends well, and is removed if not.

    `inputs`: what the result is made from. Raises UsageError where `out` can't be written or is not to be replaced.
    """
    check_free(out, force, inputs)
    out = resolved(out)
    with disk_errors(out), parents(out.parent), locked(out) as lock:
        sweep(out)
        folder = partial(out, os.getpid())
        folder.mkdir()
        record(lock, "made")
        yield folder
        seal(folder)
        with held():
            record(lock, "sealed")
            put_in_place(folder, out, force)
            remove_failed(failed(out))  # it is of an earlier run


@contextlib.contextmanager
def staged_export(out: Path, force: bool, inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """As `staged`, with a manifest of what was written."""
    with staged(out, force, inputs) as folder:
        yield folder
        write_manifest(folder)


def check_free(out: Path, force: bool, inputs: Sequence[Path] = ()) -> None:
    """Raises UsageError if `out` can't be written: before any work is done."""
    with disk_errors(out):
        if out.is_symlink():
            raise UsageError(what=f"'{out}' is a link", why="aropt follows no link", hint="give the folder itself")
        real = resolved(out)
        refuse_holder(real, out, inputs)
        if lock_file(real).is_symlink() or lock_file(real).exists():  # someone writes it, or was killed meanwhile
            with locked(real):
                pass
        if os.path.lexists(real):
            if not force:
                raise exists(out)
            refuse_foreign(real, out)
        parent = next(p for p in real.parents if p.exists())
        if not parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "Not a directory", str(parent))
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "permission denied or read-only", str(parent))


def refuse_holder(real: Path, out: Path, inputs: Sequence[Path]) -> None:
    """Raises UsageError where `out` is or holds what is needed."""
    kept = {"the working directory": Path.cwd(), "your home": Path(os.path.expanduser("~")).resolve()}
    kept |= {f"'{path}'": path.resolve() for path in inputs}
    for name, path in kept.items():
        if real in (path, *path.parents):
            raise UsageError(
                what=f"'{out}' can't be replaced", why=f"it is or holds {name}", hint="choose another folder"
            )


def exists(out: Path) -> UsageError:
    return UsageError(what=f"'{out}' exists", hint="choose another folder, or overwrite it with --force")


def resolved(out: Path) -> Path:
    """The path without links among its parents. (`out` itself is none: that was refused.)"""
    return out.resolve()


# putting it in its place


def seal(folder: Path) -> None:
    """Gives all files the modes that the user's umask says, and has them written to the disk."""
    mode = stat.S_IMODE(folder.stat().st_mode)
    for name, entry in contents(folder):
        path = folder / name
        if entry.is_symlink():
            raise UsageError(what="the result holds a link", where=str(path), hint="give the file itself")
        path.chmod(mode if entry.is_dir() else mode & 0o666)
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def put_in_place(folder: Path, out: Path, force: bool) -> None:
    """Gives the folder the name `out`. Raises UsageError where something has it that is not to be replaced.

    Where something was replaced, it has the folder's name now.
    """
    if not (force and os.path.lexists(out)):
        try:
            rename(folder, out, NO_REPLACE)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise exists(out) from error
            raise
        return
    refuse_foreign(out, out)
    exchange(folder, out)
    try:
        refuse_foreign(folder, out)  # what came between the look and the exchange
    except BaseException:
        exchange(folder, out)
        raise


def exchange(one: Path, other: Path) -> None:
    """Exchanges the names of two folders, at once where the system can."""
    try:
        rename(one, other, EXCHANGE)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
            raise
        between = one.with_suffix(".old")  # whoever finds it and nothing in its place puts it back
        os.rename(other, between)
        try:
            os.rename(one, other)
        except OSError:
            os.rename(between, other)
            raise
        os.rename(between, one)


def rename(one: Path, other: Path, flag: int) -> None:
    """Renames as Linux' renameat2 does. Without it NO_REPLACE looks first, and EXCHANGE raises ENOSYS."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    code = errno.ENOSYS
    if call is not None:
        if call(HERE, os.fsencode(one), HERE, os.fsencode(other), flag) == 0:
            return
        code = ctypes.get_errno()
    if flag == NO_REPLACE and code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        if os.path.lexists(other):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(other))
        os.rename(one, other)
        return
    raise OSError(code, os.strerror(code), str(other))


def put_aside(folder: Path, out: Path) -> Path:
    """Keeps a failed result as OUT.failed, or with a number where that is someone else's; returns the name."""
    mark_failed(folder)
    seal(folder)
    out = resolved(out)
    for number in range(100):
        aside = failed(out) if not number else out.with_name(f"{out.name}.failed-{number}")
        with held():
            remove_failed(aside)
            try:
                rename(folder, aside, NO_REPLACE)
            except FileExistsError:
                continue
            return aside
    raise UsageError(what=f"'{failed(out)}' and many of its kind exist", hint="move them away")


# the lock, and what dead processes left


def failed(out: Path) -> Path:
    return out.with_name(f"{out.name}.failed")


def partial(out: Path, process: int) -> Path:
    return out.with_name(f".{out.name}.{process}.partial")


def lock_file(out: Path) -> Path:
    return out.with_name(f".{out.name}.aropt-lock")


@contextlib.contextmanager
def locked(out: Path, tries: int = 10) -> Iterator[int]:
    """Holds the lock on `out`, and removes what a process left that died with it. Raises UsageError if it is taken.

    The value is the descriptor of the lock's file. What this process leaves is removed as a dead one's is, at the end:
    a signal may come between any two steps, and what it interrupts here, the next process finds by the lock's file.
    """
    file = lock_file(out)
    while True:
        try:
            lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        except FileNotFoundError as error:  # as /proc says it
            raise PermissionError(errno.EACCES, "takes no files", str(file.parent)) from error
        try:
            take(lock, file, out, tries)
            if file.exists() and os.path.samestat(os.fstat(lock), os.lstat(file)):  # else its owner just removed it
                recover(out, journal(lock))
                record(lock, "begun")
                try:
                    yield lock
                finally:
                    with held():
                        recover(out, journal(lock))
                        file.unlink(missing_ok=True)
                return
        finally:
            os.close(lock)


def take(lock: int, file: Path, out: Path, tries: int) -> None:
    """Raises UsageError where another process has it, or where the file is not aropt's."""
    if not stat.S_ISREG(os.fstat(lock).st_mode) or (os.fstat(lock).st_size and not journal(lock)):
        raise UsageError(what=f"'{file}' is in the way", why="it is not aropt's", hint="move it away")
    for _ in range(tries):  # another process may just look for what dead ones left
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.05)
    raise UsageError(
        what=f"'{out}' is being written",
        why=f"by process {journal(lock).get('pid', 'unknown')}",
        hint="wait until it ends, or choose another folder",
    )


def record(lock: int, stage: str) -> None:
    """Says who writes, and how far it is ("begun", "made", "sealed"); in one go, so that it is there whole."""
    text = json.dumps({"tool": "aropt", "pid": os.getpid(), "stage": stage})
    os.pwrite(lock, text.ljust(100).encode(), 0)


def journal(lock: int) -> dict[str, Any]:
    """What a lock's file says; nothing where that is not aropt's."""
    try:
        found = json.loads(os.pread(lock, 100, 0))
        return found if found["tool"] == "aropt" and type(found["pid"]) is int else {}
    except (ValueError, KeyError, TypeError):
        return {}


def recover(out: Path, last: dict[str, Any]) -> None:
    """Puts back or removes what a process left that died with the lock. (`last` is what its file says.)

    Only at the stage "made" is the partial folder its own, whatever it holds. Before, someone else may have the name;
    after, it may be what was in the other's place: `remove` takes it where it is empty or proven to be aropt's.
    """
    if not last:
        return
    left = partial(out, last["pid"])
    old = left.with_suffix(".old")
    if os.path.lexists(old) and not os.path.lexists(out):
        rename(old, out, NO_REPLACE)
    remove(old)
    if last.get("stage") == "made" and left.is_dir() and not left.is_symlink():
        shutil.rmtree(left, ignore_errors=True)
    else:
        remove(left)


def sweep(out: Path) -> None:
    """Removes what dead processes left beside other folders where `out` will be."""
    others = {out.with_name(file.name[1 : -len(".aropt-lock")]) for file in out.parent.glob(".*.aropt-lock")}
    for other in others - {out}:
        with contextlib.suppress(UsageError, OSError), locked(other, tries=1):
            pass


@contextlib.contextmanager
def parents(folder: Path) -> Iterator[None]:
    """The folder, made if need be; what was made goes again if the block fails and left nothing there."""
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()
        raise


@contextlib.contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turns what a full, read-only or otherwise unfit disk says into a UsageError."""
    try:
        yield
    except Exception as error:  # safetensors has an error of its own, with the system's number in its text
        told = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
        code = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        if code is None or errno.errorcode.get(code) not in DISK:
            raise
        raise UsageError(
            what=f"can't write '{out}'",
            why=os.strerror(code),
            where=str(getattr(error, "filename", None) or out),
            hint="free some space or choose another folder; nothing was left behind",
        ) from error
