"""Trains tiny models in many ways inside one process group, for `tests/test_engines.py`.

    accelerate launch --config_file examples/accelerate_configs/ddp.yaml tests/engine_worker.py FOLDER NAME ...

Each scenario of `SCENARIOS` writes `FOLDER/NAME.pt`: the loss curve and the final weights, whole. Imports cost more than
the training, hence many scenarios a launch. The global batch is 8 rows whatever the engine.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import tiny
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig
from transformers import TrainerCallback

from hf_lingudistill import (
    LinguDistillConfig,
    LinguDistillTrainer,
    OnPolicyLinguDistillConfig,
    OnPolicyLinguDistillTrainer,
)

GLOBAL_BATCH = 8
STEPS = 3
Result = dict[str, Any]


def mixed(order: str) -> Any:
    """24 rows. alternating: image, text, image, ... marked: the same, all of them distilled. split: in each 8 rows four with an image, none of them distilled, then
    four of text, so that with two processes one has nothing to distil and the other has no image; "split, marked": the same, all of them
    distilled. text: no image column."""
    if order == "text":
        return tiny.make_dataset(GLOBAL_BATCH * STEPS, images=False)
    dataset = tiny.make_dataset(GLOBAL_BATCH * STEPS)
    if order == "marked":
        return dataset.remove_columns("distill").add_column("distill", [True] * len(dataset))
    if order == "alternating":
        return dataset
    images, texts = range(0, len(dataset), 2), range(1, len(dataset), 2)
    indices = []
    for step in range(STEPS):
        part = slice(step * GLOBAL_BATCH // 2, (step + 1) * GLOBAL_BATCH // 2)
        indices += [*images[part], *texts[part]]
    dataset = dataset.select(indices)
    if order == "split, marked":
        return dataset.remove_columns("distill").add_column("distill", [True] * len(dataset))
    return dataset


def lora() -> LoraConfig:
    # With B at zero, as PEFT starts by default, A has no gradient
    return LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"], init_lora_weights=False)


# With moments: torch cannot load the state of an optimizer that has none under FSDP2. The large epsilon keeps Adam from blowing
# rounding up where there is hardly a gradient.
RESUMED: dict[str, Any] = {
    "save_strategy": "steps",
    "save_steps": 2,
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-3,
}
# Greedy: what is sampled hangs on weights and prompts alone, not on which process says it
ON_POLICY: dict[str, Any] = {
    "on_policy": True,
    "generation_kwargs": {"do_sample": False},
    "max_completion_length": 6,
    "shuffle_dataset": False,
    "log_completions": False,
}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
# name -> settings of the config, and: rows (see `mixed`), tied, adapter, teacher (in memory or a folder), wrong, stream, on_policy, silent
SCENARIOS: dict[str, dict[str, Any]] = {
    "prompt": {},
    "full": {"kv_sharing": "full"},
    "vision": {"kv_sharing": "vision"},
    "none": {"kv_sharing": "none"},
    "untied": {"tied": False},
    "untied evaluation": {"tied": False, **EVALUATED},
    "lora": {"adapter": True},
    "lora, untied": {"adapter": True, "tied": False, "kv_sharing": "vision"},
    "every token": {"distill_tokens": "all", "beta": 0.5},
    "checkpointing": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    "alternating rows": {"rows": "alternating"},
    "text": {"rows": "text"},
    "by length": {"train_sampling_strategy": "group_by_length"},
    "worker processes": {"dataloader_num_workers": 2},
    "stream": {"stream": True},
    "evaluation": EVALUATED,
    "evaluated first": EVALUATED,
    "loaded teacher": {"teacher": True},
    "replicated teacher": {"teacher": True, "teacher_sharding": "replicate"},
    "sharded untied teacher": {"tied": False, "teacher": True, "kv_sharing": "none"},
    "quantised teacher": {"teacher": True, "teacher_quantization": "nf4"},
    "offloaded teacher": {"teacher": True, "teacher_offload": "cpu"},
    "bf16": {"bf16": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    "resumed": RESUMED,
    "resumed lora": {**RESUMED, "adapter": True},
    "anchored": {"anchor": "before"},
    "anchored lora": {"anchor": "before", "adapter": True},
    "anchored, untied": {"anchor": "before", "tied": False, "teacher": True, "teacher_quantization": "nf4"},
    "default": {"rows": "marked", "kv_sharing": "vision"},
    "the student's KV": {"rows": "marked", "kv_sharing": "vision", "kv_source": "student"},
    "before's KV": {"kv_sharing": "prompt", "kv_source": "before", "anchor": "before", "rows": "alternating"},
    "read twice": {"rows": "marked", "kv_sharing": "vision", "blind_weight": 0.4, "teacher": True},
    "read twice, by one process": {
        "rows": "split, marked",
        "kv_sharing": "vision",
        "blind_weight": 0.4,
        "teacher": True,
    },
    "the first process's weights": {"rows": "marked", "kv_sharing": "vision", "anchor": "before"},
    "cached": {"anchor": "before", "anchor_cache": True, "kv_sharing": "none", "teacher_cache": True},
    "cached teacher": {"kv_sharing": "none", "teacher_cache": True, "teacher": True, "teacher_sharding": "replicate"},
    "on-policy": ON_POLICY,
    "on-policy vision": {**ON_POLICY, "kv_sharing": "vision", "rows": "alternating", "beta": 0.5},
    "on-policy lora": {**ON_POLICY, "adapter": True},
    "on-policy, untied": {**ON_POLICY, "tied": False, "rows": "alternating", "kv_sharing": "vision"},
    "on-policy compiled": {**ON_POLICY, "torch_compile": True, "torch_compile_backend": "eager"},
    "on-policy evaluation": {
        **ON_POLICY,
        **EVALUATED,
        "rows": "marked",
        "kv_sharing": "vision",
        "kv_source": "before",
    },
    "a class that counts no labels": {"silent": True},
    "streamed evaluation": EVALUATED,
    "wrong normalisation": {"wrong": True},
}
# They ask the whole student on every process before training
REPLICATED = {"cached", "evaluated first"}
# Which answers are sampled hangs on the process, and with it what is trained
UNEVEN: dict[str, dict[str, Any]] = {"uneven answers": ON_POLICY}
# Each ends its launch, and is not among those that are compared
FATAL: dict[str, dict[str, Any]] = {"killed": {}, "no placeholder": {}}


class WrongNormalisation(LinguDistillTrainer):
    """The control: the loss over the labels of this process's batch instead of the global one."""

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        labels = sum(batch["labels"][:, 1:].ne(-100).sum() for batch in batch_samples)
        return torch.as_tensor(labels, device=device) * self.accelerator.num_processes


def shard_on_cpu(config: LinguDistillConfig) -> None:
    """accelerate starts FSDP beside an accelerator only, and on CPUs runs DDP instead: tell it that there is one."""
    assert config.device.type == "cpu"  # the property joins the process group
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def make_trainer(folder: Path, name: str, *, accumulation: int, processes: int) -> Any:
    settings = {"rows": "split", "tied": True, **(SCENARIOS | UNEVEN | FATAL)[name]}
    rows, tied, adapter, teacher, wrong, stream, on_policy, silent = (
        settings.pop(key, False)
        for key in ("rows", "tied", "adapter", "teacher", "wrong", "stream", "on_policy", "silent")
    )
    torch.manual_seed(0)
    # As where loading spares memory: what the other processes have is not the student
    strange = name == "the first process's weights" and PartialState().process_index
    config = (OnPolicyLinguDistillConfig if on_policy else LinguDistillConfig)(
        output_dir=str(folder / (name if name.startswith(("resumed", "cached")) else "out")),
        **{
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": not torch.accelerator.is_available(),
            "bf16": False,
            "activation_checkpointing": False,
            "per_device_train_batch_size": GLOBAL_BATCH // accumulation // processes,
            "gradient_accumulation_steps": accumulation,
            "max_steps": STEPS,
            "logging_steps": 1,
            "save_strategy": "no",
            "max_grad_norm": 0.0,  # no clipping: a gradient is what the loss makes it
            "optim": "sgd",  # a step is proportional to the gradient; Adam blows rounding up to the learning rate
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "train_sampling_strategy": "sequential",
            "teacher_quantization": "none",
            "kv_sharing": "prompt",  # in which the teacher reads something of every row
            **settings,
        },
    )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not torch.accelerator.is_available():
        shard_on_cpu(config)
    dataset = mixed(rows)
    if name == "by length":
        dataset = dataset.add_column("length", [len(row["completion"][0]["content"]) for row in dataset])
    lm: Any = tiny.make_lm(1, tie_word_embeddings=tied)
    if teacher:
        path = folder / f"teacher-{'tied' if tied else 'untied'}"
        with PartialState().main_process_first():
            if not path.exists():
                lm.save_pretrained(path)
        lm = str(path)
    if on_policy:
        dataset = dataset.remove_columns("completion")
    evaluated: Any = dataset.select(range(GLOBAL_BATCH)) if "evaluat" in name else None
    if name == "streamed evaluation":
        evaluated = evaluated.to_iterable_dataset()
    student = tiny.make_vlm(strange or 0, tie_word_embeddings=tied)
    if silent:  # as Qwen2.5-VL and others say of themselves
        student.accepts_loss_kwargs = False
    trainer_class = OnPolicyLinguDistillTrainer if on_policy else LinguDistillTrainer
    return (WrongNormalisation if wrong else trainer_class)(
        model=student,
        teacher_model=lm,
        teacher_tokenizer=tiny.make_tokenizer(extra=False),
        processing_class=tiny.make_processor(),
        args=config,
        train_dataset=dataset.to_iterable_dataset() if stream else dataset,
        eval_dataset=evaluated,
        peft_config=lora() if adapter else None,
    )


class Killed(TrainerCallback):
    """The second process dies after its first step, as by the kernel's out-of-memory killer."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if PartialState().process_index == 1:
            print(f"killed at {time.time()}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder: Path, name: str, *, accumulation: int = 1, processes: int = 1) -> Result:
    """Train scenario `name`. -> losses, and the final weights, whole on every rank."""
    trainer = make_trainer(folder, name, accumulation=accumulation, processes=processes)
    if name == "killed":
        trainer.add_callback(Killed())
    if name == "uneven answers":
        trainer.generation_config.max_new_tokens = 2 + 4 * PartialState().process_index
    if name == "no placeholder":
        trainer.step.same_modules = None
    if name.startswith("resumed"):
        trainer.args.max_steps = 2
        trainer.train()
        trainer = make_trainer(folder, name, accumulation=accumulation, processes=processes)
        trainer.train(resume_from_checkpoint=True)
    else:
        if name == "evaluated first":
            trainer.evaluate()
        trainer.train()
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return {
        "engine": str(trainer.accelerator.distributed_type),
        "teacher": {"bytes": trainer.teacher.footprint, "sharded": trainer.step.sharded},
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "logs": trainer.state.log_history,
        "weights": {key.removeprefix("_orig_mod."): value.detach().cpu().clone() for key, value in weights.items()},
    }


def main(folder: Path, jobs: list[str]) -> None:
    """jobs: scenario names, each with an accumulation: `split@2`."""
    import torch.distributed as dist

    state = PartialState(cpu=not torch.accelerator.is_available())
    for job in jobs:
        started = time.perf_counter()
        name, _, accumulation = job.partition("@")
        result = run(folder, name, accumulation=int(accumulation or 1), processes=state.num_processes)
        if state.is_main_process:
            torch.save(result, folder / f"{job}.pt")
            print(f"{job}: {time.perf_counter() - started:.1f} s", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
