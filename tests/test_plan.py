"""`lingudistill plan`: what it counts is what is there, and what it compares is compared."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import family_shrunk
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

from hf_lingudistill.cli import main
from hf_lingudistill.labs.plan import (
    ENGINES,
    GIB,
    LORA_TARGETS,
    ModelFacts,
    Plan,
    PlanError,
    Setup,
    kv_bytes,
    layer_activations,
    make_plan,
    model_facts,
    read_pair,
    smallest_plan,
    step_cost,
    step_seconds,
    teacher_bytes,
    trainable_parameters,
)
from hf_lingudistill.labs.plan.cost import _step_work, _tower_work
from hf_lingudistill.labs.plan.known_models import BUILT_IN, BUILT_IN_PAIRS
from hf_lingudistill.student_kv import recording
from hf_lingudistill.teacher import load_teacher_model

ROOT = Path(__file__).resolve().parents[1]
SMALL, LARGE = "HuggingFaceTB/SmolVLM-256M-Instruct", "Qwen/Qwen2.5-VL-72B-Instruct"
# Of student and LM; docs/scale.md says which were found published
PUBLISHED = {
    SMALL: (256_484_928, 134_515_008),
    "HuggingFaceTB/SmolVLM-500M-Instruct": (507_482_304, 361_821_120),
    "HuggingFaceTB/SmolVLM-Instruct": (2_246_272_880, 1_711_376_384),
    "Qwen/Qwen2.5-VL-3B-Instruct": (3_754_622_976, 3_085_938_688),
    "Qwen/Qwen2.5-VL-7B-Instruct": (8_292_166_656, 7_615_616_512),
    "llava-hf/llava-1.5-7b-hf": (7_063_427_072, 6_738_415_616),
    "OpenGVLab/InternVL3-1B-hf": (938_193_024, 494_032_768),
    "OpenGVLab/InternVL3-2B-hf": (2_088_957_440, 1_543_714_304),
    "google/gemma-3-4b-it": (4_300_079_472, 4_300_079_472),
    LARGE: (73_410_777_344, 72_706_203_648),
}


@pytest.fixture(scope="module")
def pairs() -> dict[str, tuple[ModelFacts, ModelFacts]]:
    return {name: read_pair(name, None) for name in BUILT_IN_PAIRS}


@pytest.fixture(scope="module")
def small(pairs: dict[str, tuple[ModelFacts, ModelFacts]]) -> tuple[ModelFacts, ModelFacts]:
    return pairs[SMALL]


# --------------------------------------------------------------------------------------------------------------------
# Facts
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", PUBLISHED)
def test_built_in_configs_have_the_number_of_parameters_of_the_models(
    name: str, pairs: dict[str, tuple[ModelFacts, ModelFacts]]
) -> None:
    assert tuple(facts.parameters for facts in pairs[name]) == PUBLISHED[name]


def test_patches_become_image_tokens_as_each_family_has_it(pairs: dict[str, tuple[ModelFacts, ModelFacts]]) -> None:
    found = {name: facts.patches_per_token for name, (facts, _) in pairs.items()}
    assert found == {
        "HuggingFaceTB/SmolVLM-256M-Instruct": 16,
        "HuggingFaceTB/SmolVLM-500M-Instruct": 16,
        "HuggingFaceTB/SmolVLM-Instruct": 9,
        "Qwen/Qwen2.5-VL-3B-Instruct": 4,
        "Qwen/Qwen2.5-VL-7B-Instruct": 4,
        "Qwen/Qwen2.5-VL-72B-Instruct": 4,
        "llava-hf/llava-1.5-7b-hf": 1,
        "OpenGVLab/InternVL3-1B-hf": 4,  # downsample_ratio 0.5
        "OpenGVLab/InternVL3-2B-hf": 4,
        "google/gemma-3-4b-it": 16,  # (896 / 14)^2 patches become 256 tokens
    }


def test_patches_of_a_tile_are_the_configs_or_unknown(pairs: dict[str, tuple[ModelFacts, ModelFacts]]) -> None:
    found = {name: facts.tile_patches for name, (facts, _) in pairs.items()}
    assert found["HuggingFaceTB/SmolVLM-256M-Instruct"] == 1024
    assert found["llava-hf/llava-1.5-7b-hf"] == 24**2
    assert found["OpenGVLab/InternVL3-1B-hf"] == 32**2  # sides as a list
    assert found["Qwen/Qwen2.5-VL-3B-Instruct"] is None  # as many as an image needs


def test_the_work_of_a_tower_is_that_of_its_tiles(small: tuple[ModelFacts, ModelFacts]) -> None:
    """Oracle: torch's own count, over the layers of the tower."""
    student, _ = small
    assert student.vision is not None and student.tile_patches is not None
    config = dict(BUILT_IN[SMALL])
    with torch.device("meta"):
        vlm: Any = AutoModelForImageTextToText.from_config(
            AutoConfig.for_model(config.pop("model_type"), **config), attn_implementation="eager"
        )
        tower = vlm.model.vision_model.encoder
        tiles, patches = 16, student.tile_patches
        with FlopCounterMode(display=False) as counted:
            tower(inputs_embeds=torch.empty(tiles, patches, vlm.config.vision_config.hidden_size))
    work = counted.get_total_flops() / 2
    setup = Setup(seq_len=2048, image_tokens=tiles * patches // student.patches_per_token, response_tokens=64, batch=1)
    assert _tower_work(student, student.vision, setup) == pytest.approx(work, rel=0.01)
    # Control: as one sequence it would be more than that
    assert _tower_work(replace(student, tile_patches=None), student.vision, setup) > 3 * work


def test_facts_of_a_folder_are_those_of_its_weights(saved_pair: tuple[Path, Path]) -> None:
    student, teacher = read_pair(*map(str, saved_pair))
    vlm, lm = tiny.make_vlm(), tiny.make_lm()
    assert student.parameters == sum(p.numel() for p in vlm.parameters())
    assert teacher.parameters == sum(p.numel() for p in lm.parameters())
    assert (student.text.layers, student.text.kv_width, student.tied) == (2, 16, True)
    assert student.vision is not None and student.vision.layers == 2
    assert student.patches_per_token == 4
    # Control: a layer more is seen
    assert model_facts(tiny.make_lm(layers=3).config).parameters > teacher.parameters


def test_a_teacher_that_is_not_the_students_lm_is_refused(
    small: tuple[ModelFacts, ModelFacts], tmp_path: Path
) -> None:
    other = model_facts(tiny.make_lm().config, "other")
    with pytest.raises(
        PlanError,
        match="has 30 layers with K/V of width 192 in heads of 64, the teacher 2 of 16 in heads of 8: pass the LM",
    ):
        make_plan(small[0], other, Setup())
    make_plan(*small, Setup())
    tiny.make_lm().config.save_pretrained(tmp_path)
    with pytest.raises(PlanError, match="has no vision tower: pass a vision-language model"):
        read_pair(str(tmp_path), str(tmp_path))


# --------------------------------------------------------------------------------------------------------------------
# Bytes
# --------------------------------------------------------------------------------------------------------------------
def saved_bytes(model: torch.nn.Module, forward: Callable[[], Any]) -> int:
    """What autograd keeps of a forward pass, weights aside; each storage once."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}  # the tensor, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(size for size, _ in kept.values())


def layer_bytes(kv_heads: int, setup: Setup) -> tuple[int, int]:
    """(kept by autograd, planned) per layer of a Llama: the difference between four layers and two, halved."""
    kept, facts = [], None
    for layers in (2, 4):
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
        )
        facts = model_facts(config)
        lm: Any = LlamaForCausalLM(config).to(getattr(torch, setup.dtype))
        if setup.lora_rank:
            lora = LoraConfig(r=setup.lora_rank, target_modules=list(LORA_TARGETS), lora_dropout=0.05)
            lm = get_peft_model(lm, lora).base_model.model
            lm.enable_input_require_grads()
        mask = torch.ones(setup.batch, setup.seq_len, dtype=torch.long)
        if setup.padded:
            mask[0, :3] = 0
        ids = torch.ones_like(mask)
        with torch.autocast("cpu", torch.bfloat16, enabled=setup.mixed_precision == "bf16"):
            kept.append(saved_bytes(lm, lambda: lm.model(input_ids=ids, attention_mask=mask, use_cache=False)))  # noqa: B023
    assert facts is not None
    planned = layer_activations(facts.text, setup.tokens, setup)
    if setup.under_autocast:  # and the copies of the weights, which the plan has in a line of their own
        planned += 2 * facts.text.linear_parameters // facts.text.layers
        planned += 2 * trainable_parameters(facts, setup) // facts.text.layers if setup.lora_rank else 0
    return (kept[1] - kept[0]) // 2, planned


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["MHA", "GQA"])
@pytest.mark.parametrize(
    "options",
    [
        {"mixed_precision": "no"},
        {"mixed_precision": "bf16"},
        {"mixed_precision": "no", "dtype": "bfloat16"},
        {"mixed_precision": "no", "padded": True},
        {"mixed_precision": "no", "lora_rank": 4},
        {"mixed_precision": "bf16", "lora_rank": 4},
    ],
    ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()),
)
def test_a_layer_keeps_what_autograd_saves(kv_heads: int, options: dict[str, Any]) -> None:
    setup = Setup(seq_len=64, image_tokens=0, response_tokens=8, batch=2, device="cpu", **options)
    kept, planned = layer_bytes(kv_heads, setup)
    assert planned == pytest.approx(kept, rel=0.01)
    # Control: one fp32 tensor of the hidden size more, of about 20, is seen
    assert planned + setup.tokens * 64 * 4 != pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_a_teacher_weighs_what_is_planned(quantization: str, tmp_path: Path) -> None:
    # Wide enough for the scales, one per 64 weights or one a row, to be the share that they are in real models
    lm = tiny.make_lm(hidden_size=256, intermediate_size=512)
    lm.save_pretrained(tmp_path)
    loaded = load_teacher_model(str(tmp_path), quantization=quantization)
    tensors = [*loaded.parameters(), *(b for name, b in loaded.named_buffers() if "inv_freq" not in name)]
    weighed = sum(t.numel() * t.element_size() for t in tensors)
    weighed += sum(4 * state.absmax.numel() for p in tensors if (state := getattr(p, "quant_state", None)) is not None)
    facts = model_facts(lm.config)
    assert teacher_bytes(facts, quantization, 4) == pytest.approx(weighed, rel=0.01)
    others = {"none", "int8", "nf4"} - {quantization}
    assert all(teacher_bytes(facts, other, 4) != pytest.approx(weighed, rel=0.01) for other in others)  # control


def test_a_larger_vocabulary_makes_the_teacher_grow(small: tuple[ModelFacts, ModelFacts]) -> None:
    teacher = small[1]
    grown = teacher_bytes(teacher, "nf4", 2, teacher.vocab + 10) - teacher_bytes(teacher, "nf4", 2)
    assert grown == 10 * 576 * 2  # tied: one row a token
    assert teacher_bytes(teacher, "nf4", 2, teacher.vocab - 10) == teacher_bytes(teacher, "nf4", 2)


def test_recorded_keys_and_values_are_those_of_a_recording() -> None:
    vlm = tiny.make_vlm()
    setup = Setup(seq_len=12, image_tokens=0, response_tokens=4, batch=3, mixed_precision="no")
    with recording(vlm) as shared, torch.no_grad():
        vlm(input_ids=torch.ones(3, 12, dtype=torch.long))
    assert kv_bytes(model_facts(vlm.config), setup) == shared.nbytes() > 0
    assert kv_bytes(model_facts(vlm.config), replace(setup, seq_len=13)) != shared.nbytes()


def test_lora_trains_what_peft_trains(saved_pair: tuple[Path, Path]) -> None:
    student, _ = read_pair(*map(str, saved_pair))
    adapted = get_peft_model(tiny.make_vlm(), LoraConfig(r=3, target_modules=list(LORA_TARGETS)))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trainable_parameters(student, Setup(lora_rank=3, freeze_vision=False)) == trained
    assert trainable_parameters(student, Setup(lora_rank=4, freeze_vision=False)) != trained
    of_tower = sum(p.numel() for name, p in adapted.named_parameters() if p.requires_grad and ".vision_model." in name)
    assert 0 < of_tower == trained - trainable_parameters(student, Setup(lora_rank=3))


# --------------------------------------------------------------------------------------------------------------------
# Plans
# --------------------------------------------------------------------------------------------------------------------
def test_the_lines_are_the_peak_and_the_peak_is_the_largest_moment(small: tuple[ModelFacts, ModelFacts]) -> None:
    plan = make_plan(*small, Setup())
    assert plan.peak == sum(plan.lines.values()) == plan.moments[plan.moment] == max(plan.moments.values())
    assert len(set(plan.moments.values())) > 1
    assert plan.needed > plan.peak


def test_full_fine_tuning_in_fp32_holds_sixteen_bytes_a_parameter(small: tuple[ModelFacts, ModelFacts]) -> None:
    """Weight, gradient and Adam's two states, by hand; of a sharding engine, divided."""
    setup = Setup(mixed_precision="no", accumulation=2, freeze_vision=False)
    lines = make_plan(*small, setup).lines
    held = lines["weights"] + lines["gradients"] + lines["optimizer states"]
    parameters = small[0].parameters
    head = 4 * small[0].vocab * 576
    assert 16 * parameters <= held <= 16 * parameters + 2 * head
    for engine, divided in (("fsdp2", ("weights", "optimizer states")), ("zero2", ("optimizer states",))):
        lines = make_plan(*small, replace(setup, engine=engine, gpus=4)).lines
        single = make_plan(*small, setup).lines
        for line in ("weights", "optimizer states"):
            assert (lines[line] * 4 == pytest.approx(single[line], rel=1e-6)) == (line in divided), (engine, line)


def test_what_takes_less_takes_less(pairs: dict[str, tuple[ModelFacts, ModelFacts]]) -> None:
    pair = pairs["Qwen/Qwen2.5-VL-7B-Instruct"]
    peak = lambda **options: make_plan(*pair, Setup(**options)).peak  # noqa: E731
    assert peak(gradient_checkpointing=True) < peak(gradient_checkpointing=False)
    assert peak(teacher_quantization="nf4") < peak(teacher_quantization="int8") < peak(teacher_quantization="none")
    assert peak(lora_rank=8) < peak(lora_rank=16) < peak()
    assert peak(optimizer="sgd") < peak(optimizer="adamw_8bit") < peak(optimizer="adamw")
    assert peak(batch=1) < peak(batch=4)
    assert peak() < peak(engine="ddp", gpus=2)  # buckets
    for engine in ("fsdp2", "zero2", "zero3"):
        assert peak(engine=engine, gpus=16) < peak(engine=engine, gpus=2)
    # An unquantised teacher is cut where weights are, a quantised one is not
    for quantization, cut in (("none", True), ("nf4", False)):
        few, many = (
            make_plan(*pair, Setup(engine="fsdp2", gpus=n, teacher_quantization=quantization)).lines["teacher"]
            for n in (2, 16)
        )
        assert (many < few) == cut


def test_the_smallest_set_up_fits_and_a_smaller_one_does_not(pairs: dict[str, tuple[ModelFacts, ModelFacts]]) -> None:
    for name in (SMALL, "HuggingFaceTB/SmolVLM-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct", LARGE):
        plan = smallest_plan(*pairs[name], Setup(gpu_memory=80))
        assert plan is not None and plan.fits
        assert plan.needed <= 80 * GIB
        if plan.setup.gpus > 1:
            fewer = plan.setup.gpus // 2
            for engine in ENGINES:
                if (engine == "single") == (fewer == 1):
                    assert not make_plan(*pairs[name], replace(plan.setup, engine=engine, gpus=fewer)).fits
    assert smallest_plan(*pairs[LARGE], Setup(gpu_memory=8)) is None


# --------------------------------------------------------------------------------------------------------------------
# Cost
# --------------------------------------------------------------------------------------------------------------------
def test_the_cost_of_a_step_tends_to_the_share_of_the_response(small: tuple[ModelFacts, ModelFacts]) -> None:
    """R / (3 T) of the backbone, where head, vision tower and attention weigh nothing."""
    student, teacher = (replace(facts, vocab=0, vision=None) for facts in small)
    light = [
        replace(facts, text=replace(facts.text, heads_width=0)) for facts in (student, teacher)
    ]  # no attention products
    setup = Setup(seq_len=4096, response_tokens=64, gradient_checkpointing=False, kv_sharing="prompt", device="cpu")
    assert step_cost(light[0], light[1], setup) == pytest.approx(1 + 64 / (3 * 4096), rel=1e-9)
    # With checkpointing a step has four passes, with LoRA two
    assert step_cost(light[0], light[1], replace(setup, gradient_checkpointing=True)) == pytest.approx(
        1 + 64 / (4 * 4096), rel=1e-9
    )
    assert step_cost(light[0], light[1], replace(setup, lora_rank=8)) == pytest.approx(1 + 64 / (2 * 4096), rel=1e-9)
    # `vision` computes all text
    text = replace(setup, kv_sharing="vision", kv_source="student", image_tokens=1024)
    assert step_cost(light[0], light[1], text) == pytest.approx(1 + 3072 / (3 * 4096), rel=1e-9)
    # and of the VLM before a forward pass more, whatever the engine: as far as the image tokens, or of whole rows, where it judges too
    assert step_cost(light[0], light[1], replace(text, kv_source=None)) == pytest.approx(
        1 + (1024 + 3072) / (3 * 4096), rel=1e-9
    )
    assert step_cost(light[0], light[1], replace(text, kv_source=None, anchor="before")) == pytest.approx(
        1 + (4096 + 3072) / (3 * 4096), rel=1e-9
    )
    # A second reading is of all text too, and of rows without an image there is none
    twice = replace(text, blind_weight=0.5)
    assert step_cost(light[0], light[1], twice) == pytest.approx(1 + 2 * 3072 / (3 * 4096), rel=1e-9)
    assert step_cost(light[0], light[1], replace(twice, image_tokens=0)) == step_cost(
        light[0], light[1], replace(text, image_tokens=0)
    )
    assert replace(text, on_policy=True).blind_queries == 0 == replace(text, blind_weight=0.0).blind_queries
    split = replace(text, kv_source=None, engine="fsdp2", gpus=2)
    assert step_cost(light[0], light[1], split) == step_cost(light[0], light[1], replace(text, kv_source=None))


def test_a_frozen_tower_is_run_once_and_has_no_gradient(small: tuple[ModelFacts, ModelFacts]) -> None:
    """One pass of it in SFT, and none of the VLM before's; what differs from a student without a tower is that pass alone."""
    setup = Setup(seq_len=512, image_tokens=64, gradient_checkpointing=False, device="cpu", freeze_vision=True)
    student, teacher = small
    blind = replace(student, vision=None)
    base, with_tower = (_step_work(facts, teacher, setup) for facts in (blind, student))
    assert student.vision is not None
    assert with_tower[0] - base[0] == pytest.approx(_tower_work(student, student.vision, setup))
    assert with_tower[1] == pytest.approx(base[1])  # what distilling adds
    trained = _step_work(student, teacher, replace(setup, freeze_vision=False))
    assert trained[0] - base[0] == pytest.approx(3 * (with_tower[0] - base[0]))
    assert trained[1] - base[1] == pytest.approx(with_tower[0] - base[0])
    # In pieces each model runs its own
    pieces = replace(setup, engine="fsdp2", gpus=2)
    assert _step_work(student, teacher, pieces)[1] == pytest.approx(trained[1])


def test_a_frozen_tower_costs_what_was_measured() -> None:
    found = json.loads((ROOT / "benchmarks/results/one_look.json").read_text(encoding="utf-8"))
    shape, arms = found["shape"], found["arms"]
    pair = read_pair("HuggingFaceTB/SmolVLM-256M-Instruct", None)
    setup = Setup(
        **{name: shape[name] for name in ("image_tokens", "response_tokens")},
        seq_len=shape["length"],
        batch=shape["batch_size"],
        device="cpu",
        gradient_checkpointing=False,
    )
    assert step_cost(*pair, setup) == pytest.approx(arms["one_look"]["ratio"], rel=0.05)
    assert arms["one_look"]["ratio_max"] < arms["two_looks"]["ratio_min"]


def test_what_is_frozen_has_no_gradient_no_state_and_no_adapter(small: tuple[ModelFacts, ModelFacts]) -> None:
    student, teacher = small
    for rank in (0, 8):
        setup = Setup(lora_rank=rank, image_tokens=256, response_tokens=64, seq_len=512)
        free, frozen = (replace(setup, freeze_vision=on) for on in (False, True))
        trained = [trainable_parameters(student, one) for one in (free, frozen)]
        assert student.vision is not None
        assert trained[0] - trained[1] == (rank * student.vision.lora_width if rank else student.beside)
        plans = [make_plan(student, teacher, one) for one in (free, frozen)]
        assert (
            plans[1].peak < plans[0].peak and plans[1].lines["optimizer states"] < plans[0].lines["optimizer states"]
        )


def test_the_cost_on_a_gpu_is_what_was_measured_there() -> None:
    """One number (the time of an operation) was taken from the 135M student's step; every other arm and size is a prediction."""
    rows = [
        row
        for name in ("gpu", "gpu_h200")
        for case in json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))["cases"]
        for arm, row in case.get("arms", {}).items()
        if "planned_ratio" in row and (name, arm) != ("gpu", "vision_before")  # measured over whole rows
    ]
    assert len(rows) >= 22
    for row in rows:
        assert 0.9 * row["ratio_min"] < row["planned_ratio"] < 1.1 * row["ratio_max"]
        assert 0.7 < row["planned_seconds"] / row["seconds"] < 1.1
    off = sorted(abs(row["planned_ratio"] / row["ratio"] - 1) for row in rows)
    assert off[len(off) // 2] < 0.04


def test_launches_take_what_they_took_on_the_gpu(pairs: dict[str, tuple[ModelFacts, ModelFacts]]) -> None:
    """SmolVLM-256M has the layers of the 135M student in gpu.json (0.25 s for a step of `full`), whose products take a few milliseconds."""
    pair = next(pair for name, pair in pairs.items() if "256M" in name)
    plan = make_plan(*pair, Setup(kv_sharing="full", kv_source="student", batch=1))
    assert plan.seconds is not None and 0.2 < plan.seconds < 0.32


def test_a_small_student_on_a_gpu_waits_for_its_launches(small: tuple[ModelFacts, ModelFacts]) -> None:
    """A short row of a small model pays for the teacher's launches, a long batch for its products alone."""
    student, teacher = small
    layers = student.text.layers
    short = (
        replace(student, vision=None),
        teacher,
        Setup(seq_len=64, image_tokens=0, response_tokens=16, gradient_checkpointing=False, kv_sharing="prompt"),
    )
    assert step_cost(*short) == pytest.approx(1 + 40 * teacher.text.layers / (120 * layers), rel=1e-9)
    long = Setup(
        seq_len=8192, image_tokens=0, response_tokens=16, batch=512, gradient_checkpointing=False, kv_sharing="prompt"
    )
    assert step_cost(student, teacher, long) == pytest.approx(
        step_cost(student, teacher, replace(long, device="cpu")), rel=1e-3
    )
    assert step_cost(*short[:2], replace(short[2], device="cpu")) < step_cost(*short)


def test_the_seconds_of_a_step_are_its_operations_over_the_speed(
    pairs: dict[str, tuple[ModelFacts, ModelFacts]],
) -> None:
    pair = pairs["Qwen/Qwen2.5-VL-7B-Instruct"]
    setup = Setup(seq_len=4096, image_tokens=0, response_tokens=64, kv_sharing="prompt")
    seconds = step_seconds(*pair, setup)
    assert seconds is not None
    # Forward, again for checkpointing, and twice that backward, through 6.5 G weights of the layers, at 4e14 operations a second
    linear = 4 * 2 * 4096 * pair[0].text.linear_parameters / 4e14
    assert linear < seconds < 1.25 * linear  # and attention, the heads and the teacher
    assert step_seconds(*pair, replace(setup, batch=2)) == pytest.approx(2 * seconds)
    assert step_seconds(*pair, replace(setup, device="cpu")) is None
    assert make_plan(*pair, setup).to_dict()["step_seconds"] == seconds


def test_sharing_more_costs_less(small: tuple[ModelFacts, ModelFacts]) -> None:
    """Batches of 8: of one row, the launches of kernels decide, which are as many for `none` and `vision`."""
    full, prompt, none, vision = (
        step_cost(*small, Setup(kv_sharing=mode, kv_source="student", batch=8, freeze_vision=False))
        for mode in ("full", "prompt", "none", "vision")
    )
    assert 1 < full == prompt < none < vision


# --------------------------------------------------------------------------------------------------------------------
# Errors and the command
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0."),
        ({"lora_rank": -1}, "lora_rank must be at least 0, got -1."),
        ({"seq_len": 100}, "1024 + 256 is more than 100. Raise seq_len or lower them."),
        ({"engine": "fsdp"}, "engine must be one of single, ddp, fsdp2, zero2, zero3; got 'fsdp'."),
        ({"optimizer": "adam"}, "optimizer must be one of adamw, adamw_8bit, sgd; got 'adam'."),
        ({"gpus": 2}, "engine='single' runs on one device, got gpus=2: choose ddp, fsdp2, zero2 or zero3."),
        ({"anchor": "after"}, "anchor must be one of none, before; got 'after'."),
        (
            {"kv_sharing": "images", "engine": "fsdp2", "gpus": 2},
            "runs the teacher whole on every device, and fsdp2 splits it",
        ),
        ({"gpu_memory": 0}, "gpu_memory must be a positive number of GiB, got 0."),
        ({"gpu_memory": float("nan")}, "gpu_memory must be a positive number of GiB, got nan."),
        ({"gpu_memory": float("inf")}, "gpu_memory must be a positive number of GiB, got inf."),
        ({"kv_source": "before", "kv_sharing": "none"}, "with kv_sharing='none' it reads none: leave it out."),
    ],
)
def test_a_set_up_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as error:
        Setup(**options)
    assert message in str(error.value)


def test_the_vlm_before_is_a_copy_of_the_student_in_full_training_alone(small: tuple[ModelFacts, ModelFacts]) -> None:
    """Without the head where it does not speak."""
    student = small[0]
    head = student.vocab * student.text.hidden
    assert not student.tied
    for options, elements in (
        ({}, student.parameters),
        ({"dtype": "bfloat16"}, student.parameters),
        ({"lora_rank": 8}, 0),
        ({"engine": "ddp", "gpus": 2}, student.parameters),
    ):
        options = {"kv_sharing": "prompt", **options}
        without, anchored = (make_plan(*small, Setup(anchor=anchor, **options)) for anchor in ("none", "before"))
        assert anchored.peak - without.peak == anchored.lines["VLM before"] == 2 * elements
        assert anchored.cost > without.cost + 0.1  # a forward pass more, adapter or not
        read = make_plan(
            *small, Setup(kv_source="before", **options)
        )  # one copy and one forward, whatever asks for them
        assert anchored.peak - read.peak == (2 * head if elements else 0) and read.cost == anchored.cost
        both = make_plan(*small, Setup(kv_source="before", anchor="before", **options))
        assert both.peak == anchored.peak and both.cost == anchored.cost
    tied = (replace(student, tied=True), small[1])
    assert make_plan(*tied, Setup(kv_source="before")).lines["VLM before"] == 2 * student.parameters
    assert "VLM before" in str(make_plan(*small, Setup(anchor="before"))) and "VLM before" not in str(without)
    one = make_plan(*small, Setup(anchor="before")).needed / GIB
    found = smallest_plan(*small, Setup(anchor="before", gpu_memory=one - 0.1), (1, 2), ("single", "fsdp2"))
    assert found is not None and found.setup.engine == "fsdp2"


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_where_the_student_is_split_the_vlm_before_is(small: tuple[ModelFacts, ModelFacts], engine: Any) -> None:
    """In pieces; where it judges, its head is gathered for the loss, and for sampling the student is whole."""
    student = small[0]
    plans = {
        name: make_plan(*small, Setup(engine=engine, gpus=4, kv_sharing="prompt", **options))
        for name, options in {
            "none": {"kv_source": "student"},
            "read": {"kv_source": "before"},
            "judge": {"anchor": "before"},
            "sampled": {"kv_source": "student", "on_policy": True},
            "adapter": {"kv_source": "before", "lora_rank": 8},
        }.items()
    }
    piece, head = student.parameters // 4 * 2, student.vocab * student.text.hidden * 2
    before = {name: plan.lines["VLM before"] for name, plan in plans.items()}
    assert before == {"none": 0, "read": piece, "judge": piece + head, "sampled": piece + head, "adapter": 0}
    sampling = plans["sampled"].moments["sampling"]
    whole = make_plan(*small, Setup(kv_sharing="prompt", kv_source="student", on_policy=True)).moments["sampling"]
    standing = ["weights", "optimizer states", "teacher", "VLM before"]
    standing += ["engine buffers"] if engine == "zero3" else []  # FSDP2 gathers the weights that its buffers are
    held = sum(plans["sampled"].lines[line] for line in standing)
    assert sampling == held + student.parameters * 2 + plans["sampled"].sampling_kv
    assert "sampling" not in plans["read"].moments
    assert (
        whole - plans["sampled"].sampling_kv > 1.5 * held
    )  # control: nothing is in pieces there, and nothing gathered


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl"])
def test_layers_without_attention_are_counted(name: str) -> None:
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_config(family_shrunk.tiny(name)).eval()
    student = model_facts(model.config)
    teacher = model_facts(family_shrunk.lm_config(model.config.get_text_config(), other=False))
    ids = torch.randint(5, 300, (2, 40))
    with torch.no_grad(), recording(model) as shared:
        model.base_model(input_ids=ids, use_cache=False)
    shape: dict[str, Any] = {
        "seq_len": 40,
        "image_tokens": 8,
        "response_tokens": 8,
        "mixed_precision": "no",
        "device": "cpu",
    }
    setup = Setup(batch=2, gradient_checkpointing=False, **shape)
    assert kv_bytes(student, setup) == shared.nbytes()
    assert kv_bytes(replace(student, text=replace(student.text, mixers=0)), setup) > shared.nbytes()  # the control
    text = teacher.text
    mixer = next(m for m in model.modules() if hasattr(m, "in_proj") or hasattr(m, "in_proj_qkv"))
    one = sum(p.numel() for n, p in mixer.named_parameters() if n.startswith("conv"))
    if name == "qwen3_5":  # two layers with four heads of 16 x 16; in LFM2 the convolution alone
        one += 3 * 4 * 16 * 16
    assert text.mixers == len(shared.mixer_layers) > 0 and text.mixer_work == one * text.mixers

    def cost(length: int, mode: str, work: int) -> float:
        facts = replace(teacher, text=replace(text, mixer_work=work)), replace(setup, seq_len=length, kv_sharing=mode)
        ours = replace(student, text=replace(student.text, mixer_work=work))
        return step_cost(ours, *facts)

    heavy = (
        10**8
    )  # so that nothing else counts: of a forward and a backward pass, over the whole row or over the queries
    whole, queries = cost(400, "full", heavy) - 1, cost(400, "none", heavy) - 1
    assert whole == pytest.approx(1 / 3, rel=0.05) and queries == pytest.approx(392 / 400 / 3, rel=0.05)
    assert cost(400, "full", 0) - 1 < 0.1


def _on_a_cpu(pair: tuple[ModelFacts, ModelFacts], plan: Plan) -> float:
    """The cost of a step in products alone: a student as small as this waits for its launches on a GPU."""
    return step_cost(*pair, replace(plan.setup, device="cpu", engine="single", gpus=1))


def test_what_is_asked_once_takes_no_memory_and_no_time(small: tuple[ModelFacts, ModelFacts]) -> None:
    student, teacher = small
    read = {"kv_source": "student"}
    live, once = (make_plan(*small, Setup(anchor="before", anchor_cache=cache, **read)) for cache in (False, True))
    without = make_plan(*small, Setup(**read))
    assert once.lines["VLM before"] == 0 and once.peak == without.peak and once.cost == without.cost
    assert once.saved == live.peak - once.peak == 2 * student.parameters and once.cached == 8 * 64 + 4
    assert (live.cached, live.saved) == (0, 0)
    # The teacher: its head stays, and the product with it
    shape = {"kv_sharing": "none", "teacher_quantization": "none", "engine": "ddp", "gpus": 2}
    live, once = (make_plan(*small, Setup(teacher_cache=cache, **shape)) for cache in (False, True))
    head = 2 * student.vocab * teacher.text.hidden
    assert once.lines["teacher"] == head < live.lines["teacher"] and once.cached == 2 * teacher.text.hidden
    assert 1.0 < _on_a_cpu(small, once) < _on_a_cpu(small, live) and once.saved == live.peak - once.peak > 0
    assert "GiB less at the peak; on disk 1,152 bytes per label" in str(once) and "Asked once" not in str(live)
    assert once.to_dict()["saved_by_caches"] == once.saved and "saved_by_caches" not in live.to_dict()
    # With the eyes of the VLM before, both leave; without, rows with images keep the teacher
    both = Setup(kv_sharing="vision", kv_source="before", teacher_cache=True)
    assert make_plan(*small, both).lines["VLM before"] == 0 and not both.asks_before
    assert make_plan(*small, Setup(teacher_cache=True)).lines == make_plan(*small, both).lines, "the trainer's default"
    once, twice = (make_plan(*small, replace(both, blind_weight=weight)) for weight in (0.0, 0.5))
    assert (
        twice.cached == 2 * once.cached == 4 * teacher.text.hidden
        and _on_a_cpu(small, once) < _on_a_cpu(small, twice)  # the head is asked of both
    )
    images = make_plan(*small, Setup(kv_sharing="vision", teacher_cache=True, **read))
    assert images.saved == 0 and "rows with images still ask the teacher" in str(images)
    assert make_plan(*small, Setup(kv_sharing="vision", teacher_cache=True, image_tokens=0, **read)).saved > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"teacher_cache": True, "kv_sharing": "prompt"},
            "with kv_sharing='prompt' the teacher reads the student on every row",
        ),
        ({"anchor_cache": True}, "anchor_cache keeps what the VLM before says: set anchor='before'"),
        ({"anchor_cache": True, "anchor": "before", "on_policy": True}, "On-policy, answers are new in every step"),
        ({"anchor_cache": True, "anchor": "before", "engine": "zero3"}, "anchor_cache asks the whole student"),
        (
            {"teacher_cache": True, "engine": "fsdp2", "gpus": 2},
            "teacher_cache with kv_sharing='vision' needs the whole",
        ),
        ({"anchor_cache_k": 0}, "anchor_cache_k must be at least 1, got 0."),
        ({"blind_weight": 1.0}, "blind_weight must be at least 0 and below 1, got 1.0"),
        ({"blind_weight": 0.5, "kv_sharing": "none"}, "with kv_sharing='none' there is one: leave it out"),
    ],
)
def test_caches_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    test_a_set_up_that_cannot_be_is_refused(options, message)


def test_the_command_plans_sampling(capsys: pytest.CaptureFixture[str]) -> None:
    """On-policy: the VLM before is there, sampling is a moment of its own with K/V of all answers at once, and is not timed."""
    common = ["plan", "--student", SMALL, "--kv_source", "student", "--accumulation", "4", "--json"]
    plans = []
    for more in ([], ["--on_policy", "true"], ["--on_policy", "true", "--lora_rank", "8"]):
        main([*common, *more])
        plans.append(json.loads(capsys.readouterr().out))
    given, sampled, adapter = plans
    assert "sampling_kv" not in given and given["lines"]["VLM before"] == 0
    assert sampled["lines"]["VLM before"] == 2 * sampled["student_parameters"] and adapter["lines"]["VLM before"] == 0
    assert sampled["sampling_kv"] == 4 * sampled["recorded_kv"] > 0
    assert sampled["peak"] - given["peak"] == sampled["lines"]["VLM before"]
    assert sampled["step_cost_over_sft"] > given["step_cost_over_sft"] + 0.1
    main(common[:-1] + ["--on_policy", "true"])
    out = capsys.readouterr().out
    held = f"{sampled['sampling_kv'] / GIB:.2f} GiB of keys and values (4 answers at once)"
    assert held in out and "its seconds are not counted" in out and "whole student" not in out
    assert main(["plan", "--student", SMALL, "--on_policy", "true", "--engine", "zero3", "--gpus", "2"]) == 0
    assert "and the whole student on each device; its seconds" in capsys.readouterr().out


def test_a_vlm_as_teacher_weighs_its_text_half_or_all_of_it(saved_pair: tuple[Path, Path]) -> None:
    vlm, lm = (str(folder) for folder in saved_pair)
    shape = {
        "seq_len": 64,
        "image_tokens": 16,
        "response_tokens": 8,
        "teacher_quantization": "none",
        "mixed_precision": "no",
    }
    student, teacher = read_pair(vlm, vlm)
    half = load_teacher_model(vlm, quantization="none")
    whole = load_teacher_model(vlm, quantization="none", sees=True)
    by_half, by_whole = (make_plan(student, teacher, Setup(kv_sharing=mode, **shape)) for mode in ("prompt", "images"))
    for plan, model in ((by_half, half), (by_whole, whole)):
        assert plan.teacher["none"] == 4 * sum(p.numel() for p in model.parameters())
    assert by_half.teacher["none"] < by_whole.teacher["none"] and by_half.cost < by_whole.cost
    with pytest.raises(PlanError, match="kv_sharing='images' gives the teacher the images themselves"):
        make_plan(student, read_pair(vlm, lm)[1], Setup(kv_sharing="images", **shape))


def test_the_command_prints_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--student", SMALL, "--gpu_memory", "24"]) == 0
    out = capsys.readouterr().out
    assert "Teacher: HuggingFaceTB/SmolLM2-135M-Instruct (nf4), kv_sharing=vision" in out
    assert out.endswith("It fits in memory.\n")
    for line in ("weights", "optimizer states", "gradients", "activations", "teacher"):
        assert f"  {line} " in out
    assert main(["plan", "--student", SMALL, "--gpu_memory", "2"]) == 1
    assert capsys.readouterr().out.endswith("It does not fit in memory.\n")


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str], small: tuple[ModelFacts, ModelFacts]) -> None:
    options = ["--engine", "fsdp2", "--gpus", "2", "--no_gradient_checkpointing", "--batch", "3"]
    assert main(["plan", "--student", SMALL, "--json", *options]) == 0
    plan = make_plan(*small, Setup(engine="fsdp2", gpus=2, gradient_checkpointing=False, batch=3))
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(plan.to_dict()))


def test_the_command_finds_the_smallest_set_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--student", LARGE, "--smallest", "--lora_rank", "16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["setup"]["gpus"] > 1
    assert main(["plan", "--student", LARGE, "--smallest", "--gpu_memory", "8"]) == 1
    assert "no set-up of up to 64 devices of 8 GiB fits." in capsys.readouterr().err


def test_the_command_names_bad_input(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["plan", "--student", SMALL, "--batch", "0"]) == 2
    assert capsys.readouterr().err == "lingudistill: batch must be at least 1, got 0.\n"
    assert main(["plan", "--student", str(tmp_path / "absent"), "--teacher", SMALL]) == 2
    assert "does not exist. Pass a folder that holds a config.json, or a Hub id." in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------------
# What was measured
# --------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def plan_check() -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import plan_check as module
    finally:
        sys.path.pop(0)
    return module


def test_measured_peaks_are_within_fifteen_percent(plan_check: Any) -> None:
    """At the peak and at each moment of a step. The file holds what this code plans, not what an older one did."""
    rows = json.loads((ROOT / "benchmarks/results/plan_check.json").read_text(encoding="utf-8"))["memory"]
    assert len(rows) >= 4
    for name, row in rows.items():
        plan = plan_check.planned(plan_check.SHAPES[name])
        assert plan.peak / 2**20 == pytest.approx(row["planned_mib"], abs=0.1), (
            "run plan_check.py --shapes --json again"
        )
        assert plan.peak / 2**20 == pytest.approx(row["peak_mib"], rel=0.15), name
        planned = plan_check.planned_moments(plan)
        for moment, size in planned.items():
            assert size / 2**20 == pytest.approx(row["moments_mib"][moment], rel=0.15), (name, moment)
    assert (
        plan_check.check_cost()
        == json.loads((ROOT / "benchmarks/results/plan_check.json").read_text(encoding="utf-8"))["cost"]
    ), "step_cost.json or the plan changed: run plan_check.py --shapes --json again"
    # Control: without the activations, some would be off
    without = [
        (row["planned_mib"] - row["planned_lines_mib"]["activations"]) / row["peak_mib"] for row in rows.values()
    ]
    assert any(share < 0.85 for share in without)
