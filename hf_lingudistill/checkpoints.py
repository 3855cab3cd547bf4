"""Checkpoints that survive: written beside their place, moved there whole, and refused where they are not.

transformers writes `checkpoint-N` where it will lie. A run that is killed while it does so leaves a folder that looks like a checkpoint,
is the newest one, and is resumed from. Here the folder is made under `STAGING`, a name that nobody takes for a checkpoint, and gets
its own name by one rename when every process has written its part.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import secrets
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, sort_checkpoints

from .folders import (
    MARKER,
    RUN_FACTS,
    NotOurs,
    clear_left,
    clear_staging,
    forget,
    is_ours,
    make_staging,
    obstacle,
    record,
    remove,
    was_ours,
)
from .locks import Lock, lock

logger = logging.getLogger(__name__)

_SAID: set[str] = set()  # checkpoints that were found changed, each once
BY = "distill"  # whose files they are, in the folder's list
STAGING = ".checkpoint-being-written"
STATE = "trainer_state.json"
JIT_NOTE = "checkpoint-is-incomplete.txt"
_SETTINGS = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("preprocessor_config.json", "processor_config.json", "special_tokens_map.json", "chat_template.json"),
)
# What makes a folder one of a run, and what saving a model, its processor, its card and a run's state may write to it
_OF_A_RUN = (STATE, "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
_WRITTEN = (
    "*.json",
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.model",
    "*.jinja",
    "README.md",
    "vocab.txt",
    "merges.txt",
    "adapter",
    "completions/*.parquet",
)
# Weights in a checkpoint: transformers', PEFT's, FSDP's, DeepSpeed's
_WEIGHTS = ("*.safetensors", "pytorch_model*", "adapter_model.bin", "global_step*")
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_0", "latest")  # one process or DDP, older, FSDP2, DeepSpeed


class CheckpointError(OSError):
    """A checkpoint could not be written. The message names the last good one."""


def flaw(checkpoint: str | os.PathLike[str]) -> str | None:
    """What keeps a checkpoint from being resumed from; None if nothing does.

    Read are file names, sizes and headers: each safetensors file must be as long as its header says.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return "it does not exist"
    try:
        json.loads((folder / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {STATE}, which is written last"
    except ValueError:
        return f"its {STATE} is cut off"
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError):
            return f"its {file.name} is cut off"
    for index in folder.glob("*.safetensors.index.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"its {index.name} is cut off"
        if missing := sorted(shard for shard in shards if not (folder / shard).is_file()):
            return f"it lacks {missing[0]}"
    if not any(next(folder.glob(f"**/{pattern}"), None) for pattern in _WEIGHTS):
        return "it holds no weights"
    for file in (folder / name for name in ("optimizer.pt", "scheduler.pt") if (folder / name).is_file()):
        with file.open("rb") as opened:
            is_of_torch = opened.read(2) == b"PK"
        if is_of_torch and not zipfile.is_zipfile(file):  # whose end says what is in it
            return f"its {file.name} is cut off"
    if not any((folder / name).exists() for name in _OPTIMIZERS):
        return "it holds no optimizer state (save_only_model?)"
    return None


def newest(run: str | os.PathLike[str], *, own: bool = False) -> Path | None:
    """The complete checkpoint of a run's folder with the most steps, or None. own: of those that the run in it wrote."""
    found = {
        int(p.name.rpartition("-")[2]): p for p in Path(run).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _is_numbered(p)
    }
    if own:
        found = {step: path for step, path in found.items() if is_ours(run, path.name, by=BY)}
    return next((found[step] for step in sorted(found, reverse=True) if flaw(found[step]) is None), None)


def go_on(run: str | os.PathLike[str], begun_from: Path | None = None) -> str:
    """The last complete checkpoint of a run, and how to go on from it.

    Args:
        run: its folder, which may hold checkpoints of others.
        begun_from: the checkpoint that it was resumed from.
    """
    last = newest(run, own=True) or begun_from
    if last is None:
        return "there is no complete checkpoint: start again"
    value = "true" if last == newest(run) else str(last)
    return f"the last complete checkpoint is {str(last)!r}: go on with --resume_from_checkpoint {value}"


def to_resume(wanted: str | bool, run: str | os.PathLike[str]) -> str:
    """The checkpoint that `resume_from_checkpoint` means: True ("true" on a command line) is the newest complete one of `run`.

    Raises:
        ValueError: if there is none, or the named one is incomplete.
    """
    last = newest(run, own=True) or newest(run)  # of an earlier run, where this one has none
    if last is None:  # a run that was killed while it replaced its only one
        with suppress(OSError):
            put_back(run, wait=True)  # every process of a run does
        last = newest(run, own=True) or newest(run)
    if isinstance(wanted, bool) or wanted.lower() == "true":
        if last is None:
            half = get_last_checkpoint(run) if Path(run).is_dir() else None
            why = f" ({Path(half).name} is not complete: {flaw(half)})" if half else ""
            over = " and with --overwrite_output_dir" if Path(run).is_dir() and any(Path(run).iterdir()) else ""
            raise ValueError(
                f"No complete checkpoint to resume from in {str(run)!r}{why}: train without --resume_from_checkpoint{over}."
            )
        return str(last)
    if (reason := flaw(wanted)) is not None:
        instead = f"resume from {str(last)!r}" if last else "no other checkpoint of this run is complete"
        raise ValueError(f"Checkpoint {str(wanted)!r} cannot be resumed from: {reason}; {instead}.")
    return str(wanted)


def wanted_checkpoint(given: str | bool | None) -> str | bool | None:
    """What `resume_from_checkpoint` says: True for the newest, a path, or None for a new run ("false" on a command line)."""
    text = str(given or "false").lower()
    return None if text == "false" else True if text == "true" else str(given)


def continues(wanted: str | bool | None, run: str | os.PathLike[str]) -> bool:
    """Whether a run that resumes from this goes on in its own folder. One that goes on elsewhere is a new run there: what lies in that
    folder is another's."""
    return wanted is True or (isinstance(wanted, str) and Path(wanted).resolve().parent == Path(run).resolve())


def has_written(run: str | os.PathLike[str], name: str) -> bool:
    """Whether the run in a folder has written its checkpoint of that name, and it is whole."""
    return is_ours(run, name, by=BY) and flaw(Path(run) / name) is None


def _is_numbered(path: Path) -> bool:
    return path.name.rpartition("-")[2].isdecimal()


def check_output_dir(output_dir: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Before a new run: its folder must not hold what the run would write over, another run's files or anyone's.

    Raises:
        ValueError: if it does (and not `overwrite`), is a file, or may not be written to.
    """
    folder = Path(output_dir)
    if (why := obstacle(folder)) is not None:
        raise ValueError(f"output_dir {str(folder)!r} cannot be written: {why}. Choose another name.")
    if overwrite:
        return
    runs = sorted((path.name for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")), key=len)
    runs = [*(name for name in _OF_A_RUN if (folder / name).exists()), *runs]
    files = sorted({path.name for pattern in _WRITTEN for path in folder.glob(pattern)} - {MARKER})
    if runs or files:
        found = f"a run's files ({runs[0]})" if runs else f"{files[0]!r}, which a run may write over"
        raise ValueError(
            f"output_dir {str(folder)!r} holds {found}: choose another folder, continue the run that is there with "
            "--resume_from_checkpoint true, or pass --overwrite_output_dir."
        )


def check_apart(output_dir: str | os.PathLike[str], *, what: str = "output_dir", **models: str | None) -> None:
    """Check that a folder is not that of a model that is read, nor in it, whatever may be overwritten.

    Args:
        output_dir: the folder. what: its name in the message. models: {role: folder or Hub id}.

    Raises:
        ValueError: if it is.
    """
    folder = Path(output_dir).resolve()
    for role, name in models.items():
        if name and Path(name).is_dir() and folder.is_relative_to(Path(name).resolve()):
            raise ValueError(
                f"{what} {str(output_dir)!r} is the folder of the {role}, or lies in it, and would be written over: choose another folder."
            )


def start_afresh(run: str | os.PathLike[str]) -> None:
    """A new run begins in this folder: checkpoints of an earlier one, if any, are not its own, and `rotate` leaves them. Its record goes
    to a name of its own: it would stand for what this run has saved."""
    put_back(run)
    forget(run, by=BY)
    record_of_it = Path(run) / RUN_FACTS
    if record_of_it.is_file():
        record_of_it.rename(_free(record_of_it.with_name(f"earlier-{RUN_FACTS}")))


def rotate(run: str | os.PathLike[str], limit: int | None, best: str | None) -> None:
    """Remove the run's own oldest checkpoints over `limit`; the newest and the `best` stay, and so does every folder that
    this run did not write, or that has been changed since."""
    if not limit or limit < 0:
        return
    found = [*map(Path, sort_checkpoints(str(run), use_mtime=True))]
    own = [path for path in found if is_ours(run, path.name, by=BY)]
    changed = [path for path in found if path not in own and was_ours(run, path.name, by=BY)]
    for path in changed:
        if str(path) not in _SAID:
            _SAID.add(str(path))
            logger.warning(
                "%s holds files that the run did not write, or that have changed since: save_total_limit leaves such checkpoints. Remove them "
                "yourself.", path,
            )  # fmt: skip
    protected = {path.resolve() for path in (*own[-1:], *([Path(best)] if best else []))}
    excess = len(own) - max(limit, len(protected))
    for path in [path for path in own if path.resolve() not in protected][: max(excess, 0)]:
        remove(run, path.name, by=BY)


def keep_best(run: str | os.PathLike[str], best: str | None) -> None:
    """At the end of a run that keeps one checkpoint, its best: remove the run's own others."""
    if best is None or not Path(best).is_dir():  # the run's folder has been moved
        return
    for path in map(Path, sort_checkpoints(str(run))):
        if not path.samefile(best) and is_ours(run, path.name, by=BY):
            remove(run, path.name, by=BY)


def keep_edits(run: str | os.PathLike[str], checkpoint: str | os.PathLike[str]) -> list[str]:
    """A run that is resumed writes its model anew at its end: settings in its folder that are not as the checkpoint has them are somebody's
    edits, and are copied to `earlier-NAME` first. -> the names of the copies.

    run: the folder of the run. checkpoint: one of its own.
    """
    kept = []
    for name in (
        file.name for file in Path(checkpoint).iterdir() if file.suffix == ".jinja" or file.name in _SETTINGS
    ):
        here = Path(run) / name
        if here.is_file() and here.read_bytes() != (Path(checkpoint) / name).read_bytes():
            copy = _free(here.with_name(f"earlier-{name}"))
            shutil.copy2(here, copy)
            kept.append(copy.name)
    return sorted(kept)


def put_back(run: str | os.PathLike[str], *, wait: bool = False) -> None:
    """Remove what a killed run left half-written, and put back a checkpoint that was about to be replaced.

    Raises:
        NotOurs: if the run that writes there is not killed, and this one does not `wait` for it.
    """
    staging = Path(run) / STAGING
    try:
        held = lock(staging, _lock_of(staging), wait=wait)
    except BlockingIOError:
        raise NotOurs(
            f"Another process is writing a checkpoint to {str(run)!r}: wait for it to end, or choose another output_dir."
        ) from None
    try:
        _put_back(staging)
    finally:
        if held is not None:
            held.release()
    clear_left(run)


def _put_back(staging: Path) -> None:
    for aside in staging.glob("replaced-*"):
        place = staging.parent / aside.name.removeprefix("replaced-")
        with suppress(FileNotFoundError):  # another process of the run was first
            if not place.exists():
                aside.rename(place)
    clear_staging(staging)


@contextmanager
def staged(run: str, name: str, accelerator: Accelerator) -> Iterator[str]:
    """Where to write the checkpoint `name` of the folder `run`; on leaving, it lies in its place.

    Entered and left by all processes. Each machine moves what lies on its own disk.

    Raises:
        CheckpointError: if something in the context could not be written. What was is removed.
    """
    staging, held = Path(run) / STAGING, None
    try:
        (token,) = broadcast_object_list([secrets.token_hex(8)])
        held = _make_staging(run, staging, accelerator, token=token)
        yield str(staging)
        accelerator.wait_for_everyone()
        if accelerator.is_local_main_process:
            _move(staging, name)
        accelerator.wait_for_everyone()
        # By the first process: to others a network disk may show it late
        if accelerator.is_main_process and not (Path(run) / name).is_dir():
            raise FileNotFoundError(f"{str(staging)!r} was removed while it was written to")
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # torch and safetensors raise the last two when a disk is full
        _put_back(staging)
        last = newest(run)
        kept = (
            f"The last complete one is {str(last)!r}: resume from it"
            if last
            else "There is none before it: start again"
        )
        raise CheckpointError(
            f"{name} could not be written ({' '.join(str(error).split())[:200]}), and what was written of it is removed. {kept} when "
            "there is room."
        ) from error
    finally:
        if held is not None:
            held.release()
    accelerator.wait_for_everyone()


def _lock_of(staging: Path) -> Path:
    return staging.with_name(f"{STAGING}.lock")


def _make_staging(run: str, staging: Path, accelerator: Accelerator, *, token: str) -> Lock | None:
    """On every disk, by one process: machines may share one. -> a lock on it, of the process that has made it, where it can be had.

    token: the same on all processes, and no other run's.
    """
    held = None
    for turn in ("first", "others"):
        if accelerator.is_main_process if turn == "first" else accelerator.is_local_main_process:
            if not (staging / MARKER).is_file() or (staging / MARKER).read_text(encoding="utf-8") != token:
                put_back(run)
                make_staging(staging)
                (staging / MARKER).write_text(token, encoding="utf-8")
                held = lock(staging, _lock_of(staging), wait=False)
        accelerator.wait_for_everyone()
    return held


def _move(staging: Path, name: str) -> None:
    whole, place = staging / f"whole-{name}", staging.parent / name
    try:
        (staging / name).rename(whole)
    except FileNotFoundError:  # on a disk that machines share, another was first
        return
    for path in [*whole.rglob("*"), whole]:  # after a power cut the rename may be there and the data not
        _flush(path)
    if (
        place.exists()
    ):  # of this run, before it was resumed from an earlier one; or of anyone's, under overwrite_output_dir
        # transformers' just-in-time checkpoint makes the folder beforehand, with a note in it
        own = is_ours(place.parent, name, by=BY) or {one.name for one in place.iterdir()} == {JIT_NOTE}
        place.rename(staging / f"replaced-{name}" if own else _free(place.with_name(f"earlier-{name}")))
    whole.rename(place)
    with suppress(OSError):  # a disk that is full now: this checkpoint stays, and is not counted as the run's own
        record(place.parent, name, by=BY)
    _flush(place.parent)
    clear_staging(staging)


_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_WHOLE = ("config.json", "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")


def set_aside_other_kind(folder: str | Path, *, adapter: bool) -> None:
    """Rename, to `earlier-NAME`, what an earlier run has left there of the other kind: transformers would load whole weights with the adapter that
    lies beside them. adapter: what has been saved now."""
    for pattern in _WHOLE if adapter else _ADAPTER:
        for path in Path(folder).glob(pattern):
            place = _free(path.with_name(f"earlier-{path.name}"))
            path.rename(place)
            logger.warning(
                "%s is of an earlier run, and would be loaded with this model: it is called %s now.", path, place.name
            )


def _free(path: Path) -> Path:
    """The path, or one with a number behind it that nothing bears."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], numbered) if not name.exists())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --------------------------------------------------------------------------------------------------------------------
# What was measured between the last log and the checkpoint
# --------------------------------------------------------------------------------------------------------------------
def write_measured(checkpoint: Path, accelerator: Accelerator, values: dict[str, Any]) -> None:
    """Each process its own file; JSON, whose floats come back bit for bit."""
    facts = {"processes": accelerator.num_processes, **values}
    _measured(checkpoint, accelerator).write_text(json.dumps(facts) + "\n", encoding="utf-8")


def read_measured(checkpoint: Path, accelerator: Accelerator) -> dict[str, Any] | None:
    """What `write_measured` wrote; None if it did not, or for another number of processes, whose sums are not these."""
    file = _measured(checkpoint, accelerator)
    facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return facts if facts.pop("processes", None) == accelerator.num_processes else None


def _measured(checkpoint: Path, accelerator: Accelerator) -> Path:
    return checkpoint / f"lingudistill_measured_{accelerator.process_index}.json"
