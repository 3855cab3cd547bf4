"""Nothing of the user's is lost: what this library wrote it can tell from everything else, and only that is replaced or removed.

    with replacing("outputs/demo", "before", "after", "report.json", by="demo") as folder:
        model.save_pretrained(folder / "before")     # built beside its place
        ...
    # now they lie in outputs/demo, all of them; after an error none of them does, and what was there is untouched

A folder's `MARKER` lists the files that were written there, with their sizes and times. A name is free if nothing bears it, or
if every file under it is listed and unchanged: a file that was added to a model's folder, or trained over, is the user's.

Several processes may write to one folder at a time (two sweeps into `outputs/`): each builds in a folder of its own, and takes its turn
with the list (`locks.py`). Where nothing can be locked, what a killed process left stays, since nobody can tell that it is gone.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .locks import Lock, lock

MARKER = ".lingudistill-files.json"
RUN_FACTS = "lingudistill.json"  # the record of a training
STAGING = ".lingudistill-being-written"
LOCK = ".lingudistill.lock"  # where folders cannot be locked
_REPLACED = ".lingudistill-replaced"  # in a staging folder: what lay in the places that new files are taking

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
        others = sorted(path.name for path in root.iterdir() if not _is_trace(path))
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


def was_ours(folder: str | os.PathLike[str], name: str, *, by: str) -> bool:
    """Whether something of what bears this name there was written by `by`, whatever became of it."""
    return any(
        path.split("/")[0] == name and any(stamp[0] == by for stamp in stamps)
        for path, stamps in _listing(Path(folder)).items()
    )


@contextmanager
def replacing(folder: str | os.PathLike[str], *names: str, by: str) -> Iterator[Path]:
    """An empty folder to make `names` in (all, or some); on leaving, they take their places in `folder` by renames. All else that
    was made in it is removed with it.

    What lay there under these names is removed, after `check` has said that it is `by`'s own. If the block raises, everything is
    as it was before.

    Raises:
        NotOurs: before the block is entered, or after it, if something has come into the way meanwhile or cannot be replaced: then
            everything is as it was, what was made is kept, and the message says where.
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
    if not (staging / MARKER).is_file():
        raise NotOurs(f"{str(staging)!r} was removed while it was written to: nothing was replaced. Run it again.")
    try:
        check(root, *names, by=by)
    except NotOurs as error:
        raise NotOurs(f"{error} What was made is in {str(_left_to_the_user(staging))!r}.") from None
    listing = _listing(root)
    new = {
        path.relative_to(staging).as_posix(): [_stamp(path, by)] for name in made for path in _files(staging / name)
    }
    kept = {path: stamps for path, stamps in listing.items() if path.split("/")[0] not in names}
    try:
        # While the files are moved, either of two may lie in a place: a run that is killed here leaves nothing that is not known
        _write(root, {path: listing.get(path, []) + new.get(path, []) for path in {*listing, *new}})
        (staging / _REPLACED).mkdir()
        write_whole(staging / MARKER, json.dumps({"names": names, "made": made}))
        for name in names:
            if os.path.lexists(root / name):
                (root / name).rename(staging / _REPLACED / name)
        for name in made:
            (staging / name).rename(root / name)
    except OSError as error:
        _undo(root, staging)
        raise NotOurs(
            f"{error.filename or str(root)!r} cannot be written ({error.strerror or error}): everything is as it was, and what was made is in "
            f"{str(_left_to_the_user(staging))!r}."
        ) from None
    with suppress(OSError):  # a disk that is full now: the list holds both
        write_whole(staging / MARKER, "")  # done: what was replaced may go
        _write(root, {**kept, **new})


def _undo(root: Path, staging: Path) -> None:
    """Of files that were taking their places when it broke off: the new ones back into the staging folder, and the old ones back."""
    try:
        begun = json.loads((staging / MARKER).read_text(encoding="utf-8"))
        names, made = begun["names"], begun["made"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # nothing was on its way
    for name in names:
        with suppress(OSError):
            if name in made and not os.path.lexists(staging / name):
                (root / name).rename(staging / name)
        with suppress(OSError):
            if not os.path.lexists(root / name):
                (staging / _REPLACED / name).rename(root / name)


def _left_to_the_user(staging: Path) -> Path:
    """A staging folder that is nobody's to clear. -> where it is."""
    with suppress(OSError):
        (staging / _REPLACED).rmdir()
    with suppress(OSError):
        (staging / MARKER).unlink()
    return staging


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
    try:
        with _own_staging(root) as staging:
            (root / name).rename(staging / name)  # first: a folder that is half removed looks like a whole one
            clear_staging(staging)
    except FileNotFoundError:  # another process was first
        pass
    except OSError:  # a disk so full that no folder can be made: it is room that is wanted
        shutil.rmtree(root / name, ignore_errors=True)
    record(root, name, by=by)


def clear_left(folder: str | os.PathLike[str]) -> None:
    """Remove what processes that are gone left half-written in a folder, and put back what they were about to replace."""
    root = Path(folder)
    with _alone(root):
        _clear_left(root)


def _clear_left(root: Path) -> None:
    for staging in sorted(root.glob(f"{STAGING}*")):
        if not _is_staging(staging):
            continue
        try:
            held = lock(staging, _lock_of(staging), wait=False)
        except BlockingIOError:
            continue  # its process is at it
        if held is not None:  # else nobody can tell
            _undo(root, staging)
            clear_staging(staging)
            _release(held, staging)


@contextmanager
def _own_staging(root: Path) -> Iterator[Path]:
    """An empty folder to build in that is no other process's; what processes left that were killed is cleared."""
    with suppress(FileExistsError):  # `check` says it in words
        root.mkdir(parents=True, exist_ok=True)
    with _alone(root):
        _clear_left(root)
        for number in itertools.count(1):
            staging = root / (STAGING if number == 1 else f"{STAGING}-{number}")
            try:
                staging.mkdir()
                held = lock(staging, _lock_of(staging), wait=False)
            except FileExistsError:  # another's, or something of the user's
                continue
            except BlockingIOError:  # whoever had the name before has not let go of it
                staging.rmdir()
                continue
            break
        (staging / MARKER).touch()
    try:
        yield staging
    finally:
        with _alone(root):  # or the next one takes a lock's file that is about to go
            _release(held, staging)


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One process at a time, of those that work on the same folder; where there are no locks, as many as there are."""
    held = lock(root, root / LOCK, wait=True)
    try:
        yield
    finally:
        if held is not None:
            held.release()


def _release(held: Lock | None, staging: Path) -> None:
    if held is not None:
        held.release()
        with suppress(OSError):
            _lock_of(staging).unlink(missing_ok=True)


def _lock_of(staging: Path) -> Path:
    return staging.with_name(f"{staging.name}.lock")


def make_staging(staging: Path) -> Path:
    """An empty folder to build in, marked as ours. -> the folder.

    Raises:
        NotOurs: if a folder of this name is there that we did not make.
    """
    clear_staging(staging)
    if staging.is_symlink() or (staging.exists() and (not staging.is_dir() or any(staging.iterdir()))):
        raise NotOurs(f"{str(staging)!r} is in the way and was not made by this library. Move it.")
    staging.mkdir(parents=True, exist_ok=True)
    (staging / MARKER).touch()
    return staging


def clear_staging(staging: Path) -> None:
    """Remove a folder that `make_staging` made, with all that was built in it; any other is left alone."""
    if not _is_staging(staging):
        return
    with suppress(OSError):
        for path in list(staging.iterdir()):
            if path.name != MARKER:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() and not path.is_symlink() else path.unlink()
        if [path.name for path in staging.iterdir()] == [MARKER]:  # last: what is left after a kill is ours to the end
            (staging / MARKER).unlink()
            staging.rmdir()


def _is_staging(staging: Path) -> bool:
    return not staging.is_symlink() and (staging / MARKER).is_file()


def _is_trace(path: Path) -> bool:
    """Whether it is something that this library leaves beside what a command makes."""
    if path.name.startswith(STAGING):
        return path.suffix == ".lock" or _is_staging(path)
    return path.name in (MARKER, LOCK) or (path.name.startswith(f"{MARKER}.") and path.suffix == ".tmp")


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
    write_whole(root / MARKER, json.dumps({"files": dict(sorted(listing.items()))}, indent=0) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or as it was, whatever ends the process or fills the disk."""
    place = path.resolve()  # a link stays one
    partial = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, place)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _files(path: Path) -> list[Path]:
    """The files of a folder, at any depth, and its symbolic links; or the file itself; or nothing."""
    if path.is_symlink() or path.is_file():
        return [path]
    return sorted(found for found in path.rglob("*") if found.is_symlink() or not found.is_dir())


def _stamp(path: Path, by: str) -> Stamp:
    facts = path.lstat()
    return [by, facts.st_size, facts.st_mtime_ns]
