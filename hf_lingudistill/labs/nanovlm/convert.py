"""Folders in, folders out: `from_nanovlm` and `to_nanovlm`, the two directions of `lingudistill convert-nanovlm`."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    GenerationConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from .config import NanoVLMConfig, NanoVLMError
from .inputs import origin
from .stock import is_split, make_processor, make_tokenizer
from .weights import to_nanovlm as nanovlm_tensors
from .weights import to_transformers as transformers_tensors

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Converted:
    """What was written. notes: what a user should know, one sentence each."""

    folder: Path
    parameters: int
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{self.folder}: {self.parameters / 1e6:.1f}M parameters",
            *(f"  note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def from_nanovlm(
    source: str, destination: str, *, tokenizer: str | None = None, revision: str | None = None
) -> Converted:
    """Write a nanoVLM checkpoint as a transformers VLM (Idefics3) with its processor, stock classes only.

    Args:
        source: folder or Hub id with nanoVLM's `config.json` and `model.safetensors`.
        destination: a folder that does not exist or is empty.
        tokenizer: the tokenizer before nanoVLM's own tokens; default: `lm_tokenizer` of the config.
        revision: branch, tag or commit of a Hub id.

    Raises:
        NanoVLMError: if the checkpoint cannot be converted, or the destination holds something.
    """
    folder = _fetch(source, revision, [WEIGHTS])
    config = NanoVLMConfig.read((folder / "config.json").read_text(encoding="utf-8"))
    words = make_tokenizer(config, _base_tokenizer(tokenizer or config.lm_tokenizer))
    tensors = transformers_tensors(_tensors(folder / WEIGHTS), config)
    model = _model(config, words, tensors)
    processor = make_processor(config, words)
    with _new_folder(destination) as target:
        model.save_pretrained(target)
        processor.save_pretrained(target)
        (target / "README.md").write_text(_card(config, source), encoding="utf-8")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Converted(Path(destination), parameters, config.notes() + _input_notes(config))


def to_nanovlm(source: str, destination: str, *, revision: str | None = None) -> Converted:
    """Write a converted model, trained or not, back as nanoVLM's `config.json` and `model.safetensors`.

    Raises:
        NanoVLMError: if the model does not come from nanoVLM, no longer fits it, or the destination holds something.
    """
    folder = _fetch(source, revision, ["*.safetensors", "model.safetensors.index.json"])
    try:
        here = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise NanoVLMError(f"{source!r}: config.json is not one that transformers reads ({error}).") from error
    config = origin(here, source)
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise NanoVLMError(f"{source!r} holds no safetensors weights. Expected {WEIGHTS}; pickles are not loaded.")
    tensors, metadata = nanovlm_tensors({name: t for shard in shards for name, t in _tensors(shard).items()}, config)
    _check_shapes(tensors, config)
    with _new_folder(destination) as target:
        (target / "config.json").write_text(config.text, encoding="utf-8")
        save_file(tensors, target / WEIGHTS, metadata)
    return Converted(Path(destination), sum(t.numel() for t in tensors.values()))


def transformers_config(config: NanoVLMConfig, tokenizer: PreTrainedTokenizerFast) -> Idefics3Config:
    """The Idefics3 config that computes what nanoVLM computes; `nanovlm` keeps the original."""
    settings: dict[str, Any] = {"lm_model_type": config.lm_model_type, "nanovlm": config.text}
    return Idefics3Config(
        text_config={
            "model_type": "llama",
            "vocab_size": config.lm_vocab_size,
            "hidden_size": config.lm_hidden_dim,
            "intermediate_size": config.lm_inter_dim,
            "num_hidden_layers": config.lm_n_blocks,
            "num_attention_heads": config.lm_n_heads,
            "num_key_value_heads": config.lm_n_kv_heads,
            "max_position_embeddings": config.lm_max_position_embeddings,
            "rms_norm_eps": config.lm_rms_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": float(config.lm_re_base)},
            "attention_dropout": config.lm_dropout,
            "tie_word_embeddings": config.lm_tie_weights,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            # None: padded with its end-of-sequence token, Llama would train that token's embedding no more.
            "pad_token_id": None,
        },
        vision_config={
            "hidden_size": config.vit_hidden_dim,
            "intermediate_size": config.vit_inter_dim,
            "num_hidden_layers": config.vit_n_blocks,
            "num_attention_heads": config.vit_n_heads,
            "image_size": config.vit_img_size,
            "patch_size": config.vit_patch_size,
            "layer_norm_eps": config.vit_ln_eps,
            "attention_dropout": config.vit_dropout,
            "hidden_act": "gelu_pytorch_tanh",
        },
        scale_factor=config.mp_pixel_shuffle_factor,
        image_token_id=cast(int, tokenizer.convert_tokens_to_ids(config.image_token)),
        tie_word_embeddings=config.lm_tie_weights,
        **settings,
    )


def _model(config: NanoVLMConfig, tokenizer: PreTrainedTokenizerFast, tensors: dict[str, torch.Tensor]) -> Any:
    target = transformers_config(config, tokenizer)
    target.dtype = tensors["model.text_model.embed_tokens.weight"].dtype
    with torch.device("meta"):
        model = Idefics3ForConditionalGeneration(target)
    if config.lm_tie_weights:
        tensors = tensors | {"lm_head.weight": tensors["model.text_model.embed_tokens.weight"]}
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise NanoVLMError(f"{WEIGHTS} does not fit config.json: {' '.join(str(error).split())[:600]}") from error
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def _input_notes(config: NanoVLMConfig) -> list[str]:
    """How the stock processor's inputs differ from nanoVLM's."""
    exact = "NanoVLMProcessor makes nanoVLM's own (docs/nanovlm.md)."
    if is_split(config):
        notes = [f"The stock processor puts the whole image after its tiles, nanoVLM before them. {exact}"]
        if not config.resize_to_max_side_len:
            notes.append(
                f"The stock processor does not shrink images of more than {config.max_img_size} pixels, as nanoVLM does: shrink "
                f"them before. {exact}"
            )
        return notes
    if config.tiles_per_side > 1:
        return [f"The stock processor does not split images, as nanoVLM does without a global image token. {exact}"]
    return []


def _check_shapes(tensors: dict[str, torch.Tensor], config: NanoVLMConfig) -> None:
    """What nanoVLM's loader would refuse: most often, a vocabulary that was resized."""
    head = tensors["decoder.head.weight"].shape
    if tuple(head) != (config.lm_vocab_size, config.lm_hidden_dim):
        raise NanoVLMError(
            f"The head has shape {tuple(head)}, nanoVLM's has ({config.lm_vocab_size}, {config.lm_hidden_dim}): the vocabulary was "
            "resized after the conversion."
        )


def _fetch(source: str, revision: str | None, weights: list[str]) -> Path:
    """The folder of a checkpoint; a Hub id is downloaded, config and safetensors alone."""
    folder = Path(os.path.expanduser(source))
    if not folder.exists():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(source, revision=revision, allow_patterns=["config.json", *weights]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise NanoVLMError(f"{source!r} is neither a folder nor a Hub id that can be read ({error}).") from error
    if not (folder / "config.json").is_file():
        raise NanoVLMError(f"{source!r} has no config.json. Expected a checkpoint's folder or Hub id.")
    if weights == [WEIGHTS] and not (folder / WEIGHTS).is_file():
        raise NanoVLMError(
            f"{source!r} has no {WEIGHTS}. Expected what nanoVLM's save_pretrained writes; pickles (.bin, .pt, .pth) are not loaded."
        )
    return folder


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise NanoVLMError(f"{path.name} is not a whole safetensors file: {error}") from error


def _base_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """tokenizer.json as it is, as nanoVLM was trained with it: AutoTokenizer builds SmolLM2's class (GPT-2's) anew, without the rule
    that digits stand alone."""
    try:
        return cast(PreTrainedTokenizerFast, PreTrainedTokenizerFast.from_pretrained(name))
    except (OSError, ValueError) as error:
        raise NanoVLMError(
            f"The tokenizer {name!r} cannot be loaded ({' '.join(str(error).split())[:200]}). Pass --tokenizer with a folder or Hub id "
            "of the tokenizer that the checkpoint was trained with (a tokenizer.json)."
        ) from error


@contextmanager
def _new_folder(destination: str) -> Iterator[Path]:
    """A folder beside the destination that takes its name once it is whole; nothing is overwritten."""
    target = Path(os.path.expanduser(destination)).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise NanoVLMError(
            f"{destination!r} exists and is not an empty folder. Nothing is overwritten: name a new folder."
        )
    there = target.exists()  # an empty folder stays the one that it is: somebody may stand in it, or have mounted it
    target.parent.mkdir(parents=True, exist_ok=True)
    working = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target if there else target.parent))
    try:
        yield working
        if there:
            made = sorted(working.iterdir())
            if meanwhile := [file.name for file in made if os.path.lexists(target / file.name)]:
                raise NanoVLMError(
                    f"{meanwhile[0]!r} has come into {destination!r} meanwhile. Nothing is overwritten: name a new folder."
                )
            for file in made:
                file.rename(target / file.name)
            working.rmdir()
        else:
            working.chmod(0o755)  # mkdtemp's is private
            working.rename(target)  # fails if something has been put there meanwhile
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)
        raise


def _card(config: NanoVLMConfig, source: str) -> str:
    bases = [name for name in (config.lm_model_type, config.vit_model_type) if isinstance(name, str)]
    named = f"`{source}`" if not Path(os.path.expanduser(source)).exists() else "a nanoVLM checkpoint"
    notes = "\n".join(f"- {note}" for note in config.notes() + _input_notes(config))
    return (
        "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n"
        + ("base_model:\n" + "".join(f"- {name}\n" for name in bases) if bases else "")
        + f"---\n\nConverted from {named} by `lingudistill convert-nanovlm`: the same tensors under transformers' names. It loads with "
        "`AutoModelForImageTextToText` and `AutoProcessor`.\n\n" + notes + "\n"
    )
