"""What a pair is put through once its two models stand: errors against oracles, one training step, save and reload."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from family_shrunk import FIRST_IMAGE_ID

MODES = ("full", "prompt", "vision")


def copy_weights(student: Any, lm: Any) -> bool:
    """The student's own decoder and head in the LM; False where the LM has other parts."""
    ours, theirs = student.get_decoder().state_dict(), lm.get_decoder().state_dict()
    if any(".text_moe." in name for name in ours):  # ERNIE 4.5 VL: image tokens have experts of their own
        ours = {k.replace(".text_moe.", "."): v for k, v in ours.items() if ".vision_moe." not in k}
    if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in theirs.items()}:
        return False
    lm.get_decoder().load_state_dict(ours)
    lm.get_output_embeddings().load_state_dict(student.get_output_embeddings().state_dict())
    return True


def measure(student: Any, same: Any, other: Any, copied: bool) -> dict[str, float]:
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
        with recording(student) as shared, projections(decoder_of(student)) as written:
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
        before = unspoiled = None
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
            full = full_length(other, ids.masked_fill(image, 0), seen, written, own, queried, mask)
            wanted = logits(other, full[at])
            given = logits(other, teacher_pass(other, shared, plan))
            found["reference_error"] = max(found.get("reference_error", 0.0), off(given, wanted))
            if before is not None:
                found["modes_differ"] = max(found.get("modes_differ", 0.0), off(given, before))
            before = given
            unspoiled = given if mode == "full" else unspoiled
        shared.values = {layer: values.roll(1, dims=2) for layer, values in shared.values.items()}
        plan = plan_queries(ids, labels, kv_sharing="full", shared_vocab_size=320, attention_mask=mask)
        wanted = logits(student, hidden[plan.loss_rows, plan.loss_positions]) if copied else unspoiled
        reader = same if copied else other
        found["control"] = off(logits(reader, teacher_pass(reader, shared, plan)), wanted)
    return found


def _looks_ahead(layer: Any) -> bool:
    """Whether some query of the student's layer sees a later token: the LM's own masks are then not the student's."""
    import torch

    mask = layer.mask
    if mask is None:
        return not layer.is_causal
    return bool((mask if mask.dtype == torch.bool else mask > -1).triu(1).any())


# What tokens write to the state of a mixer without softmax, by the names of its projections; and which channels they read with
_WRITTEN = ("in_proj_qkv", "in_proj_b", "in_proj_a", "in_proj_qkvz", "in_proj_ba", "in_proj")


@contextmanager
def projections(decoder: Any) -> Iterator[dict[str, Any]]:
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


def full_length(
    teacher: Any, ids: Any, seen: Any, written: dict[str, Any], own: Any, queried: Any, attention_mask: Any
) -> Any:
    """(B, T, H): the teacher's own forward over whole rows, its masks its own, the student's K/V, rotary embeddings and mixer inputs
    put in where a position is not its own."""
    import torch
    from oracle import CACHE, SubstitutingCache
    from transformers import DynamicCache

    from hf_lingudistill._internals import decoder_of

    decoder = decoder_of(teacher)

    def rotary(_: Any, args: Any, kwargs: Any, mine: Any) -> Any:
        theirs = seen.rotary[kwargs.get("layer_type", args[2] if len(args) > 2 else None)]
        half = theirs[0].shape[-1] // 2
        if torch.equal(mine[0][..., :half], mine[0][..., half:]) and torch.equal(
            *(theirs[0][..., i::2] for i in (0, 1))
        ):
            return tuple(torch.cat([x[..., ::2], x[..., ::2]], dim=-1) for x in theirs)  # GLM-4.1V on GLM-4
        return theirs

    def substituted(name: str) -> Any:
        module = decoder.get_submodule(name.rpartition(".")[0])

        def hook(_: Any, __: Any, mine: Any) -> Any:
            reads = torch.zeros(mine.shape[-1], dtype=torch.bool)
            if name.endswith("in_proj_qkv"):
                reads[: module.key_dim] = True
            elif name.endswith("in_proj_qkvz"):  # by key head: query, key, its values, their gates
                heads, key = module.num_k_heads, module.head_k_dim
                reads = reads.view(heads, -1)
                reads[:, :key] = True
                reads[:, (reads.shape[1] + 2 * key) // 2 :] = True
                reads = reads.flatten()
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


def as_itself(student: Any, teacher: Any) -> None:
    """Raise where a VLM that is run whole on the student's inputs is not the student for the same weights, or is for other ones."""
    import torch
    from families import randomise_
    from planning import plan_queries, teacher_pass

    from hf_lingudistill.sharing import sharing

    randomise_(student, seed=1)
    ids = torch.randint(5, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    labels = torch.where(torch.arange(24) >= 12, ids, -100).repeat(1, 1)
    with torch.no_grad(), sharing("images").recording(student) as shared:
        hidden = student.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)[0]
    plan = plan_queries(ids, labels, kv_sharing="images", shared_vocab_size=320)
    wanted = hidden[plan.loss_rows, plan.loss_positions]
    teacher.load_state_dict(student.state_dict())
    same = (teacher_pass(teacher, shared, plan) - wanted).abs().max() / wanted.std()
    randomise_(teacher, seed=2)
    other = (teacher_pass(teacher, shared, plan) - wanted).abs().max() / wanted.std()
    if not (float(same) < 1e-5 and float(other) > 1e-2):
        raise ValueError(f"off by {float(same):.2g} with the same weights, by {float(other):.2g} with others")


def one_step(student: Any, teacher: Any, mode: str = "vision") -> str:
    """One step of the real step on text rows: the loss is finite and every layer of the decoder moves."""
    import torch
    from planning import prepare_teacher

    from hf_lingudistill.losses import Weights
    from hf_lingudistill.sharing import sharing
    from hf_lingudistill.step import DistillStep

    ids = torch.randint(5, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    labels = torch.where(torch.arange(24) >= 12, ids, -100).repeat(1, 1)
    frozen = prepare_teacher(teacher, student, shared_vocab_size=320)
    step = DistillStep(student.train(), frozen, sharing(mode), Weights())
    step.install()
    try:
        types = {}
        if "mm_token_type_ids" in inspect.signature(type(student).forward).parameters:  # as processors give it
            types["mm_token_type_ids"] = torch.zeros_like(ids)
        output = student(
            **types,
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
        for i, layer in enumerate(student.get_decoder().layers)
        if not any(p.grad is not None and p.grad.any() for p in layer.parameters())
    ]
    if still:
        raise ValueError(f"no gradient in layers {still}")
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad / (parameter.grad.norm() + 1e-6)
    return "done"


def reload(student: Any) -> str:
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
