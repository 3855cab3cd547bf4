"""Every class that `AutoModelForImageTextToText` knows, made tiny, through what a user would do with it.

    python tests/all_families.py                 # all of them, one process each; finished ones are not run again
    python tests/all_families.py qwen3_vl llava  # some of them, anew
    python tests/all_families.py --one qwen3_vl  # one of them, in this process; its result on the last line

For each: `check` on the pair; the self-check of the pair; the LM with the student's own weights, which must give the student's logits in
every mode; another LM, which must give what a full-length pass with substituted keys and values gives; one training step; save and
reload. Image features are put in as embeddings, on the way that a projector's output takes: towers do not run here. A row that `check`
lets through and whose error is not rounding is a fault, and so is one that fails at a later stage.

Needs no network. `make families` writes `docs/results/families.json` and the table in `docs/families.md`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs/results/families.json"
TIMEOUT_S = 240
MODES = ("full", "prompt", "vision")
VOCAB, FIRST_IMAGE_ID = 352, 336  # the tiny tokenizer has about 320 tokens
ROUNDING = 1e-3  # of logits, relative to their spread

# By name, wherever in a config it stands. A head has 16 dimensions, of which M-RoPE turns 8 pairs.
SIZES: dict[str, Any] = dict.fromkeys(
    (
        *("hidden_size", "d_model", "embed_dim", "out_hidden_size", "projection_dim", "embedding_dim", "n_embd"),
        *("vision_feature_dim", "text_hidden_size", "projector_hidden_size", "mlp_hidden_size", "output_hidden_size"),
        *("image_embed_dim", "output_dim", "proj_hidden_size", "latent_dim", "projection_hidden_size", "hidden_dim"),
        *(
            "vision_hidden_size",
            "embedding_size",
            "mm_hidden_size",
            "adapter_hidden_size",
            "projector_intermediate_size",
        ),
    ),
    64,
) | {
    **dict.fromkeys(("intermediate_size", "ffn_dim", "mlp_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("depth", "vision_layers", "num_local_layers", "num_global_layers"), 1),
    **dict.fromkeys(
        ("num_attention_heads", "num_heads", "n_head", "encoder_attention_heads", "decoder_attention_heads"), 4
    ),
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(
        ("head_dim", "global_head_dim", "mamba_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16
    ),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "linear_num_value_heads"), 4
    ),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(
        ("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "moe_num_shared_experts"), 1
    ),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size"), 16),
    "codebook_dim": 64,
    "hidden_size_per_layer_input": 0,  # which needs token ids beside embeddings
    "image_size": 32,
    "patch_size": 8,
    "num_kv_shared_layers": 0,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
    "query_pre_attn_scalar": 16,
    "max_position_embeddings": 512,
    "original_max_position_embeddings": 256,
    "mamba_num_heads": 4,
    "ssm_state_size": 16,
    "n_groups": 2,
}
# The LM that a text half was made from, where the text half's own type has no causal LM
LM_OF = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen2_5_omni_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
    "qwen3_omni_moe_text": "qwen3_moe",
    "glm4v_text": "glm4",
    "glm4v_moe_text": "glm4_moe",
    "glm_ocr_text": "glm4",
    "ernie4_5_vl_moe_text": "ernie4_5_moe",
    "paddleocr_vl_text": "ernie4_5",
    "granite4_vision_text": "granite",
    "granite_docling_text": "granite",
    "hunyuan_vl_text": "hunyuan_v1_dense",
}


def shrink(config: Any) -> Any:
    """A config of the same class with the same kinds of layers, small enough to build on the spot."""
    from transformers import PreTrainedConfig

    from hf_lingudistill.compatibility.configs import modeling_source

    settings = {k: v for k, v in config.to_dict().items() if k not in ("transformers_version", "model_type")}
    if "conv_L_cache" in settings and "conv" not in settings["layer_types"]:  # the class's default has none
        settings |= {"layer_types": ["conv", "full_attention"] * (settings["num_hidden_layers"] // 2)}
    taken = iter(range(FIRST_IMAGE_ID, VOCAB))
    for name, value in settings.items():
        own = config.__dict__.get(name)
        if isinstance(own, PreTrainedConfig):
            settings[name] = shrink(own).to_dict()
        elif name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            settings[name] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}[name]
        elif re.search(r"token_(id|index)$", name) and isinstance(value, int):
            settings[name] = next(taken)
        elif (
            name in SIZES and value is not None and not (isinstance(value, list) and not isinstance(SIZES[name], list))
        ):
            settings[name] = SIZES[name]
        elif name in SIZES and isinstance(value, list) and len(value) == 2:  # height and width
            settings[name] = [SIZES[name]] * 2
    if settings.get("kv_lora_rank"):  # the rotary part alone
        settings.pop("head_dim", None)
        settings["num_key_value_heads"] = settings.get("num_attention_heads")
    if (kept := _kept_layers(config, settings)) is not None:
        count = config.__dict__["num_hidden_layers"]
        for name, value in config.to_dict().items():
            if (
                isinstance(value, list)
                and len(value) == count
                and name not in ("mrope_section", "vision_feature_layer")
            ):
                settings[name] = [settings[name][i] if isinstance(settings[name], list) else value[i] for i in kept]
        settings["num_hidden_layers"] = len(kept)
        if special := settings.get("per_layer_config"):  # Gemma 4: wider heads where attention is global
            given = {int(index): value for index, value in special.items()}
            given = {
                i: {k: SIZES.get(k, v) for k, v in given[old].items()} for i, old in enumerate(kept) if old in given
            }
            settings["per_layer_config"] = {
                i: v | ({"head_dim": 32} if "head_dim" in v else {}) for i, v in given.items()
            }
    if config.__dict__.get("head_dim", 0) is None and "num_attention_heads" in settings:
        settings["head_dim"] = SIZES["head_dim"]
    for name in ("rope_parameters", "rope_scaling"):
        if not settings.get(name):
            settings.pop(name, None)
        elif isinstance(settings[name], dict):
            settings[name] = _sections(settings[name], "mrope_section" in (modeling_source(config) or ""))
    return type(config).from_dict(settings)


def _kept_layers(config: Any, settings: dict[str, Any]) -> list[int] | None:
    """Indices of the layers that stay: the first two, and the first of each other kind. None: no kinds are listed."""
    kinds = settings.get("layer_types") or settings.get("layers_block_type")
    if not isinstance(kinds, list) or not kinds or len(kinds) != config.__dict__.get("num_hidden_layers"):
        return None
    return sorted({0, 1, *(kinds.index(kind) for kind in dict.fromkeys(kinds))})


def _sections(rope: dict[str, Any], needed: bool) -> dict[str, Any]:
    """M-RoPE's sections are cut to the pairs of a small head."""
    if any(isinstance(v, dict) for v in rope.values()):
        return {k: _sections(v, needed) if isinstance(v, dict) else v for k, v in rope.items()}
    if rope and (needed or "mrope_section" in rope):
        pairs = int(8 * rope.get("partial_rotary_factor", 1.0))
        rope = rope | {"mrope_section": [pairs - 2 * (pairs // 4), pairs // 4, pairs // 4]}
    return rope


def _without_sections(rope: Any) -> Any:
    return (
        {k: _without_sections(v) for k, v in rope.items() if k != "mrope_section"} if isinstance(rope, dict) else rope
    )


def lm_config(text: Any, other: bool) -> Any:
    """The config of the plain LM behind a text half. other: wider, with another head of queries."""
    from transformers import CONFIG_MAPPING

    kind = LM_OF.get(text.model_type, text.model_type)
    settings = {k: v for k, v in text.to_dict().items() if k not in ("transformers_version", "model_type")}
    if settings.get("head_dim") is None and (heads := getattr(text, "num_attention_heads", None)):
        settings["head_dim"] = text.hidden_size // heads
    settings["tie_word_embeddings"] = False
    if kind == "qwen3_moe":  # as published, and not the class's default
        settings["norm_topk_prob"] = True
    if "rope_parameters" in settings:
        settings["rope_parameters"] = _without_sections(settings["rope_parameters"])
    bound = settings.get("kv_lora_rank") or "conv_L_cache" in settings  # what is shared is as wide as the model
    if other and not bound and settings.get("num_key_value_heads", 4) < 4:
        settings |= {"hidden_size": 96, "intermediate_size": 128, "num_attention_heads": 6}
    return CONFIG_MAPPING[kind].from_dict(settings) if kind != text.model_type else type(text).from_dict(settings)


def run(model_type: str) -> dict[str, Any]:
    """The stages in order; the first that fails ends the row."""
    import logging

    import tiny
    import torch
    from families import randomise_
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    from hf_lingudistill.compatibility import check_compatibility
    from hf_lingudistill.self_check import self_check

    logging.disable(logging.CRITICAL)
    row: dict[str, Any] = {"type": model_type}

    def reason(error: BaseException) -> str:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]

    tokenizer = tiny.make_tokenizer(extra=False)

    def check(config: Any) -> Any:
        text = config.get_text_config(decoder=True)
        try:
            lm = lm_config(text, other=False)
        except Exception:  # the text half stands for its LM
            lm = text
        row.update(text=text.model_type, lm=lm.model_type)
        return check_compatibility(config, lm, student_tokenizer=tokenizer, teacher_tokenizer=tokenizer)

    try:  # as published, which needs no model
        report = check(CONFIG_MAPPING[model_type]())
    except Exception as error:
        return row | {"stage": "check", "note": reason(error)}
    ours = [check for check in report.misfits if check.name not in ("vocabulary", "KV heads", "head_dim")]
    if ours:
        return row | {"stage": "check", "fits": False, "note": ours[0].reason}
    try:
        config = shrink(CONFIG_MAPPING[model_type]())
        row["class"] = type(config).__name__.removesuffix("Config")
        with torch.device("meta"):
            shell = AutoModelForImageTextToText.from_config(config)
        row["class"] = type(shell).__name__
        if (size := sum(p.numel() for p in shell.parameters())) > 100_000_000:
            raise ValueError(f"still {size / 1e6:.0f}M parameters")
        torch.manual_seed(0)
        student = AutoModelForImageTextToText.from_config(config).float().eval()
        randomise_(student, seed=1)
    except Exception as error:
        return row | {"stage": "build", "note": reason(error)}
    text = student.config.get_text_config(decoder=True)
    report = check(student.config)
    if not report.fits:
        return row | {"stage": "check", "fits": False, "note": report.misfits[0].reason}
    try:
        same, other = (
            AutoModelForCausalLM.from_config(lm_config(text, other=o)).float().eval() for o in (False, True)
        )
        randomise_(same, seed=2)
        randomise_(other, seed=3)
        copied = _copy_weights(student, same)
    except Exception as error:
        return row | {"stage": "LM", "fits": True, "note": reason(error)}
    ids = torch.randint(5, 300, (1, 40), generator=torch.Generator().manual_seed(5))
    try:
        self_check(student, same, ids)
    except Exception as error:
        refused = isinstance(error, ValueError)
        return row | {"stage": "self-check", "fits": not refused, "note": reason(error).removeprefix("ValueError: ")}
    row |= {"fits": True, "same_weights": copied}
    try:
        row |= _measure(student, same, other, copied)
    except Exception as error:
        return row | {"stage": "oracle", "note": reason(error)}
    try:
        row["step"] = _one_step(student, other)
    except Exception as error:
        return row | {"stage": "step", "note": reason(error)}
    try:
        row["reload"] = _reload(student)
    except Exception as error:
        return row | {"stage": "reload", "note": reason(error)}
    return row | {
        "stage": "done",
        "note": "; ".join(check.reason for check in report.notes if check.name in ("attention",)),
    }


def _copy_weights(student: Any, lm: Any) -> bool:
    """The student's own decoder and head in the LM; False where the LM has other parts."""
    ours, theirs = student.get_decoder().state_dict(), lm.get_decoder().state_dict()
    if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in theirs.items()}:
        return False
    lm.get_decoder().load_state_dict(ours)
    lm.get_output_embeddings().load_state_dict(student.get_output_embeddings().state_dict())
    return True


def _measure(student: Any, same: Any, other: Any, copied: bool) -> dict[str, float]:
    """Largest errors over the modes, of logits, relative to their spread; and two controls."""
    import torch
    from oracle import StudentKV
    from planning import plan_queries, teacher_pass

    from hf_lingudistill._internals import decoder_of, head_of
    from hf_lingudistill.losses import _finish, _raw_logits
    from hf_lingudistill.student_kv import recording

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 300, (2, 24), generator=generator)
    ids[:, 3:9] = FIRST_IMAGE_ID
    image = ids == FIRST_IMAGE_ID
    labels = torch.where(torch.arange(24) >= 14, ids, -100).repeat(1, 1)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        embeddings = student.get_input_embeddings()(ids)
        features = torch.randn(embeddings.shape, generator=generator) * embeddings.std()
        embeddings = torch.where(image[..., None], features, embeddings)
        with recording(student) as shared, _projections(decoder_of(student)) as written:
            hidden = student.base_model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False)[0]

        def logits(model: Any, states: torch.Tensor) -> torch.Tensor:
            return _finish(_raw_logits(states, head_of(model)), head_of(model))

        def off(given: torch.Tensor, wanted: torch.Tensor) -> float:
            if not bool(given.isfinite().all() & wanted.isfinite().all()):
                raise ValueError("logits that are not finite")
            return float((given - wanted).abs().max() / wanted.std())

        found: dict[str, float] = {}
        seen = StudentKV(shared.keys, shared.values, hidden, shared.rotary)  # type: ignore[arg-type]  # by layer
        causal = not any(_looks_ahead(layer) for layer in shared.masks.values())
        blind = None
        for mode in MODES:
            plan = plan_queries(ids, labels, kv_sharing=mode, shared_vocab_size=320, attention_mask=mask)
            at = plan.loss_rows, plan.loss_positions
            wanted = logits(student, hidden[at])
            if copied:
                error = off(logits(same, teacher_pass(same, shared, plan)), wanted)
                found["same_error"] = max(found.get("same_error", 0.0), error)
            if not causal or getattr(
                other.config, "kv_lora_rank", None
            ):  # whose cache keeps what keys and values are made of
                continue
            own = plan.sharing.own(~image, labels != -100, mask.bool())
            queried = torch.zeros_like(image)
            queried[plan.rows, plan.positions] = True
            full = _full_length(other, ids.masked_fill(image, 0), seen, written, own, queried, mask)
            wanted = logits(other, full[at])
            given = logits(other, teacher_pass(other, shared, plan))
            found["reference_error"] = max(found.get("reference_error", 0.0), off(given, wanted))
            if blind is not None:
                found["modes_differ"] = max(found.get("modes_differ", 0.0), off(given, blind))
            blind = given
        shared.values = {layer: values.roll(1, dims=2) for layer, values in shared.values.items()}
        plan = plan_queries(ids, labels, kv_sharing="full", shared_vocab_size=320, attention_mask=mask)
        wanted = logits(student, hidden[plan.loss_rows, plan.loss_positions])
        spoiled = logits(same if copied else other, teacher_pass(same, shared, plan))
        found["control"] = off(spoiled, wanted)
    return found


def _looks_ahead(layer: Any) -> bool:
    """Whether some query of the student's layer sees a later token: the LM's own masks are then not the student's."""
    import torch

    mask = layer.mask
    if mask is None:
        return not layer.is_causal
    return bool((mask if mask.dtype == torch.bool else mask > -1).triu(1).any())


# What tokens write to the state of a mixer without softmax, by the names of its projections; and which channels they read with
_WRITTEN = ("in_proj_qkv", "in_proj_b", "in_proj_a", "in_proj")


@contextmanager
def _projections(decoder: Any) -> Iterator[dict[str, Any]]:
    found: dict[str, Any] = {}
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: found.update({name: output}))
        for name, module in decoder.named_modules()
        if name.rpartition(".")[2] in _WRITTEN
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _full_length(
    teacher: Any, ids: Any, seen: Any, written: dict[str, Any], own: Any, queried: Any, attention_mask: Any
) -> Any:
    """(B, T, H): the teacher's own forward over whole rows, its masks its own, the student's K/V, rotary embeddings and mixer inputs
    put in where a position is not its own."""
    import torch
    from oracle import CACHE, SubstitutingCache
    from transformers import DynamicCache

    from hf_lingudistill._internals import decoder_of

    decoder = decoder_of(teacher)

    def rotary(_: Any, args: Any, kwargs: Any, __: Any) -> Any:
        return seen.rotary[kwargs.get("layer_type", args[2] if len(args) > 2 else None)]

    def substituted(name: str) -> Any:
        module = decoder.get_submodule(name.rpartition(".")[0])

        def hook(_: Any, __: Any, mine: Any) -> Any:
            reads = torch.zeros(mine.shape[-1], dtype=torch.bool)
            if name.endswith("in_proj_qkv"):
                reads[: module.key_dim] = True
            elif name.endswith("in_proj"):
                reads[mine.shape[-1] // 3 : 2 * mine.shape[-1] // 3] = True
            return torch.where(own[..., None] | (queried[..., None] & reads), mine, written[name])

        return hook

    hooks = [decoder.rotary_emb.register_forward_hook(rotary, with_kwargs=True)]
    hooks += [decoder.get_submodule(name).register_forward_hook(substituted(name)) for name in written]
    cache = SubstitutingCache(own, seen)
    if {"linear_attention", "conv"} & {
        *(getattr(decoder.config, "layer_types", None) or ())
    }:  # a cache with places for states
        cache.layers = DynamicCache(config=teacher.config).layers
    try:
        inputs = {"inputs_embeds": teacher.get_input_embeddings()(ids), "attention_mask": attention_mask}
        return decoder(**inputs, use_cache=True, **{CACHE: cache})[0]
    finally:
        for hook in hooks:
            hook.remove()


def _one_step(student: Any, teacher: Any) -> str:
    """One step of the real step on text rows: the loss is finite and every layer of the decoder moves."""
    import torch
    from planning import prepare_teacher

    from hf_lingudistill._internals import decoder_of
    from hf_lingudistill.losses import Weights
    from hf_lingudistill.sharing import sharing
    from hf_lingudistill.step import DistillStep

    ids = torch.randint(5, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    labels = torch.where(torch.arange(24) >= 12, ids, -100).repeat(1, 1)
    frozen = prepare_teacher(teacher, student, shared_vocab_size=320)
    step = DistillStep(student.train(), frozen, sharing("vision"), Weights())
    step.install()
    try:
        output = student(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            labels=labels,
            distill=torch.tensor([True, False]),
            fused_lm_head=True,
        )
        output.loss.backward()
    finally:
        del student.forward
        student.eval()
    if not bool(torch.isfinite(output.loss)):
        raise ValueError(f"the loss is {float(output.loss)}")
    still = [
        i
        for i, layer in enumerate(decoder_of(student).layers)
        if not any(p.grad is not None and p.grad.any() for p in layer.parameters())
    ]
    if still:
        raise ValueError(f"no gradient in layers {still}")
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad / (parameter.grad.norm() + 1e-6)
    return "done"


def _reload(student: Any) -> str:
    """Saved and loaded again by the auto class, without unknown or missing weights: the same logits."""
    import tempfile

    import torch
    from transformers import AutoModelForImageTextToText

    ids = torch.randint(5, 300, (1, 16), generator=torch.Generator().manual_seed(2))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        student.save_pretrained(folder)
        again = AutoModelForImageTextToText.from_pretrained(folder).eval()
        error = (again(input_ids=ids).logits - student(input_ids=ids).logits).abs().max()
    if not float(error) < 1e-5:
        raise ValueError(f"logits differ by {float(error):.2g} after reloading")
    return "same logits"


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--one"]:
        print("\n" + json.dumps(run(arguments[1])))
        return
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    import hf_lingudistill.trainer  # noqa: F401  # loaded once, before processes are forked

    known = {row["type"]: row for row in json.loads(RESULTS.read_text())["families"]} if RESULTS.exists() else {}
    names = arguments or [name for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if name not in known]
    for name in names:
        known[name] = row = apart(name)
        print(f"{name:24} {row['stage']:10} {row.get('same_error', '')} {row.get('note', '')[:150]}", flush=True)
        write(known)


def apart(name: str) -> dict[str, Any]:
    """`run` in a process of its own: what one family patches, leaks or crashes stays its own."""
    context = multiprocessing.get_context("fork")
    reading, writing = context.Pipe(duplex=False)
    process = context.Process(target=lambda: writing.send(run(name)))
    process.start()
    writing.close()
    row: dict[str, Any] = {"type": name, "stage": "died", "note": f"not done after {TIMEOUT_S} s"}
    try:
        if reading.poll(TIMEOUT_S):
            row = reading.recv()
    except EOFError:
        row["note"] = f"the process ended by itself (exit code {process.exitcode})"
    process.kill()
    process.join()
    return row


def write(rows: dict[str, dict[str, Any]]) -> None:
    import transformers

    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    whole = {"transformers": transformers.__version__, "families": [rows[name] for name in sorted(rows)]}
    RESULTS.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
