"""Small word-level tokenizers, built on the spot.

tokenizer = word_tokenizer(48)                                  # ids 0-3 special, then w4, w5, ..., w47
tokenizer = word_tokenizer(48, extra=("<image>",))              # id 48, as a VLM adds it
tokenizer = word_tokenizer(48, renamed={20: "other"})           # disagrees with the first at one id
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")

TEXT_TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>{% endfor %}"
# Takes lists of parts, as VLM templates do, and writes the same text.
PARTS_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<eos>{% endfor %}"
)


def word_tokenizer(
    size: int,
    *,
    extra: Sequence[str] = (),
    renamed: Mapping[int, str] | None = None,
    chat_template: str | None = None,
) -> PreTrainedTokenizerFast:
    """A tokenizer of `size` tokens, four of them special, and `extra` special tokens from id `size` on.

    renamed: other token strings for single ids.
    """
    tokens = [*SPECIAL, *(f"w{index}" for index in range(len(SPECIAL), size))]
    for index, token in (renamed or {}).items():
        tokens[index] = token
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    if extra:
        tokenizer.add_special_tokens({"additional_special_tokens": list(extra)})
    tokenizer.chat_template = chat_template
    return tokenizer
