"""The part of a card that says how the model was trained: what the run's facts tell, each a row of a table, all of it escaped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .escape import markdown, pinned
from .results import Facts, is_finite

# Of a teacher that is a VLM, what taught
TEACHER_PARTS = {"text half": "the text half of a VLM", "whole": "a VLM that sees the images itself"}


def training_rows(run_facts: Facts) -> list[tuple[str, str]]:
    """(what, value) of what is known about the training, all of it escaped. The data is missed by name: readers look for it."""
    student, teacher, settings = (run_facts.get(name) or {} for name in ("student", "teacher", "settings"))
    training, hardware = run_facts.get("training") or {}, run_facts.get("hardware") or {}
    sampling = run_facts.get("sampling") or {}
    rows = {
        "answers": _answers(sampling),
        "distilled share": _shares(training),
        "`kv_sharing`": settings.get("kv_sharing"),
        "`kv_source`": settings.get("kv_source"),
        "`distill_tokens`": None if sampling else _tokens(settings),
        "loss": _loss_on_policy(settings, run_facts) if sampling else _loss(settings, run_facts.get("anchor") or {}),
        "steps": _count(training.get("steps")),
        "batch": _batch(settings, hardware),
        "tokens seen": _count(training.get("tokens")),
        "learning rate": settings.get("learning_rate"),
        "hardware": _hardware_text(hardware),
        "seconds": _count(training.get("seconds")),
        "seed": settings.get("seed"),
    }
    known = [(name, markdown(value)) for name, value in rows.items() if value not in (None, "")]
    if not known:
        return []
    who = [("student (VLM before)", pinned(student)), ("teacher (frozen)", _teacher(teacher))]
    data = _data_rows(run_facts.get("datasets") or [], sampled=bool(sampling)) or "not recorded"
    return [*((name, value) for name, value in who if value), ("data", data), *known]


def _teacher(teacher: Facts) -> str:
    mib, kl, quantization = (teacher.get(name) for name in ("mib", "quantization_kl", "quantization"))
    parts = [pinned(teacher)] if pinned(teacher) else []
    about = [TEACHER_PARTS[part]] if (part := str(teacher.get("part"))) in TEACHER_PARTS else []
    if quantization is not None:
        about.append("weights not quantised" if quantization == "none" else f"weights in {markdown(quantization)}")
    about += [f"computed in {markdown(teacher['arithmetic'])}"] if teacher.get("arithmetic") else []
    about += [f"{mib:,.1f} MiB"] if is_finite(mib) else []
    about += ["asked before training, its hidden states kept"] if teacher.get("cache") else []
    about += [f"KL to full precision {kl:.4f} nats per token"] if is_finite(kl) else []
    return "; ".join([*parts, *([", ".join(about)] if about else [])])


def _tokens(settings: Facts) -> str | None:
    gate, margin = settings.get("distill_tokens"), settings.get("distill_margin")
    return None if gate is None else f"{gate}, margin {margin} nats" if margin else str(gate)


def _loss(settings: Facts, anchor: Facts) -> str | None:
    ce, kd = settings.get("ce_weight"), settings.get("distill_weight")
    if ce is None or kd is None:
        return None
    shape = [f"{name} {settings[name]}" for name in ("beta", "temperature") if settings.get(name) is not None]
    weight: Any = settings.get("anchor_weight")
    elsewhere = "CE elsewhere"
    if settings.get("anchor") == "before" and is_finite(weight):
        elsewhere = f"{1 - weight:g} x CE + {weight:g} x KL(VLM before || student{_kept(anchor)}) on unmarked rows, {elsewhere}"
    return f"{ce} x CE + {kd} x divergence at distilled tokens, {elsewhere}" + (
        f" ({', '.join(shape)})" if shape else ""
    )


def _kept(anchor: Facts) -> str:
    """Of an anchor that was computed before training, what it consists of."""
    cache = anchor.get("cache") or {}
    k: Any = cache.get("k")
    lost: Any = cache.get("lost")
    if k is None:
        return ""
    return f", of its {k} most likely tokens" + (f" with {1 - lost:.2%} of its probability" if is_finite(lost) else "")


def _loss_on_policy(settings: Facts, run_facts: Facts) -> str:
    shape = [f"{name} {settings[name]}" for name in ("beta", "temperature") if settings.get(name) is not None]
    others = ", D(VLM before, student) on the others" if has_two_judges(run_facts) else ""
    return f"{settings.get('distill_weight', 1.0)} x D(teacher, student) on marked rows{others} ({', '.join(shape)})"


def has_two_judges(run_facts: Facts) -> bool:
    """Whether, on-policy, the VLM before judged some of the rows."""
    share = (run_facts.get("training") or {}).get("distilled_rows_share")
    return bool(run_facts.get("anchor")) and share != 1.0


def _answers(sampling: Facts) -> str | None:
    if not sampling:
        return None
    options = [f"{name} {sampling[name]}" for name in ("top_p", "top_k", "min_p") if sampling.get(name) is not None]
    how = f", {', '.join(options)}" if options else ""
    engine = "vLLM" if sampling.get("use_vllm") else "transformers"
    return f"the student's own, sampled with {engine} (at most {sampling.get('max_completion_length')} tokens{how})"


def _batch(settings: Facts, hardware: Facts) -> str | None:
    rows, accumulation = settings.get("per_device_train_batch_size"), settings.get("gradient_accumulation_steps") or 1
    processes = hardware.get("processes") or 1
    if rows is None:
        return None
    several = [f"{accumulation} accumulation steps"] if accumulation != 1 else []
    several += [f"{processes} processes"] if processes != 1 else []
    return " x ".join([f"{rows} rows per device" if several else f"{rows} rows", *several])


def _count(value: Any) -> str | None:
    return f"{value:,.0f}" if is_finite(value) else None


def _data_rows(datasets: Sequence[Facts], *, sampled: bool = False) -> str:
    parts, others = [], "judged by the VLM before" if sampled else "cross-entropy only"
    for fact in datasets:
        text = pinned({**fact, "kind": "dataset"})
        if not fact.get("id"):
            text = markdown(fact.get("name") or "a source without a name")
        details = [str(fact[key]) for key in ("config", "split") if fact.get(key)]
        if fact.get("distill") is not None:
            details.append("distilled" if fact["distill"] else others)
        parts.append(text + (f" ({markdown(', '.join(details))})" if details else ""))
    return "; ".join(parts)


def _shares(training: Facts) -> str | None:
    rows, tokens = training.get("distilled_rows_share"), training.get("distilled_tokens_share")
    parts = [f"{rows:.0%} of the rows"] if is_finite(rows) else []
    parts += [f"{tokens:.0%} of the answer tokens"] if is_finite(tokens) else []
    return ", ".join(parts) or None


def _hardware_text(hardware: Facts) -> str | None:
    if not hardware.get("device"):
        return None
    device = "CPU" if hardware["device"] == "cpu" else str(hardware["device"])
    processes, threads = hardware.get("processes") or 1, hardware.get("threads")
    parts = [f"{processes} x {device}" if processes > 1 else device]
    parts += [f"{threads} thread{'s' * (threads != 1)}"] if threads else []
    parts += [str(hardware["precision"])] if hardware.get("precision") else []
    return ", ".join(parts)
