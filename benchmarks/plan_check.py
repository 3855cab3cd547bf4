"""`lingudistill plan` against measured peaks: is the memory model right, and is the step's cost?

    python benchmarks/plan_check.py --json benchmarks/results/plan_check.json      # ~10 min on 1 CPU core

For each shape a fresh process makes a SmolVLM and its LM with random weights, trains two steps with `LinguDistillTrainer`
and reports the high-water mark of its resident memory over those steps, less what was resident before the models were
made (libraries, and one step of a tiny model that brings in whatever loads late). The plan says what the tensors take; the
two are compared, at the peak and at each moment of the step. `tuned` processes hand each freed block of 64 KiB back to the system, so that resident memory is that of live
tensors; with `--both_allocators`, a second process runs the C library's allocator as it is, and shows what that keeps.

The step's cost is compared with benchmarks/results/step_cost.json, which is not measured again.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from accelerate import DistributedType, PartialState
from harness import be_quiet, write_result
from peft import LoraConfig
from PIL import Image
from step_cost import EXTRA, TEMPLATE, make_tokenizer
from transformers import (
    Idefics3Processor,
    LlamaConfig,
    LlamaForCausalLM,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

import hf_lingudistill.step
from hf_lingudistill import LinguDistillConfig, LinguDistillTrainer
from hf_lingudistill.labs.plan import LORA_TARGETS, Plan, Setup, make_plan, model_facts
from hf_lingudistill.student_kv import SharedKV

HERE = Path(__file__).resolve().parent
MIB = 2**20
FORWARD, TEACHER, LOSS = "the student's forward pass", "the teacher's pass", "the loss"
# No function returns between the last two moments of the plan
LAYERS, END, UPDATE = "the backward pass of the layers", "the end of the backward pass", "the update"
MEASURED = ("peak_mib", "moments_mib", "models_mib", "before_mib", "default_allocator_mib")
TUNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


@dataclass(frozen=True)
class Shape:
    """Models and a set-up. side: of the image, in image tokens. shuffle: patches a side that become one image token."""

    layers: int = 8
    hidden: int = 512
    intermediate: int = 1536
    heads: int = 8
    kv_heads: int = 8
    vocab: int = 16384
    tied: bool = True
    vision_hidden: int = 192
    vision_layers: int = 2
    side: int = 16
    shuffle: int = 1
    seq_len: int = 768
    response: int = 64
    batch: int = 1
    checkpointing: bool = False
    accumulation: int = 1
    bf16: bool = False
    lora_rank: int = 0
    quantization: str = "nf4"
    kv_sharing: str = "prompt"
    padded: bool = False
    frozen: bool = False  # the vision tower
    engine: str = "single"  # or ddp or fsdp2, on two processes

    @property
    def processes(self) -> int:
        return 1 if self.engine == "single" else 2

    @property
    def pixels(self) -> int:
        """A side of the image; a patch has 16."""
        return self.side * self.shuffle * 16

    @property
    def setup(self) -> Setup:
        return Setup(
            seq_len=self.seq_len,
            image_tokens=self.side**2,
            response_tokens=self.response,
            batch=self.batch,
            dtype="float32",
            mixed_precision="bf16" if self.bf16 else "no",
            gradient_checkpointing=self.checkpointing,
            accumulation=self.accumulation,
            lora_rank=self.lora_rank,
            teacher_quantization=self.quantization,
            kv_sharing=self.kv_sharing,
            kv_source="student",
            padded=self.padded,
            engine=self.engine,
            gpus=self.processes,
            device="cpu",
            freeze_vision=self.frozen,
        )


SHAPES = {
    "base": Shape(),
    "wide": Shape(layers=4, hidden=1024, intermediate=4096, heads=16, kv_heads=4, seq_len=512),
    "deep, checkpointing": Shape(layers=32, hidden=384, intermediate=1024, heads=6, kv_heads=2, checkpointing=True),
    "long, full": Shape(seq_len=3072, side=40, response=256, kv_sharing="full", quantization="none"),
    "long, checkpointing": Shape(layers=16, seq_len=3072, side=40, checkpointing=True, kv_sharing="full"),
    "batch of 8, none": Shape(batch=8, seq_len=384, response=96, kv_sharing="none", quantization="int8"),
    "batch of 4, vision": Shape(batch=4, seq_len=512, kv_sharing="vision", kv_heads=2, accumulation=2),
    "padded batch of 4": Shape(batch=4, seq_len=512, kv_heads=2, padded=True),
    "large vocabulary, untied": Shape(layers=4, vocab=65536, tied=False, seq_len=512, response=128),
    "vision tower": Shape(layers=4, vision_hidden=512, vision_layers=12, shuffle=2, seq_len=512),
    "vision tower, frozen": Shape(layers=4, vision_hidden=512, vision_layers=12, shuffle=2, seq_len=512, frozen=True),
    "LoRA": Shape(layers=12, hidden=768, intermediate=2048, heads=12, kv_heads=4, lora_rank=16),
    "bf16 autocast": Shape(bf16=True),
    "bf16 autocast, checkpointing": Shape(layers=24, bf16=True, checkpointing=True, seq_len=1536, side=28),
    "base, DDP on two processes": Shape(engine="ddp"),
    "base, FSDP2 on two processes": Shape(engine="fsdp2"),
}


def make_configs(shape: Shape) -> tuple[SmolVLMConfig, LlamaConfig]:
    """Of the student and of its LM. The student has `EXTRA` tokens more."""
    text = dict(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=8192,
        pad_token_id=0,
        eos_token_id=2,
    )
    student = SmolVLMConfig(
        text_config=LlamaConfig(vocab_size=shape.vocab + len(EXTRA), **text).to_dict(),
        vision_config=dict(
            hidden_size=shape.vision_hidden,
            intermediate_size=4 * shape.vision_hidden,
            num_hidden_layers=shape.vision_layers,
            num_attention_heads=max(1, shape.vision_hidden // 64),
            image_size=shape.pixels,
            patch_size=16,
        ),
        image_token_id=shape.vocab,
        scale_factor=shape.shuffle,
        tie_word_embeddings=shape.tied,
        pad_token_id=0,
    )
    return student, LlamaConfig(vocab_size=shape.vocab, **text)


def planned(shape: Shape) -> Plan:
    student, teacher = make_configs(shape)
    return make_plan(model_facts(student, "vlm"), model_facts(teacher, "lm"), shape.setup)


def planned_moments(plan: Plan) -> dict[str, int]:
    """Of a plan, by the windows that `Moments` measures."""
    moments = dict(plan.moments)
    moments[LAYERS] = max(moments[LAYERS], moments.pop(END))
    return moments


def make_models(folder: Path, shape: Shape) -> None:
    """The student (processor included) in `vlm` and its LM in `lm`."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(shape.vocab, extra=True)
    student, teacher = make_configs(shape)
    assert tokenizer.convert_tokens_to_ids("<image>") == student.image_token_id
    LlamaForCausalLM(teacher).save_pretrained(folder / "lm")
    make_tokenizer(shape.vocab, extra=False).save_pretrained(folder / "lm")
    SmolVLMForConditionalGeneration(student).save_pretrained(folder / "vlm")
    Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(
            size={"longest_edge": shape.pixels},
            max_image_size={"longest_edge": shape.pixels},
            do_image_splitting=False,
        ),
        tokenizer=tokenizer,
        image_seq_len=shape.side**2,
        chat_template=TEMPLATE,
    ).save_pretrained(folder / "vlm")


def make_dataset(shape: Shape) -> datasets.Dataset:
    """`batch` rows of `seq_len` tokens; with `padded`, all but the first a few shorter."""
    rng = np.random.default_rng(0)
    prompt_words = shape.seq_len - shape.side**2 - shape.response - 8  # the template's own tokens, as in step_cost.py

    def words(count: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(0, 10000, count))

    rows = [
        {
            "prompt": [{"role": "user", "content": words(prompt_words - (8 if shape.padded and index else 0))}],
            "completion": [{"role": "assistant", "content": words(shape.response - 1)}],
            "images": [Image.fromarray(rng.integers(0, 255, (shape.pixels, shape.pixels, 3), dtype=np.uint8))],
        }
        for index in range(shape.batch)
    ] * (shape.accumulation * shape.processes)
    message = datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})
    features = datasets.Features(prompt=message, completion=message, images=datasets.List(datasets.Image()))
    return datasets.Dataset.from_list(rows, features=features)


def make_trainer(folder: Path, shape: Shape, steps: int) -> LinguDistillTrainer:
    config = LinguDistillConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=shape.batch,
        gradient_accumulation_steps=shape.accumulation,
        max_steps=steps,
        activation_checkpointing=shape.checkpointing,
        max_length=None,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=shape.bf16,
        teacher_model_name_or_path=str(folder / "lm"),
        teacher_quantization=shape.quantization,
        kv_sharing=shape.kv_sharing,
        kv_source="student",
        distill_tokens="all",
        freeze_vision=shape.frozen,
    )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        assert config.device.type == "cpu"  # the property joins the process group
        # beside no accelerator accelerate runs DDP in place of FSDP: tell it that there is one
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    lora = None
    if shape.lora_rank:
        lora = LoraConfig(r=shape.lora_rank, target_modules=list(LORA_TARGETS), lora_dropout=0.05)
    return LinguDistillTrainer(
        model=str(folder / "vlm"), args=config, train_dataset=make_dataset(shape), peft_config=lora
    )


def unmap(trainer: LinguDistillTrainer) -> None:
    """Give student and teacher memory of their own: on a CPU, loaded weights are pages of the checkpoint's file, of which one
    small tensor keeps all resident, whatever was quantised since."""
    for model in (trainer.model, trainer.teacher.model):
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.clone()


def resident(field: str) -> float:
    """VmRSS or VmHWM of this process in MiB."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1024


class Moments:
    """The high-water mark of each moment of a step, in the plan's words: resident memory is read, and its mark starts anew,
    when the function that ends the moment returns. The last step's values stay."""

    def __init__(self, before: float) -> None:
        self.before = before
        self.peaks: dict[str, float] = {}

    def end(self, moment: str) -> None:
        self.peaks[moment] = resident("VmHWM") - self.before
        Path("/proc/self/clear_refs").write_text("5")

    def ended_by(self, function: Callable[..., Any], moment: str) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            self.end(moment)
            return result

        return wrapped

    def watch(self, trainer: LinguDistillTrainer) -> None:
        training_step = trainer.training_step

        def begun(*args: Any, **kwargs: Any) -> Any:
            self.end(UPDATE)  # of the step before, whose gradients are freed by now
            return training_step(*args, **kwargs)

        trainer.training_step = begun
        step = trainer.step
        step._backbone = self.ended_by(step._backbone, FORWARD)  # type: ignore[method-assign]
        SharedKV.release = self.ended_by(SharedKV.release, TEACHER)  # type: ignore[method-assign]
        hf_lingudistill.step.score = self.ended_by(hf_lingudistill.step.score, LOSS)
        accelerator = trainer.accelerator
        accelerator.backward = self.ended_by(accelerator.backward, LAYERS)


def measure(folder: Path, shape: Shape) -> dict[str, Any]:
    """Two steps of `shape` in this process, whose models are in `folder`."""
    with tempfile.TemporaryDirectory() as tiny_folder:
        tiny = Shape(
            layers=2, hidden=64, intermediate=128, heads=1, kv_heads=1, vocab=512, side=2, seq_len=64, response=8
        )
        tiny = Shape(**{**asdict(tiny), "quantization": shape.quantization, "lora_rank": min(shape.lora_rank, 2)})
        make_models(Path(tiny_folder), tiny)
        make_trainer(Path(tiny_folder), tiny, steps=1).train()
    gc.collect()
    before = resident("VmRSS")
    trainer = make_trainer(folder, shape, steps=2)
    unmap(trainer)
    gc.collect()
    length = next(iter(trainer.get_train_dataloader()))["input_ids"].shape
    assert tuple(length) == (shape.batch, shape.seq_len), (
        f"expected {shape.batch} x {shape.seq_len}, got {tuple(length)}"
    )
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew: loading is not the step
    models_mib = resident("VmRSS") - before
    moments = Moments(before)
    moments.watch(trainer)
    trainer.train()
    moments.end(UPDATE)
    peak = max(moments.peaks.values())
    return {"peak_mib": peak, "moments_mib": moments.peaks, "models_mib": models_mib, "before_mib": before}


def measured(folder: Path, name: str, environment: dict[str, str]) -> dict[str, Any]:
    """`measure` in a fresh process, or in two, of which the first answers."""
    command = [sys.executable, __file__, "--_measure", name, "--_folder", str(folder)]
    if SHAPES[name].processes > 1:
        config = HERE.parent / f"examples/accelerate_configs/{SHAPES[name].engine}.yaml"
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        command = [*launcher, "--main_process_port", "0", *command[1:]]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if result.returncode:
        raise RuntimeError(f"The measurement of {name!r} failed:\n{result.stderr[-3000:]}")
    answers = [line for line in result.stdout.splitlines() if line.startswith('{"peak_mib"')]
    return json.loads(answers[0])  # type: ignore[no-any-return]


def check_memory(name: str, both_allocators: bool) -> dict[str, Any]:
    """Measure one shape and compare."""
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        make_models(folder, SHAPES[name])
        row = measured(folder, name, TUNED)
        if both_allocators:
            row["default_allocator_mib"] = measured(folder, name, {})["peak_mib"]
    return compared(name, row)


def compared(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row of measurements with what this version of the plan says beside them."""
    plan = planned(SHAPES[name])
    row = {key: value for key, value in row.items() if key in MEASURED}
    row["planned_mib"] = plan.peak / MIB
    row["error"] = row["planned_mib"] / row["peak_mib"] - 1
    row["planned_moments_mib"] = {moment: size / MIB for moment, size in planned_moments(plan).items()}
    row["planned_lines_mib"] = {line: size / MIB for line, size in plan.lines.items() if size}
    return {
        "shape": asdict(SHAPES[name]),
        "parameters": plan.student.parameters,
        "moment": plan.moment,
        **json.loads(json.dumps(row), parse_float=lambda text: round(float(text), 4)),
    }


def check_cost() -> dict[str, Any]:
    """The plan's cost of a step beside the medians of step_cost.json."""
    result = json.loads((HERE / "results/step_cost.json").read_text(encoding="utf-8"))
    shape = result["shape"]
    # The models of step_cost.py
    vlm, lm = make_configs(Shape(30, 576, 1536, heads=9, kv_heads=3, vocab=49152, vision_hidden=192, side=28))
    vlm.vision_config.intermediate_size = 384
    student, teacher = model_facts(vlm), model_facts(lm)
    rows = {}
    for arm in ("full", "prompt", "vision", "vision_before", "vision_before_twice", "none", "inputs"):
        if arm not in result["arms"]:
            continue
        setup = Setup(
            seq_len=shape["length"],
            image_tokens=shape["image_tokens"],
            response_tokens=shape["response_tokens"],
            batch=shape["batch_size"],
            mixed_precision="no",
            gradient_checkpointing=shape["gradient_checkpointing"],
            teacher_quantization=shape["teacher_quantization"],
            kv_sharing=arm.partition("_")[0],
            kv_source="before" if "_before" in arm else "student",
            blind_weight=0.5 if arm.endswith("_twice") else 0.0,
            device="cpu",
            freeze_vision=False,
        )
        row = result["arms"][arm]
        rows[arm] = {
            "planned": round(make_plan(student, teacher, setup).cost, 4),
            **{key: round(row[key], 4) for key in ("ratio", "ratio_min", "ratio_max")},
        }
    return rows


def write(path: Path, rows: dict[str, Any]) -> None:
    result = {
        "machine": {
            "device": f"CPU, {torch.get_num_threads()} thread(s)",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "memory": {name: rows[name] for name in SHAPES if name in rows},
        "cost": check_cost(),
    }
    write_result(result, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--json", type=Path, help="write the figures to this file; measurements it holds stay, and are compared again"
    )
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=SHAPES, metavar="NAME")
    parser.add_argument("--both_allocators", action="store_true", help="also with the C library's allocator as it is")
    parser.add_argument("--_measure", choices=SHAPES, help=argparse.SUPPRESS)
    parser.add_argument("--_folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    be_quiet()
    if args._measure:
        print("\n" + json.dumps(measure(args._folder, SHAPES[args._measure])))
        return
    rows = {}
    if args.json and args.json.is_file():
        rows = json.loads(args.json.read_text(encoding="utf-8"))["memory"]
        rows = {name: compared(name, row) for name, row in rows.items()}
        write(args.json, rows)
    print(f"{'shape':<30} {'planned':>8} {'measured':>8} {'error':>7} {'default':>8}  MiB")
    for name in args.shapes:
        row = rows[name] = check_memory(name, args.both_allocators)
        print(
            f"{name:<30} {row['planned_mib']:8.0f} {row['peak_mib']:8.0f} {row['error']:+7.1%} "
            f"{row.get('default_allocator_mib', float('nan')):8.0f}  {row['moment']}",
            flush=True,
        )
        if args.json:  # after each, so that what was measured stays
            write(args.json, rows)
    for arm, row in check_cost().items():
        print(f"cost {arm:<8} planned {row['planned']:.3f}, measured {row['ratio']:.3f}")


if __name__ == "__main__":
    main()
