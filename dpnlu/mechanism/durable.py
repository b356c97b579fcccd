"""Files that stay whole if the process, the disk space or the power ends while they are written.

A file is written in a folder beside its place, `NAME.partial`, forced to disk and then moved, and
the moving is forced to disk as well: at every moment the place holds the old file or the new one,
whole. What a process that was killed leaves in such a folder is never read.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_PARTIAL = ".partial"
# What a file system answers that cannot force directories to disk, or cannot lock.
_CANNOT = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to instead of `path`, which takes its place at the end.

    It is alone in its folder: libraries have temporary files of their own beside what they write.

    Raises:
        OSError: it cannot be written; what is at `path` has stayed as it was.
    """
    partial = partial_of(path)
    _clear(partial)
    partial.mkdir()
    try:
        yield partial / path.name
        sync(partial / path.name)
        (partial / path.name).replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sync(path.parent)


def write_text(path: Path, content: str) -> None:
    """Write a text, in UTF-8; see `replacing`."""
    with replacing(path) as partial:
        file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            # Half a surrogate pair, which UTF-8 refuses, becomes what JSON writes for it.
            write_all(file, content.encode("utf-8", "backslashreplace"))
        finally:
            os.close(file)


def write_json(path: Path, content: Any) -> None:
    """Write JSON; see `replacing`."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_all(file: int, content: bytes) -> None:
    """Write to a file descriptor, all of it or with an error; nothing is forced to disk yet."""
    left = memoryview(content)
    while left:
        left = left[os.write(file, left) :]


def sync(path: Path) -> None:
    """Force a file, or the names in a directory, to disk.

    A directory is left as it is where the file system cannot do that, or where it may be written to
    and not read.
    """
    cannot = (*_CANNOT, errno.EACCES) if path.is_dir() else ()
    try:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
    except OSError as error:
        if error.errno not in cannot:
            raise


def sync_tree(directory: Path) -> None:
    """Force all that is in a directory to disk."""
    for path in (*directory.rglob("*"), directory):
        sync(path)


def make_directory(path: Path) -> None:
    """Make a directory and those above it, unless they are there."""
    missing = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync(made.parent)


def remove(path: Path) -> None:
    """Remove a file, unless there is none."""
    with suppress(FileNotFoundError):
        path.unlink()
        sync(path.parent)


def partial_of(path: Path) -> Path:
    """The folder in which `path` is written; a process that is killed leaves it behind."""
    return path.with_name(path.name + _PARTIAL)


def remove_partials(directory: Path) -> None:
    """Remove what killed processes have left half-written in a directory and those below it."""
    for path in list(directory.rglob("*" + _PARTIAL)):
        _clear(path)


def _clear(path: Path) -> None:
    """Remove a folder with all that is in it, or a file, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def locked(file: int) -> bool:
    """Lock an open file, or directory, for this process until it closes it or ends.

    Returns:
        Whether no other process has locked it; always, where the file system has no locks.
    """
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    return True
