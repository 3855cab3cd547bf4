"""The language model that the recipe begins with: the one that the settings name, from the Hub or from pip packages."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hf_lingudistill.labs.demo.models import SMOLLM2, load_smollm2
from hf_lingudistill.labs.demo.text import package_file
from hf_lingudistill.weights import load_whole


def name_of(settings: Mapping[str, Any]) -> str:
    """The Hub id of the LM that some settings are about."""
    name: str = settings.get("lm", {}).get("hub", SMOLLM2)
    return name


def load_lm(settings: Mapping[str, Any], *, offline: bool = False) -> tuple[Any, Any]:
    """(LM, tokenizer) of a recipe's settings; embeddings beyond the tokenizer's tokens are left out.

    settings: `lm` has `hub`, a Hub id, and for `offline` what stands in its place: `packages`, each with one `part` of a GGUF file whose
        digest is `sha256`. Without `lm`, SmolLM2-135M-Instruct. `dtype` is the LM's (default float32).

    Raises:
        ModuleNotFoundError: if offline and a package is not installed.
        ValueError: if the parts are not the file that was tested.
    """
    dtype = getattr(torch, settings.get("dtype", "float32"))
    if "lm" not in settings:
        lm, tokenizer = load_smollm2(offline=offline)
        return lm.to(dtype), tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = settings["lm"]
    if offline:
        lm, tokenizer = _from_parts(source, dtype)
    else:
        lm = load_whole(AutoModelForCausalLM, source["hub"], dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(source["hub"])
    if lm.config.vocab_size > len(tokenizer):
        lm.resize_token_embeddings(len(tokenizer))
    return lm.eval(), tokenizer


def _from_parts(source: Mapping[str, Any], dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    digest, packages = hashlib.sha256(), source["packages"]
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "model.gguf"
        with whole.open("wb") as file:
            for number in range(1, packages["n"] + 1):
                named, inside = packages["name"].format(number), packages["part"].format(number)
                part = package_file(named, inside, install=packages["install"]).read_bytes()
                digest.update(part)
                file.write(part)
        if digest.hexdigest() != source["sha256"]:
            raise ValueError(
                f"The parts of {source['hub']} have the digest {digest.hexdigest()}, expected {source['sha256']}: other versions of the "
                f"packages. Install those that were tested: `{packages['install']}`."
            )
        expanded = load_whole(AutoModelForCausalLM, scratch, gguf_file=whole.name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=whole.name)
    # The expanded model still calls itself quantised, and then refuses to be saved; the numbers move to a plain one
    values = {name: value for name, value in expanded.config.to_dict().items() if name != "quantization_config"}
    config = AutoConfig.for_model(**values | {"tie_word_embeddings": source.get("tied", False)})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    state = expanded.state_dict()
    if config.tie_word_embeddings:  # the file keeps the matrix twice; the head's copy has more bits
        name = "model.embed_tokens.weight"
        state[name] = state["lm_head.weight"]
    model.load_state_dict(state)
    model.tie_weights()
    return model, tokenizer
