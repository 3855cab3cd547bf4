"""What a step costs."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from typing import Any

from hf_lingudistill.labs.plan import Setup, read_pair
from hf_lingudistill.labs.plan import step_cost as step_cost_of

from .files import ANSWERS_ONCE, GPU_COSTS, ON_POLICY_COST, STEP_COST, gpu_cases, read


def step_cost() -> str:
    """Time and memory of one step."""
    return _step_cost(read(STEP_COST))


def step_cost_152k() -> str:
    """The same with a vocabulary as large as Qwen's."""
    return _step_cost(read(STEP_COST.with_name("step_cost_152k.json")))


def step_cost_twice() -> str:
    """The default beside itself with a second, blind reading."""
    return _step_cost(read(STEP_COST.with_name("step_cost_twice.json")))


def one_look() -> str:
    """The default where the vision tower is frozen, with image features shared and not, and where it is trained."""
    result = read(STEP_COST.with_name("one_look.json"))
    arms, shape, machine = result["arms"], result["shape"], result["machine"]
    said = {
        "sft": "tower frozen, SFT",
        "one_look": "tower frozen, default",
        "two_looks": "the same, each model running its tower",
        "sft_trained": "tower trained, SFT",
        "default_trained": "tower trained, default",
    }
    pair = read_pair("HuggingFaceTB/SmolVLM-256M-Instruct", None)
    setup = Setup(
        seq_len=shape["length"],
        image_tokens=shape["image_tokens"],
        response_tokens=shape["response_tokens"],
        batch=shape["batch_size"],
        gradient_checkpointing=False,
        device="cpu",
    )
    planned = {
        arm: f"{step_cost_of(*pair, replace(setup, freeze_vision=arm == 'one_look')):.2f}"
        for arm in ("one_look", "default_trained")
    }
    on_a_gpu = read(STEP_COST.with_name("one_look_gpu.json"))
    gpu = on_a_gpu["machine"]

    def over(row: dict[str, Any]) -> str:
        return f"{row['ratio']:.2f} ({row['ratio_min']:.2f} - {row['ratio_max']:.2f})" if "ratio" in row else "1"

    lines = [
        f"| | CPU: step | over SFT (min - max) | `plan` says | {gpu['device'].split(' ')[1]}: step | over SFT |",
        "|---|---|---|---|---|---|",
    ]
    for arm, row in arms.items():
        there = on_a_gpu["arms"][arm]
        lines.append(
            f"| {said[arm]} | {row['seconds']:.2f} s | {over(row)} | {planned.get(arm, '')} | {there['seconds']:.3f} s | {over(there)} |"
        )
    lines += [
        "",
        f"SmolVLM-256M's shape: tower and projector of {shape['vision_parameters'] / 1e6:.0f}M parameters, LM of {shape['lm_parameters'] / 1e6:.0f}M; "
        f"{shape['length']} tokens, {shape['image_tokens']} of them image, {shape['response_tokens']} response. Medians of {result['rounds']} "
        f"interleaved rounds, CPU time; {machine['device']}, {machine['dtype']}, load {machine['load_before']} to {machine['load_after']}. SFT "
        f"scores labelled positions alone. On the GPU: batch {on_a_gpu['shape']['batch_size']}, {gpu['dtype']}, wall time. `plan` leaves out the optimizer's time, of which there is more where more is trained "
        "(`python benchmarks/one_look.py`).",
    ]
    return "\n".join(lines)


def _frozen() -> str:
    on_a_cpu, on_a_gpu = (
        read(STEP_COST.with_name(name))["arms"]["one_look"]["ratio"] - 1
        for name in ("one_look.json", "one_look_gpu.json")
    )
    return f"At 256M with a frozen tower, over SFT that scores answers only: {on_a_cpu:.0%} on a CPU, {on_a_gpu:.0%} on the H200, where kernel launches dominate"


def _step_cost(result: dict[str, Any]) -> str:
    arms, shape, machine = result["arms"], result["shape"], result["machine"]
    base = arms["sft"].get("peak_mb")
    lines = [
        "| arm | step | over compact SFT (min - max) | over TRL's SFT | peak memory over TRL's SFT |",
        "|---|---|---|---|---|",
    ]
    for arm, row in arms.items():
        memory = f"{row['peak_mb'] - base:+.0f} MiB" if base and "peak_mb" in row else "not measured"
        lines.append(
            f"| `{arm}` | {row['seconds']:.2f} s | {row['ratio']:.3f} ({row['ratio_min']:.3f} - {row['ratio_max']:.3f}) "
            f"| {row['ratio_trl']:.3f} | {memory} |"
        )
    lines += [
        "",
        f"Medians of {result['rounds']} interleaved rounds; {shape['length']} tokens, {shape['image_tokens']} of them image, "
        f"{shape['response_tokens']} response; LM of {shape['lm_parameters'] / 1e6:.0f}M parameters, teacher in "
        f"{shape['teacher_quantization']}, one copy of K/V is {shape['kv_mb']:.0f} MiB; {machine['device']}, "
        f"{machine['dtype']}, load {machine['load_before']} to {machine['load_after']}.",
    ]
    if "sft_compact" not in arms:
        lines += ["", "_Measured before the step was rewritten: the new step is not in this table yet._"]
    return "\n".join(lines)


def gpu_cost() -> str:
    """Time and memory of one step on a GPU, of the cases that were measured."""
    lines = [
        "| GPU | student | batch | arm | step | over compact SFT (min - max) | over TRL's SFT | peak memory | over TRL's SFT |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    cases = gpu_cases()
    for gpu, case in cases:
        base = case["arms"]["sft"]["peak_mb"]
        for arm, row in case["arms"].items():
            lines.append(
                f"| {gpu} | {case['shape']} | {case['batch']} | `{arm}` | {row['seconds']:.3f} s | {row['ratio']:.3f} ({row['ratio_min']:.3f} - "
                f"{row['ratio_max']:.3f}) | {row['ratio_trl']:.3f} | {row['peak_mb'] / 1024:.1f} GiB | {row['peak_mb'] - base:+.0f} MiB |"
            )
    first, newest = cases[0][1], read(GPU_COSTS[0])
    lines += [
        "",
        f"One GPU, torch {newest['torch']}, {newest['dtype']}; medians of interleaved rounds ("
        + ", ".join(f"{found['rounds']} on the {found['device'].split(' ')[1]}" for found in map(read, GPU_COSTS))
        + f", the first discarded), {first['length']} tokens, {first['response']} of them response, checkpointing on, teacher in {first['teacher']}, "
        "full fine-tuning with AdamW. The H100's rows are of 2026-11-26, when `vision_before` ran the VLM before over whole rows; now it stops at "
        "the last image token. `python benchmarks/gpu.py --out OUT` measures more cases where there is time.",
    ]
    return "\n".join(lines)


def gpu_claim() -> str:
    """README's sentence: what a step costs in the cheapest and in the default mode, at the largest size measured, and with a frozen tower."""
    gpu, case = next((gpu, case) for gpu, case in gpu_cases() if case["batch"] == 8)

    def more(arm: str) -> str:
        return f"{case['arms'][arm]['ratio_trl'] - 1:.0%}"

    return (
        f"A step takes {more('vision_before')} longer than TRL's own (`full`: {more('full')}) on an {gpu} ({case['shape']}, batch {case['batch']}, small tower trained). "
        f"{_frozen()} ([every mode](docs/cost.md))."
    )


def on_policy_cost() -> str:
    """What sampling adds to a step."""
    result = read(ON_POLICY_COST)
    seconds, shape, machine = result["seconds"], result["shape"], result["machine"]
    return (
        f"{machine['device']}, {machine['dtype']}, a 135M LM, {shape['batch_size']} rows of {shape['length']} tokens with "
        f"{shape['answer_tokens']['given'] // shape['batch_size']} in each answer: {seconds['given']:.2f} s for a step on given answers, "
        f"{seconds['on_policy']:.2f} s on-policy, {seconds['sampling']:.2f} s of it for sampling with transformers; "
        f"{result['ratio']['median']:.1f} times ({result['ratio']['min']:.1f} to {result['ratio']['max']:.1f}, {result['rounds']} rounds). "
        "`python benchmarks/on_policy_cost.py --layers 30 --bf16 --batch_size 8`."
    )


def answers_once() -> str:
    """What asking once costs, and what it saves."""
    if not ANSWERS_ONCE.is_file():
        return (
            "_Not measured yet: run `python benchmarks/answers_once.py --json benchmarks/results/answers_once.json`._"
        )
    found = read(ANSWERS_ONCE)
    rows = ["| | rows, labels | s per million labels | MiB per million labels |", "|---|---|---|---|"]
    for name in ("anchor_cache", "teacher_cache"):
        one = found[name]
        rows.append(
            f"| `{name}` | {one['rows']}, {one['labels']:,} | {one['seconds_per_million_labels']:,.0f} | "
            f"{one['mib_per_million_labels']:,.0f} |"
        )
    held, machine, lost = found["held_mib"], found["machine"], found["anchor_cache"]["lost"]
    said = (
        f"SmolLM2-135M-Instruct and a SmolVLM around it, {found['batch_size']} rows a batch, {machine['dtype']}, {machine['device']}, "
        f"{machine['threads']} thread, CPU time of the process; k = {found['anchor_cache']['k']}, {lost:.1%} of the probability outside of it (a "
        f"VLM that has seen no image yet). The run holds {held['cached']:,.0f} MiB of the two models (the teacher's head) in place of "
        f"{held['live']:,.0f}, and a step takes {found['step_ratio']:.2f} of its time."
    )
    return "\n".join([*rows, "", *textwrap.wrap(said, 130)])
