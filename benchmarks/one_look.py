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
from step_cost import EXTRA, make_models, make_stepper, run_arm

from hf_lingudistill.step import DistillStep
from hf_lingudistill.vision import vision_parameters

# 32 x 32 patches, 4 x 4 of them a token: 64 tokens
SHAPE = {
    "IMAGE_SIZE": 512,
    "PATCH": 16,
    "PER_TOKEN": 4,
    "LENGTH": 256,
    "TOWER": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
}
ARMS = ("sft", "one_look", "two_looks", "sft_trained", "default_trained")
BASE = {"one_look": "sft", "two_looks": "sft", "default_trained": "sft_trained"}


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
    args.teacher_quantization, args.activation_checkpointing = "nf4", False
    for name, value in SHAPE.items():
        setattr(step_cost, name, value)
    with tempfile.TemporaryDirectory() as tmp:
        make_models(Path(tmp), 49152)
        steppers = {
            frozen: make_stepper("vision_before", Path(tmp), args, before=True, frozen=frozen)
            for frozen in (True, False)
        }
        beside = sum(p.numel() for p in vision_parameters(steppers[True].trainer.model).values())
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
            "image_tokens": step_cost.image_tokens(),
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
