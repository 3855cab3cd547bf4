"""The text half of a VLM as a causal language model of its own: a teacher for those who tuned a VLM that has no text-only original.

    python examples/recipes/text_half.py --vlm google/gemma-3-4b-it --output_dir outputs/gemma3_4b/text_half

Weights are copied, not trained; seconds on a CPU, and the VLM's size in memory twice. What is written loads with plain transformers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from hf_lingudistill.folders import check, replacing


def text_half(vlm: str, output_dir: str | Path, *, revision: str | None = None) -> None:
    """Write the text half of a VLM with its tokenizer and chat template.

    Raises:
        NotOurs: if output_dir holds what this function did not write.
        ValueError: if it is no VLM, transformers has no causal LM for its text half, or the two have other weights.
    """
    out = Path(output_dir)
    check(out.parent, out.name, by="text_half")
    whole: Any = AutoModelForImageTextToText.from_pretrained(vlm, revision=revision)
    config = whole.config.get_text_config()
    if config is whole.config or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{vlm}: transformers has no causal language model for a text half of type {config.model_type!r}. Use another VLM."
        )
    # As a whole it may be tied where its text config does not say so
    config.tie_word_embeddings = whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
    config.dtype = whole.dtype
    half: Any = AutoModelForCausalLM.from_config(config).to(whole.dtype)
    for name, mine, theirs in (
        ("decoder", half.get_decoder(), whole.get_decoder()),
        ("head", half.get_output_embeddings(), whole.get_output_embeddings()),
    ):
        try:
            mine.load_state_dict(theirs.state_dict(), strict=True)
        except RuntimeError as error:
            raise ValueError(f"{vlm}: the {name} of {type(half).__name__} has other weights. {error}") from error
    if whole.generation_config is not None:
        half.generation_config = whole.generation_config
    tokenizer = AutoTokenizer.from_pretrained(vlm, revision=revision)
    with replacing(out.parent, out.name, by="text_half") as made:
        half.save_pretrained(made / out.name)
        tokenizer.save_pretrained(made / out.name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vlm", required=True, help="folder or Hub id")
    parser.add_argument("--revision", help="branch, tag or commit of it")
    parser.add_argument("--output_dir", required=True)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    try:
        text_half(args.vlm, args.output_dir, revision=args.revision)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Saved to {args.output_dir}: the text half of {args.vlm}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
