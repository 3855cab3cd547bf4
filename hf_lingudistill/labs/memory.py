"""Memory per device and cost of a step, on paper: from two configs, without a weight and without a GPU.

    student, teacher = read_pair("Qwen/Qwen2.5-VL-7B-Instruct", None)
    plan = make_plan(student, teacher, Setup(seq_len=2048, engine="fsdp2", gpus=8))
    print(plan)

Parameters are counted exactly, on the models that transformers builds from the configs on the meta device. Everything else
is arithmetic: a step has seven moments that can be its peak (`_moments`), each the sum of named lines, and the plan shows
the largest. `benchmarks/plan_check.py` holds the sums against measured peaks; docs/scale.md says what they leave out.

Symbols: B rows a device, T = `seq_len`, R = `response_tokens`, L layers, H hidden size, A heads x head size, K key/value
heads x head size, I intermediate size, V vocabulary. Sizes in bytes unless said otherwise; GiB = 2**30.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..sharing import MODES
from .known_models import BUILT_IN, BUILT_IN_PAIRS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# torch and transformers are imported where a config is read: a wrong option should be reported without that wait.

Engine = Literal["single", "ddp", "fsdp2", "zero2", "zero3"]
ENGINES: tuple[Engine, ...] = get_args(Engine)  # from the simplest to the most divided
OPTIMIZERS = ("adamw", "adamw_8bit", "sgd")
DTYPES = ("float32", "bfloat16")
MIXED_PRECISIONS = ("bf16", "fp16", "no")
QUANTIZATIONS = ("nf4", "int8", "none")
SHARINGS = tuple(MODES)
ANCHORS = ("none", "before")
DEVICES = ("cuda", "cpu")

GIB = 2**30
# Not in any tensor, and not measured by us: CUDA's context, cuBLAS and NCCL; and what an allocator loses between blocks
CONTEXT_BYTES = 1 * GIB
ALLOCATOR_SHARE = 0.95

# Of TRL's chunked head and our chunked divergence (trl.kernels.chunked_logprob, losses.py)
_TILE_TOKENS, _TILE_VOCAB = 4096, 32768
_CHUNK_ELEMENTS, _KEEP_ELEMENTS = 2**22, 2**24
_CHUNK_BUFFERS = 7  # fp32 logits-sized tensors alive at once in the divergence
_TILE_BUFFERS = {
    "forward": 4,
    "backward": 8,
}  # the same in TRL's head without Triton; with it, the tile is all there is
# DeepSpeed's defaults, in elements: reduce and all-gather buckets, and parameters that ZeRO-3 keeps gathered
_ZERO_BUCKET, _ZERO_LIVE = 5 * 10**8, 10**9
# The linear layers that examples/baselines/lora.yaml adapts
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class PlanError(ValueError):
    """A set-up that cannot be planned: a value out of range, or options that contradict each other."""


# --------------------------------------------------------------------------------------------------------------------
# What is planned
# --------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TowerFacts:
    """A stack of transformer layers: a language model or a vision tower.

    heads_width, kv_width: heads x head size. gated: the MLP has a gate (three matrices) and the norms are RMSNorm; otherwise
    two and LayerNorm. layer_parameters: of one layer. linear_parameters: of all linear weights in the layers.
    largest_linear: elements of the largest of them. lora_width: sum of in + out features of adapted layers.
    """

    layers: int
    hidden: int
    heads: int
    heads_width: int
    kv_width: int
    intermediate: int
    gated: bool
    layer_parameters: int
    linear_parameters: int
    largest_linear: int
    lora_width: int


@dataclass(frozen=True)
class ModelFacts:
    """What a plan needs to know of a model. parameters: all, tied ones once. vocab: rows of the head. embedding: elements of
    the token embedding. tied: the head is the embedding. patches_per_token: of the vision tower, per image token."""

    name: str
    parameters: int
    vocab: int
    embedding: int
    tied: bool
    text: TowerFacts
    vision: TowerFacts | None = None
    patches_per_token: int = 1


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
    teacher_quantization: str = _option("nf4", "Of the teacher's weights.", *QUANTIZATIONS)
    kv_sharing: str = _option("prompt", "Where the teacher reads the student's keys and values.", *SHARINGS)
    anchor: str = _option(
        "none", "Whether the VLM before judges the unmarked rows: a copy, or the adapter's base.", *ANCHORS
    )
    padded: bool = _option(False, "Rows of a batch differ in length: attention takes a mask.")
    device: str = _option("cuda", "cpu counts the buffers of TRL's head without Triton.", *DEVICES)

    def __post_init__(self) -> None:
        for name in ("seq_len", "response_tokens", "batch", "gpus", "accumulation"):
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
            ("anchor", ANCHORS),
            ("device", DEVICES),
        ):
            if getattr(self, name) not in choices:
                raise PlanError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}.")
        if self.engine == "single" and self.gpus > 1:
            raise PlanError(
                f"engine='single' runs on one device, got gpus={self.gpus}: choose ddp, fsdp2, zero2 or zero3."
            )
        if self.anchor == "before" and self.engine in ("fsdp2", "zero3"):
            raise PlanError(
                f"anchor='before' needs the whole student on every device, and {self.engine} splits it: choose single, ddp or zero2."
            )
        if self.gpu_memory <= 0:
            raise PlanError(f"gpu_memory must be a positive number of GiB, got {self.gpu_memory}.")

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
    def head_positions(self) -> int:
        """Positions that TRL's fused head projects: those with a label where Triton runs, all of them elsewhere."""
        return self.labels if self.device == "cuda" else self.tokens

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


# --------------------------------------------------------------------------------------------------------------------
# Facts from configs
# --------------------------------------------------------------------------------------------------------------------
def read_pair(student: str, teacher: str | None) -> tuple[ModelFacts, ModelFacts]:
    """The facts of a VLM and of its LM, each a folder, a Hub id, or one of `BUILT_IN`, which need no Hub.

    teacher: None = the one that `BUILT_IN_PAIRS`, or the student's config or card, names.

    Raises:
        PlanError: if one of the two is not a causal LM, or if the student has no vision tower.
        UnreadableModelError: if a config cannot be read, or no teacher is named.
    """
    from ..compatibility import named_teacher

    if teacher is None:
        teacher = BUILT_IN_PAIRS.get(student) or named_teacher(student)
    facts = _read_facts("student", student), _read_facts("teacher", teacher)
    if facts[0].vision is None:
        raise PlanError(f"The student {student!r} has no vision tower: pass a vision-language model.")
    return facts


def _read_facts(role: str, name_or_path: str) -> ModelFacts:
    if name_or_path in BUILT_IN and not os.path.exists(name_or_path):
        from transformers import AutoConfig

        settings = dict(BUILT_IN[name_or_path])
        return model_facts(AutoConfig.for_model(settings.pop("model_type"), **settings), name_or_path)
    from ..compatibility import load_config

    return model_facts(load_config(role, name_or_path, trust_remote_code=False, revision=None), name_or_path)


def model_facts(config: PreTrainedConfig, name: str = "") -> ModelFacts:
    """Count a model that is built from its config on the meta device, where weights have shapes and no memory.

    Raises:
        PlanError: if transformers has no model with a language-model head for it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    try:
        with torch.device("meta"):
            kind: Any = AutoModelForImageTextToText if _vision_config(config) is not None else AutoModelForCausalLM
            model: Any = kind.from_config(config)
    except (ValueError, KeyError) as error:
        raise PlanError(
            f"No model can be built from the config of {name!r}: {' '.join(str(error).split())}"
        ) from error
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    decoder, text, vision = model.get_decoder(), config.get_text_config(), _vision_config(config)
    return ModelFacts(
        name=name,
        parameters=sum(p.numel() for p in model.parameters()),
        vocab=head.shape[0],
        embedding=embedding.numel(),
        tied=head is embedding,
        text=_tower(text, decoder.layers),
        vision=None if vision is None else _tower(vision, _vision_layers(model, decoder)),
        patches_per_token=_patches_per_token(config),
    )


def _vision_config(config: PreTrainedConfig) -> PreTrainedConfig | None:
    vision = getattr(config, "vision_config", None)
    return None if vision is None or isinstance(vision, dict) else vision


def _vision_layers(model: Any, decoder: Any) -> Any:
    """The longest list of layers outside the decoder."""
    from torch import nn

    inside = set(decoder.modules())
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and m not in inside and len(m) > 0]
    return max(lists, key=len)


def _tower(config: PreTrainedConfig, layers: Any) -> TowerFacts:
    from torch import nn

    named = [(name, m) for name, m in layers.named_modules() if isinstance(m, nn.Linear)]
    heads = _first(config, "num_attention_heads", "num_heads")
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return TowerFacts(
        layers=len(layers),
        hidden=config.hidden_size,
        heads=heads,
        heads_width=width,
        kv_width=width // heads * (getattr(config, "num_key_value_heads", None) or heads),
        intermediate=_first(config, "intermediate_size"),
        gated=any(name.endswith("gate_proj") for name, _ in named),
        layer_parameters=sum(p.numel() for p in layers[0].parameters()),
        linear_parameters=sum(m.weight.numel() for _, m in named),
        largest_linear=max(m.weight.numel() for _, m in named),
        lora_width=sum(m.in_features + m.out_features for name, m in named if name.endswith(LORA_TARGETS)),
    )


def _first(config: PreTrainedConfig, *names: str) -> int:
    for name in names:
        if isinstance(value := getattr(config, name, None), int):
            return value
    raise PlanError(f"The {config.model_type} config has no {' or '.join(names)}: its memory cannot be planned.")


def _patches_per_token(config: PreTrainedConfig) -> int:
    """Vision patches that become one image token: pixel shuffle (Idefics3, SmolVLM, InternVL), patch merging (Qwen-VL), pooling
    (Gemma 3)."""
    vision = _vision_config(config)
    if pooled := getattr(config, "mm_tokens_per_image", None):
        return (_first(vision, "image_size") // _first(vision, "patch_size")) ** 2 // int(pooled)  # type: ignore[arg-type]
    shrunk = 1 / (getattr(config, "downsample_ratio", None) or 1)
    side = getattr(config, "scale_factor", None) or getattr(vision, "spatial_merge_size", None) or shrunk
    return round(side**2)


# --------------------------------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------------------------------
def layer_activations(tower: TowerFacts, tokens: int, setup: Setup) -> int:
    """Bytes that one layer keeps for its backward pass, as autograd saves them (held against its hooks in the tests).

    Norms keep their input, the normalised input and the output; attention keeps Q, K, V and its output; a gated MLP the
    gate, its activation, the other branch and their product. Under autocast each product keeps a half-precision copy
    of its own input instead of the norm's output.
    """
    lora, wide, half = setup.lora_rank > 0, setup.stream_bytes, setup.compute_bytes
    h, a, i = tower.hidden, tower.heads_width, tower.intermediate
    keys = a if setup.padded else tower.kv_width  # with a mask, K/V are repeated for each head before the product
    attention = (2 * a + 2 * keys) * half
    readers = (3, 2) if tower.gated else (3, 1)  # products that read the first norm's output, and the second's
    if setup.under_autocast:
        outputs = 0 if lora else sum(readers) * h * half
    else:
        outputs = 0 if lora else 2 * h * wide
    if tower.gated:  # RMSNorm computes in fp32; a frozen weight needs no normalised input
        norms = 2 * h * 4 + (0 if lora else 2 * h * wide)
        mlp = (3 if lora else 4) * i * half
    else:
        norms, mlp = 2 * h * wide, 2 * i * half
    adapters = 0
    if lora and tower.lora_width:  # dropout gives each adapted layer an input of its own, and a mask
        mask_bytes = 1 if setup.device == "cuda" else 4
        adapters = (sum(readers) * h + a + i) * (half + mask_bytes) + 7 * setup.lora_rank * half
    mask = setup.seq_len * half if setup.padded and setup.device == "cpu" else 0
    statistics = 8 + 4 * tower.heads
    return tokens * (norms + outputs + attention + mlp + adapters + mask + statistics)


def _tower_activations(tower: TowerFacts, tokens: int, setup: Setup) -> tuple[int, int]:
    """(of all layers before the backward pass, of the layer that it computes again): the second is 0 without checkpointing,
    with which only each layer's input is kept."""
    layer = layer_activations(tower, tokens, setup)
    if not setup.gradient_checkpointing:
        return tower.layers * layer, 0
    return tower.layers * tokens * tower.hidden * setup.stream_bytes, layer


def teacher_bytes(teacher: ModelFacts, quantization: str, dtype_bytes: int, vocab: int = 0) -> int:
    """Weights of the whole teacher. bitsandbytes packs the linear layers; embedding, head and norms stay whole.

    vocab: rows of the student's head, to which the teacher's embeddings grow.
    """
    grown = max(0, vocab - teacher.vocab) * teacher.text.hidden * (1 if teacher.tied else 2)
    linear = teacher.text.linear_parameters
    rest = (teacher.parameters + grown - linear) * dtype_bytes
    # nf4: half a byte and an fp32 scale per 64 weights. int8: a byte, and a scale a row, which is nothing beside it.
    return rest + {"nf4": linear * 9 // 16, "int8": linear, "none": linear * dtype_bytes}[quantization]


def anchor_bytes(student: ModelFacts, setup: Setup) -> int:
    """The frozen copy of the student that judges unmarked rows; an adapter's base is there already."""
    return student.parameters * setup.compute_bytes if setup.anchor == "before" and setup.lora_rank == 0 else 0


def kv_bytes(student: ModelFacts, setup: Setup) -> int:
    """One copy of the student's K/V of all layers, as recorded for the teacher."""
    return 2 * student.text.layers * student.text.kv_width * setup.tokens * setup.compute_bytes


def trainable_parameters(student: ModelFacts, setup: Setup) -> int:
    if setup.lora_rank == 0:
        return student.parameters
    width = student.text.lora_width + (student.vision.lora_width if student.vision else 0)
    return setup.lora_rank * width


Lines = dict[str, int]


def _standing(student: ModelFacts, teacher: ModelFacts, setup: Setup) -> Lines:
    """What is there at every moment of a step: weights, optimizer states, teacher, and the engine's buffers."""
    trainable, shards = trainable_parameters(student, setup), setup.shards
    frozen = student.parameters - trainable if setup.lora_rank == 0 else student.parameters
    weights = (trainable + frozen) * setup.weight_bytes
    if setup.lora_rank:
        weights += trainable * (4 - setup.weight_bytes)  # PEFT keeps adapters in fp32
    cut = setup.engine in ("fsdp2", "zero3")
    return {
        "weights": weights // (shards if cut else 1),
        "optimizer states": _optimizer_bytes(student, trainable, setup) // shards,
        "teacher": _teacher_on_device(teacher, student.vocab, setup),
        "engine buffers": _engine_bytes(student, trainable, setup),
        "VLM before": anchor_bytes(student, setup),
    }


def _optimizer_bytes(student: ModelFacts, trainable: int, setup: Setup) -> int:
    """AdamW: two states in the dtype of the weight. In 8 bits, those of embeddings stay in 32. DeepSpeed adds an fp32 copy."""
    deepspeed = setup.engine in ("zero2", "zero3")
    state = 4 if deepspeed or setup.lora_rank else setup.weight_bytes
    copy = 4 * trainable if deepspeed and setup.mixed_precision != "no" else 0
    if setup.optimizer == "sgd":
        return copy
    if setup.optimizer == "adamw_8bit":
        whole = student.embedding if setup.lora_rank == 0 else 0
        return copy + 2 * (trainable - whole) + 8 * whole
    return copy + 2 * state * trainable


def _teacher_on_device(teacher: ModelFacts, vocab: int, setup: Setup) -> int:
    whole = teacher_bytes(teacher, setup.teacher_quantization, setup.compute_bytes, vocab)
    if setup.teacher_quantization == "none" and setup.engine in ("fsdp2", "zero3"):
        # In pieces; two layers are gathered at a time, and the head
        gathered = 2 * teacher.text.layer_parameters + vocab * teacher.text.hidden
        return whole // setup.gpus + gathered * setup.compute_bytes
    return whole


def _engine_bytes(student: ModelFacts, trainable: int, setup: Setup) -> int:
    """What an engine holds beside the pieces: DDP's buckets, DeepSpeed's, and what FSDP2 and ZeRO-3 gather."""
    if setup.engine == "ddp":
        return trainable * (4 if setup.lora_rank else setup.weight_bytes)
    if setup.engine == "zero2":
        return 2 * min(_ZERO_BUCKET, trainable) * 2
    if setup.engine == "zero3":
        return (min(_ZERO_BUCKET, trainable) + min(_ZERO_LIVE, student.parameters)) * 2
    if setup.engine == "fsdp2":
        # Two decoder layers at a time; embeddings and vision tower are gathered from first to last, in the compute dtype; the
        # head is gathered twice in the dtype of the weights, by TRL and for the divergence
        text = student.text.layers * student.text.layer_parameters
        root = 2 * student.text.layer_parameters + student.parameters - text
        return root * setup.compute_bytes + 2 * student.vocab * student.text.hidden * setup.weight_bytes
    return 0


def _gradient_bytes(student: ModelFacts, setup: Setup) -> int:
    trainable = trainable_parameters(student, setup)
    return trainable * (4 if setup.lora_rank else setup.weight_bytes) // setup.shards


def _tile_bytes(setup: Setup, vocab: int, direction: str) -> int:
    """Buffers of TRL's fused head."""
    elements = min(setup.head_positions, _TILE_TOKENS) * min(_TILE_VOCAB, vocab)
    if setup.device == "cuda":
        return elements * setup.compute_bytes
    return elements * (setup.compute_bytes + 4 * (_TILE_BUFFERS[direction] - 1))


def _moments(student: ModelFacts, teacher: ModelFacts, setup: Setup) -> Iterator[tuple[str, Lines]]:
    """(moment of the step, its lines) for each moment that can be the peak, in the order of the step."""
    text, vision, tokens = student.text, student.vision, setup.tokens
    standing = _standing(student, teacher, setup)
    gradients = _gradient_bytes(student, setup)
    if setup.accumulation > 1:
        standing["gradients"] = gradients
    patches = setup.batch * setup.image_tokens * student.patches_per_token
    seen, seen_again = _tower_activations(vision, patches, setup) if vision is not None and patches else (0, 0)
    read, read_again = _tower_activations(text, tokens, setup)
    kept = seen + read + 3 * tokens * text.hidden * 4  # and the last norm
    # Checkpointing frees K/V, and grouped queries make autograd keep repeated ones: only then is the record a copy
    is_copy = setup.gradient_checkpointing or (setup.padded and text.kv_width < text.heads_width)
    recorded = kv_bytes(student, setup) if is_copy and MODES[setup.kv_sharing].records_kv else 0
    linear = text.linear_parameters + (vision.linear_parameters if vision else 0)
    casts = 2 * linear if setup.under_autocast else 0
    casts_left = (
        0 if setup.gradient_checkpointing else casts
    )  # autograd keeps them where it keeps the product's inputs
    head = student.vocab * text.hidden
    head_cast = 2 * head if setup.weight_bytes > setup.compute_bytes else 0
    head_gradient = 0 if setup.lora_rank else 4 * head  # fp32, whole, from cross-entropy and from the divergence each
    product = 0 if setup.lora_rank else head * (4 if setup.compute_bytes == 4 else setup.compute_bytes + 4)
    chunk = 4 * min(_CHUNK_ELEMENTS, setup.labels * student.vocab)
    small = setup.labels * student.vocab <= _KEEP_ELEMENTS
    logits_gradient = setup.labels * student.vocab * 4 if small else 0

    def moment(name: str, **lines: int) -> tuple[str, Lines]:
        total = dict(standing)
        for line, size in lines.items():
            line = line.replace("_", " ")
            total[line] = total.get(line, 0) + size
        return name, total

    yield moment(
        "the student's forward pass",
        activations=kept,
        recorded_KV=recorded,
        autocast_copies=casts,
        logits_and_loss=_tile_bytes(setup, student.vocab, "forward"),
    )
    yield moment(
        "the teacher's pass",
        activations=kept,
        recorded_KV=recorded,
        autocast_copies=casts,
        teacher=_teacher_work(teacher.text, setup),
    )
    yield moment(
        "the divergence",
        activations=kept,
        autocast_copies=casts + head_cast,
        logits_and_loss=_CHUNK_BUFFERS * chunk + 2 * logits_gradient,
    )
    yield moment(
        "the backward pass of the divergence",
        activations=kept,
        autocast_copies=casts_left + head_cast,
        gradients=head_gradient + product,  # what has been summed, and the next chunk's share
        logits_and_loss=2 * logits_gradient if small else _CHUNK_BUFFERS * chunk,
    )
    yield moment(
        "the backward pass of the head",
        activations=kept,
        autocast_copies=casts_left,
        gradients=2 * head_gradient,
        logits_and_loss=_tile_bytes(setup, student.vocab, "backward"),
    )
    yield moment(
        "the backward pass of the layers",
        activations=kept + read_again + tokens * (2 * text.intermediate + text.hidden) * setup.compute_bytes,
        autocast_copies=casts_left,
        gradients=head_gradient * (2 if student.tied else 1),
    )
    yield moment(
        "the end of the backward pass",
        activations=max(seen + seen_again, layer_activations(text, tokens, setup)),
        gradients=(gradients if setup.accumulation == 1 else 0) + (head_gradient if student.tied else 0),
    )


def _teacher_work(teacher: TowerFacts, setup: Setup) -> int:
    """The teacher's pass: one layer at a time, without gradient; a layer's weights are unpacked one after the other."""
    per_query = 3 * teacher.hidden + 2 * teacher.heads_width + 3 * teacher.intermediate
    scores = 3 * teacher.heads * setup.queries * setup.seq_len if MODES[setup.kv_sharing].reads_student else 0
    own = 2 * teacher.kv_width * setup.tokens if setup.kv_sharing in ("prompt", "vision", "inputs") else 0
    unpacked = teacher.largest_linear if setup.teacher_quantization != "none" else 0
    return (setup.queries * per_query + scores + own + unpacked) * setup.compute_bytes


# --------------------------------------------------------------------------------------------------------------------
# Cost of a step
# --------------------------------------------------------------------------------------------------------------------
# What a GPU is taken to do, for the cost of a step: 40 % of an H100's dense bf16 products, and an operation every 6 microseconds
# (counted in tests/test_dispatch.py: of a step of SFT per text layer, of a tower's, and of the teacher's pass)
_FLOPS, _LAUNCH_SECONDS = 4e14, 6e-6
_LAUNCHES_PER_LAYER, _LAUNCHES_OF_TOWER, _LAUNCHES_OF_TEACHER = 120, 100, 40


def step_cost(student: ModelFacts, teacher: ModelFacts, setup: Setup) -> float:
    """Time of a distilling step over that of the same step of SFT with a head over the labelled positions alone: see `step_seconds`."""
    sft, added, launches, more = _step_work(student, teacher, setup)
    if setup.device == "cpu":
        return (sft + added) / sft
    return _seconds(sft + added, more) / _seconds(sft, launches)


def step_seconds(student: ModelFacts, teacher: ModelFacts, setup: Setup) -> float | None:
    """Seconds of a distilling step (one batch per device) on a GPU of `_FLOPS`; None for a CPU, whose speed is not taken as known.

    Multiply-adds or launches, whichever takes longer: a small student on a GPU waits for its launches, and the teacher adds some. No
    memory traffic, no unpacking of quantised weights, no communication and no reading of data is counted. Never measured on a GPU. With
    an anchor, every step is taken to have an unmarked row.
    """
    if setup.device == "cpu":
        return None
    sft, added, _, more = _step_work(student, teacher, setup)
    return _seconds(sft + added, more)


def _seconds(work: float, count: float) -> float:
    return max(2 * work / _FLOPS, count * _LAUNCH_SECONDS)


def _step_work(student: ModelFacts, teacher: ModelFacts, setup: Setup) -> tuple[float, float, float, float]:
    """(multiply-adds of SFT, of what distilling adds, launches of SFT, launches of both)."""
    passes = 2.0 if setup.lora_rank else 3.0  # forward, gradient of the inputs, gradient of the weights
    passes += 1.0 if setup.gradient_checkpointing else 0.0
    backbone = _forward_work(student.text, setup.tokens, setup.seq_len / 2)
    launches: float = _LAUNCHES_PER_LAYER * student.text.layers
    if student.vision is not None:
        patches = setup.image_tokens * student.patches_per_token
        backbone += _forward_work(student.vision, setup.batch * patches, patches)
        launches += _LAUNCHES_OF_TOWER * student.vision.layers
    forward = launches / 3
    launches *= 4 / 3 if setup.gradient_checkpointing else 1.0
    head = student.vocab * student.text.hidden
    sft = passes * backbone + (2 if setup.lora_rank else 3) * head * setup.labels
    keys = setup.seq_len if MODES[setup.kv_sharing].reads_student else setup.seq_len / 2
    added = _forward_work(teacher.text, setup.queries, keys) + student.vocab * teacher.text.hidden * setup.labels
    more = launches + _LAUNCHES_OF_TEACHER * teacher.text.layers
    if setup.anchor == "before":
        added, more = added + backbone, more + forward
    return sft, added, launches, more


def _forward_work(tower: TowerFacts, tokens: float, keys: float) -> float:
    """Multiply-adds of one forward pass: linear layers, and two products with `keys` keys a token on average."""
    return tokens * (tower.linear_parameters + 2 * tower.layers * tower.heads_width * keys)


# --------------------------------------------------------------------------------------------------------------------
# The plan
# --------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Plan:
    """A set-up and what it takes.

    moment: when memory peaks. lines: bytes by name at that moment. teacher: bytes of the whole teacher by quantisation.
    recorded_kv: bytes of one copy of the student's K/V. moments: bytes in all by moment. cost: of a step over SFT. seconds: of a step, see
    `step_seconds`.
    """

    student: ModelFacts
    teacher_name: str
    setup: Setup
    moment: str
    lines: Lines
    moments: Lines
    teacher: Lines
    recorded_kv: int
    cost: float
    seconds: float | None

    @property
    def peak(self) -> int:
        """Bytes of tensors on a device at the peak."""
        return sum(self.lines.values())

    @property
    def needed(self) -> float:
        """Bytes a device must have: the peak, what the allocator loses, and CUDA's own."""
        return self.peak / ALLOCATOR_SHARE + CONTEXT_BYTES

    @property
    def fits(self) -> bool:
        return self.needed <= self.setup.gpu_memory * GIB

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values (JSON); sizes in bytes."""
        return {
            "student": self.student.name,
            "teacher": self.teacher_name,
            "student_parameters": self.student.parameters,
            "setup": asdict(self.setup),
            "fits": self.fits,
            "needed": round(self.needed),
            "peak": self.peak,
            "peak_moment": self.moment,
            "lines": self.lines,
            "moments": self.moments,
            "teacher_by_quantization": self.teacher,
            "recorded_kv": self.recorded_kv,
            "step_cost_over_sft": self.cost,
            "step_seconds": self.seconds,
        }

    def __str__(self) -> str:
        setup = self.setup
        precision = setup.dtype + ("" if setup.mixed_precision == "no" else f" under {setup.mixed_precision}")
        method = f"LoRA of rank {setup.lora_rank}" if setup.lora_rank else "full fine-tuning"
        text = [
            f"Student: {self.student.name} ({self.student.parameters / 1e6:,.0f}M parameters)",
            f"Teacher: {self.teacher_name} ({setup.teacher_quantization}), kv_sharing={setup.kv_sharing}",
            f"{method}, {precision}, {setup.optimizer}; {setup.engine} on {setup.gpus} x {setup.gpu_memory:g} GiB; "
            f"{setup.batch} x {setup.seq_len} tokens a device ({setup.image_tokens} image, {setup.response_tokens} response)",
            "",
            f"Per device, at the peak, which is {self.moment}:",
            *(f"  {name:<20}{size / GIB:9.2f} GiB" for name, size in self.lines.items() if size),
            f"  {'tensors':<20}{self.peak / GIB:9.2f} GiB",
            f"  {'needed':<20}{self.needed / GIB:9.2f} GiB, with the allocator's loss and CUDA's own",
            "",
            "Teacher: " + ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in self.teacher.items()) + ", whole",
            f"Recorded K/V: {self.recorded_kv / GIB:.2f} GiB, dropped before the backward pass",
            f"A step costs {self.cost:.3f} of an SFT step (operations)"
            + (
                ""
                if self.seconds is None
                else f", {self.seconds:.2f} s at {_FLOPS / 1e12:.0f} TFLOP/s (40 % of an H100)"
            ),
            f"It {'fits' if self.fits else 'does not fit'}.",
        ]
        return "\n".join(text)


def make_plan(student: ModelFacts, teacher: ModelFacts, setup: Setup) -> Plan:
    """The plan of one set-up.

    Raises:
        PlanError: if student and teacher differ in layers or K/V heads, so that nothing could be shared.
    """
    ours = (student.text.layers, student.text.kv_width)
    theirs = (teacher.text.layers, teacher.text.kv_width)
    if ours != theirs:
        raise PlanError(
            f"The student's language model has {ours[0]} layers with K/V of width {ours[1]}, the teacher {theirs[0]} of "
            f"{theirs[1]}: pass the LM that the student was built from."
        )
    moments = dict(_moments(student, teacher, setup))
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return Plan(
        student=student,
        teacher_name=teacher.name,
        setup=setup,
        moment=moment,
        lines=moments[moment],
        moments={name: sum(lines.values()) for name, lines in moments.items()},
        teacher={q: teacher_bytes(teacher, q, setup.compute_bytes, student.vocab) for q in QUANTIZATIONS},
        recorded_kv=kv_bytes(student, setup),
        cost=step_cost(student, teacher, setup),
        seconds=step_seconds(student, teacher, setup),
    )


def smallest_plan(
    student: ModelFacts,
    teacher: ModelFacts,
    setup: Setup,
    gpu_counts: Iterable[int] = (1, 2, 4, 8, 16, 32, 64),
    engines: Iterable[Engine] = ENGINES,
) -> Plan | None:
    """The fewest devices that fit, and among the engines that do so on that many, the simplest. None if nothing fits.

    Where the engine cuts weights, an unquantised teacher, which can be cut, is tried after the quantised one, which cannot.
    """
    for gpus in gpu_counts:
        for engine in engines:
            if (engine == "single") != (gpus == 1) or (setup.anchor == "before" and engine in ("fsdp2", "zero3")):
                continue
            here = replace(setup, engine=engine, gpus=gpus)
            tried = (here, replace(here, teacher_quantization="none")) if engine in ("fsdp2", "zero3") else (here,)
            for candidate in tried:
                plan = make_plan(student, teacher, candidate)
                if plan.fits:
                    return plan
    return None
