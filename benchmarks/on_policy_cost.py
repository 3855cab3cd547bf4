"""What sampling adds to a step: seconds on-policy (transformers' generation) against given answers, at equal tokens.

    python benchmarks/on_policy_cost.py                      # about 3 minutes on one CPU core
    python benchmarks/on_policy_cost.py --json benchmarks/results/on_policy_cost.json

Models, shapes and images are those of `step_cost.py` with `--layers` decoder layers (random weights): rows of an image, a prompt and an
answer of exactly `--answer` tokens. On-policy, the student never ends an answer early, so that both arms train on the same number of
tokens. Arms, interleaved round by round, a whole optimizer step each (sampling, forward, backward, AdamW):

    given       LinguDistillTrainer, every token distilled
    on_policy   OnPolicyLinguDistillTrainer, every row judged by the LM; `sampling` is the part of it in which answers are written

Ratios are of wall time within a round. Load is written beside them: repeat it when the machine is quiet. vLLM is not measured.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import step_cost
import torch
from harness import be_quiet, machine_facts, write_result

from hf_lingudistill import OnPolicyLinguDistillConfig, OnPolicyLinguDistillTrainer
from hf_lingudistill.labs.json_text import as_json
from hf_lingudistill.machine import machine


class OnPolicyStepper:
    """One on-policy trainer, driven step by step outside of its training loop."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        config = OnPolicyLinguDistillConfig(
            output_dir=str(folder / "out"),
            per_device_train_batch_size=args.batch_size,
            max_completion_length=args.answer,
            generation_kwargs={"min_new_tokens": args.answer},
            log_completions=False,
            report_to="none",
            save_strategy="no",
            use_cpu=machine().gpus == 0,
            bf16=args.bf16,
            activation_checkpointing=False,
            teacher_model_name_or_path=str(folder / "lm"),
            teacher_quantization="none",
        )
        rows = step_cost.make_dataset(args.batch_size, long=False).remove_columns("completion")
        trainer = OnPolicyLinguDistillTrainer(model=str(folder / "vlm"), args=config, train_dataset=rows)
        trainer.create_optimizer()
        trainer.model_wrapped = trainer.accelerator.prepare(trainer.model)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        self.trainer, self.rows = trainer, next(iter(trainer.get_train_dataloader()))
        self.sampling, self.tokens = 0.0, 0
        sample = trainer._generate_and_score_completions

        def timed(rows: list[dict[str, Any]]) -> dict[str, Any]:
            started = time.perf_counter()
            output: dict[str, Any] = sample(rows)
            self.sampling, self.tokens = time.perf_counter() - started, int(output["completion_mask"].sum())
            return output

        trainer._generate_and_score_completions = timed

    def step(self) -> None:
        """One optimizer step on answers that are sampled for it."""
        self.trainer.training_step(self.trainer.model, self.rows, num_items_in_batch=None)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        if machine().gpus > 0:
            torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds after one warm-up round")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--answer", type=int, default=step_cost.RESPONSE_TOKENS, help="tokens of each answer")
    parser.add_argument("--layers", type=int, default=8, help="of the LM; SmolLM2-135M has 30")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    be_quiet()
    step_cost.RESPONSE_TOKENS = args.answer
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        step_cost.make_models(folder, 49152, {**step_cost.SMOLLM2_135M, "num_hidden_layers": args.layers})
        options = argparse.Namespace(
            batch_size=args.batch_size, bf16=args.bf16, activation_checkpointing=False, teacher_quantization="none"
        )
        given, sampled = step_cost.make_stepper("prompt", folder, options), OnPolicyStepper(folder, args)
        seconds: dict[str, list[float]] = {"given": [], "on_policy": [], "sampling": []}
        load_before = os.getloadavg()[0]
        for number in range(args.rounds + 1):
            started = time.perf_counter()
            given.step("prompt")
            between = time.perf_counter()
            sampled.step()
            ended = time.perf_counter()
            if number:  # the first round warms up
                seconds["given"].append(between - started)
                seconds["on_policy"].append(ended - between)
                seconds["sampling"].append(sampled.sampling)
            print(
                f"round {number}: given {between - started:.2f} s, on-policy {ended - between:.2f} s", file=sys.stderr
            )
        ratios = [ours / theirs for ours, theirs in zip(seconds["on_policy"], seconds["given"], strict=True)]
        result = {
            "shape": {
                "batch_size": args.batch_size,
                "length": int(given.batch["input_ids"].shape[1]),
                "answer_tokens": {"given": given.labels, "on_policy": sampled.tokens},
                "layers": args.layers,
            },
            "machine": machine_facts(bf16=args.bf16, load=(load_before, os.getloadavg()[0])),
            "rounds": args.rounds,
            "seconds": {name: statistics.median(values) for name, values in seconds.items()},
            "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        }
    print(as_json(result))
    write_result(result, args.json)


if __name__ == "__main__":
    main()
