"""Checkpoints that survive: written beside their place, moved there whole, and refused where they are not.

transformers writes `checkpoint-N` where it will lie. A run that is killed while it does so leaves a folder that looks like a checkpoint,
is the newest one, and is resumed from. Here the folder is made under `STAGING`, a name that nobody takes for a checkpoint, and gets
its own name by one rename when every process has written its part.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

STAGING = ".checkpoint-being-written"
STATE = "trainer_state.json"
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
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if missing := sorted(shard for shard in shards if not (folder / shard).is_file()):
            return f"it lacks {missing[0]}"
    if not any((folder / name).exists() for name in _OPTIMIZERS):
        return "it holds no optimizer state (save_only_model?)"
    return None


def newest(run: str | os.PathLike[str]) -> Path | None:
    """The complete checkpoint of a run's folder with the most steps, or None."""
    found = {
        int(p.name.rpartition("-")[2]): p for p in Path(run).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _is_numbered(p)
    }
    return next((found[step] for step in sorted(found, reverse=True) if flaw(found[step]) is None), None)


def to_resume(wanted: str | bool, run: str | os.PathLike[str]) -> str:
    """The checkpoint that `resume_from_checkpoint` means: True ("true" on a command line) is the newest complete one of `run`.

    Raises:
        ValueError: if there is none, or the named one is incomplete.
    """
    last = newest(run)
    if isinstance(wanted, bool) or str(wanted).lower() == "true":
        if last is None:
            half = get_last_checkpoint(run) if Path(run).is_dir() else None
            why = f" ({Path(half).name} is not complete: {flaw(half)})" if half else ""
            raise ValueError(
                f"No complete checkpoint to resume from in {str(run)!r}{why}: train without --resume_from_checkpoint and with "
                "--overwrite_output_dir."
            )
        return str(last)
    if (reason := flaw(wanted)) is not None:
        instead = f"resume from {str(last)!r}" if last else "no other checkpoint of this run is complete"
        raise ValueError(f"Checkpoint {str(wanted)!r} cannot be resumed from: {reason}; {instead}.")
    return str(wanted)


def _is_numbered(path: Path) -> bool:
    return path.name.rpartition("-")[2].isdecimal()


def clear_staging(run: str | os.PathLike[str]) -> None:
    """Remove what a killed run left half-written, and put back a checkpoint that was about to be replaced."""
    staging = Path(run) / STAGING
    for aside in staging.glob("replaced-*"):
        place = Path(run) / aside.name.removeprefix("replaced-")
        if not place.exists():
            aside.rename(place)
    shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def staged(run: str, name: str, accelerator: Accelerator) -> Iterator[str]:
    """Where to write the checkpoint `name` of the folder `run`; on leaving, it lies in its place.

    Entered and left by all processes. Each machine moves what lies on its own disk.

    Raises:
        CheckpointError: if something in the context could not be written. What was is removed.
    """
    staging = Path(run) / STAGING
    if accelerator.is_local_main_process:
        clear_staging(run)
    accelerator.wait_for_everyone()
    try:
        staging.mkdir(parents=True, exist_ok=True)
        yield str(staging)
        accelerator.wait_for_everyone()
        if accelerator.is_local_main_process:
            _move(staging, name)
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # torch and safetensors raise the last two when a disk is full
        shutil.rmtree(staging, ignore_errors=True)
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
    accelerator.wait_for_everyone()


def _move(staging: Path, name: str) -> None:
    whole, place = staging / f"whole-{name}", staging.parent / name
    try:
        (staging / name).rename(whole)
    except FileNotFoundError:  # on a disk that machines share, another was first
        return
    for path in [*whole.rglob("*"), whole]:  # after a power cut the rename may be there and the data not
        _flush(path)
    if place.exists():
        place.rename(staging / f"replaced-{name}")
    whole.rename(place)
    _flush(place.parent)
    shutil.rmtree(staging, ignore_errors=True)


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
