"""Nothing of the user's is lost: what this library wrote it can tell from everything else, and only that is replaced or removed.

    with replacing("outputs/demo", "before", "after", "report.json", by="demo") as folder:
        model.save_pretrained(folder / "before")     # built beside its place
        ...
    # now they lie in outputs/demo, all of them; after an error none of them does, and what was there is untouched

A folder's `MARKER` lists the files that were written there, with their sizes and times. A name is free if nothing bears it, or
if every file under it is listed and unchanged: a file that was added to a model's folder, or trained over, is the user's.

Several processes may write to one folder at a time (two sweeps into `outputs/`): each builds in a folder of its own, and takes its turn
with the list. They are told apart by locks, which Windows and some network file systems do not have.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MARKER = ".lingudistill-files.json"
STAGING = ".lingudistill-being-written"

Stamp = list[object]  # [by, size in bytes, time of the last change in nanoseconds]
Listing = dict[
    str, list[Stamp]
]  # path in the folder -> what may lie there: while files are moved, the old one or the new one


class NotOurs(ValueError):
    """A file or folder is in the way that this library did not write, or that has changed since, or may not be written to. It was not
    touched."""


def claim(folder: str | os.PathLike[str], *, by: str) -> None:
    """Check that a folder is absent, empty, or one that the command `by` has written to. Nothing is touched.

    Raises:
        NotOurs: if it is not.
    """
    root = Path(folder)
    if (why := obstacle(root)) is not None:
        raise NotOurs(f"{why}: choose another output_dir.")
    if root.is_symlink() or root.exists():
        others = sorted(path.name for path in root.iterdir())
        if others and not any(stamp[0] == by for stamps in _listing(root).values() for stamp in stamps):
            raise NotOurs(
                f"{str(root)!r} holds {others[0]!r} and was not made by this command: choose an output_dir that is new, empty, or "
                "its own."
            )


def obstacle(folder: str | os.PathLike[str]) -> str | None:
    """What keeps a folder of this path from being made or written to, in words: a file that bears its name or that of one above it, or
    the permissions of it or, where it is not made yet, of the nearest above it. None: nothing does."""
    root = Path(folder)
    there = next((path for path in (root, *root.absolute().parents) if path.is_symlink() or path.exists()), root)
    if not there.is_dir():
        return f"{str(there)!r} is a file, expected a folder"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"this user may not write to {str(there)!r}"
    return None


def check(folder: str | os.PathLike[str], *names: str, by: str) -> None:
    """Check that files and folders of these names may be written there by the command `by`. Nothing is touched.

    Raises:
        NotOurs: if one of them is there and is not what `by` wrote, a file is where the folder is to be, or nothing may be written there.
    """
    if (why := obstacle(folder)) is not None:
        raise NotOurs(f"{why}: choose another output_dir.")
    for name in names:
        if (stranger := _stranger(Path(folder), name, by)) is not None:
            raise NotOurs(
                f"{str(stranger)!r} is in the way: this command did not write it, or it has changed since. Move it, or choose another "
                "folder."
            )


def is_ours(folder: str | os.PathLike[str], name: str, *, by: str) -> bool:
    """Whether all of what bears this name there was written by `by`, and is as it was written."""
    path = Path(folder) / name
    return (path.is_symlink() or path.exists()) and _stranger(Path(folder), name, by) is None


@contextmanager
def replacing(folder: str | os.PathLike[str], *names: str, by: str) -> Iterator[Path]:
    """An empty folder to make `names` in (all, or some); on leaving, they take their places in `folder` by renames. All else that
    was made in it is removed with it.

    What lay there under these names is removed, after `check` has said that it is `by`'s own. If the block raises, everything is
    as it was before.

    Raises:
        NotOurs: before the block is entered, or after it, if something has come into the way meanwhile: then what was made is kept
            where it is, and the message says where.
    """
    root = Path(folder)
    check(root, *names, by=by)
    with _own_staging(root) as staging:
        try:
            yield staging
        except BaseException:
            clear_staging(staging)
            raise
        with _alone(root):
            _take_their_places(root, staging, names, by)
            clear_staging(staging)


def _take_their_places(root: Path, staging: Path, names: tuple[str, ...], by: str) -> None:
    made = [name for name in names if (staging / name).exists()]
    try:
        check(root, *names, by=by)
    except NotOurs as error:
        raise NotOurs(f"{error} What was made is in {str(staging)!r}.") from None
    listing = _listing(root)
    new = {
        path.relative_to(staging).as_posix(): [_stamp(path, by)] for name in made for path in _files(staging / name)
    }
    kept = {path: stamps for path, stamps in listing.items() if path.split("/")[0] not in names}
    # While the files are moved, either of two may lie in a place: a run that is killed here leaves nothing that is not known
    _write(root, {path: listing.get(path, []) + new.get(path, []) for path in {*listing, *new}})
    for name in names:
        _remove(root / name)
    for name in made:
        (staging / name).rename(root / name)
    _write(root, {**kept, **new})


def record(folder: str | os.PathLike[str], name: str, *, by: str) -> None:
    """Note that `by` has written `name` to a folder, which `check` had found free."""
    root = Path(folder)
    with _alone(root):
        kept = {path: stamps for path, stamps in _listing(root).items() if path.split("/")[0] != name}
        new = {path.relative_to(root).as_posix(): [_stamp(path, by)] for path in _files(root / name)}
        _write(root, {**kept, **new})


def forget(folder: str | os.PathLike[str], *, by: str) -> None:
    """Take what `by` wrote to a folder so far for the user's from now on."""
    root = Path(folder)
    with _alone(root):
        listing = _listing(root)
        if kept := {path: stamps for path, stamps in listing.items() if all(stamp[0] != by for stamp in stamps)}:
            _write(root, kept)
        elif listing:
            (root / MARKER).unlink()


def remove(folder: str | os.PathLike[str], name: str, *, by: str) -> None:
    """Remove what `by` wrote under this name.

    Raises:
        NotOurs: if it did not, or it has changed since.
    """
    root = Path(folder)
    check(root, name, by=by)
    _remove(root / name)
    record(root, name, by=by)


@contextmanager
def _own_staging(root: Path) -> Iterator[Path]:
    """An empty folder to build in that no other process builds in, while both are at it; what a process left that was killed is cleared."""
    held = None
    with suppress(FileExistsError):  # `make_staging` says it in words
        root.mkdir(parents=True, exist_ok=True)
    with _alone(root):
        for number in itertools.count(1):
            staging = root / (STAGING if number == 1 else f"{STAGING}-{number}")
            try:
                with _locked(staging, wait=False):
                    pass  # nobody's, or of a process that is gone
            except BlockingIOError:
                continue
            held = _lock(make_staging(staging), wait=False)
            break
    try:
        yield staging
    finally:
        _unlock(held)


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One process at a time, of those that work on the same folder; where there are no locks, as many as there are."""
    with _locked(root, wait=True):
        yield


@contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[None]:
    held = _lock(folder, wait=wait)
    try:
        yield
    finally:
        _unlock(held)


def _lock(folder: Path, *, wait: bool) -> int | None:
    """A lock on a folder, which ends with the process at the latest; None where there is no such folder, or there are no locks.

    Raises:
        BlockingIOError: if another holds it and this one does not `wait`.
    """
    if fcntl is None:
        return None
    try:
        held = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(held)
        raise
    except OSError:  # a file system without locks
        os.close(held)
        return None
    return held


def _unlock(held: int | None) -> None:
    if held is not None:
        fcntl.flock(held, fcntl.LOCK_UN)  # a process that was forked meanwhile has the same one open
        os.close(held)


def make_staging(staging: Path) -> Path:
    """An empty folder to build in, marked as ours. -> the folder.

    Raises:
        NotOurs: if a folder of this name is there that we did not make.
    """
    clear_staging(staging)
    if staging.is_symlink() or (staging.exists() and any(staging.iterdir())):
        raise NotOurs(f"{str(staging)!r} is in the way and was not made by this library. Move it.")
    staging.mkdir(parents=True, exist_ok=True)
    (staging / MARKER).touch()
    return staging


def clear_staging(staging: Path) -> None:
    """Remove a folder that `make_staging` made, with all that was built in it; any other is left alone."""
    if not staging.is_symlink() and (staging / MARKER).is_file():
        shutil.rmtree(staging, ignore_errors=True)


def _stranger(root: Path, name: str, by: str) -> Path | None:
    """A file under this name that `by` did not write, or that has changed since."""
    listing = _listing(root)
    for path in _files(root / name):
        if path.is_symlink() or _stamp(path, by) not in listing.get(path.relative_to(root).as_posix(), []):
            return path
    return None


def _listing(root: Path) -> Listing:
    try:
        found = json.loads((root / MARKER).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # no marker, or none that can be read: nothing there is known to be ours
    return found if isinstance(found, dict) else {}


def _write(root: Path, listing: Listing) -> None:
    partial = root / f"{MARKER}.tmp"
    partial.write_text(json.dumps({"files": dict(sorted(listing.items()))}, indent=0) + "\n", encoding="utf-8")
    os.replace(partial, root / MARKER)


def _files(path: Path) -> list[Path]:
    """The files of a folder, at any depth, and its symbolic links; or the file itself; or nothing."""
    if path.is_symlink() or path.is_file():
        return [path]
    return sorted(found for found in path.rglob("*") if found.is_symlink() or not found.is_dir())


def _stamp(path: Path, by: str) -> Stamp:
    facts = path.lstat()
    return [by, facts.st_size, facts.st_mtime_ns]


def _remove(path: Path) -> None:
    """Called for what `check` has found to be ours."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
