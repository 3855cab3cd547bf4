"""Tiny random vision-language models of every supported family, with hand-made inputs (no processors, no network).

    from families import FAMILY_NAMES, build_family
    family = build_family("smolvlm")
    inputs = family.make_inputs("left", seed=0)          # ready for family.student(**inputs)
    teacher = family.make_teacher(identical=True)        # the plain LM with the student's own weights

Random tiny models agree with anything: attention is near uniform, the image is ignored, logits are all alike. So the
weights are scaled up until attention is peaked and the logits have a standard deviation of `LOGIT_STD`, every bias and
norm is random, and the two rows of a batch differ in length, number of turns and images.

Each family keeps its own traits: image sizes (Qwen-VL grids, LLaVA-OneVision tilings, InternVL tiles, SmolVLM pixel
masks), image tokens inside or beyond the LM's vocabulary, tied or untied heads, M-RoPE, deepstack, sliding windows,
bidirectional image blocks (Gemma3) and prefixes (PaliGemma).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

Inputs = dict[str, torch.Tensor]

PAD, EOS, BOS, IMAGE_START, IMAGE_END = 0, 1, 2, 3, 4
FIRST_TEXT_ID, END_TEXT_ID = 5, 150
LM_VOCAB = 160  # what the plain LM knows
STUDENT_VOCAB = 168  # what the VLM knows, where the family adds tokens of its own
INNER_IMAGE, INNER_VIDEO = 150, 151  # image/video placeholders that the LM's vocabulary already holds (Qwen)
OUTER_IMAGE, STUDENT_ONLY = 160, 161  # placeholder and a special token that only the VLM has

LAYERS = 3
LOGIT_STD = 7.0


@dataclass(frozen=True)
class Family:
    """One VLM family.

    Attributes:
        name: one of `FAMILY_NAMES`.
        student: the VLM, eval mode, fp32, random with a fixed seed. Shared between tests: mutate a `fresh_student`.
        image_token_ids: ids of the image (and video) placeholders.
        text_vocab_size: ids below it are tokens of the plain LM (placeholders inside the LM's vocabulary included).
    """

    name: str
    student: PreTrainedModel
    image_token_ids: tuple[int, ...]
    text_vocab_size: int
    _spec: _Spec

    def fresh_student(self) -> PreTrainedModel:
        """A copy of the student that a test may train or patch."""
        return copy.deepcopy(self.student)

    def make_teacher(self, identical: bool) -> PreTrainedModel:
        """The plain ...ForCausalLM of the family, frozen, eval mode, fp32.

        Args:
            identical: `True` copies the student's language model, head and vocabulary. `False` gives another random
                LM with the same layers, KV heads and head_dim but another width, more query heads, another RoPE theta
                and only the LM's own vocabulary.
        """
        config = self._spec.teacher_config(not identical)
        torch.manual_seed(0)
        teacher = self._spec.teacher_class(config)
        if identical:
            # strict: every weight of the student's LM must have a place in the plain LM, and the other way round.
            teacher.model.load_state_dict(self.student.get_decoder().state_dict(), strict=True)
            teacher.lm_head.load_state_dict(self.student.lm_head.state_dict(), strict=True)
        else:
            randomise_(teacher, seed=1000 + FAMILY_NAMES.index(self.name))
            text_ids = torch.randint(FIRST_TEXT_ID, END_TEXT_ID, (2, 24), generator=_generator(7))
            scale_logits_(teacher, {"input_ids": text_ids})
        return teacher.eval().requires_grad_(False)

    def make_inputs(self, padding_side: str, seed: int) -> Inputs:
        """A batch of two rows, ready for `student(**inputs)`.

        Args:
            padding_side: `left` or `right` pads the shorter row 1; `none` lengthens its prompt instead, so that models
                may take their shortcut for unpadded causal batches.
            seed: of text and pixels.

        Row 0 holds two turns (where the family allows) and up to two images, row 1 one turn and one image. `labels`
        are the response tokens, -100 elsewhere. With families that add tokens, row 0's last response contains one
        that only the student knows.

        Returns: `input_ids`, `attention_mask`, `labels` (B, T) and whatever else the family's forward takes.
        """
        return _make_inputs(self._spec, padding_side, seed)


def with_other_pixels(inputs: Inputs, seed: int) -> Inputs:
    """The same batch with other images. Padding tiles (all zero) stay zero."""
    pixels = inputs["pixel_values"]
    noise = torch.randn(pixels.shape, generator=_generator(90_000 + seed))
    return {**inputs, "pixel_values": torch.where(pixels == 0, pixels, noise)}


def build_family(name: str) -> Family:
    """Build one family. Deterministic: the same name always gives the same weights."""
    spec = _SPECS[name]
    torch.manual_seed(0)
    student = spec.student().eval()
    randomise_(student, seed=FAMILY_NAMES.index(name))
    scale_logits_(student, _make_inputs(spec, "right", seed=123))
    inner = spec.image_token_id < LM_VOCAB
    return Family(
        name=name,
        student=student,
        image_token_ids=(INNER_IMAGE, INNER_VIDEO) if inner else (OUTER_IMAGE,),
        text_vocab_size=LM_VOCAB,
        _spec=spec,
    )


# --- weights ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def randomise_(model: PreTrainedModel, seed: int) -> None:
    """Fill every parameter so that activations stay near unit variance and attention is peaked."""
    generator = _generator(seed)

    def fill(parameter: torch.Tensor, std: float, mean: float = 0.0) -> None:
        parameter.copy_(mean + std * torch.randn(parameter.shape, generator=generator))

    done: set[int] = set()
    for name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in done or not parameter.numel():  # a tied head; a part that is switched off
                continue
            done.add(id(parameter))
            kind = type(module).__name__
            if parameter_name == "bias":
                fill(parameter, 0.3)
            elif "Norm" in kind:
                fill(parameter, 0.2, mean=0.0 if kind.startswith("Gemma") else 1.0)
                if name.endswith(("q_norm", "k_norm")):
                    parameter.add_(0.5)  # unit queries and keys leave attention almost uniform
            elif isinstance(module, nn.Embedding):
                fill(parameter, 1.0 / float(getattr(module, "scalar_embed_scale", 1.0)))
            elif isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
                gain = 1.5 if name.endswith(("q_proj", "k_proj", "o_proj", "qkv")) else 1.0
                fill(parameter, gain / parameter[0].numel() ** 0.5)
            elif parameter_name == "mm_input_projection_weight":  # Gemma3: (in, out), zero-initialised
                fill(parameter, 1.0 / parameter.shape[0] ** 0.5)
            elif parameter_name.startswith("lambda_"):  # InternVL layer scale
                fill(parameter, 0.1, mean=0.5)
            else:  # class, position and newline embeddings
                fill(parameter, 1.0)


@torch.no_grad()
def scale_logits_(model: PreTrainedModel, inputs: Inputs) -> None:
    """Scale the final norm so that logits have a standard deviation of `LOGIT_STD`.

    The norm and not the head: a tied head is also the embedding.
    """
    real = (
        inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones_like(inputs["input_ids"]).bool()
    )
    logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits[real]
    factor = LOGIT_STD / logits.std()
    norm = model.get_decoder().norm
    offset = 1.0 if type(norm).__name__.startswith("Gemma") else 0.0  # Gemma multiplies by 1 + weight
    norm.weight.copy_((norm.weight + offset) * factor - offset)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- inputs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Images:
    """inputs: what goes beside `input_ids`. tokens: placeholders of each image, per row."""

    inputs: Inputs
    tokens: list[list[int]]


def _make_inputs(spec: _Spec, padding_side: str, seed: int) -> Inputs:
    generator = _generator(10_000 + seed)
    images = spec.images(generator)

    def text(count: int) -> list[tuple[int, bool]]:
        ids = torch.randint(FIRST_TEXT_ID, END_TEXT_ID, (count,), generator=generator).tolist()
        return [(token, False) for token in ids]

    def response(count: int, with_student_only: bool = False) -> list[tuple[int, bool]]:
        tokens = [(token, True) for token, _ in text(count)]
        if with_student_only and spec.image_token_id >= LM_VOCAB:
            tokens[count // 2] = (STUDENT_ONLY, True)
        return tokens

    def image(count: int) -> list[tuple[int, bool]]:
        before, after = spec.around_image
        return [(token, False) for token in (*before, *[spec.image_token_id] * count, *after)]

    if padding_side not in ("left", "right", "none"):
        raise ValueError(f"padding_side must be left, right or none, got {padding_side!r}.")
    bos = [(BOS, False)]
    if spec.prefix_lm:  # PaliGemma: the image opens the row, one prompt, one answer
        rows = [
            image(images.tokens[0][0]) + bos + text(6) + response(7, with_student_only=True),
            image(images.tokens[1][0]) + bos + text(3) + response(4),
        ]
    else:
        second_image = image(images.tokens[0][1]) if len(images.tokens[0]) > 1 else []
        rows = [
            bos
            + text(3)
            + image(images.tokens[0][0])
            + text(3)
            + response(5)
            + text(2)
            + second_image
            + text(2)
            + response(5, with_student_only=True),
            bos + text(2) + image(images.tokens[1][0]) + text(3) + response(4),
        ]

    length = max(map(len, rows))
    if padding_side == "none":  # after the image and before the answer, where there is prompt text
        rows[1][-4:-4] = text(length - len(rows[1]))
    input_ids = torch.full((len(rows), length), PAD)
    labels = torch.full((len(rows), length), -100)
    attention_mask = torch.zeros((len(rows), length), dtype=torch.long)
    for index, row in enumerate(rows):
        start = length - len(row) if padding_side == "left" else 0
        place = slice(start, start + len(row))
        input_ids[index, place] = torch.tensor([token for token, _ in row])
        labels[index, place] = torch.tensor([token if answer else -100 for token, answer in row])
        attention_mask[index, place] = 1
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, **images.inputs}
    if spec.type_ids is not None:
        is_image = input_ids == spec.image_token_id
        # PaliGemma marks the causal suffix, the others the images.
        inputs[spec.type_ids] = ((labels != -100) if spec.prefix_lm else is_image).long()
    return inputs


def _pixels(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def _idefics_images(generator: torch.Generator) -> _Images:
    # (B, images, C, 16, 16), row 1 has one image and one padding image; its image is 12 pixels high.
    pixel_values = _pixels(generator, 2, 2, 3, 16, 16)
    pixel_attention_mask = torch.ones(2, 2, 16, 16, dtype=torch.long)
    pixel_values[1, 1] = 0
    pixel_attention_mask[1, 1] = 0
    pixel_attention_mask[1, 0, 12:] = 0
    return _Images({"pixel_values": pixel_values, "pixel_attention_mask": pixel_attention_mask}, [[4, 4], [4]])


def _flat_images(size: int, tokens: int) -> Callable[[torch.Generator], _Images]:
    def images(generator: torch.Generator) -> _Images:
        return _Images({"pixel_values": _pixels(generator, 3, 3, size, size)}, [[tokens, tokens], [tokens]])

    return images


def _one_image_each(size: int, tokens: int) -> Callable[[torch.Generator], _Images]:
    def images(generator: torch.Generator) -> _Images:
        return _Images({"pixel_values": _pixels(generator, 2, 3, size, size)}, [[tokens], [tokens]])

    return images


def _internvl_images(generator: torch.Generator) -> _Images:
    # Row 0: an image of two tiles (8 tokens in a row), then a one-tile image; row 1: one tile.
    return _Images({"pixel_values": _pixels(generator, 4, 3, 16, 16)}, [[8, 4], [4]])


def _onevision_images(generator: torch.Generator) -> _Images:
    # Row 0: 8x16 pixels = base + 2 tiles: 4 + 2 * (4 + newline) tokens; row 1: 8x8 = base + 1 tile, padded to 3.
    pixel_values = _pixels(generator, 2, 3, 3, 8, 8)
    pixel_values[1, 2] = 0
    image_sizes = torch.tensor([[8, 16], [8, 8]])
    return _Images({"pixel_values": pixel_values, "image_sizes": image_sizes}, [[14], [10]])


def _qwen_images(generator: torch.Generator) -> _Images:
    grid = torch.tensor([[1, 4, 6], [1, 4, 4], [1, 6, 4]])  # in patches; 2x2 patches make one token
    patches = int(grid.prod(-1).sum())
    pixel_values = _pixels(generator, patches, 3 * 2 * 4 * 4)  # channels * frames * patch * patch
    return _Images({"pixel_values": pixel_values, "image_grid_thw": grid}, [[6, 4], [6]])


# --- configurations --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Spec:
    student: Callable[[], PreTrainedModel]
    teacher_class: Callable[[PreTrainedConfig], PreTrainedModel]
    teacher_config: Callable[[bool], PreTrainedConfig]  # other: bool
    images: Callable[[torch.Generator], _Images]
    image_token_id: int
    around_image: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    type_ids: str | None = None
    prefix_lm: bool = False


_IDS: dict[str, Any] = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}
_VIT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def _rope(other: bool, **extra: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 500.0 if other else 10_000.0, **extra}


def _llama_config(other: bool, vocab_size: int = STUDENT_VOCAB, tied: bool = False) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=LM_VOCAB if other else vocab_size,
        hidden_size=72 if other else 48,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=6 if other else 4,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters=_rope(other),
        tie_word_embeddings=tied,
        **_IDS,
    )


def _qwen2_sizes(other: bool) -> dict[str, Any]:
    # Qwen2 derives head_dim = hidden_size / heads, 16 in both.
    return {
        "hidden_size": 96 if other else 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 6 if other else 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,  # the defaults of Qwen2 and Qwen2-VL differ
        **_IDS,
    }


def _qwen2_config(other: bool, vocab_size: int = LM_VOCAB, tied: bool = False) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=LM_VOCAB if other else vocab_size,
        tie_word_embeddings=tied,
        rope_parameters=_rope(other),
        **_qwen2_sizes(other),
    )


def _qwen3_sizes(other: bool) -> dict[str, Any]:
    return {
        "hidden_size": 72 if other else 48,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 6 if other else 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "pad_token_id": PAD,
    }


def _gemma_config(other: bool) -> GemmaConfig:
    return GemmaConfig(
        vocab_size=LM_VOCAB if other else STUDENT_VOCAB,
        hidden_size=72 if other else 48,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=6 if other else 4,
        num_key_value_heads=1,
        head_dim=16,
        rope_parameters=_rope(other),
        **_IDS,
    )


def _gemma3_config(other: bool) -> Gemma3TextConfig:
    return Gemma3TextConfig(
        vocab_size=LM_VOCAB if other else STUDENT_VOCAB,
        hidden_size=72 if other else 48,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=6 if other else 4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=6,  # shorter than a row, longer than an image block
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": _rope(other),
            "full_attention": {"rope_type": "default", "rope_theta": 2_000.0 if other else 1_000_000.0},
        },
        **_IDS,
    )


def _smolvlm() -> PreTrainedModel:
    vision = {**_VIT, "image_size": 16, "patch_size": 4}
    config = SmolVLMConfig(
        text_config=_llama_config(False, tied=True),
        vision_config=vision,
        image_token_id=OUTER_IMAGE,
        scale_factor=2,
        tie_word_embeddings=True,
    )
    return SmolVLMForConditionalGeneration(config)


def _idefics3() -> PreTrainedModel:
    vision = {**_VIT, "image_size": 16, "patch_size": 4}
    config = Idefics3Config(
        text_config=_llama_config(False),
        vision_config=vision,
        image_token_id=OUTER_IMAGE,
        scale_factor=2,
        tie_word_embeddings=False,
    )
    return Idefics3ForConditionalGeneration(config)


def _llava(text_config: Callable[[], PreTrainedConfig]) -> Callable[[], PreTrainedModel]:
    def student() -> PreTrainedModel:
        config = LlavaConfig(
            text_config=text_config(),
            vision_config=CLIPVisionConfig(**_VIT, image_size=16, patch_size=8, projection_dim=32),
            image_token_index=OUTER_IMAGE,
            image_seq_length=4,
        )
        return LlavaForConditionalGeneration(config)

    return student


def _llava_onevision() -> PreTrainedModel:
    config = LlavaOnevisionConfig(
        text_config=_qwen2_config(False, tied=True),
        vision_config=SiglipVisionConfig(**_VIT, image_size=8, patch_size=4, vision_use_head=False),
        image_token_index=INNER_IMAGE,
        video_token_index=INNER_VIDEO,
        image_grid_pinpoints=[[8, 8], [8, 16], [16, 8], [16, 16]],
        tie_word_embeddings=True,
    )
    return LlavaOnevisionForConditionalGeneration(config)


_QWEN_VL_IDS: dict[str, Any] = {
    "image_token_id": INNER_IMAGE,
    "video_token_id": INNER_VIDEO,
    "vision_start_token_id": IMAGE_START,
    "vision_end_token_id": IMAGE_END,
}


def _qwen2_vl() -> PreTrainedModel:
    text = {"vocab_size": LM_VOCAB, "rope_parameters": _rope(False, mrope_section=[2, 3, 3]), **_qwen2_sizes(False)}
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": text["hidden_size"],
        "mlp_ratio": 2,
        "num_heads": 4,
        "patch_size": 4,
    }
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **_QWEN_VL_IDS)
    return Qwen2VLForConditionalGeneration(config)


def _qwen2_5_vl() -> PreTrainedModel:
    text = {"vocab_size": LM_VOCAB, "rope_parameters": _rope(False, mrope_section=[2, 3, 3]), **_qwen2_sizes(False)}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [1],
        "out_hidden_size": text["hidden_size"],
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_QWEN_VL_IDS)
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl() -> PreTrainedModel:
    text = {"vocab_size": LM_VOCAB, "rope_parameters": _rope(False, mrope_section=[4, 2, 2]), **_qwen3_sizes(False)}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 4,
        "out_hidden_size": text["hidden_size"],
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **_QWEN_VL_IDS)
    return Qwen3VLForConditionalGeneration(config)


def _qwen3_config(other: bool) -> Qwen3Config:
    return Qwen3Config(vocab_size=LM_VOCAB, rope_parameters=_rope(other), **_qwen3_sizes(other))


def _internvl() -> PreTrainedModel:
    config = InternVLConfig(
        text_config=_qwen2_config(False),
        vision_config={**_VIT, "image_size": [16, 16], "patch_size": [4, 4]},
        image_token_id=INNER_IMAGE,
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    return InternVLForConditionalGeneration(config)


def _gemma3() -> PreTrainedModel:
    config = Gemma3Config(
        text_config=_gemma3_config(False),
        vision_config=SiglipVisionConfig(**_VIT, image_size=16, patch_size=4, vision_use_head=False),
        mm_tokens_per_image=4,
        boi_token_index=IMAGE_START,
        eoi_token_index=IMAGE_END,
        image_token_index=OUTER_IMAGE,
    )
    return Gemma3ForConditionalGeneration(config)


def _paligemma() -> PreTrainedModel:
    text = _gemma_config(False)
    config = PaliGemmaConfig(
        text_config=text,
        vision_config=SiglipVisionConfig(**_VIT, image_size=16, patch_size=8, vision_use_head=False),
        image_token_index=OUTER_IMAGE,
        projection_dim=text.hidden_size,
        hidden_size=text.hidden_size,
        vocab_size=STUDENT_VOCAB,
    )
    return PaliGemmaForConditionalGeneration(config)


def _llama_tied(other: bool) -> LlamaConfig:
    return _llama_config(other, tied=True)


def _qwen2_tied(other: bool) -> Qwen2Config:
    return _qwen2_config(other, tied=True)


def _qwen2_wide(other: bool) -> Qwen2Config:
    return _qwen2_config(other, vocab_size=STUDENT_VOCAB)


_FAKE = ((STUDENT_ONLY,), (STUDENT_ONLY,))  # Idefics3's <fake_token_around_image>
_START_END = ((IMAGE_START,), (IMAGE_END,))

_SPECS: dict[str, _Spec] = {
    "smolvlm": _Spec(_smolvlm, LlamaForCausalLM, _llama_tied, _idefics_images, OUTER_IMAGE, _FAKE),
    "idefics3": _Spec(_idefics3, LlamaForCausalLM, _llama_config, _idefics_images, OUTER_IMAGE, _FAKE),
    "llava": _Spec(
        _llava(lambda: _llama_config(False)), LlamaForCausalLM, _llama_config, _flat_images(16, 4), OUTER_IMAGE
    ),
    "llava_qwen2": _Spec(
        _llava(lambda: _qwen2_wide(False)), Qwen2ForCausalLM, _qwen2_wide, _flat_images(16, 4), OUTER_IMAGE
    ),
    "llava_onevision": _Spec(_llava_onevision, Qwen2ForCausalLM, _qwen2_tied, _onevision_images, INNER_IMAGE),
    "qwen2_vl": _Spec(
        _qwen2_vl, Qwen2ForCausalLM, _qwen2_tied, _qwen_images, INNER_IMAGE, _START_END, "mm_token_type_ids"
    ),
    "qwen2_5_vl": _Spec(
        _qwen2_5_vl, Qwen2ForCausalLM, _qwen2_config, _qwen_images, INNER_IMAGE, _START_END, "mm_token_type_ids"
    ),
    "qwen3_vl": _Spec(
        _qwen3_vl, Qwen3ForCausalLM, _qwen3_config, _qwen_images, INNER_IMAGE, _START_END, "mm_token_type_ids"
    ),
    "internvl": _Spec(_internvl, Qwen2ForCausalLM, _qwen2_config, _internvl_images, INNER_IMAGE, _START_END),
    "gemma3": _Spec(
        _gemma3, Gemma3ForCausalLM, _gemma3_config, _flat_images(16, 4), OUTER_IMAGE, _START_END, "token_type_ids"
    ),
    "paligemma": _Spec(
        _paligemma,
        GemmaForCausalLM,
        _gemma_config,
        _one_image_each(16, 4),
        OUTER_IMAGE,
        type_ids="token_type_ids",
        prefix_lm=True,
    ),
}

FAMILY_NAMES: tuple[str, ...] = tuple(_SPECS)
