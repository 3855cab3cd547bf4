"""The facts of a training run: gathered from the trainer at save, kept beside the model as `lingudistill.json`.

They can be published as they are: a folder of this machine is known by its last part alone, and neither user name nor token
is in it. What is not known is None, never a guess.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import yaml

from .._internals import own_name
from .._version import __version__
from ..folders import RUN_FACTS, write_whole
from ..weights import glance
from .http import HTTPError

RunFacts = dict[str, Any]
FILE_NAME = RUN_FACTS
SCHEMA = "lingudistill-record/1"  # its name since 0.1: files of then are still read
LIBRARIES = ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "bitsandbytes", "huggingface_hub")

# Settings that say where a run is kept, logged or sent (some hold tokens), or that follow from the machine.
_NOT_RECIPE = {
    "output_dir",
    "logging_dir",
    "run_name",
    "report_to",
    "project",
    "disable_tqdm",
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "cache_dir",
    "use_cpu",
    "accelerator_config",
    "dataloader_pin_memory",
    "debug",
    "pad_to_multiple_of",
    *("vllm_server_host", "vllm_server_port", "vllm_server_base_url", "vllm_group_port"),
    *("trackio_space_id", "trackio_bucket_id"),
}
# What the loss of a token depends on, but for the weights
LOSS_SETTINGS = (
    "kv_sharing",
    "kv_source",
    "blind_weight",
    "distill_tokens",
    "distill_margin",
    "ce_weight",
    "distill_weight",
    "beta",
    "temperature",
    "anchor",
    "anchor_weight",
)
# Which tokens are trained on, of given rows
ROW_SETTINGS = ("answers_only", "completion_only_loss", "distill_column", "max_length")
SETTINGS = (
    *LOSS_SETTINGS,
    *ROW_SETTINGS,
    "freeze_vision",
    "anchor_cache",
    "teacher_cache",
    "teacher_quantization",
    "learning_rate",
    "lr_scheduler_type",
    "optim",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "bf16",
    "fp16",
)


# dataset, revision, folder of the files
_ON_THE_HUB = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^/]+))?/(?:(.+)/)?[^/]+$")


# --------------------------------------------------------------------------------------------------------------------
# Names
# --------------------------------------------------------------------------------------------------------------------
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


def is_local(reference: str) -> bool:
    """Whether a model or dataset is named by a folder of this machine."""
    if reference.lower().startswith("file:") or _DRIVE.match(reference):
        return True
    return reference.startswith((".", "~", "/", "\\")) or os.path.isabs(reference) or Path(reference).exists()


def public_name(reference: str) -> str:
    """A Hub id as it is; of a folder the last part, which says nothing about the machine; a URL without user, query and fragment, where
    passwords and signatures stand."""
    if not is_local(reference):
        return "::".join(map(_without_secrets, reference.split("::")))  # fsspec's chains: zip://rows.csv::https://...
    return Path(reference.replace("\\", "/")).expanduser().name or "local"


def _without_secrets(url: str) -> str:
    if url.startswith("pipe:"):  # a command of a shell, which may hold anything
        return "a command"
    if "://" not in url:
        return url
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def hub_id(reference: str | None) -> str | None:
    """The reference, if it is a Hub id and no folder."""
    from .escape import repo_or_none  # not above: the command line starts without huggingface_hub

    return None if not reference or is_local(reference) else repo_or_none(reference)


# --------------------------------------------------------------------------------------------------------------------
# What the Hub (or the folder's card) says about a base model or a dataset
# --------------------------------------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=64)  # facts are gathered at every checkpoint
def base_facts(reference: str, revision: str | None = None) -> RunFacts:
    """Licence and language of a base model: from its folder's card, else one request to the Hub. Empty if neither answers."""
    from huggingface_hub import HfApi, metadata_load

    try:
        if is_local(reference):
            card: Any = metadata_load(Path(reference).expanduser() / "README.md")
        else:
            card = HfApi().model_info(reference, revision=revision, timeout=10).card_data
    except (OSError, ValueError, HTTPError, yaml.YAMLError):
        return {}
    names = ("license", "license_name", "license_link", "language")
    return {name: card.get(name) for name in names if card and card.get(name)}


@functools.lru_cache(maxsize=64)
def dataset_revision(dataset_id: str | None) -> str | None:
    """The commit of a Hub dataset's main branch now; None for local data and where the Hub does not answer."""
    from huggingface_hub import HfApi

    if dataset_id is None or hub_id(dataset_id) is None:
        return None
    try:
        return HfApi().dataset_info(dataset_id, timeout=10).sha
    except (OSError, ValueError, HTTPError):
        return None


def dataset_fact(path: str, *, data_files: Any = None, **fields: Any) -> RunFacts:
    """A data source as run facts keep it.

    data_files: what is read, where `path` names a loader (`parquet`, `json`); files of one dataset on the Hub make that the source.
    fields: `config`, `split`, `fraction`, `distill`, whatever is known.
    """
    known = {name: value for name, value in fields.items() if value is not None}
    if data_files is None or "/" in path or is_local(path):
        return {"id": hub_id(path), "name": public_name(path), "revision": dataset_revision(path), **known}
    files = _file_names(data_files)
    found = [_ON_THE_HUB.match(file) for file in files]
    places = {(match[1], match[2]) for match in found if match}
    if len(places) != 1 or not all(found):
        names = sorted({public_name(file) for file in files})
        return {"id": None, "name": ", ".join(names), "revision": None, **known}
    ((name, revision),) = places
    folders = sorted({match[3] for match in found if match and match[3]})
    return {
        "id": name,
        "name": name,
        "revision": revision or dataset_revision(name),
        **({"config": ", ".join(folders)} if folders else {}),
        **known,
    }


def _file_names(data_files: Any) -> list[str]:
    if isinstance(data_files, Mapping):
        data_files = list(data_files.values())
    if isinstance(data_files, list | tuple):
        return [name for part in data_files for name in _file_names(part)]
    return [str(data_files)]


# --------------------------------------------------------------------------------------------------------------------
# The recipe
# --------------------------------------------------------------------------------------------------------------------
def recipe_of(*arguments: Any) -> RunFacts:
    """The settings of these dataclasses that differ from their defaults, as a YAML recipe names them.

    Left out: where the run is kept, logged or sent (tokens among it). Folders are known by their last part.
    """
    recipe: RunFacts = {}
    for instance in arguments:
        for field in dataclasses.fields(instance):
            value = getattr(instance, field.name)
            if field.name in _NOT_RECIPE or field.name.startswith(("_", "hub_", "push_to_hub")):
                continue
            # Not from a fresh instance: making one resets the running accelerator's state
            default = field.default_factory() if callable(field.default_factory) else field.default
            if value != default:
                recipe[field.name] = _plain(value)
    return recipe


def _plain(value: Any) -> Any:
    """A value as YAML writes it, without folders of this machine."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {name: _plain(item) for name, item in fields if item is not None}
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items() if "token" not in str(name)}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value)  # and no subclass, which YAML does not write
    if isinstance(value, int | None):
        return value
    text = str(getattr(value, "value", value))  # an enumeration is written as its value
    return public_name(text) if text and (is_local(text) or "://" in text) else text


# --------------------------------------------------------------------------------------------------------------------
# The run
# --------------------------------------------------------------------------------------------------------------------
def gather_run_facts(
    trainer: Any, *, recipe: Mapping[str, Any] | None = None, datasets: Sequence[RunFacts] = ()
) -> RunFacts:
    """What a card says about how a model was trained.

    Args:
        trainer: a `PublishingMixin`, at any time; what is not known yet (steps, seconds) is None. So are the seconds of a run that was
            resumed: its clock knows the last part alone.
        recipe: `recipe_of` the run's arguments; left out, of the trainer's alone.
        datasets: `dataset_fact` of each source.
    """
    from accelerate.utils import is_peft_model

    args, state = trainer.args, trainer.state
    chosen = {**vars(args), **getattr(trainer, "decided", {})}  # other trainers' arguments have fewer
    student = trainer.model.get_base_model() if is_peft_model(trainer.model) else trainer.model
    name = str(getattr(student.config, "_name_or_path", "") or "")
    return {
        "schema": SCHEMA,
        "student": {
            **model_fact(name, (args.model_init_kwargs or {}).get("revision")),
            "model_type": student.config.model_type,
            "parameters": _count(student),
        },
        "anchor": _before_fact(trainer),
        "sampling": _sampling_fact(chosen),
        "teacher": {
            **model_fact(trainer.teacher_name_or_path, chosen.get("teacher_model_revision")),
            "part": trainer.teacher_part,
            "quantization": chosen.get("teacher_quantization"),
            "arithmetic": trainer.teacher_arithmetic,
            "mib": round(trainer.teacher.footprint / 2**20, 2),
            "quantization_kl": trainer.teacher_quantization_kl,
            **_cache_fact(trainer, "teacher_cached"),
        },
        "datasets": list(datasets),
        "settings": {name: plain(chosen[name]) for name in SETTINGS if name in chosen},
        "training": {
            "steps": state.global_step or None,
            "epochs": state.epoch,
            "rows": len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else None,
            "distilled_rows_share": 1.0 if trainer.has_distill_column is False else trainer.distill_share,
            **_from_log(state.log_history),
            **({"seconds": None} if getattr(trainer, "_resumed_from", None) is not None else {}),
            "trained_parameters": _count(trainer.model, trained=True),
        },
        "hardware": _hardware(trainer.accelerator, args),
        "versions": _versions(),
        "recipe": dict(recipe) if recipe is not None else {**_model_names(name, trainer), **recipe_of(args)},
    }


def plain(option: Any) -> Any:
    """An option as JSON keeps it: an enum's value."""
    return getattr(option, "value", option)


def _count(model: Any, *, trained: bool = False) -> int:
    """Parameters of a model without what an adapter added, or those that are trained, an adapter's among them.

    As many as there are where no engine has sharded them (ZeRO-3: `ds_numel`) and bitsandbytes has not packed them.
    """
    total = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad if trained else own_name(model, name) is not None:
            count = getattr(parameter, "ds_numel", parameter.numel())
            total += count * 2 * parameter.element_size() if type(parameter).__name__ == "Params4bit" else count
    return int(total)


def _before_fact(trainer: Any) -> RunFacts | None:
    """The VLM before as a second parent: its bytes beside the student (0 where it is the adapter's base). None without one."""
    before = getattr(getattr(trainer, "step", None), "judge", None)  # any trainer with a teacher may carry the mixin
    cache = _cache_fact(trainer, "anchor_cached")
    if before is None and not cache:
        return None
    return {"model": "before", "mib": 0.0 if before is None else round(before.footprint / 2**20, 2), **cache}


def _cache_fact(trainer: Any, name: str) -> RunFacts:
    """What was kept of a model's answers before training; empty where it was asked live."""
    cache = getattr(trainer, name, None)
    return {} if cache is None else {"cache": trainer.cache_facts(cache)}


def _sampling_fact(chosen: Mapping[str, Any]) -> RunFacts | None:
    """How the student sampled the answers that it was trained on; None where they were given."""
    names = ("max_completion_length", "top_p", "top_k", "min_p", "repetition_penalty", "use_vllm")
    return {name: chosen[name] for name in names} if names[0] in chosen else None


def model_fact(reference: str, revision: str | None = None) -> RunFacts:
    """A model as run facts keep it: a Hub id with the commit that was loaded, or the last part of a folder."""
    known = hub_id(reference)
    return {
        "id": known,
        "name": public_name(reference) if reference else None,
        "revision": loaded_commit(known, revision) if known else None,
        "files": glance(reference, revision) if reference else None,
        **(base_facts(reference, revision) if reference else {}),
    }


def loaded_commit(repo_id: str, revision: str | None = None) -> str | None:
    """The commit that a Hub model was loaded from, as the cache knows it; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo_id, "config.json", revision=revision or "main")
    return Path(config).parent.name if isinstance(config, str) else None


def _model_names(student: str, trainer: Any) -> RunFacts:
    names = {"model_name_or_path": student, "teacher_model_name_or_path": trainer.teacher_name_or_path}
    known: RunFacts = {key: public_name(name) for key, name in names.items() if name}
    return known if _sampling_fact(vars(trainer.args)) is None else {**known, "on_policy": True}


def _from_log(history: Iterable[Mapping[str, Any]]) -> RunFacts:
    """Seconds, tokens and the distilled and anchored shares of the answer tokens, from what was logged."""
    seconds = tokens = None
    distilled = anchored = labels = 0.0
    for entry in history:
        seconds = entry.get("train_runtime", seconds)
        tokens = entry.get("num_tokens", tokens)
        distilled += entry.get("distilled_tokens", 0.0)
        anchored += entry.get("anchored_tokens", 0.0)
        labels += entry.get("answer_tokens", 0.0)
    return {
        "seconds": seconds,
        "tokens": None if tokens is None else int(tokens),
        "answer_tokens": int(labels) or None,
        "distilled_tokens_share": distilled / labels if labels else None,
        "anchored_tokens_share": anchored / labels if labels else None,
    }


def _hardware(accelerator: Any, args: Any) -> RunFacts:
    import torch

    on_gpu = accelerator.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(accelerator.device) if on_gpu else accelerator.device.type,
        "processes": accelerator.num_processes,
        "threads": None if on_gpu else torch.get_num_threads(),
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
    }


def _versions() -> dict[str, str]:
    found = {"hf_lingudistill": __version__, "python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------
def write_run_facts(facts: RunFacts, folder: str | Path) -> Path:
    """Write `lingudistill.json`. -> its path."""
    path = Path(folder) / FILE_NAME
    write_whole(path, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    return path


def read_run_facts(folder: str | Path) -> RunFacts:
    """The run facts beside a model; empty if there is none.

    Raises:
        ValueError: if the file is there and holds something else.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} must hold the facts of a training run in JSON: {error}. Restore or delete it."
        ) from None
    if not isinstance(facts, dict) or facts.get("schema") != SCHEMA:
        raise ValueError(f"{path} must have the schema {SCHEMA!r}; restore or delete it.")
    return facts


# Their names in 0.1
training_record, read_record, write_record = gather_run_facts, read_run_facts, write_run_facts
