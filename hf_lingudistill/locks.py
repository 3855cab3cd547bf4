"""Locks between processes, which end with the process that holds one, at the latest.

On a folder itself where the file system takes that; network file systems and Windows lock files alone, and get one beside.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@dataclass
class Lock:
    """One that is held. `release` it once."""

    descriptor: int | None = None
    file: FileLock | None = None

    def release(self) -> None:
        """Let the next one in."""
        if self.descriptor is not None:
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)  # a process that was forked meanwhile has the same one open
            os.close(self.descriptor)
        if self.file is not None:
            self.file.release()


def lock(folder: Path, file: Path | None, *, wait: bool) -> Lock | None:
    """A lock on a folder, or on a file where folders cannot be locked; None where there is no such folder, or nothing can be locked.

    file: made where it is needed; None = the folder or nothing.

    Raises:
        BlockingIOError: if another holds it and this one does not `wait`.
    """
    if not folder.is_dir():
        return None
    held = _on_folder(folder, wait=wait)
    if held is not None or file is None:
        return held
    try:
        of_file = FileLock(file, timeout=-1 if wait else 0)
        of_file.acquire()
    except Timeout:
        raise BlockingIOError(f"{str(file)!r} is held by another process") from None
    except (OSError, NotImplementedError):
        return None
    return Lock(file=of_file)


def _on_folder(folder: Path, *, wait: bool) -> Lock | None:
    if fcntl is None:
        return None
    try:
        held = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        with suppress(OSError):
            os.close(held)
        if isinstance(error, BlockingIOError):
            raise
        return None  # a file system that locks no folders
    return Lock(descriptor=held)
