"""accelerate's engines: one process, DDP and FSDP2 train the same student, and nobody waits for anybody.

Each launch is a real `accelerate launch` of two CPU processes, which trains every scenario of `engine_worker.py` in turn.
The one process that they are compared to is this one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine_worker
import pytest
import tiny
import torch
import yaml
from planning import KV_SHARING_MODES, plan_queries, prepare_teacher
from test_trainer import counted

from hf_lingudistill import LinguDistillConfig, engines
from hf_lingudistill._internals import loaded_by_every_process
from hf_lingudistill.engines import SameModules, blank_image, is_teacher_sharded, sharding_of, vision_on
from hf_lingudistill.teacher import on_device

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "examples" / "accelerate_configs"
TOLERANCE = 1e-5
CONTROLS = {"wrong normalisation"}
BF16_TOLERANCE = 0.02  # of the losses: FSDP2 rounds weights and gradients where autocast rounds products
JOBS = [
    *engine_worker.SCENARIOS,
    *engine_worker.UNEVEN,
    "prompt@2",
    "prompt@4",
    "untied@2",
    "lora@4",
    "on-policy vision@2",
]


def launch(
    engine: str, folder: Path, jobs: list[str], *, timeout: float = 900, gpus: bool = False
) -> subprocess.CompletedProcess[str]:
    """Two processes, on the CPU unless told otherwise; the port is free, so that launches do not meet."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({} if gpus else {"CUDA_VISIBLE_DEVICES": ""})}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{engine}.yaml")]
    command += ["--main_process_port", "0", str(ROOT / "tests" / "engine_worker.py"), str(folder), *jobs]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, cwd=ROOT)


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def launched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Job -> what two processes under an engine made of it."""
    folder = tmp_path_factory.mktemp(request.param)
    # A compiled student that samples is refused under DDP: see test_on_policy.py
    left_out = (
        engine_worker.REPLICATED if request.param == "fsdp2" else {"the first process's weights", "on-policy compiled"}
    )
    jobs = [job for job in JOBS if job not in left_out]
    run = launch(request.param, folder, jobs)
    assert run.returncode == 0, run.stderr[-4000:]
    results = {job: torch.load(folder / f"{job}.pt") for job in jobs}
    return {"engine": request.param, **results}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Job -> what one process made of it."""
    folder, known = tmp_path_factory.mktemp("single"), {}

    def run(job: str) -> dict[str, Any]:
        if job not in known:
            name, _, accumulation = job.partition("@")
            known[job] = engine_worker.run(folder, name, accumulation=int(accumulation or 1))
        return known[job]

    return run


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The largest relative difference of losses (step by step) and weights (tensor by tensor)."""
    assert len(ours["losses"]) == len(theirs["losses"]) == engine_worker.STEPS
    assert ours["weights"].keys() == theirs["weights"].keys()
    gaps = [abs(a - b) / abs(b) for a, b in zip(ours["losses"], theirs["losses"], strict=True)]
    for name, weight in theirs["weights"].items():
        # A bias of keys has no gradient but rounding, and stays below any size that matters
        gaps.append(float((ours["weights"][name] - weight).norm() / weight.norm().clamp(min=1e-2)))
    return max(gaps)


@pytest.mark.slow
def test_two_processes_train_as_one(launched: dict[str, Any], single: Callable[[str], dict[str, Any]]) -> None:
    assert launched["prompt"]["engine"].endswith({"ddp": "MULTI_CPU", "fsdp2": "FSDP"}[launched["engine"]])
    gaps = {}
    for job in launched.keys() - {"engine"}:
        if job not in CONTROLS | {"bf16"} | engine_worker.UNEVEN.keys():
            gaps[job] = difference(launched[job], single(job.partition("@")[0]))
    assert not {job: gap for job, gap in gaps.items() if gap > TOLERANCE}
    assert launched["bf16"]["losses"] == pytest.approx(single("bf16")["losses"], rel=BF16_TOLERANCE)


@pytest.mark.slow
def test_control_a_loss_over_local_labels_is_found_out(
    launched: dict[str, Any], single: Callable[[str], dict[str, Any]]
) -> None:
    """Also that the scenarios differ: a comparison of one run with itself would pass anything."""
    assert difference(launched["wrong normalisation"], single("prompt")) > 100 * TOLERANCE
    for name in ("full", "vision", "none", "every token", "quantised teacher", *on_policy_of(launched)):
        assert difference(launched[name], single("prompt")) > 100 * TOLERANCE, name


@pytest.mark.slow
def test_the_vlm_before_is_read_under_every_engine(
    launched: dict[str, Any], single: Callable[[str], dict[str, Any]]
) -> None:
    """The control of the scenarios about it: the teacher that reads it is another one than that which reads the student."""
    assert difference(launched["default"], launched["the student's KV"]) > 10 * TOLERANCE
    assert difference(launched["default"], single("default")) < TOLERANCE
    assert difference(launched["default"], launched["read twice"]) > 10 * TOLERANCE


@pytest.mark.slow
def test_processes_whose_answers_differ_in_length_do_not_wait_for_each_other(launched: dict[str, Any]) -> None:
    """Where FSDP2 gathers weights anew for every token, the one with longer answers waits forever."""
    lengths = [entry["completions/mean_length"] for entry in launched["uneven answers"]["logs"] if "loss" in entry]
    # At most 2 tokens on one process and 6 on the other; a mean above 3 tells that these were written
    assert len(lengths) == engine_worker.STEPS and all(3 < length <= 4 for length in lengths)


def on_policy_of(launched: dict[str, Any]) -> list[str]:
    """Without an adapter, whose weights have other names."""
    return [name for name in launched if name.startswith("on-policy") and "lora" not in name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prompt", "untied", "lora"])
def test_accumulation_changes_nothing_on_one_process(single: Callable[[str], dict[str, Any]], name: str) -> None:
    for accumulation in (2, 4):
        assert difference(single(f"{name}@{accumulation}"), single(name)) < TOLERANCE


@pytest.mark.slow
def test_the_head_moves_as_on_one_process(launched: dict[str, Any], single: Callable[[str], dict[str, Any]]) -> None:
    """Neither lost nor doubled: an untied head has no other gradient than that of its own use."""
    name, start = "lm_head.weight", tiny.make_vlm(0, tie_word_embeddings=False).state_dict()
    moved, expected = (result["weights"][name] - start[name] for result in (launched["untied"], single("untied")))
    assert expected.norm() > 0.01
    assert float((moved - expected).norm() / expected.norm()) < TOLERANCE


@pytest.mark.slow
def test_a_teacher_that_was_asked_before_by_two_processes_is_the_live_one(
    launched: dict[str, Any], single: Callable[[str], dict[str, Any]]
) -> None:
    assert difference(launched["cached teacher"], single("none")) < TOLERANCE
    assert launched["cached teacher"]["teacher"]["bytes"] < single("none")["teacher"]["bytes"]


@pytest.mark.slow
def test_evaluation_is_that_of_one_process(launched: dict[str, Any], single: Callable[[str], dict[str, Any]]) -> None:
    for name in ("evaluation", "untied evaluation", "on-policy evaluation"):
        ours, theirs = (
            [entry["eval_loss"] for entry in result["logs"] if "eval_loss" in entry]
            for result in (launched[name], single(name))
        )
        assert ours == pytest.approx(theirs, rel=TOLERANCE) and len(ours) == engine_worker.STEPS


@pytest.mark.slow
def test_teacher_is_sharded_where_the_engine_shards_and_it_is_not_quantised(
    launched: dict[str, Any], single: Callable[[str], dict[str, Any]]
) -> None:
    jobs = launched.keys() - {"engine"}
    sharded = {job for job in jobs if launched[job]["teacher"]["sharded"]}
    if launched["engine"] == "ddp":
        assert not sharded
        return
    assert jobs - sharded == {"quantised teacher", "replicated teacher", "cached teacher", "anchored, untied"}
    for name in ("loaded teacher", "sharded untied teacher"):
        whole, piece = single(name)["teacher"]["bytes"], launched[name]["teacher"]["bytes"]
        assert piece == pytest.approx(whole / 2, rel=0.02), name


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_process_that_is_killed_ends_the_run_within_a_minute(tmp_path: Path, engine: str) -> None:
    run = launch(engine, tmp_path, ["killed"], timeout=600)
    ended = time.time()
    killed = re.search(r"killed at ([\d.]+)", run.stdout)
    assert killed, run.stderr[-4000:]
    assert run.returncode != 0 and "SIGKILL" in run.stderr
    assert ended - float(killed[1]) < 60


@pytest.mark.slow
def test_control_without_placeholders_a_process_without_images_breaks_the_step(tmp_path: Path) -> None:
    run = launch("fsdp2", tmp_path, ["no placeholder"], timeout=600)
    assert run.returncode != 0 and not (tmp_path / "no placeholder.pt").exists()


# --------------------------------------------------------------------------------------------------------------------
# Parts, on one process
# --------------------------------------------------------------------------------------------------------------------
def accelerator(kind: str, version: int = 2, stage: int = 3) -> Any:
    """What `sharding_of` reads of an `Accelerator`."""
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage))
    return SimpleNamespace(distributed_type=SimpleNamespace(value=kind), is_fsdp2=version == 2, state=state)


@pytest.mark.parametrize(
    ("kind", "stage", "expected"),
    [("NO", 0, None), ("MULTI_GPU", 0, None), ("FSDP", 0, "fsdp2"), ("DEEPSPEED", 2, None), ("DEEPSPEED", 3, "zero3")],
)
def test_engines_that_shard_are_told_from_those_that_replicate(kind: str, stage: int, expected: str | None) -> None:
    assert sharding_of(accelerator(kind, stage=stage)) == expected


def test_fsdp1_is_refused() -> None:
    with pytest.raises(ValueError, match="FSDP version 1 is not supported: set fsdp_version: 2"):
        sharding_of(accelerator("FSDP", version=1))


@pytest.mark.parametrize(
    ("teacher_sharding", "quantised", "sharding", "expected"),
    [
        ("auto", False, "fsdp2", True),
        ("auto", False, "zero3", True),
        ("auto", True, "fsdp2", False),
        ("auto", False, None, False),
        ("replicate", False, "fsdp2", False),
        ("shard", False, "fsdp2", True),
    ],
)
def test_teacher_sharding_is_resolved(teacher_sharding: str, quantised: bool, sharding: Any, expected: bool) -> None:
    assert is_teacher_sharded(teacher_sharding, quantised=quantised, sharding=sharding) is expected


@pytest.mark.parametrize(
    ("quantised", "sharding", "sentence"),
    [(False, None, "needs an engine that shards weights"), (True, "fsdp2", "cannot shard a quantised teacher")],
)
def test_sharding_that_cannot_be_had_is_refused(quantised: bool, sharding: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        is_teacher_sharded("shard", quantised=quantised, sharding=sharding)


def test_offload_of_an_int8_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="teacher_offload='cpu' cannot free an int8 teacher"):
        LinguDistillConfig(output_dir=str(tmp_path), teacher_offload="cpu", teacher_quantization="int8")


def test_an_offloaded_teacher_comes_for_the_pass_and_goes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = prepare_teacher(tiny.make_lm(1), tiny.make_vlm(0), shared_vocab_size=300, exact_vocab=True)
    visited: list[str] = []
    move = torch.nn.Module.to
    monkeypatch.setattr(
        torch.nn.Module, "to", lambda self, device: (visited.append(str(device)), move(self, device))[1]
    )
    with on_device(teacher, torch.device("cpu", 0), offload=True) as head:
        assert visited == ["cpu:0"]
        assert torch.equal(head.weight, teacher.head.weight) and head.weight is not teacher.head.weight
    assert visited == ["cpu:0", "cpu"]
    with on_device(teacher, torch.device("cpu"), offload=False) as head:
        assert head is teacher.head
    assert visited == ["cpu:0", "cpu"]


@pytest.mark.gpu
def test_an_offloaded_teacher_leaves_the_device() -> None:
    teacher = prepare_teacher(tiny.make_lm(1), tiny.make_vlm(0), shared_vocab_size=300, exact_vocab=True)
    before = torch.cuda.memory_allocated()
    with on_device(teacher, torch.device("cuda"), offload=True) as head:
        assert torch.cuda.memory_allocated() - before >= teacher.footprint
    assert 0 < torch.cuda.memory_allocated() - before < teacher.footprint  # the head, until the loss is done with it
    del head
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("kv_sharing", KV_SHARING_MODES)
def test_a_placeholder_asks_for_one_position_of_a_batch_without_any(kv_sharing: Any) -> None:
    ids = torch.arange(1, 9).reshape(2, 4)
    marks, arguments = torch.zeros(2).bool(), {"kv_sharing": kv_sharing, "shared_vocab_size": 300}
    empty = plan_queries(ids, ids, marks, **arguments)
    plan = plan_queries(ids, ids, marks, **arguments, at_least_one=True)
    assert empty.num_queries == 0 and plan.num_queries == 1
    assert plan.num_loss == empty.num_loss == 0
    # a batch that asks anyway is left alone
    asked = plan_queries(ids, ids, **arguments, at_least_one=True)
    assert torch.equal(asked.positions, plan_queries(ids, ids, **arguments).positions)


def test_a_blank_image_reaches_every_weight_of_the_vision_tower_and_changes_no_logit(make_trainer: Any) -> None:
    trainer = make_trainer(train_sampling_strategy="sequential")
    student = trainer.model
    image = blank_image(trainer.data_collator.inner, student)
    assert "pixel_values" in image
    text = {"input_ids": torch.arange(3, 13)[None], "attention_mask": torch.ones(1, 10, dtype=torch.long)}
    plain = student(**text).logits
    with vision_on(image, student):
        logits = student(**text).logits
    assert torch.equal(logits, plain)
    logits.sum().backward()
    vision = [p for name, p in student.named_parameters() if "vision_model" in name or "connector" in name]
    assert vision and all(p.grad is not None and not p.grad.any() for p in vision)
    student.zero_grad()
    student(**text).logits.sum().backward()  # control, and the hook is gone
    assert all(p.grad is None for p in vision)


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_where_an_unused_weight_keeps_its_last_gradient_all_are_used(
    make_trainer: Any, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """Of a step of text alone, DeepSpeed's ZeRO-3 applies the gradient that the tower had in the step before."""
    trainer = make_trainer(train_sampling_strategy="sequential")
    student, image = trainer.model.train(), blank_image(trainer.data_collator.inner, trainer.model)
    text = {"input_ids": torch.arange(3, 13)[None], "attention_mask": torch.ones(1, 10, dtype=torch.long)}
    monkeypatch.setattr(engines, "sharding_of", lambda _: engine)

    def gradients_of_the_tower() -> list[Any]:
        same = SameModules(student, image, trainer.accelerator)
        same.look_at([text])
        student.zero_grad()
        with same.for_batch(text):
            student(**text).logits.sum().backward()
        return [p.grad for name, p in student.named_parameters() if "vision_model" in name or "connector" in name]

    found = gradients_of_the_tower()
    assert found and all((p is not None and not p.any()) if engine == "zero3" else p is None for p in found)
    for name, weight in student.named_parameters():
        weight.requires_grad_("vision_model" not in name and "connector" not in name)
    with counted(student.model.vision_model) as calls:
        assert (
            all(p is None for p in gradients_of_the_tower()) and not calls
        )  # nothing of a frozen one is left to apply


def test_every_process_loads_the_teacher_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with loaded_by_every_process():
        assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"


@pytest.mark.parametrize("name", ["single", "ddp", "fsdp2", "zero2", "zero3"])
def test_accelerate_reads_its_config(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    kinds = {"single": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert config.distributed_type == kinds[name]
    assert yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["mixed_precision"] == "no"


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_two_gpus_train_as_one_process(tmp_path: Path, single: Callable[[str], dict[str, Any]], engine: str) -> None:
    """Two CUDA devices; DeepSpeed for its two engines."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    jobs = ["prompt", "untied", "loaded teacher", "offloaded teacher"]
    run = launch(engine, tmp_path, jobs, gpus=True)
    assert run.returncode == 0, run.stderr[-4000:]
    for job in jobs:
        # fp32 kernels of a GPU add up in another order
        assert difference(torch.load(tmp_path / f"{job}.pt"), single(job)) < 1e-3, job
