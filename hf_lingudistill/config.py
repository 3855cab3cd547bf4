"""`LinguDistillConfig` and `OnPolicyLinguDistillConfig`: TRL's `SFTConfig` and `DistillationConfig` plus what distillation needs. The
fields are in `options`."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy
from trl import DistillationConfig, SFTConfig

from ._internals import use_new_names
from .machine import machine
from .options import (
    ANCHOR_CHOICES,
    DISTILL_TOKENS_CHOICES,
    KV_SHARING_CHOICES,
    KV_SOURCE_CHOICES,
    NEEDS_LABELS,
    OFFLOAD_CHOICES,
    ON_NAN_CHOICES,
    QUANTIZATION_CHOICES,
    SHARDING_CHOICES,
    DistillOptions,
    OnPolicyOptions,
    check_numbers,
    parameters,
    shown,
)
from .sharing import MODES

__all__ = [
    "ANCHOR_CHOICES",
    "DISTILL_TOKENS_CHOICES",
    "KV_SHARING_CHOICES",
    "KV_SOURCE_CHOICES",
    "OFFLOAD_CHOICES",
    "ON_NAN_CHOICES",
    "QUANTIZATION_CHOICES",
    "SHARDING_CHOICES",
    "LinguDistillConfig",
    "LocalSFTConfig",
    "OnPolicyLinguDistillConfig",
    "shown",
]


@dataclass
class LocalArguments:
    """Training arguments that follow the machine (no accelerator; bf16 where it is native) and know `activation_checkpointing`, the
    name that stays for `gradient_checkpointing`, under every supported release. Mixed in before a config of TRL's."""

    activation_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Compute activations again in the backward pass instead of keeping them: less memory, more time. On by default."
        },
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of activation checkpointing, such as use_reentrant."}
    )

    def __post_init__(self) -> None:
        given: Any = self
        given.use_cpu = given.use_cpu or not machine().accelerated
        if given.bf16 is None and not given.fp16:
            given.bf16 = machine(use_cpu=given.use_cpu).bf16
        use_new_names(self)
        super().__post_init__()  # type: ignore[misc]


@dataclass
class LocalSFTConfig(LocalArguments, SFTConfig):
    """TRL's [`~trl.SFTConfig`] with [`LocalArguments`]."""

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "activation_checkpointing_kwargs"]


if TYPE_CHECKING:

    class _Config(DistillOptions, LocalArguments, TrainingArguments): ...

else:
    _Config = object  # at run time a config of TRL's stands behind the mixin


class ChosenText(str):
    """The value of an option that was left out. It bears this on the value, so that a config that is copied, pickled or made of another one's
    fields (`dataclasses.replace`) still knows."""


class ChosenNumber(float):
    """Likewise of a number."""


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, ChosenText) else float(value) if isinstance(value, ChosenNumber) else value


# Options that make one row of several
JOINING = ("packing", "eval_packing", "padding_free")

# Numbers whose sentences say more than that
_CHECKED_HERE = {
    *(option.name for option in fields(DistillOptions)),
    "max_completion_length",
    "label_smoothing_factor",
}


class DistillChecks(_Config):
    """What every distilling config checks. Mixed in first, before the options and a config of TRL's."""

    @property
    def kv_source_left_out(self) -> bool:
        """Whether `kv_source` follows the mode."""
        return self.kv_source is None or isinstance(self.kv_source, ChosenText)

    @property
    def blind_weight_left_out(self) -> bool:
        """Whether `blind_weight` follows the mode."""
        return self.blind_weight is None or isinstance(self.blind_weight, ChosenNumber)

    def __post_init__(self) -> None:
        self._forget_chosen()
        self._check_types()
        metric = self.metric_for_best_model
        if self.greater_is_better is None and isinstance(metric, str) and metric.endswith(("_ce", "_kl", "entropy")):
            self.greater_is_better = False  # transformers knows losses alone by their names
        super().__post_init__()
        self.check()

    def to_dict(self) -> dict[str, Any]:
        """The options in plain types, which every writer knows."""
        found: dict[str, Any] = super().to_dict()  # type: ignore[no-untyped-call]
        return {name: _plain(value) for name, value in found.items()}

    def _forget_chosen(self) -> None:
        """What was left out follows what is set now."""
        if self.kv_source_left_out:
            self.kv_source = None
        if self.blind_weight_left_out:
            self.blind_weight = None

    def check(self) -> None:
        """Choose what was left out, and check the rest. A trainer does it again: options may have been set since they were made.

        Raises:
            ValueError: in one sentence that says what was expected, what was found, and what to do.
        """
        use_new_names(self)
        self._forget_chosen()
        self._check_types()
        self._check()

    def _check(self) -> None:
        if self.kv_source is None and isinstance(self.kv_sharing, str) and self.kv_sharing in MODES:
            # `anchor_cache` is there to hold no second model: then nothing else asks for one unsaid
            saves = self.anchor_cache and not self.teacher_cache
            self.kv_source = ChosenText("student" if saves else MODES[self.kv_sharing].source)
        for name, choices in (
            ("teacher_quantization", QUANTIZATION_CHOICES),
            ("teacher_sharding", SHARDING_CHOICES),
            ("teacher_offload", OFFLOAD_CHOICES),
            ("kv_sharing", KV_SHARING_CHOICES),
            ("kv_source", KV_SOURCE_CHOICES),
            ("distill_tokens", DISTILL_TOKENS_CHOICES),
            ("anchor", ANCHOR_CHOICES),
            ("on_nan", ON_NAN_CHOICES),
        ):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {shown(value)}.")
        self._choose_blind_weight()
        if self.kv_source == "before" and not MODES[self.kv_sharing].reads_student:
            raise ValueError(
                f"kv_source='before' says whose keys and values the teacher reads, and with kv_sharing={self.kv_sharing!r} it reads none: "
                "set another kv_sharing, or leave kv_source out."
            )
        if self.teacher_offload == "cpu" and self.teacher_quantization == "int8":
            raise ValueError(
                "teacher_offload='cpu' cannot free an int8 teacher, of which bitsandbytes holds a second reference on the "
                "device: set teacher_quantization to 'nf4' or 'none'."
            )
        if self.push_to_hub:
            if self.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                raise ValueError(
                    f"hub_strategy must be 'end' or left out; got {HubStrategy(self.hub_strategy).value!r}. Checkpoints hold "
                    "optimizer states and the training arguments, a token among them: the finished model alone is published."
                )
            self.hub_strategy = HubStrategy.END
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(
                f"beta must be in [0.0, 1.0] (0 = KL(teacher || student), 1 = KL(student || teacher)); got {self.beta}."
            )
        if not 0.0 <= self.anchor_weight <= 1.0:
            raise ValueError(
                f"anchor_weight must be in [0.0, 1.0] (0 = cross-entropy alone, 1 = the VLM before alone); got {self.anchor_weight}."
            )
        if not (math.isfinite(self.temperature) and self.temperature > 0.0):
            raise ValueError(f"temperature must be a positive number; got {self.temperature}.")
        for name in ("distill_weight", "ce_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"{name} must be a number of at least 0; got {value}.")
        if self.distill_weight == 0.0 and self.ce_weight == 0.0:
            raise ValueError(
                "distill_weight and ce_weight are both 0: distilled tokens would have no loss. Set at least one above 0."
            )
        if not math.isfinite(self.distill_margin):
            raise ValueError(f"distill_margin must be a finite number of nats; got {self.distill_margin}.")
        if (
            self.max_steps == 0 or self.max_steps < -1
        ):  # to transformers, which takes it for "not set", it means num_train_epochs
            raise ValueError(f"max_steps must be above 0, or -1 to train for num_train_epochs; got {self.max_steps}.")
        if self.label_smoothing_factor != 0.0:
            raise ValueError(
                f"label_smoothing_factor must be 0 for distillation (the teacher smooths the labels); got "
                f"{self.label_smoothing_factor}."
            )

    def _choose_blind_weight(self) -> None:
        mode = MODES[self.kv_sharing]
        joined = [name for name in JOINING if getattr(self, name, False)]
        if self.blind_weight is None:
            self.blind_weight = ChosenNumber(0.0 if joined else mode.blind)
        if not 0.0 <= self.blind_weight < 1.0:
            raise ValueError(
                f"blind_weight must be at least 0 and below 1 (for 1, set kv_sharing='none'); got {self.blind_weight}."
            )
        if self.blind_weight and not mode.reads_student:
            raise ValueError(
                f"blind_weight is the weight of what the teacher says without the image beside what it says with it, and with "
                f"kv_sharing={self.kv_sharing!r} it answers once: leave blind_weight out, or set another kv_sharing."
            )
        if self.blind_weight and joined:
            raise ValueError(
                f"{joined[0]}=True joins rows, which a teacher without the image cannot keep apart: leave blind_weight out, or set "
                f"{joined[0]}=False."
            )

    def _check_types(self) -> None:
        """A recipe in YAML, or Python, may hold anything; argparse checks the command line alone. Numbers become floats and
        paths texts, which is what loggers and records can write."""
        numbers = (
            "blind_weight",
            "beta",
            "temperature",
            "distill_weight",
            "ce_weight",
            "distill_margin",
            "anchor_weight",
        )
        for name in numbers:
            value = getattr(self, name)
            if name == "blind_weight" and value is None:
                continue
            if not isinstance(value, Real) or isinstance(value, bool):
                raise ValueError(f"{name} must be a number; got {shown(value)}.")
            try:
                setattr(self, name, float(value))
            except OverflowError:
                raise ValueError(f"{name} must be a number that a float can hold; got {shown(value)}.") from None
        check_numbers(self, but=_CHECKED_HERE)
        for name in (
            "measure_teacher_quantization",
            "anchor_cache",
            "teacher_cache",
            "skip_bad_rows",
            "answers_only",
            "self_check",
            "overwrite_output_dir",
        ):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false; got {shown(getattr(self, name))}.")
        if not isinstance(self.freeze_vision, bool | None):
            raise ValueError(f"freeze_vision must be true or false, or left out; got {shown(self.freeze_vision)}.")
        for name in ("teacher_model_name_or_path", "teacher_model_revision", "output_dir", "cache_dir"):
            value = getattr(self, name)
            if value is None:
                continue
            if not (isinstance(value, str | os.PathLike) and str(value).strip()):
                raise ValueError(f"{name} must be a name or path, or left out; got {shown(value)}.")
            setattr(self, name, str(value))
        k = self.anchor_cache_k
        if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k < 2**31:
            raise ValueError(f"anchor_cache_k must be a number of tokens of at least 1; got {shown(k)}.")
        if not (isinstance(self.distill_column, str) and self.distill_column):
            raise ValueError(f"distill_column must name a dataset column; got {shown(self.distill_column)}.")
        kwargs = self.teacher_model_init_kwargs
        if isinstance(kwargs, str):
            try:
                kwargs = json.loads(kwargs)
            except ValueError:
                kwargs = None
            valid = isinstance(kwargs, dict)
        else:
            valid = kwargs is None or isinstance(kwargs, dict)
        if not valid:
            raise ValueError(
                "teacher_model_init_kwargs must be a mapping, in JSON on the command line; got "
                f"{shown(self.teacher_model_init_kwargs)}."
            )


@dataclass
class LinguDistillConfig(DistillChecks, DistillOptions, LocalSFTConfig):
    __doc__ = f"""Configuration of [`LinguDistillTrainer`]. Every field of [`~trl.SFTConfig`] keeps its meaning; `max_length` is 4096 where it
    is left out, and with `push_to_hub=True` the finished model alone is published (`hub_strategy="end"`), never a checkpoint.

    {parameters(DistillOptions)}
    """

    max_length: int | None = field(
        default=4096,
        metadata={
            "help": "Tokens per row, those of its images among them. What is longer is cut, but for images: such a row is refused. None: no limit. "
            "TRL's default of 1024 is below what one picture of SmolVLM takes (1,088)."
        },
    )

    _VALID_DICT_FIELDS = [*LocalSFTConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]

    def __post_init__(self) -> None:
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            # The loss moves with what the teacher lets through; cross-entropy does not
            self.metric_for_best_model, self.greater_is_better = "ce_loss", False
        super().__post_init__()

    def _check(self) -> None:
        super()._check()
        # chunked_nll is the old name of what nll does now
        if (loss := getattr(self, "loss_type", "nll")) not in ("nll", "chunked_nll"):
            raise ValueError(
                f"loss_type must be 'nll' for distillation; got {loss!r}. Use trl.SFTTrainer for other losses."
            )
        self._check_caches()

    def _check_caches(self) -> None:
        if self.anchor_cache and self.anchor != "before":
            raise ValueError(
                f"anchor_cache=True keeps what the VLM before says, and anchor={self.anchor!r} does not ask it: set anchor='before', or "
                "leave anchor_cache out."
            )
        if self.anchor_cache and self.kv_source == "before" and not self.teacher_cache:
            raise ValueError(
                "anchor_cache=True frees nothing where kv_source='before' asks the VLM before in every step: set teacher_cache=True as "
                "well, or kv_source='student', or leave anchor_cache out."
            )
        mode = MODES[self.kv_sharing]
        if self.teacher_cache and mode.reads_student and mode.text_reads_student and self.kv_source == "student":
            raise ValueError(
                f"teacher_cache=True keeps what does not change, and with kv_sharing={self.kv_sharing!r} the teacher reads the student's "
                "keys and values on every row, which training moves: set kv_source='before', set kv_sharing to none, images, vision or "
                "inputs (the last two: on text rows), or leave teacher_cache out."
            )
        joined = [name for name in ("packing", "padding_free") if getattr(self, name, False)]
        if joined and (self.anchor_cache or self.teacher_cache):
            raise ValueError(
                f"{joined[0]}=True joins rows, and anchor_cache and teacher_cache find answers by row: set {joined[0]}=False, or leave the "
                "caches out."
            )


@dataclass
class OnPolicyLinguDistillConfig(DistillChecks, OnPolicyOptions, LocalArguments, DistillationConfig):
    __doc__ = f"""Configuration of [`OnPolicyLinguDistillTrainer`]. Every field of [`~trl.DistillationConfig`] keeps its meaning, those of
    generation among them (`max_completion_length`, `top_p`, `use_vllm`, ...); with `push_to_hub=True` the finished model alone is published.

    {parameters(OnPolicyOptions)}
    """

    _VALID_DICT_FIELDS = [*DistillationConfig._VALID_DICT_FIELDS, "activation_checkpointing_kwargs"]

    # What the student says is what it learns from: shown at every log, a few on the screen and all in a file
    log_completions: bool = field(
        default=True,
        metadata={"help": "At every log, print sampled answers and write them to output_dir/completions."},
    )
    num_completions_to_print: int | None = field(default=4, metadata={"help": "How many of them to print."})

    def __post_init__(self) -> None:
        self.remove_unused_columns = False  # the collator reads what it needs, under whatever name
        super().__post_init__()

    def _check(self) -> None:
        super()._check()
        for option in fields(OnPolicyOptions):
            value = getattr(self, option.name)
            if option.name in NEEDS_LABELS and value != option.default:
                raise ValueError(
                    f"{option.name} has no meaning on-policy, where answers are sampled and nothing is a label; got {shown(value)}. Leave "
                    "it out."
                )
        generation: Any = self.generation_kwargs or {}  # a text has become a mapping by now
        if (several := generation.get("num_return_sequences", 1)) != 1:
            raise ValueError(
                f"generation_kwargs has num_return_sequences={several!r}, and each prompt has one answer here: of several, those of the first prompts would "
                "be taken for those of others. Leave it out."
            )
        if not isinstance(self.max_completion_length, int) or self.max_completion_length < 1:
            raise ValueError(
                f"max_completion_length must be a number of tokens of at least 1; got {shown(self.max_completion_length)}."
            )
