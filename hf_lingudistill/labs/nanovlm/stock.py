"""The inputs of a converted checkpoint, said with stock classes alone: tokenizer, chat template, image processor, processor.

No stock processor makes nanoVLM's tiles: those that cut an image as nanoVLM does put the whole image after its tiles, those
that put it first cut or pad differently. So, by kind of checkpoint:

    not split       DeepseekVLProcessor, which writes n image tokens per image and nothing else: nanoVLM's inputs exactly
    split           GraniteDoclingProcessor, which writes `<row_i_col_j>` before each tile: nanoVLM's tokens and tiles, the
                    whole image last
    split, with no  DeepseekVLProcessor, one tile per image: every stock class adds the whole image to its tiles, and such a
    global token    checkpoint has never seen it

What GraniteDoclingProcessor writes between tiles is taken out by the tokenizer's normalizer, which is data in tokenizer.json.
For an image of one tile (a small one, or any with `do_image_splitting=False`) it writes nothing at all: so the chat template
writes `<whole-image>` before each image, and the normalizer puts the image's tokens in its place where no tile follows.

`NanoVLMProcessor` (inputs.py) makes nanoVLM's own inputs for all kinds.
"""

from __future__ import annotations

from typing import Any

from PIL.Image import Resampling
from tokenizers import AddedToken, Regex, Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast
from transformers.models.deepseek_vl.processing_deepseek_vl import DeepseekVLProcessor
from transformers.models.granite_docling.processing_granite_docling import GraniteDoclingProcessor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from .config import NanoVLMConfig, NanoVLMError

# Idefics3 takes a tile of zeros for padding, and nanoVLM does not normalise: a black tile is all zeros. Adding the smallest
# number that float16 holds keeps it, and moves no other pixel by more than half of float16's own step.
OFFSET = 2.0**-24

MARK, GLOBAL = "<fake_token_around_image>", "<global-img>"  # as GraniteDoclingProcessor writes them
WHOLE, PLACEHOLDER = "<whole-image>", "<image>"  # no tokens: what the normalizer replaces

# Collects what each message says: `pictures` (its image tokens), `words` (its texts) and `content` (both, in order). Where a
# conversation has several images, nanoVLM numbers them from 0.
_FLATTEN = """\
{%- set ns = namespace(images=0, seen=0, flat=[], content='', pictures='', words='') -%}
{%- for message in messages -%}
{%- if message['content'] is not string -%}
{%- for part in message['content'] or [] if part['type'] == 'image' -%}
{%- set ns.images = ns.images + 1 -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- set ns.content = '' -%}{%- set ns.pictures = '' -%}{%- set ns.words = '' -%}
{%- if message['content'] is string -%}
{%- set ns.content = message['content'] -%}{%- set ns.words = message['content'] -%}
{%- else -%}
{%- for part in message['content'] or [] -%}
{%- if part['type'] == 'image' -%}
{%- set picture = ('<image: ' ~ ns.seen ~ '>' if ns.images > 1 else '') + IMAGE -%}
{%- set ns.content = ns.content + picture -%}{%- set ns.pictures = ns.pictures + picture -%}
{%- set ns.seen = ns.seen + 1 -%}
{%- else -%}
{%- set ns.content = ns.content + part['text'] -%}{%- set ns.words = ns.words + part['text'] -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- set ns.flat = ns.flat + [{'role': message['role'], 'content': ns.content, 'pictures': ns.pictures, 'words': ns.words}] -%}
{%- endfor -%}
{%- set messages = ns.flat %}"""

# nanoVLM before it had chat templates.
_QUESTION_ANSWER = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ message['pictures'] + 'Question: ' + message['words'] + "
    "' Answer:' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + EOS }}{% else %}{{ message['content'] }}"
    "{% endif %}{% endfor %}"
)


def chat_template(config: NanoVLMConfig, image: str, eos_token: str) -> str:
    """nanoVLM's chat template for messages whose content is a text or a list of text and image parts.

    image: what stands for one image.
    """
    own = config.lm_chat_template or _QUESTION_ANSWER.replace("EOS", _quoted(eos_token))
    return _FLATTEN.replace("IMAGE", _quoted(image)) + own


def is_split(config: NanoVLMConfig) -> bool:
    """Whether the stock processor splits images (see above)."""
    return bool(config.tiles_per_side > 1 and config.global_token)


def image_prompt(config: NanoVLMConfig) -> str:
    """What the chat template writes for an image, for the stock processor to expand."""
    if is_split(config):
        return WHOLE + PLACEHOLDER
    if config.max_img_size is None:
        return config.image_token
    return (config.global_token or config.extra_tokens["r1c1"]) + config.image_token


def make_tokenizer(config: NanoVLMConfig, base: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The LM's tokenizer with nanoVLM's own tokens appended, padded with its end-of-sequence token.

    Raises:
        NanoVLMError: if the base has no end-of-sequence token, or more tokens than the model.
    """
    if base.eos_token is None:
        raise NanoVLMError(
            f"The tokenizer {base.name_or_path!r} names no end-of-sequence token (eos_token), which nanoVLM pads with."
        )
    tokenizer = Tokenizer.from_str(base.backend_tokenizer.to_str())
    extra = {name: AddedToken(token, special=True, normalized=True) for name, token in config.extra_tokens.items()}
    tokenizer.add_special_tokens(list(extra.values()))
    if (size := tokenizer.get_vocab_size(with_added_tokens=True)) > config.lm_vocab_size:
        raise NanoVLMError(
            f"{base.name_or_path!r} and nanoVLM's own tokens make {size:,} tokens, but the model has {config.lm_vocab_size:,}. Pass "
            "the tokenizer that the checkpoint was trained with as --tokenizer."
        )
    settings: dict[str, Any] = {}
    kept = ["bos_token", "eos_token", "unk_token"]
    if is_split(config):
        # Without a token of this name GraniteDoclingProcessor takes PLACEHOLDER, and counts no ids of it where it is unknown.
        extra["nanovlm_image_token"] = extra.pop("image_token")
        kept.remove("unk_token")  # byte-level: there are no unknown texts
        known = [tokenizer.normalizer] if tokenizer.normalizer else []
        tokenizer.normalizer = normalizers.Sequence(known + _without_separators(config))
        # A processor hands settings of its tokenizer on to its image processor, and this one tells it rows and columns.
        settings["return_row_col_info"] = True
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{name: token for name in kept if (token := getattr(base, name))},
        pad_token=base.eos_token,
        extra_special_tokens=extra,
        model_max_length=config.lm_max_position_embeddings,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        **settings,
    )


def _without_separators(config: NanoVLMConfig) -> list[normalizers.Normalizer]:
    """Takes out what GraniteDoclingProcessor writes around tiles, and names images as nanoVLM does.

    A line break goes only between an image token and Granite's mark, so a user's own line breaks stay.
    """
    image, whole = config.image_token, str(config.global_token)
    literal = "".join(c if c.isalnum() or c in "_<>" else "\\" + c for c in image)
    return [
        normalizers.Replace(Regex(f"{WHOLE}(?!{MARK})"), whole + image * config.tokens_per_tile),
        normalizers.Replace(WHOLE, ""),
        normalizers.Replace(PLACEHOLDER, image),
        normalizers.Replace(Regex(rf"(?<={literal})\n\n?(?={MARK})"), ""),
        normalizers.Replace(MARK + GLOBAL, whole),
        normalizers.Replace(MARK, ""),
    ]


def make_processor(
    config: NanoVLMConfig, tokenizer: PreTrainedTokenizerFast
) -> GraniteDoclingProcessor | DeepseekVLProcessor:
    """The stock processor of a converted checkpoint."""
    tile = {"longest_edge": config.vit_img_size}
    split = is_split(config)
    images = Idefics3ImageProcessorPil(
        do_image_splitting=split,
        do_resize=split and bool(config.resize_to_max_side_len),
        size={"longest_edge": config.max_img_size} if split else tile,
        max_image_size=tile,
        resample=resample(config),
        image_mean=[-OFFSET] * 3,
        image_std=[1.0] * 3,
    )
    template = chat_template(config, image_prompt(config), str(tokenizer.eos_token))
    if split:
        return GraniteDoclingProcessor(images, tokenizer, image_seq_len=config.tokens_per_tile, chat_template=template)
    return DeepseekVLProcessor(images, tokenizer, chat_template=template, num_image_tokens=config.tokens_per_tile)


def resample(config: NanoVLMConfig) -> Resampling:
    """How this checkpoint resizes an image."""
    return Resampling.BILINEAR if config.max_img_size is None else Resampling.BICUBIC


def _quoted(text: str) -> str:
    """A Jinja string literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
