"""A tiny SmolVLM with its processor and its LM, made in memory in well under a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Idefics3Processor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EXTRA_TOKENS = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
TEXT = (
    "the cat sat on the mat and looked at a small red circle. what shape is in the image? it is a blue triangle. "
    "tell me about the sea. the sea is deep, wide and full of salt. a teal rectangle. is there a green shape? yes. no. "
) * 20


def make_tokenizer(extra: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 300 tokens; `extra` appends the VLM's own tokens, as a VLM's tokenizer does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token="<|im_start|>"
    )
    fast.chat_template = CHATML
    if extra:
        fast.add_special_tokens({"additional_special_tokens": EXTRA_TOKENS})
        fast.image_token, fast.fake_image_token, fast.global_image_token = EXTRA_TOKENS[:3]
        fast.end_of_utterance_token = EXTRA_TOKENS[3]
        fast.global_image_token_id = fast.convert_tokens_to_ids(EXTRA_TOKENS[2])
    return fast


def scale_up(model: torch.nn.Module, factor: float, seed: int = 0) -> None:
    """Random tiny models agree with anything: larger weights make attention and images matter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0.0, factor / parameter.shape[-1] ** 0.5, generator=generator)


def make_processor() -> Idefics3Processor:
    tokenizer = make_tokenizer(extra=True)
    image_processor = Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False
    )
    return Idefics3Processor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=CHATML,
    )


def text_config(vocab_size: int, layers: int = 2, **kwargs: object) -> LlamaConfig:
    settings: dict = dict(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        max_position_embeddings=512,
    )
    settings.update(kwargs)
    return LlamaConfig(**settings)


def make_lm(seed: int = 0, vocab_size: int | None = None, **kwargs: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    lm = LlamaForCausalLM(text_config(vocab_size or len(make_tokenizer(extra=False)), **kwargs))
    scale_up(lm, 1.5, seed)
    return lm.eval()


def make_vlm(seed: int = 0, **kwargs: object) -> SmolVLMForConditionalGeneration:
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(extra=True)
    config = SmolVLMConfig(
        text_config=text_config(len(tokenizer), **kwargs).to_dict(),
        vision_config=dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=kwargs.get("tie_word_embeddings", True),
        pad_token_id=0,
    )
    vlm = SmolVLMForConditionalGeneration(config)
    scale_up(vlm, 1.5, seed)
    return vlm.eval()


def save_pair(folder: Path, **kwargs: object) -> tuple[Path, Path]:
    """Write a student (model and processor) and a teacher (model and tokenizer). -> their folders."""
    student, teacher = folder / "student", folder / "teacher"
    make_vlm(0, **kwargs).save_pretrained(student)
    make_processor().save_pretrained(student)
    make_lm(1, **kwargs).save_pretrained(teacher)
    make_tokenizer(extra=False).save_pretrained(teacher)
    return student, teacher


def make_rows(count: int = 8, *, seed: int = 0, images: bool = True) -> list[dict]:
    """Prompt-completion rows: even rows with an image and a short answer (not distilled), odd rows text to distil."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        visual = images and index % 2 == 0
        question = "what shape is in the image?" if visual else "tell me about the sea"
        answer = (
            "a small red circle"
            if visual
            else "the sea is deep, wide and full of salt." + " the cat sat." * (index % 3)
        )
        pixels = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
        row = {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}],
            "distill": not visual,
        }
        if images:
            row["images"] = [Image.fromarray(pixels)] if visual else []
        rows.append(row)
    return rows


def make_dataset(count: int = 8, **kwargs: object):
    """The rows of `make_rows` as a `datasets.Dataset`."""
    from datasets import Dataset, Features, Image, List, Value

    rows = make_rows(count, **kwargs)
    message = List({"role": Value("string"), "content": Value("string")})
    features = {"prompt": message, "completion": message, "distill": Value("bool")}
    if "images" in rows[0]:
        features["images"] = List(Image())
    return Dataset.from_list(rows, features=Features(features))


def moved(trainer: Any) -> Any:
    """The trainer, its student another one than before."""
    generator = torch.Generator().manual_seed(3)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
    return trainer
