"""Bytes of a step on one device: the moments that can be its peak, each the sum of named lines.

Symbols: B rows per device, T = `seq_len`, R = `response_tokens`, L layers, H hidden size, A heads x head size, K key/value
heads x head size, I intermediate size, V vocabulary. Sizes in bytes unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator

from ...sharing import MODES
from .facts import ModelFacts, TowerFacts
from .setup import Setup

# DeepSpeed's defaults, in elements: reduce and all-gather buckets, and parameters that ZeRO-3 keeps gathered
_ZERO_BUCKET, _ZERO_LIVE = 5 * 10**8, 10**9


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
    linear = teacher.text.linear_parameters + (teacher.vision.linear_parameters if teacher.vision else 0)
    rest = (teacher.parameters + grown - linear) * dtype_bytes
    # nf4: half a byte and an fp32 scale per 64 weights. int8: a byte, and a scale a row, which is nothing beside it.
    return rest + {"nf4": linear * 9 // 16, "int8": linear, "none": linear * dtype_bytes}[quantization]


def before_bytes(student: ModelFacts, setup: Setup) -> int:
    """The frozen copy of the student that judges unmarked rows or is read; an adapter's base is there already. Whole, it goes without
    a head where it does not judge. In pieces where the student is; the head is gathered for the loss, where it judges."""
    if not setup.asks_before or setup.lora_rank:
        return 0
    judges = setup.on_policy or (setup.anchor == "before" and not setup.anchor_cache)
    head = student.vocab * student.text.hidden
    if not setup.splits:
        unread = 0 if judges or student.tied else head
        return (student.parameters - unread) * setup.compute_bytes
    head = head if judges else 0
    return (student.parameters // setup.gpus + head) * setup.compute_bytes


def kv_bytes(student: ModelFacts, setup: Setup) -> int:
    """One copy of the student's K/V of all layers, and of what those without K/V write, as recorded for the teacher."""
    text = student.text
    per_token = 2 * (text.layers - text.mixers) * text.kv_width + text.mixer_writes
    return per_token * setup.tokens * setup.compute_bytes


def trainable_parameters(student: ModelFacts, setup: Setup) -> int:
    """How many of its parameters are trained: all, or those of the adapter; none of a frozen tower."""
    if setup.lora_rank == 0:
        return student.parameters - (student.beside if setup.freeze_vision else 0)
    width = student.text.lora_width
    if student.vision is not None and not setup.freeze_vision:
        width += student.vision.lora_width
    return setup.lora_rank * width


Lines = dict[str, int]


def _standing(student: ModelFacts, teacher: ModelFacts, setup: Setup) -> Lines:
    """What is there at every moment of a step: weights, optimizer states, teacher, and the engine's buffers."""
    trainable, shards = trainable_parameters(student, setup), setup.shards
    frozen = student.parameters - trainable if setup.lora_rank == 0 else student.parameters
    weights = (trainable + frozen) * setup.weight_bytes
    if setup.lora_rank:
        weights += trainable * (4 - setup.weight_bytes)  # PEFT keeps adapters in fp32
    return {
        "weights": weights // (shards if setup.splits else 1),
        "optimizer states": _optimizer_bytes(student, trainable, setup) // shards,
        "teacher": _teacher_on_device(teacher, student.vocab, setup),
        "engine buffers": _engine_bytes(student, trainable, setup),
        "VLM before": before_bytes(student, setup),
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


def cached_bytes(student: ModelFacts, teacher: ModelFacts, setup: Setup) -> int:
    """On disk, per label: what is kept of the VLM before (token ids and fp32 logs, and one of the rest) or of the teacher; the more
    of the two."""
    anchor = 8 * min(setup.anchor_cache_k, student.vocab) + 4 if setup.anchor_cache else 0
    readings = 2 if setup.blind_queries else 1
    return max(anchor, readings * teacher.text.hidden * setup.compute_bytes if setup.teacher_cache else 0)


def _teacher_on_device(teacher: ModelFacts, vocab: int, setup: Setup) -> int:
    if setup.teacher_is_gone:
        return vocab * teacher.text.hidden * setup.compute_bytes  # its head
    whole = teacher_bytes(teacher, setup.teacher_quantization, setup.compute_bytes, vocab)
    if setup.teacher_quantization == "none" and setup.splits:
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


def _chunk_bytes(student: ModelFacts, setup: Setup) -> int:
    """One fp32 tensor of logits in the loss, which takes the labelled positions chunk by chunk (`losses.py`)."""
    from ...losses import CPU_CHUNK, chunk_elements

    most = CPU_CHUNK if setup.device == "cpu" else chunk_elements(int(setup.gpu_memory * 2**30))
    return 4 * min(max(most // student.vocab, 1), setup.labels) * student.vocab


def chunk_tensors(setup: Setup) -> int:
    """Logits-sized fp32 tensors that the loss holds at once for a chunk: both models' log-probabilities and probabilities, and the
    logits of a second reading."""
    return 5 if setup.blind_queries else 4


def moments_of(student: ModelFacts, teacher: ModelFacts, setup: Setup) -> Iterator[tuple[str, Lines]]:
    """(moment of the step, its lines) for each moment that can be the peak, in the order of the step."""
    text, tokens = student.text, setup.tokens
    vision = None if setup.freeze_vision else student.vision  # autograd keeps nothing of what is not trained
    standing = _standing(student, teacher, setup)
    if setup.on_policy:  # before anything else, and without the gradients of an accumulation
        held = {"sampling KV": kv_bytes(student, setup) * setup.accumulation}
        if setup.splits:
            held["gathered weights"] = student.parameters * setup.compute_bytes
        if setup.engine == "fsdp2":
            held["engine buffers"] = 0  # what it gathers elsewhere is among these
        yield "sampling", standing | held
    gradients = _gradient_bytes(student, setup)
    if setup.accumulation > 1:
        standing["gradients"] = gradients
    patches = setup.batch * setup.image_tokens * student.patches_per_token
    seen, seen_again = _tower_activations(vision, patches, setup) if vision is not None and patches else (0, 0)
    read, read_again = _tower_activations(text, tokens, setup)
    kept = seen + read + 3 * tokens * text.hidden * 4  # and the last norm
    # Checkpointing frees K/V, and grouped queries make autograd keep repeated ones: only then is the record a copy
    is_copy = setup.gradient_checkpointing or (setup.padded and text.kv_width < text.heads_width)
    records = MODES[setup.kv_sharing].records_kv and not setup.teacher_is_gone
    recorded = kv_bytes(student, setup) if is_copy and records else 0
    linear = text.linear_parameters + (vision.linear_parameters if vision else 0)
    casts = 2 * linear if setup.under_autocast else 0
    # autograd keeps them where it keeps the product's inputs
    casts_left = 0 if setup.gradient_checkpointing else casts
    head = student.vocab * text.hidden
    # On a CPU the products of the heads are in fp32 (`losses.py`); elsewhere in the dtype of autocast
    product_bytes = 4 if setup.device == "cpu" else setup.compute_bytes
    head_casts = head * product_bytes if setup.weight_bytes != product_bytes else 0
    if setup.compute_bytes != product_bytes:
        head_casts += student.vocab * teacher.text.hidden * product_bytes  # the teacher's, loaded in the compute dtype
    chunk = _chunk_bytes(student, setup)
    several = chunk < 4 * setup.labels * student.vocab
    head_gradient = 0 if setup.lora_rank else head * (4 if several else max(setup.weight_bytes, product_bytes))

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
    )
    yield moment(
        "the teacher's pass",
        activations=kept,
        recorded_KV=recorded,
        autocast_copies=casts,
        teacher=0 if setup.teacher_is_gone else _teacher_work(teacher, setup),
    )
    yield moment(
        "the loss",
        activations=kept,
        autocast_copies=casts + head_casts,
        gradients=head_gradient,
        logits=chunk_tensors(setup) * chunk + (chunk // 2 if product_bytes == 2 else 0),
    )
    yield moment(
        "the backward pass of the layers",
        activations=kept + read_again + tokens * (2 * text.intermediate + text.hidden) * setup.compute_bytes,
        autocast_copies=casts_left,
        gradients=head_gradient,
    )
    yield moment(
        "the end of the backward pass",
        activations=max(seen + seen_again, layer_activations(text, tokens, setup)),
        gradients=(gradients if setup.accumulation == 1 else 0) + (head_gradient if student.tied else 0),
    )


def _teacher_work(teacher: ModelFacts, setup: Setup) -> int:
    """The teacher's pass: one layer at a time, without gradient; a layer's weights are unpacked one after the other. One with eyes of
    its own looks before it reads."""
    text = teacher.text
    # A CPU holds the scores of masked attention; CUDA's kernels do not, and the mask is left, with what it was made of
    scores = (2 if setup.device == "cuda" else 3 * text.heads) * setup.queries * setup.seq_len
    if not MODES[setup.kv_sharing].reads_student:
        scores = 0
    own = 2 * text.kv_width * setup.tokens if setup.kv_sharing in ("prompt", "vision", "inputs") else 0
    if (
        text.mixers and MODES[setup.kv_sharing].records_kv
    ):  # over whole rows: the projections, and what convolution and scan make of them
        own = max(own, 3 * text.mixer_width * setup.tokens)
    elements = setup.queries * _layer_work(text) + scores + own
    if teacher.vision is not None:
        patches = setup.batch * setup.image_tokens * teacher.patches_per_token
        elements = max(elements, patches * _layer_work(teacher.vision))
    unpacked = text.largest_linear if setup.teacher_quantization != "none" else 0
    return (elements + unpacked) * setup.compute_bytes


def _layer_work(tower: TowerFacts) -> int:
    """Elements per token while one layer runs without gradient."""
    return 3 * tower.hidden + 2 * tower.heads_width + 3 * tower.intermediate
