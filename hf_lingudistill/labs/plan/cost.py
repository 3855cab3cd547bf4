"""The cost of a step over supervised fine-tuning, counted in multiply-adds and launches."""

from __future__ import annotations

from ...sharing import MODES
from .facts import ModelFacts, TowerFacts
from .setup import Setup

# What a GPU is taken to do, for the cost of a step: 40 % of an H100's dense bf16 products, and an operation every 40 microseconds, which
# is what Python, autocast and a launch took on the H100 of benchmarks/results/gpu.json (135M, batch 8: 0.187 s for 4,800 of them). Operations
# are counted in tests/test_dispatch.py: of a step of SFT per text layer, of a tower's, and of the teacher's pass
FLOPS, _LAUNCH_SECONDS = 4e14, 4e-5
_LAUNCHES_PER_LAYER, _LAUNCHES_OF_TOWER, _LAUNCHES_OF_TEACHER = 120, 100, 40


def step_cost(student: ModelFacts, teacher: ModelFacts, setup: Setup) -> float:
    """Time of a distilling step over that of the same step of SFT with a head over the labelled positions alone: see `step_seconds`."""
    sft, added, launches, more = _step_work(student, teacher, setup)
    if setup.device == "cpu":
        return (sft + added) / sft
    return _seconds(sft + added, more) / _seconds(sft, launches)


def step_seconds(student: ModelFacts, teacher: ModelFacts, setup: Setup) -> float | None:
    """Seconds of a distilling step (one batch per device) on a GPU of `FLOPS`; None for a CPU, whose speed is not taken as known.

    Multiply-adds or launches, whichever takes longer: a small student on a GPU waits for its launches, and the teacher adds some. No
    memory traffic, no unpacking of quantised weights, no communication and no reading of data is counted: docs/scale.md holds it against
    a GPU. With the VLM before, every step is taken to ask it: over whole rows where it judges, as far as the image tokens, which are
    taken to stand first, where the teacher only reads those.
    """
    if setup.device == "cpu":
        return None
    sft, added, _, more = _step_work(student, teacher, setup)
    return _seconds(sft + added, more)


def _seconds(work: float, count: float) -> float:
    return max(2 * work / FLOPS, count * _LAUNCH_SECONDS)


def _step_work(student: ModelFacts, teacher: ModelFacts, setup: Setup) -> tuple[float, float, float, float]:
    """(multiply-adds of SFT, of what distilling adds, launches of SFT, launches of both)."""
    passes = 2.0 if setup.lora_rank else 3.0  # forward, gradient of the inputs, gradient of the weights
    passes += 1.0 if setup.gradient_checkpointing else 0.0
    text = _forward_work(student.text, setup.tokens, setup.seq_len / 2)
    tower = 0.0 if student.vision is None else _tower_work(student, student.vision, setup)
    # Launches of a forward pass
    of_text = _LAUNCHES_PER_LAYER * student.text.layers / 3
    of_tower = 0.0 if student.vision is None else _LAUNCHES_OF_TOWER * student.vision.layers / 3
    again = 4.0 if setup.gradient_checkpointing else 3.0
    # Nothing behind a frozen tower asks for a gradient: it runs once
    sft = passes * text + (1.0 if setup.freeze_vision else passes) * tower
    launches = again * of_text + (1.0 if setup.freeze_vision else again) * of_tower
    head = student.vocab * student.text.hidden
    sft += (2 if setup.lora_rank else 3) * head * setup.labels
    keys = setup.seq_len if MODES[setup.kv_sharing].reads_student else setup.seq_len / 2
    added, more = float(student.vocab * teacher.text.hidden * setup.labels), launches
    if not setup.teacher_is_gone:
        added += _forward_work(teacher.text, setup.queries, keys)
        if MODES[setup.kv_sharing].records_kv:  # layers without attention run over the whole row, asked or not
            added += teacher.text.mixer_work * max(0, setup.tokens - setup.queries)
        more += _LAUNCHES_OF_TEACHER * teacher.text.layers
    if setup.blind_queries:
        added += student.vocab * teacher.text.hidden * setup.labels
        if not setup.teacher_is_gone:
            added += _forward_work(teacher.text, setup.blind_queries, setup.seq_len / 2)
            more += _LAUNCHES_OF_TEACHER * teacher.text.layers
    if teacher.vision is not None and not setup.teacher_is_gone:
        added += _tower_work(teacher, teacher.vision, setup)
        more += _LAUNCHES_OF_TOWER * teacher.vision.layers / 3
    if setup.asks_before:
        looks = not setup.freeze_vision or setup.splits  # else it is given the student's image features
        added += _before_work(student, setup, text) + (tower if looks else 0.0)
        more += of_text + (of_tower if looks else 0.0)
    return sft, added, launches, more


def _before_work(student: ModelFacts, setup: Setup, text: float) -> float:
    """Multiply-adds of the VLM before, its tower left out. text: of its decoder on whole rows."""
    judges = setup.on_policy or (setup.anchor == "before" and not setup.anchor_cache)
    if judges or MODES[setup.kv_sharing].text_reads_student or not setup.image_tokens:
        return text
    return _forward_work(student.text, setup.batch * setup.image_tokens, setup.image_tokens / 2)


def _tower_work(model: ModelFacts, tower: TowerFacts, setup: Setup) -> float:
    """Multiply-adds of one forward pass of the vision tower: a patch attends to those of its own image or tile."""
    patches = setup.image_tokens * model.patches_per_token
    return _forward_work(tower, setup.batch * patches, min(patches, model.tile_patches or patches))


def _forward_work(tower: TowerFacts, tokens: float, keys: float) -> float:
    """Multiply-adds of one forward pass: linear layers, two products with `keys` keys per token on average, and what mixers do."""
    attending = tower.layers - tower.mixers
    return tokens * (tower.linear_parameters + 2 * attending * tower.heads_width * keys + tower.mixer_work)
