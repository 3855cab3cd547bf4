"""What a step costs where the vision tower is frozen: the VLM before is given the student's image features, and its tower is not run.

    python benchmarks/one_look.py --json benchmarks/results/one_look.json        # about 10 minutes on one CPU core

A student of SmolVLM-256M's shape (SigLIP tower of 93M parameters over 512 x 512 pixels, 64 image tokens, LM of 135M; random weights) and one
row of 256 tokens, 64 of them response. Arms, each a whole optimizer step, interleaved round by round:

    sft           TRL's step with our head over the labelled positions alone, tower frozen
    one_look      the default on top of it: image features are shared
    two_looks     the same with a tower run by each, as it was before
    sft_trained, default_trained   with a tower that is trained, where nothing can be shared

Ratios are medians of paired rounds, each to the `sft` of its tower; on a CPU of CPU time, on CUDA of synchronised wall time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import step_cost
import torch
from harness import be_quiet, machine_facts, write_result
from step_cost import EXTRA, SMOLLM2_135M, TEMPLATE, Stepper, make_configs, make_dataset, make_tokenizer, run_arm
from transformers import Idefics3Processor, LlamaForCausalLM, SmolVLMForConditionalGeneration
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from hf_lingudistill import LinguDistillConfig, LinguDistillTrainer
from hf_lingudistill.machine import machine
from hf_lingudistill.step import DistillStep

IMAGE_SIZE, PATCH, PER_TOKEN = 512, 16, 4  # 32 x 32 patches, 4 x 4 of them a token: 64 tokens
TOWER = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
ARMS = ("sft", "one_look", "two_looks", "sft_trained", "default_trained")
BASE = {"one_look": "sft", "two_looks": "sft", "default_trained": "sft_trained"}


def make_models(folder: Path) -> int:
    """-> parameters of tower and projector."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(49152, extra=True)
    student, lm = make_configs(49152, SMOLLM2_135M, tokenizer.convert_tokens_to_ids("<image>"))
    student.scale_factor = PER_TOKEN
    for name, value in {**TOWER, "image_size": IMAGE_SIZE, "patch_size": PATCH}.items():
        setattr(student.vision_config, name, value)
    LlamaForCausalLM(lm).save_pretrained(folder / "lm")
    make_tokenizer(49152, extra=False).save_pretrained(folder / "lm")
    vlm = SmolVLMForConditionalGeneration(student)
    vlm.save_pretrained(folder / "vlm")
    Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(
            size={"longest_edge": IMAGE_SIZE}, max_image_size={"longest_edge": IMAGE_SIZE}, do_image_splitting=False
        ),
        tokenizer=tokenizer,
        image_seq_len=(IMAGE_SIZE // PATCH // PER_TOKEN) ** 2,
        chat_template=TEMPLATE,
    ).save_pretrained(folder / "vlm")
    return sum(p.numel() for part in (vlm.model.vision_model, vlm.model.connector) for p in part.parameters())


def make_stepper(folder: Path, args: argparse.Namespace, *, frozen: bool) -> Stepper:
    config = LinguDistillConfig(
        output_dir=str(folder / f"out-{frozen}"),
        per_device_train_batch_size=args.batch_size,
        max_length=None,
        report_to="none",
        save_strategy="no",
        use_cpu=machine().gpus == 0,
        bf16=args.bf16,
        activation_checkpointing=False,
        teacher_model_name_or_path=str(folder / "lm"),
        freeze_vision=frozen,
    )
    trainer = LinguDistillTrainer(
        args=config, model=str(folder / "vlm"), train_dataset=make_dataset(args.batch_size, long=False)
    )
    trainer.first_batch.batches_to_compare = 0
    return Stepper(trainer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds after one warm-up round")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU; default: 1")
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    be_quiet()
    # Rows of this picture
    step_cost.IMAGE_SIZE, step_cost.PATCH, step_cost.LENGTH = IMAGE_SIZE, PATCH * PER_TOKEN, 256
    with tempfile.TemporaryDirectory() as tmp:
        beside = make_models(Path(tmp))
        steppers = {frozen: make_stepper(Path(tmp), args, frozen=frozen) for frozen in (True, False)}
        length = steppers[True].batch["input_ids"].shape[1]
        seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
        load_before = os.getloadavg()[0]
        for number in range(args.rounds + 1):
            for arm in ARMS:
                stepper = steppers["trained" not in arm]
                looks = patch.object(DistillStep, "_seen", lambda *_: None) if arm == "two_looks" else nullcontext()
                with looks:
                    taken, _ = run_arm(stepper, "sft_compact" if "sft" in arm else "vision_before")
                if number:  # the first round warms up, and says whether features can be shared
                    seconds[arm].append(taken)
                print(f"round {number} {arm:<16} {taken:8.3f} s", file=sys.stderr, flush=True)
        assert steppers[True].trainer.step.eyes.alike and steppers[False].trainer.step.eyes.alike is None
        arms: dict[str, Any] = {arm: {"seconds": statistics.median(taken)} for arm, taken in seconds.items()}
        for arm, base in BASE.items():
            ratios = [mine / other for mine, other in zip(seconds[arm], seconds[base], strict=True)]
            arms[arm] |= {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
    result = {
        "shape": {
            "batch_size": args.batch_size,
            "length": length,
            "image_tokens": (IMAGE_SIZE // PATCH // PER_TOKEN) ** 2,
            "response_tokens": step_cost.RESPONSE_TOKENS,
            "lm_parameters": 134_515_008,
            "vision_parameters": beside,
            "vocabulary": 49152 + len(EXTRA),
        },
        "machine": machine_facts(bf16=args.bf16, load=(load_before, os.getloadavg()[0])),
        "rounds": args.rounds,
        "arms": arms,
    }
    for arm, row in arms.items():
        print(f"{arm:<16} {row['seconds']:8.3f} s {row.get('ratio', 1.0):7.3f}")
    write_result(result, args.json)


if __name__ == "__main__":
    main()
