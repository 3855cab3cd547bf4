"""Whether a run that is resumed is the run that its checkpoint is of: same loss, rows, models and adapter."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model

from .hub.run_facts import LOSS_SETTINGS, ROW_SETTINGS, plain, public_name
from .options import shown
from .weights import glance

# What a resumed run may not change. What is the optimizer's would not even change: the checkpoint holds it
KEPT = (
    *LOSS_SETTINGS,
    *ROW_SETTINGS,
    *("freeze_vision", "teacher_quantization", "learning_rate", "lr_scheduler_type", "optim", "seed"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
)
_ADAPTER = "adapter_config.json"
_BATCH, _ACCUMULATED = "per_device_train_batch_size", "gradient_accumulation_steps"
_OF_AN_ADAPTER = (
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "target_modules",
    "modules_to_save",
    "bias",
)


def check_same(trainer: Any, checkpoint: Path, facts: Mapping[str, Any]) -> None:
    """Resumed with another loss, other rows or another teacher, a run would be neither of two, and its record would speak of one.

    Args:
        trainer: that resumes. checkpoint: its folder. facts: what was recorded there; what an older version did not record is not compared.

    Raises:
        ValueError: naming what differs.
    """
    if differ := [
        *_options({**vars(trainer.args), **trainer.decided}, facts),
        *_rows_per_step(trainer, facts),
        *_models(trainer, facts),
        *_adapter(trainer.model, checkpoint),
    ]:
        was, found = (", ".join(f"{name}={shown(pair[side])}" for name, *pair in differ) for side in (0, 1))
        raise ValueError(
            f"The checkpoint {str(checkpoint)!r} was trained with {was}; found {found}. Resume it with the options it had, or begin a new "
            "run in another folder with that checkpoint as the student (without --resume_from_checkpoint)."
        )


def _options(now: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    kept = facts.get("settings") or {}
    for name in KEPT:
        if name in kept and name in now and kept[name] != (value := plain(now[name])):
            yield name, kept[name], value


def _rows_per_step(trainer: Any, facts: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Transformers goes on behind as many batches as there were steps: of other sizes, rows are left out or read twice."""
    kept, args = facts.get("settings") or {}, trainer.args
    was = (kept.get(_BATCH), kept.get(_ACCUMULATED), (facts.get("hardware") or {}).get("processes"))
    now = (args.per_device_train_batch_size, args.gradient_accumulation_steps, trainer.accelerator.num_processes)
    if None not in was and math.prod(map(int, was)) != math.prod(now):  # type: ignore[arg-type]
        for name, *pair in zip((_BATCH, _ACCUMULATED, "number of processes"), was, now, strict=True):
            if pair[0] != pair[1]:
                yield name, *pair


def _models(trainer: Any, facts: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """By a look at their files, wherever those lie now. The student's weights come from the checkpoint; what it began as counts where the
    VLM before is asked."""
    args = trainer.args
    asked = {"teacher": (trainer.teacher_name_or_path, args.teacher_model_revision)}
    if trainer.before is not None:
        name = str(getattr(trainer.model.config, "_name_or_path", "") or "")
        asked["student"] = name, (args.model_init_kwargs or {}).get("revision")
    for role, (name, revision) in asked.items():
        known = facts.get(role) or {}
        was, found = known.get("files"), glance(name, revision) if name else None
        if was is not None and found is not None and was != found:
            yield role, f"{known.get('name')} (files {was})", f"{public_name(name)} (files {found})"


def _adapter(model: Any, checkpoint: Path) -> Iterator[tuple[str, Any, Any]]:
    path = checkpoint / _ADAPTER
    if not is_peft_model(model):
        if path.is_file():
            yield "an adapter", True, False
        return
    if not path.is_file():
        yield "an adapter", False, True
        return
    saved, now = json.loads(path.read_text(encoding="utf-8")), model.active_peft_config.to_dict()
    for name in _OF_AN_ADAPTER:
        was, found = (_sorted(plain(of.get(name))) for of in (saved, now))
        if name in saved and was != found:
            yield f"lora_{name}" if name == "r" else name, was, found


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, list | set | tuple) else value
