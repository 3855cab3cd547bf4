"""Every option of distillation, once: its type, default and help. torch is not needed to read, list or explain them.

`LinguDistillConfig` adds `DistillOptions` to TRL's `SFTConfig`, `OnPolicyLinguDistillConfig` adds `OnPolicyOptions` to its
`DistillationConfig`; the script adds `DistillScriptArguments` and `StudentArguments`.
Flags, YAML keys, docstrings and `lingudistill distill --help` are made from the fields.
"""

from __future__ import annotations

import dataclasses
import math
import re
import textwrap
import typing
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cache
from numbers import Integral, Real
from typing import Any, ClassVar

from trl import ModelConfig, ScriptArguments

from .sharing import MODES

KV_SHARING_CHOICES = tuple(MODES)
QUANTIZATION_CHOICES = ("nf4", "int8", "none")
SHARDING_CHOICES = ("auto", "replicate", "shard")
OFFLOAD_CHOICES = ("none", "cpu")
DISTILL_TOKENS_CHOICES = ("all", "confident")
ANCHOR_CHOICES = ("none", "before")
KV_SOURCE_CHOICES = ("student", "before")
ON_NAN_CHOICES = ("stop", "skip")


def shown(value: Any) -> str:
    """A value as an error sentence quotes it: not longer than a line, and never an error itself (of an integer, Python prints at
    most 4,300 digits)."""
    try:
        text = repr(value)
    except ValueError:
        return f"{type(value).__name__} of more digits than can be printed"
    return text if len(text) <= 100 else text[:97] + "..."


# Options of transformers, TRL and PEFT whose least value they check late or never
_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_length": 1,
    "lora_r": 1,
    "learning_rate": 0,
    "weight_decay": 0,
    "warmup_steps": 0,
    "max_grad_norm": 0,
    "dataloader_num_workers": 0,
    "lora_dropout": 0,
}
_MAY_BE_INFINITE = ("max_grad_norm",)  # measured, and never clipped


def check_numbers(options: Any, *, but: Collection[str] = ()) -> None:
    """Check every number among the fields of a dataclass. A recipe in YAML, or Python, may give a fraction of a step, or NaN; and YAML reads
    1e-4 as a text, which becomes the number.

    but: fields that are checked elsewhere.

    Raises:
        ValueError: naming the option.
    """
    kind: Any = type(options)
    for name, whole in _numbers(kind).items():
        value = getattr(options, name)
        if name in but or value is None:
            continue
        if isinstance(value, str):
            try:
                value = int(value) if whole else float(value)
            except ValueError:
                raise ValueError(f"{name} must be a {'whole ' if whole else ''}number; got {shown(value)}.") from None
            setattr(options, name, value)
        if not isinstance(value, Integral if whole else Real) or isinstance(value, bool):
            raise ValueError(f"{name} must be a {'whole ' if whole else ''}number; got {shown(value)}.")
        if not whole and not (math.isfinite(value) or (value == math.inf and name in _MAY_BE_INFINITE)):
            raise ValueError(f"{name} must be a finite number; got {shown(value)}.")
        if value < _LEAST.get(name, -math.inf):
            raise ValueError(f"{name} must be at least {_LEAST[name]}; got {shown(value)}.")


@cache
def _numbers(options: Any) -> dict[str, bool]:
    """{field: whether it is whole} of the fields that hold a number and nothing else (or None)."""
    hints = typing.get_type_hints(options)
    kinds = {
        option.name: set(typing.get_args(hints[option.name]) or (hints[option.name],)) - {type(None)}
        for option in dataclasses.fields(options)
    }
    return {name: kind == {int} for name, kind in kinds.items() if kind and kind <= {int, float}}


def _choice(default: str | None, choices: tuple[str, ...], help: str) -> Any:
    return field(default=default, metadata={"help": help, "choices": list(choices)})


def _option(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class DistillOptions:
    """The fields that `LinguDistillConfig` adds to `SFTConfig`. In a help text, % is written %%."""

    _argument_group_name = "Distillation"

    teacher_model_name_or_path: str | None = _option(
        None,
        "The LM that the student was built from, or a VLM: Hub id or folder. Left out, it is guessed from the student's config or "
        "card, and the guess is printed.",
        aliases=["--teacher"],
    )
    teacher_model_revision: str | None = _option(None, "Branch, tag or commit of the teacher on the Hub.")
    teacher_model_init_kwargs: dict[str, Any] | str | None = _option(
        None,
        "Keyword arguments for the teacher's `AutoModelForCausalLM.from_pretrained`; on the command line as JSON.",
    )
    teacher_quantization: str = _choice(
        "nf4",
        QUANTIZATION_CHOICES,
        "nf4 or int8 (both through bitsandbytes, on CPU and CUDA), or none. Embeddings and head stay whole.",
    )
    measure_teacher_quantization: bool = _option(
        False,
        "Load the unquantised teacher once and log KL(full precision || quantised) in nats per token on the first batch.",
    )
    teacher_sharding: str = _choice(
        "auto",
        SHARDING_CHOICES,
        "Under FSDP2 and ZeRO-3: replicate keeps the whole teacher on every process, shard splits it like the student, auto "
        "shards an unquantised teacher and replicates a quantised one (packed weights do not split).",
    )
    teacher_offload: str = _choice(
        "none",
        OFFLOAD_CHOICES,
        "cpu keeps the teacher in CPU memory between steps; its weights come to the device for the teacher's pass. none "
        "leaves it on the device.",
    )
    kv_sharing: str = _choice(
        "vision",
        KV_SHARING_CHOICES,
        f"What the teacher reads of the student: {', '.join(KV_SHARING_CHOICES)} (docs/method.md). `lingudistill diagnose` measures which "
        "fits a pair.",
    )
    kv_source: str | None = _choice(
        None,
        KV_SOURCE_CHOICES,
        "Whose keys and values the teacher reads: the student's, which training moves, or those of the VLM before. Left out: before with "
        "vision, unless an adapter changes the weights under it or anchor_cache is set without teacher_cache; else student.",
    )
    blind_weight: float | None = _option(
        None,
        "In [0, 1). On rows with an image the teacher answers twice, with the student's keys and values and without the image; this is the "
        "weight of the second answer in the mean of both. Left out: 0.",
    )
    beta: float = _option(0.0, "Generalised JSD in [0, 1]: 0 = KL(teacher || student), 1 = KL(student || teacher).")
    temperature: float = _option(
        1.0, "Both distributions are softened by it; > 0. As in TRL, no factor of temperature squared."
    )
    distill_weight: float = _option(1.0, "Weight of the divergence at distilled tokens; >= 0.")
    ce_weight: float = _option(
        0.5,
        "Weight of cross-entropy at distilled tokens; >= 0. Tokens that are not distilled always have CE of weight 1.",
    )
    distill_column: str = _option(
        "distill",
        "Boolean dataset column: rows marked false get CE only and cost the teacher nothing. Without the column, every row is "
        "distilled.",
    )
    distill_tokens: str = _choice(
        "all",
        DISTILL_TOKENS_CHOICES,
        "all distils every response token of a marked row; confident only those whose label the teacher gives at least the "
        "student's probability, the others get CE.",
    )
    distill_margin: float = _option(
        0.0, "For confident: by how many nats the teacher must be above the student. May be negative."
    )
    anchor: str = _choice(
        "none",
        ANCHOR_CHOICES,
        "before: the VLM before training judges rows marked false, beside their labels (docs/parents.md).",
    )
    anchor_weight: float = _option(
        0.5, "In [0, 1]. With anchor, the loss of unmarked rows is (1 - this) * CE + this * KL(VLM before || student)."
    )
    anchor_cache: bool = _option(
        False,
        "Ask the VLM before once, before training, and keep its most likely tokens at each label: full fine-tuning holds no second model "
        "(docs/caches.md).",
    )
    anchor_cache_k: int = _option(64, "Tokens kept per label; the rest count as one. Its probability is logged.")
    teacher_cache: bool = _option(
        False,
        "Ask the teacher once, before training, about rows where it reads nothing that training moves, and keep its hidden states; if that "
        "is all rows, it leaves the memory.",
    )
    cache_dir: str | None = _option(None, "Folder of both caches; other runs can use it. Left out: output_dir/caches.")
    freeze_vision: bool | None = _option(
        None,
        "Leave the vision tower and its projector as they are: they see already, and trained at the language model's rate they see less "
        "(docs/method.md). A step is cheaper, too. Left out: true, unless an adapter reaches them.",
    )
    skip_bad_rows: bool = _option(
        False,
        "Skip rows that cannot be trained on (unreadable image, empty answer, ...) and count them; else stop at the first.",
    )
    answers_only: bool = _option(
        True,
        "Of messages, train on the assistant's turns alone, where the chat template tells them apart; false: on all turns.",
    )
    on_nan: str = _choice(
        "stop",
        ON_NAN_CHOICES,
        "A step whose loss, gradient or teacher is not finite: stop saves a checkpoint and names the rows, skip leaves it out (ten in "
        "a row stop the run). Under DeepSpeed only stop.",
    )
    self_check: bool = _option(
        True,
        "Before training, refuse a pair whose teacher cannot use the student's keys, values and rotary embedding. Left out where an "
        "engine shards weights.",
    )
    overwrite_output_dir: bool = _option(False, "Allow an output_dir that holds another run.")


# Options of `DistillOptions` that speak of labels, or of answers that are given: on-policy, where nothing is a label, they stay at their defaults
NEEDS_LABELS = (
    "ce_weight",
    "distill_tokens",
    "distill_margin",
    "anchor_weight",
    "answers_only",
    "anchor_cache",
    "anchor_cache_k",
    "teacher_cache",
    "cache_dir",
)


@dataclass
class OnPolicyOptions(DistillOptions):
    """The same options for answers that the student samples: other defaults, and some without a meaning (`NEEDS_LABELS`)."""

    blind_weight: float | None = _option(
        0.0,
        "In [0, 1). On rows with an image the LM answers twice, with the student's keys and values and without the image; this is the weight "
        "of the second answer in the mean of both.",
    )
    beta: float = _option(
        1.0, "Generalised JSD in [0, 1], of both judges: 1 = KL(student || judge), 0 = KL(judge || student)."
    )
    temperature: float = _option(
        1.0, "Of sampling, and of both distributions in the divergence; > 0. No factor of its square."
    )
    distill_weight: float = _option(1.0, "Weight of rows marked true beside that of the others, which is 1; > 0.")
    distill_column: str = _option(
        "distill",
        "Boolean dataset column: rows marked false are judged by the VLM before, the others by the LM. Without the column, all are "
        "judged by the LM.",
    )
    anchor: str = _choice(
        "before",
        ANCHOR_CHOICES,
        "before: the VLM as it was before training judges the rows that are marked false (LoRA: its base; full fine-tuning: a frozen "
        "copy, if there are such rows). none: refuse such rows.",
    )
    ce_weight: float = _option(0.0, "No meaning on-policy.")
    distill_tokens: str = _choice(
        "all", DISTILL_TOKENS_CHOICES, "No meaning on-policy: every sampled token is judged."
    )
    distill_margin: float = _option(0.0, "No meaning on-policy.")
    anchor_weight: float = _option(1.0, "No meaning on-policy.")
    answers_only: bool = _option(True, "No meaning on-policy.")
    anchor_cache: bool = _option(False, "No meaning on-policy.")
    anchor_cache_k: int = _option(64, "No meaning on-policy.")
    teacher_cache: bool = _option(False, "No meaning on-policy.")
    cache_dir: str | None = _option(None, "No meaning on-policy.")


@dataclass
class DistillScriptArguments(ScriptArguments):
    """What the script adds to TRL's script arguments."""

    _argument_group_name = "The data"

    on_policy: bool = _option(False, "Train on the student's own answers (docs/on_policy.md).")
    merge_adapter: bool = _option(
        False, "After a LoRA run, save the merged model to output_dir, and the adapter to output_dir/adapter."
    )
    demo: bool = _option(False, "Run the embedded demo, which makes its own models and data. No Hub needed.")
    image_folder: str | None = _option(
        None, "Where relative paths of images in --dataset_name begin. Left out: at the file that names them."
    )
    # Not a field, which would be an option: those that stand on the command line or in the recipe, whatever their values are
    written: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        """A recipe in YAML may hold anything; argparse checks the command line alone."""
        for name in ("on_policy", "merge_adapter", "demo", "dataset_streaming"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false; got {shown(getattr(self, name))}.")
        for name in ("dataset_name", "dataset_config", "image_folder"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"{name} must be a name, or left out; got {shown(getattr(self, name))}.")
        for name in ("dataset_train_split", "dataset_test_split"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must name a split; got {shown(getattr(self, name))}.")


@dataclass
class StudentArguments(ModelConfig):
    """TRL's model arguments, where the model is the student."""

    _argument_group_name = "The student"

    model_name_or_path: str | None = _option(None, "The student: a VLM's Hub id or folder.", aliases=["--student"])

    def __post_init__(self) -> None:
        if not isinstance(self.model_name_or_path, str | None):
            raise ValueError(f"model_name_or_path must be a name, or left out; got {shown(self.model_name_or_path)}.")
        super().__post_init__()  # type: ignore[no-untyped-call]
        check_numbers(self)
        # TRL makes one name a text, which PEFT takes for a pattern of whole paths, and finds nothing
        name = self.lora_target_modules
        if isinstance(name, str) and re.fullmatch(r"[\w.]+", name):
            self.lora_target_modules = [name]


def aliases(*groups: type) -> dict[str, str]:
    """{alias: name of the field} of the options that have two names, as YAML keys have them."""
    return {
        alias.removeprefix("--"): option.name
        for group in groups
        for option in dataclasses.fields(group)
        for alias in option.metadata.get("aliases", ())
    }


def parameters(options: type) -> str:
    """The `Parameters:` section of a docstring: name, type, default and help of every field."""
    lines = ["Parameters:"]
    for option in dataclasses.fields(options):
        kind = str(option.type).split(" | ")[0].split("[")[0]
        default = "*optional*" if option.default is None else f"defaults to `{_literal(option.default)}`"
        lines.append(f"        {option.name} (`{kind}`, {default}):")
        lines.append(textwrap.indent(textwrap.fill(option.metadata["help"], 110), " " * 12))
    return "\n".join(lines)


def _literal(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
