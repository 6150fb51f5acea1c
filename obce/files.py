"""Files that appear under their name only when they are whole: written beside it, flushed to disk, then renamed.

And directories that one process alone writes to.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_IN_USE = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # as some network file systems are mounted
PARTIAL = ".partial-"
"""What the names of unfinished files and directories begin with; whoever finds one may remove it."""


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A path to write to, which takes the target's name only if the block ends well; files and directories."""
    partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=target.parent)) / target.name
    try:
        yield partial
        if partial.is_dir():
            for file in sorted(partial.rglob("*")):
                if file.is_file():
                    flush(file)
            if target.exists():
                # a directory cannot be renamed over a full one: the old one steps aside first
                os.replace(target, partial.parent / "old")
        else:
            flush(partial)
        os.replace(partial, target)
        flush(target.parent)
    finally:
        shutil.rmtree(partial.parent, ignore_errors=True)


def flush(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(target: Path, text: str) -> None:
    """Writes a file of UTF-8 as `whole` does."""
    with whole(target) as path:
        path.write_text(text, encoding="utf-8")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the directory, which this process alone writes to for the `with`; those that read it need no lock.

    Where the system or its file system has no locks, nothing keeps another process away.

    Raises:
        ValueError: Another process writes to it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as file:
        if fcntl is not None:
            try:
                # the system gives the lock back however the process ends
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _IN_USE:
                    raise ValueError(
                        f"directory '{folder}' is in use by another process: wait for it, or choose another --out"
                    ) from None
                if error.errno not in _NO_LOCKS:
                    raise
        yield
