"""`LinguDistillConfig`: TRL's `SFTConfig` plus what distillation needs."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from transformers.trainer_utils import HubStrategy
from trl import SFTConfig

from ._internals import use_new_names
from .machine import machine
from .sharing import MODES

KV_SHARING_CHOICES = tuple(MODES)
QUANTIZATION_CHOICES = ("nf4", "int8", "none")
SHARDING_CHOICES = ("auto", "replicate", "shard")
OFFLOAD_CHOICES = ("none", "cpu")
DISTILL_TOKENS_CHOICES = ("all", "confident")
ON_NAN_CHOICES = ("stop", "skip")


def shown(value: Any) -> str:
    """A value as an error sentence quotes it: not longer than a line, and never an error itself (of an integer, Python prints at
    most 4,300 digits)."""
    try:
        text = repr(value)
    except ValueError:
        return f"{type(value).__name__} of more digits than can be printed"
    return text if len(text) <= 100 else text[:97] + "..."


@dataclass
class LocalSFTConfig(SFTConfig):
    """TRL's [`~trl.SFTConfig`] that follows the machine (no accelerator; bf16 where it is native) and knows
    `activation_checkpointing`, the name that stays for `gradient_checkpointing`, under every supported release."""

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "activation_checkpointing_kwargs"]

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
        self.use_cpu = self.use_cpu or not machine().accelerated
        if self.bf16 is None and not self.fp16:
            self.bf16 = machine(use_cpu=self.use_cpu).bf16
        use_new_names(self)
        super().__post_init__()  # type: ignore[no-untyped-call]


@dataclass
class LinguDistillConfig(LocalSFTConfig):
    """Configuration of [`LinguDistillTrainer`]. Every field of [`~trl.SFTConfig`] keeps its meaning; with `push_to_hub=True` the
    finished model alone is published (`hub_strategy="end"`), never a checkpoint.

    Parameters:
        teacher_model_name_or_path (`str`, *optional*):
            The LM that the student was built from: Hub id or folder. Left out, it is guessed from the student's config
            or card, and the guess is printed.
        teacher_model_revision (`str`, *optional*):
            Branch, tag or commit of the teacher.
        teacher_model_init_kwargs (`dict`, *optional*):
            Keyword arguments for the teacher's `AutoModelForCausalLM.from_pretrained`.
        teacher_quantization (`str`, defaults to `"nf4"`):
            `"nf4"`, `"int8"` (both through bitsandbytes, on CPU and CUDA) or `"none"`. Embeddings and head stay whole.
        measure_teacher_quantization (`bool`, defaults to `False`):
            Load the unquantised teacher once and log KL(full precision || quantised) in nats on the first batch.
        teacher_sharding (`str`, defaults to `"auto"`):
            Under FSDP2 and ZeRO-3: `"replicate"` keeps the whole teacher on every process, `"shard"` splits it like the
            student, `"auto"` shards an unquantised teacher and replicates a quantised one (packed weights do not split).
        teacher_offload (`str`, defaults to `"none"`):
            `"cpu"` keeps the teacher in CPU memory between steps; its weights come to the device for the teacher's pass.
        kv_sharing (`str`, defaults to `"prompt"`):
            Where the teacher reads the student's keys and values: `"full"` everywhere, `"prompt"` everywhere but at
            response tokens, `"vision"` at tokens it cannot read itself (images), `"none"` nowhere.
        beta (`float`, defaults to `0.0`):
            Generalised JSD in [0, 1]: 0 = KL(teacher || student), 1 = KL(student || teacher).
        temperature (`float`, defaults to `1.0`):
            Both distributions are softened by it; > 0. As in TRL, no factor of temperature squared.
        distill_weight (`float`, defaults to `1.0`):
            Weight of the divergence at distilled tokens; >= 0.
        ce_weight (`float`, defaults to `0.5`):
            Weight of cross-entropy at distilled tokens; >= 0. Tokens that are not distilled always have CE of weight 1.
        distill_column (`str`, defaults to `"distill"`):
            Boolean dataset column: rows marked false get CE only and cost the teacher nothing. Without the column,
            every row is distilled.
        distill_tokens (`str`, defaults to `"confident"`):
            `"all"` distils every response token of a marked row; `"confident"` only those whose label the teacher gives
            at least the student's probability, the others get CE.
        distill_margin (`float`, defaults to `0.0`):
            For `"confident"`: by how many nats the teacher must be above the student. May be negative.
        skip_bad_rows (`bool`, defaults to `False`):
            Skip rows that cannot be trained on (unreadable image, empty answer, ...) and count them by reason, instead
            of stopping at the first.
        answers_only (`bool`, defaults to `True`):
            Of `messages`, train on the assistant's turns alone, where the chat template tells them from the others; `False`
            trains on all turns. (TRL's `assistant_only_loss` also puts a template of TRL's in place of the student's.)
        on_nan (`str`, defaults to `"stop"`):
            What to do about a step whose loss, gradient or teacher is not finite, before the weights change: `"stop"` saves a
            checkpoint and raises `NotFinite`, `"skip"` leaves the step out and goes on (ten in a row stop the run). The rows
            are named. Under DeepSpeed only `"stop"`.
        overwrite_output_dir (`bool`, defaults to `False`):
            Allow an `output_dir` that holds another run.
    """

    _VALID_DICT_FIELDS = [*LocalSFTConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]

    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "The LM that the student was built from: Hub id or folder. Left out, it is guessed from the student's "
            "config or card, and the guess is printed."
        },
    )
    teacher_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the teacher on the Hub."}
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments for the teacher's `AutoModelForCausalLM.from_pretrained`."}
    )
    teacher_quantization: str = field(
        default="nf4",
        metadata={
            "help": "Quantisation of the frozen teacher through bitsandbytes, on CPU and CUDA: nf4, int8 or none.",
            "choices": list(QUANTIZATION_CHOICES),
        },
    )
    measure_teacher_quantization: bool = field(
        default=False,
        metadata={"help": "Log KL(full-precision teacher || quantised teacher) in nats per token on the first batch."},
    )
    teacher_sharding: str = field(
        default="auto",
        metadata={
            "help": "Under FSDP2 and ZeRO-3: replicate the teacher on every process, shard it like the student, or auto: "
            "shard it where it is not quantised.",
            "choices": list(SHARDING_CHOICES),
        },
    )
    teacher_offload: str = field(
        default="none",
        metadata={
            "help": "cpu: keep the teacher in CPU memory between steps.",
            "choices": list(OFFLOAD_CHOICES),
        },
    )
    kv_sharing: str = field(
        default="prompt",
        metadata={
            "help": "Where the teacher reads the student's keys and values: "
            + "; ".join(f"{mode.name}: {mode.reads}" for mode in MODES.values()),
            "choices": list(KV_SHARING_CHOICES),
        },
    )
    beta: float = field(
        default=0.0,
        metadata={"help": "Generalised JSD: 0 = KL(teacher || student), 1 = KL(student || teacher), in [0, 1]."},
    )
    temperature: float = field(default=1.0, metadata={"help": "Softens both distributions; must be positive."})
    distill_weight: float = field(default=1.0, metadata={"help": "Weight of the divergence at distilled tokens."})
    ce_weight: float = field(
        default=0.5,
        metadata={
            "help": "Weight of cross-entropy at distilled tokens. All other tokens have cross-entropy of weight 1."
        },
    )
    distill_column: str = field(
        default="distill",
        metadata={"help": "Boolean dataset column that marks the rows to distil. Missing: every row is distilled."},
    )
    distill_tokens: str = field(
        default="confident",
        metadata={
            "help": "all: distil every response token of a marked row. confident: only where the teacher gives the label "
            "at least the student's probability; cross-entropy elsewhere.",
            "choices": list(DISTILL_TOKENS_CHOICES),
        },
    )
    distill_margin: float = field(
        default=0.0, metadata={"help": "For confident: nats by which the teacher must be above the student."}
    )
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "Skip and count rows that cannot be trained on, instead of stopping."}
    )
    answers_only: bool = field(
        default=True,
        metadata={
            "help": "Of messages, train on the assistant's turns alone, where the chat template tells them apart. false: on "
            "all turns."
        },
    )
    on_nan: str = field(
        default="stop",
        metadata={
            "help": "A step whose loss, gradient or teacher is not finite: stop (a checkpoint is saved), or skip the step.",
            "choices": list(ON_NAN_CHOICES),
        },
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Allow an output_dir that already holds another run."}
    )

    def __post_init__(self) -> None:
        self._check_types()
        super().__post_init__()
        for name, choices in (
            ("teacher_quantization", QUANTIZATION_CHOICES),
            ("teacher_sharding", SHARDING_CHOICES),
            ("teacher_offload", OFFLOAD_CHOICES),
            ("kv_sharing", KV_SHARING_CHOICES),
            ("distill_tokens", DISTILL_TOKENS_CHOICES),
            ("on_nan", ON_NAN_CHOICES),
        ):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {shown(value)}.")
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
        # chunked_nll is the old name of what nll does now
        if (loss := getattr(self, "loss_type", "nll")) not in ("nll", "chunked_nll"):
            raise ValueError(
                f"loss_type must be 'nll' for distillation; got {loss!r}. Use trl.SFTTrainer for other losses."
            )
        if self.label_smoothing_factor != 0.0:
            raise ValueError(
                f"label_smoothing_factor must be 0 for distillation (the teacher smooths the labels); got "
                f"{self.label_smoothing_factor}."
            )

    def _check_types(self) -> None:
        """A recipe in YAML, or Python, may hold anything; argparse checks the command line alone. Numbers become floats and
        paths texts, which is what loggers and records can write."""
        for name in ("beta", "temperature", "distill_weight", "ce_weight", "distill_margin"):
            value = getattr(self, name)
            if not isinstance(value, Real) or isinstance(value, bool):
                raise ValueError(f"{name} must be a number; got {shown(value)}.")
            try:
                setattr(self, name, float(value))
            except OverflowError:
                raise ValueError(f"{name} must be a number that a float can hold; got {shown(value)}.") from None
        for name in ("measure_teacher_quantization", "skip_bad_rows", "answers_only", "overwrite_output_dir"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false; got {shown(getattr(self, name))}.")
        for name in ("teacher_model_name_or_path", "teacher_model_revision", "output_dir"):
            value = getattr(self, name)
            if value is None:
                continue
            if not (isinstance(value, str | os.PathLike) and str(value).strip()):
                raise ValueError(f"{name} must be a name or path, or left out; got {shown(value)}.")
            setattr(self, name, str(value))
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
