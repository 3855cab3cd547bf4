"""The set-up that is planned: the options of `lingudistill plan`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ...sharing import MODES

Engine = Literal["single", "ddp", "fsdp2", "zero2", "zero3"]
ENGINES: tuple[Engine, ...] = get_args(Engine)  # from the simplest to the most divided
SPLITTING: tuple[Engine, ...] = ("fsdp2", "zero3")  # that split the student itself
OPTIMIZERS = ("adamw", "adamw_8bit", "sgd")
DTYPES = ("float32", "bfloat16")
MIXED_PRECISIONS = ("bf16", "fp16", "no")
QUANTIZATIONS = ("nf4", "int8", "none")
SHARINGS = tuple(MODES)
ANCHORS = ("none", "before")
KV_SOURCES = ("student", "before")
DEVICES = ("cuda", "cpu")


class PlanError(ValueError):
    """A set-up that cannot be planned: a value out of range, or options that contradict each other."""


def _option(default: Any, help: str, *choices: str, **metadata: Any) -> Any:
    return field(
        default=default, metadata={"help": help, **({"choices": list(choices)} if choices else {}), **metadata}
    )


@dataclass(frozen=True)
class Setup:
    """How one wants to train: the options of `lingudistill plan`. Defaults are the trainer's.

    Raises:
        PlanError: naming the value that is out of range.
    """

    _argument_group_name = "The set-up"

    seq_len: int = _option(2048, "Tokens of a row.")
    image_tokens: int = _option(1024, "Of these, of images.")
    response_tokens: int = _option(256, "Of these, distilled.")
    batch: int = _option(1, "Rows per device.")
    engine: Engine = _option("single", "How devices share the work.")
    gpus: int = _option(1, "Number of devices.")
    gpu_memory: float = _option(80.0, "GiB of one device.")
    optimizer: str = _option("adamw", "Whose states take memory.", *OPTIMIZERS)
    dtype: str = _option("float32", "Of the student's weights.", *DTYPES)
    mixed_precision: str = _option("bf16", "Autocast on top of it.", *MIXED_PRECISIONS)
    gradient_checkpointing: bool = _option(
        True, "Compute activations again in the backward pass.", aliases=["--activation_checkpointing"]
    )
    accumulation: int = _option(1, "Steps before an update; above 1, gradients stay through the forward pass.")
    lora_rank: int = _option(0, "0: full fine-tuning.")
    freeze_vision: bool = _option(True, "Tower and projector are not trained, and not adapted.")
    teacher_quantization: str = _option("nf4", "Of the teacher's weights.", *QUANTIZATIONS)
    kv_sharing: str = _option("vision", "Where the teacher reads the student's keys and values.", *SHARINGS)
    kv_source: str | None = _option(
        None,
        "Whose they are: the student's, or the VLM's before (a copy, or the adapter's base). Left out: as the trainer chooses.",
        *KV_SOURCES,
    )
    blind_weight: float | None = _option(None, "Above 0, the teacher reads rows with images twice. Left out: 0.")
    anchor: str = _option(
        "none", "Whether the VLM before judges the unmarked rows: a copy, or the adapter's base.", *ANCHORS
    )
    anchor_cache: bool = _option(False, "The VLM before is asked once, before training, and leaves the memory.")
    anchor_cache_k: int = _option(64, "How many tokens are kept of it at each label.")
    teacher_cache: bool = _option(
        False, "The teacher is asked once, before training; where that is about all rows, it leaves the memory."
    )
    on_policy: bool = _option(
        False,
        "The student samples the answers, and the VLM before judges too. The seconds of sampling are not counted.",
    )
    padded: bool = _option(False, "Rows of a batch differ in length: attention takes a mask.")
    device: str = _option("cuda", "Where it runs: on a cpu, the products of the heads are in fp32.", *DEVICES)

    def __post_init__(self) -> None:
        for name in ("seq_len", "response_tokens", "batch", "gpus", "accumulation", "anchor_cache_k"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("image_tokens", "lora_rank"):
            if getattr(self, name) < 0:
                raise PlanError(f"{name} must be at least 0, got {getattr(self, name)}.")
        if self.image_tokens + self.response_tokens > self.seq_len:
            raise PlanError(
                f"image_tokens and response_tokens are part of seq_len: {self.image_tokens} + {self.response_tokens} is more "
                f"than {self.seq_len}. Raise seq_len or lower them."
            )
        for name, choices in (
            ("engine", ENGINES),
            ("optimizer", OPTIMIZERS),
            ("dtype", DTYPES),
            ("mixed_precision", MIXED_PRECISIONS),
            ("teacher_quantization", QUANTIZATIONS),
            ("kv_sharing", SHARINGS),
            ("kv_source", KV_SOURCES),
            ("anchor", ANCHORS),
            ("device", DEVICES),
        ):
            if getattr(self, name) not in choices and (name, getattr(self, name)) != ("kv_source", None):
                raise PlanError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}.")
        if self.engine == "single" and self.gpus > 1:
            raise PlanError(
                f"engine='single' runs on one device, got gpus={self.gpus}: choose ddp, fsdp2, zero2 or zero3."
            )
        if MODES[self.kv_sharing].sees and self.splits:
            raise PlanError(
                f"kv_sharing={self.kv_sharing!r} runs the teacher whole on every device, and {self.engine} splits it: choose single, ddp "
                "or zero2."
            )
        if self.blind_weight is not None and not 0.0 <= self.blind_weight < 1.0:
            raise PlanError(f"blind_weight must be at least 0 and below 1, got {self.blind_weight}.")
        if self.blind_weight and not MODES[self.kv_sharing].reads_student:
            raise PlanError(
                f"blind_weight is about a second reading without the image, and with kv_sharing={self.kv_sharing!r} there is one: leave it "
                "out."
            )
        self._check_caches()
        if not 0 < self.gpu_memory < math.inf:
            raise PlanError(f"gpu_memory must be a positive number of GiB, got {self.gpu_memory}.")
        if self.kv_source == "before" and not MODES[self.kv_sharing].reads_student:
            raise PlanError(
                f"kv_source is about the keys and values that the teacher reads, and with kv_sharing={self.kv_sharing!r} it reads none: leave it "
                "out."
            )

    def _check_caches(self) -> None:
        """As the trainer's config refuses them."""
        mode = MODES[self.kv_sharing]
        if self.on_policy and (self.anchor_cache or self.teacher_cache):
            raise PlanError("On-policy, answers are new in every step: leave anchor_cache and teacher_cache out.")
        if self.anchor_cache and self.anchor != "before":
            raise PlanError(
                "anchor_cache keeps what the VLM before says: set anchor='before', or leave anchor_cache out."
            )
        if self.anchor_cache and self.splits:
            raise PlanError(
                f"anchor_cache asks the whole student on every device before training, and {self.engine} splits it: leave it out, or choose "
                "single, ddp or zero2."
            )
        if self.teacher_cache and mode.reads_student and self.splits:
            raise PlanError(
                f"teacher_cache with kv_sharing={self.kv_sharing!r} needs the whole student on every device, and {self.engine} splits it: "
                "choose single, ddp or zero2."
            )
        if self.teacher_cache and mode.reads_student and mode.text_reads_student and self.source == "student":
            raise PlanError(
                f"teacher_cache keeps what does not change, and with kv_sharing={self.kv_sharing!r} the teacher reads the student on every "
                "row: set kv_source='before', another kv_sharing, or leave teacher_cache out."
            )

    @property
    def teacher_is_gone(self) -> bool:
        """Whether a row of this shape needs no live teacher."""
        mode = MODES[self.kv_sharing]
        still = not mode.reads_student or self.source == "before" or self.image_tokens == 0
        return self.teacher_cache and still

    @property
    def asks_before(self) -> bool:
        """Whether the VLM before runs in a step."""
        judges = self.anchor == "before" and not self.anchor_cache
        return self.on_policy or judges or (self.source == "before" and not self.teacher_cache)

    @property
    def source(self) -> str:
        """`kv_source`; left out, as the trainer chooses it."""
        if self.kv_source is not None:
            return self.kv_source
        saves = self.anchor_cache and not self.teacher_cache
        return "student" if saves else MODES[self.kv_sharing].source

    @property
    def blind_queries(self) -> int:
        """Positions that the teacher computes once more, without the image; 0 where it reads once."""
        left_out = 0.0 if self.on_policy else MODES[self.kv_sharing].blind
        weight = left_out if self.blind_weight is None else self.blind_weight
        if not weight or not self.image_tokens:
            return 0
        return self.batch * MODES["none"].queries_per_row(self.seq_len, self.image_tokens, self.response_tokens)

    @property
    def splits(self) -> bool:
        """Whether the engine splits the student itself."""
        return self.engine in SPLITTING

    @property
    def tokens(self) -> int:
        """B x T."""
        return self.batch * self.seq_len

    @property
    def labels(self) -> int:
        """B x R, the positions whose loss is taken."""
        return self.batch * self.response_tokens

    @property
    def queries(self) -> int:
        """Positions that the teacher computes."""
        mode = MODES[self.kv_sharing]
        return self.batch * mode.queries_per_row(self.seq_len, self.image_tokens, self.response_tokens)

    @property
    def weight_bytes(self) -> int:
        """Of a weight of the student on its device."""
        if self.engine in ("zero2", "zero3") and self.mixed_precision != "no":
            return 2  # DeepSpeed keeps half precision and an fp32 copy for the optimizer
        if self.engine == "fsdp2" and self.mixed_precision != "no" and self.lora_rank == 0:
            return 4  # accelerate upcasts what is trained
        return 4 if self.dtype == "float32" else 2

    @property
    def compute_bytes(self) -> int:
        """Of an element in a matrix product."""
        return 2 if self.mixed_precision != "no" else self.weight_bytes

    @property
    def stream_bytes(self) -> int:
        """Of an element of the residual stream: FSDP2 casts what enters a layer, autocast what enters a product."""
        return self.compute_bytes if self.engine == "fsdp2" else self.weight_bytes

    @property
    def under_autocast(self) -> bool:
        """Whether fp32 activations are cast on their way into each product."""
        return self.mixed_precision != "no" and self.weight_bytes == 4 and self.engine != "fsdp2"

    @property
    def shards(self) -> int:
        """Into how many pieces the engine cuts what it cuts."""
        return self.gpus if self.engine in ("fsdp2", "zero2", "zero3") else 1
