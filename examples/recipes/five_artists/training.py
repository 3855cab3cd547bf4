"""How an arm is trained: cross-entropy, distillation, distillation on the student's own answers, or KL to the original that is told
the caption. Same rows, order and optimizer; of its own answers, on-policy sees the questions alone, in TRL's order."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from parents import PerTokenTrainer
from peft import LoraConfig, PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTTrainer
from world_rows import TRAINING_TEMPLATE

from hf_lingudistill import (
    LinguDistillConfig,
    LinguDistillTrainer,
    OnPolicyLinguDistillConfig,
    OnPolicyLinguDistillTrainer,
)
from hf_lingudistill._internals import keep_image_dtype
from hf_lingudistill.config import LocalSFTConfig
from hf_lingudistill.labs.world.questions import as_dataset
from hf_lingudistill.machine import machine
from hf_lingudistill.weights import load_whole

OPTIONS = ("kv_sharing", "kv_source", "blind_weight", "distill_tokens", "ce_weight", "distill_weight", "anchor")


def load(path: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(model, processor) of a VLM's folder."""
    model = load_whole(AutoModelForImageTextToText, path, dtype=dtype)
    keep_image_dtype(model)
    return model, AutoProcessor.from_pretrained(path)


def adapters(rank: int) -> Any:
    """LoRA on every matrix of the text model; tower and connector stand still."""
    targets = r".*text_model.*(q|k|v|o|gate|up|down)_proj"
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)


class CaptionTold(SFTTrainer):
    """KL(original || student) on the distilled rows, where the original is told the caption in place of seeing the picture; CE on
    the others. What distillation could reach if its teacher saw the picture as well as words can say.

    Args:
        original: the frozen LM. told: for every row of the dataset, in order, the ids that the original reads before the answer
            (None: the row is not distilled).
    """

    def __init__(self, *args: Any, original: Any, told: Sequence[list[int] | None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.original, self.told, self.rows_read = original.to(self.args.device).eval(), told, 0

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        told = self.told[self.rows_read : self.rows_read + labels.size(0)]
        self.rows_read += labels.size(0)
        rows, places = (labels[:, 1:] != -100).nonzero(as_tuple=True)
        # The Trainer's own autocast wraps the whole model's forward, which is not called here
        vlm = model.get_base_model() if isinstance(model, PeftModel) else model
        with torch.autocast(labels.device.type, torch.bfloat16, enabled=self.args.bf16):
            states = vlm.model(**inputs, use_cache=False).last_hidden_state
            logits = vlm.lm_head(states[rows, places]).float()
        loss = F.cross_entropy(logits, labels[rows, places + 1], reduction="none")
        for row, prompt in enumerate(told):
            if prompt is None:
                continue
            own = rows == row
            answer = labels[row, places[own] + 1]
            with torch.no_grad():
                ids = torch.cat([torch.tensor(prompt, device=answer.device), answer])[None]
                with torch.autocast(labels.device.type, torch.bfloat16, enabled=self.args.bf16):
                    found = self.original(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
                target = found.float()
            # The student's own tokens count against it, as in the library
            student = logits[own].log_softmax(dim=-1)[:, : target.size(1)]
            target = target.log_softmax(dim=-1)
            loss = loss.masked_scatter(own, (target.exp() * (target - student)).sum(dim=-1))
        return loss.sum() / (len(rows) if num_items_in_batch is None else num_items_in_batch)


def train(
    start: Path,
    teacher: Path,
    rows: list[dict[str, Any]],
    out: Path,
    arguments: dict[str, Any],
    *,
    kind: str,
    batch_size: int,
    seed: int,
    distill: dict[str, Any] | None = None,
    lora: int | None = None,
    told: Sequence[list[int] | None] | None = None,
    freeze_tower: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Train the VLM in `start` on the rows in order and save it to out; -> a record.

    teacher: the original LM's folder; of an arm whose teacher is the VLM before, start. freeze_tower: tower and connector stand still, as in
        most VLMs' later stages and as the library does when it is not told otherwise. dtype: of the weights; adapters are fp32, and the teacher
        computes as the trainer does.
    batch_size: rows per step, in `gradient_accumulation_steps` equal parts.
    kind: `ce` (trl.SFTTrainer), `distill` (LinguDistillTrainer with `distill`'s options), `on_policy` (its on-policy sibling, likewise),
        `per_token` (`parents.PerTokenTrainer`, likewise), or `caption` (`CaptionTold`).
    """
    model, processor = load(start, dtype)
    processor.chat_template = processor.tokenizer.chat_template = TRAINING_TEMPLATE
    kwargs: dict[str, Any] = {"model": model, "processing_class": processor, "train_dataset": as_dataset(rows)}
    if freeze_tower:
        for name, weight in model.named_parameters():
            weight.requires_grad_(".vision_model." not in name and ".connector." not in name)
    if lora is not None:
        kwargs["peft_config"] = adapters(lora)
    with tempfile.TemporaryDirectory() as scratch:
        common = arguments | {
            "output_dir": scratch,
            "seed": seed,
            "per_device_train_batch_size": batch_size // arguments.get("gradient_accumulation_steps", 1),
            "train_sampling_strategy": "sequential",
            "disable_tqdm": True,
            "bf16": machine().bf16,
        }
        vision = {} if freeze_tower else {"freeze_vision": False}  # left out, the library freezes it
        if kind in ("distill", "per_token"):
            config = LinguDistillConfig(**common, **vision, teacher_quantization="none", **(distill or {}))
            trainer_class = LinguDistillTrainer if kind == "distill" else PerTokenTrainer
            trainer: Any = trainer_class(args=config, teacher_model=str(teacher), **kwargs)
        elif kind == "on_policy":
            given = {
                name: value for name, value in common.items() if name not in ("max_length", "train_sampling_strategy")
            }
            sampling = OnPolicyLinguDistillConfig(
                **given, **vision, teacher_quantization="none", log_completions=False, **(distill or {})
            )
            kwargs["train_dataset"] = kwargs["train_dataset"].remove_columns("completion")
            trainer = OnPolicyLinguDistillTrainer(args=sampling, teacher_model=str(teacher), **kwargs)
        elif kind == "caption":
            from transformers import AutoModelForCausalLM

            lm = load_whole(AutoModelForCausalLM, teacher, dtype=dtype)
            assert told is not None
            trainer = CaptionTold(args=LocalSFTConfig(**common), original=lm, told=told, **kwargs)
        else:
            trainer = SFTTrainer(args=LocalSFTConfig(**common), **kwargs)
        result = trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        trained = trainer.model.merge_and_unload() if lora is not None else trainer.model
        trained.save_pretrained(out)
        AutoProcessor.from_pretrained(start).save_pretrained(out)
    kept = ("ce_loss", "kd_loss", "teacher_ce", "distilled_share")
    # As they were resolved: what an arm leaves out is the library's default of the day
    resolved = {**vars(trainer.args), **getattr(trainer, "decided", {})}
    options = {name: resolved[name] for name in OPTIONS if name in resolved}
    return {
        **({"options": options} if options else {}),
        "train_loss": result.training_loss,
        "train_seconds": round(result.metrics["train_runtime"], 1),
        "steps": result.global_step,
        "log": [{name: entry[name] for name in ("step", "loss", *kept) if name in entry} for entry in log],
    }
