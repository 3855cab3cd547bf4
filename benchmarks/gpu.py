"""Everything that needs a CUDA device, in one command: the `gpu` tests and the step-cost table in bf16.

    python benchmarks/gpu.py --out OUT                     # on a CUDA machine; writes OUT/gpu.json and OUT/gpu.md
    python benchmarks/gpu.py --out OUT --wheels FOLDER     # installs what is missing from wheels, without a network
    python benchmarks/gpu.py --out OUT --toy               # the same path at toy size, on a CPU if need be

Students of SmolLM2-135M's, SmolLM2-1.7B's and Qwen2.5-7B's shape with random weights, a small tower, L = 2048, response 64 and 256,
batch 1 and 8, checkpointing on and off, teacher in nf4, int8 and whole, eager launches, medians of interleaved rounds with CUDA events.
The 7B student trains LoRA adapters of rank 16 in bf16, the others all their weights. Each case runs in a process of its own: what does not
fit is written down as that, and the run goes on. `--budget` seconds bound it. Arms as in step_cost.py; `vision_before` is the default.

Peak: what one arm needs by itself. All arms' trainers are on the device at once; weights and optimizer states that an arm does not
use are not counted (`idle`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    "toy": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab=1024),
    "135M": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, vocab=49152),
    "1.7B": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32, num_key_value_heads=32, vocab=49152),
    "7B": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, vocab=152064),
}  # fmt: skip
ARMS = ("sft", "sft_compact", "full", "prompt", "vision", "vision_before", "vision_before_twice", "none", "inputs")
LORA = ("7B",)  # whose weights, gradients and optimizer states do not fit a device twice
# In the order in which a budget is spent: first what the documents quote
CASES = [
    {"shape": shape, "response": response, "batch": batch, "checkpointing": checkpointing, "teacher": teacher}
    for teacher, checkpointing, response, shape, batch in itertools.product(
        ("nf4", "none", "int8"), (True, False), (256, 64), ("1.7B", "135M", "7B"), (8, 1)
    )
]


def install(wheels: Path) -> None:
    """Install the wheels that the interpreter lacks; nothing is fetched."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--find-links", str(wheels)]
    subprocess.run([*command, *map(str, sorted(wheels.glob("*.whl")))], check=True)


def make_shape(name: str, folder: Path, image_size: int) -> None:
    """Student and LM of a shape, drawn on the device: a CPU takes minutes for 7B."""
    import step_cost
    import torch

    from hf_lingudistill.machine import machine

    shape = dict(SHAPES[name])
    step_cost.IMAGE_SIZE = image_size
    with torch.device(machine().device):
        dtype = torch.bfloat16 if machine().gpus > 0 else torch.float32
        step_cost.make_models(folder, shape.pop("vocab"), shape, dtype)


def measure(case: dict[str, Any], folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of one optimizer step of each arm, and the peak memory of each, in this process."""
    import step_cost
    import torch

    from hf_lingudistill.machine import machine

    step_cost.be_quiet()
    cuda = machine().gpus > 0
    step_cost.RESPONSE_TOKENS = case["response"]
    step_cost.LENGTH = case["length"]
    step_cost.IMAGE_SIZE = case["image_size"]
    args = argparse.Namespace(
        batch_size=case["batch"], bf16=cuda, activation_checkpointing=case["checkpointing"],
        teacher_quantization=case["teacher"], lora=16 if case["shape"] in LORA else None,
    )  # fmt: skip

    def held() -> int:
        return torch.cuda.memory_allocated() if cuda else 0

    # What each trainer keeps on the device between its steps: the second has the teacher, and the VLM before
    steppers, kept = {}, {}
    for kind in ("sft", "sft_compact"):
        empty = held()
        steppers[kind] = step_cost.make_stepper(kind, folder, args, before=kind != "sft")
        steppers[kind].step(kind)  # its optimizer states
        kept[kind] = held() - empty
    ours = steppers["sft_compact"].trainer
    teacher, before = ours.teacher.footprint, getattr(ours.before, "footprint", 0)

    def idle(arm: str) -> int:
        """Bytes on the device that the arm does not need."""
        if arm == "sft":
            return kept["sft_compact"]
        unused = 0 if step_cost.reads_before(arm) else before
        return kept["sft"] + unused + (teacher if arm == "sft_compact" else 0)

    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    peaks: dict[str, float] = {}
    for index in range(rounds + 1):
        for arm in ARMS:
            step = steppers["sft" if arm == "sft" else "sft_compact"].step
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                step(arm)
                end.record()
                torch.cuda.synchronize()
                taken = begin.elapsed_time(end) / 1000
                peaks[arm] = (torch.cuda.max_memory_allocated() - idle(arm)) / 2**20
            else:
                started = time.process_time()
                step(arm)
                taken = time.process_time() - started
            if index:
                seconds[arm].append(taken)
    length = int(steppers["sft"].batch["input_ids"].shape[1])
    arms = {}
    for arm in ARMS:
        arms[arm] = {"seconds": statistics.median(seconds[arm])}
        for name, base in (("ratio", "sft_compact"), ("ratio_trl", "sft")):
            ratios = [a / b for a, b in zip(seconds[arm], seconds[base], strict=True)]
            arms[arm] |= {name: statistics.median(ratios), f"{name}_min": min(ratios), f"{name}_max": max(ratios)}
        if arm in peaks:
            arms[arm]["peak_mb"] = peaks[arm]
        if not arm.startswith("sft"):
            arms[arm] |= planned({**case, "length": length}, arm)
    return {
        "length": length,
        "teacher_mb": teacher / 2**20,
        "before_mb": before / 2**20,
        "arms": arms,
    }


def planned(case: dict[str, Any], arm: str) -> dict[str, float]:
    """What `lingudistill plan` gives an arm of a case: MiB, before the allowance for what is no tensor; the step over compact SFT."""
    import step_cost

    from hf_lingudistill.labs.plan import Setup, make_plan, model_facts

    shape = dict(SHAPES[case["shape"]])
    step_cost.IMAGE_SIZE = case["image_size"]
    student, lm = step_cost.make_configs(shape.pop("vocab"), shape, 0)
    setup = Setup(
        seq_len=case["length"], image_tokens=(case["image_size"] // step_cost.PATCH) ** 2, response_tokens=case["response"],
        batch=case["batch"], dtype="bfloat16" if case["shape"] in LORA else "float32", mixed_precision="bf16",
        gradient_checkpointing=case["checkpointing"], lora_rank=16 if case["shape"] in LORA else 0,
        teacher_quantization=case["teacher"], kv_sharing=arm.partition("_")[0], blind_weight=0.5 if arm.endswith("_twice") else 0.0,
        kv_source="before" if step_cost.reads_before(arm) else "student", gpu_memory=80, freeze_vision=False,
    )  # fmt: skip
    plan = make_plan(model_facts(student, "vlm"), model_facts(lm, "lm"), setup)
    return {"planned_mb": plan.peak / 2**20, "planned_ratio": plan.cost, "planned_seconds": plan.seconds or 0.0}


def run_case(case: dict[str, Any], folder: Path, rounds: int, limit: float) -> dict[str, Any]:
    """`measure` in a process of its own; a failure is a sentence."""
    command = [
        sys.executable,
        __file__,
        "--_case",
        json.dumps(case),
        "--_folder",
        str(folder),
        "--rounds",
        str(rounds),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {**case, "failed": f"not done within {limit:.0f} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {**case, "failed": last[:200]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**case, **found}


def gpu_tests() -> dict[str, Any]:
    """What `pytest -m gpu` says in its last line, and what failed."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(
        command, cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True, check=False
    )
    lines = done.stdout.strip().splitlines()
    return {"summary": lines[-1] if lines else "", "failed": [line for line in lines if line.startswith("FAILED")]}


def one_look(limit: float) -> dict[str, Any]:
    """The default where the vision tower is frozen (`one_look.py`), a batch of eight."""
    with tempfile.TemporaryDirectory() as tmp:
        script, found = Path(__file__).with_name("one_look.py"), Path(tmp) / "found.json"
        command = [sys.executable, str(script), "--json", str(found), "--bf16", "--batch_size", "8"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
        except subprocess.TimeoutExpired:
            return {"failed": "no time left"}
        if done.returncode:
            return {"failed": done.stderr.strip().splitlines()[-1][:200]}
        return dict(json.loads(found.read_text(encoding="utf-8")))


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        f"{result['device']}, torch {result['torch']}, {result['dtype']}. `gpu` tests: {result['tests']['summary']}",
        "",
    ]
    lines += [
        "| student | batch | response | checkpointing | teacher | arm | step | over compact SFT | over TRL's SFT | peak MiB |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    for case in result["cases"]:
        start = (
            f"| {case['shape']} | {case['batch']} | {case['response']} | {case['checkpointing']} | {case['teacher']} |"
        )
        if "failed" in case:
            lines.append(f"{start} | {case['failed']} | | | |")
        for arm, row in case.get("arms", {}).items():
            peak = f"{row['peak_mb']:.0f}" if "peak_mb" in row else "not measured"
            lines.append(
                f"{start} `{arm}` | {row['seconds']:.4f} s | {row['ratio']:.3f} | {row['ratio_trl']:.3f} | {peak} |"
            )
    return "\n".join(lines) + "\n"


def replan(path: Path) -> None:
    """Put what this version of the plan says beside what was measured."""
    from hf_lingudistill.labs.json_text import as_json

    result = json.loads(path.read_text(encoding="utf-8"))
    for case in result["cases"]:
        for arm, row in case.get("arms", {}).items():
            row |= {} if arm.startswith("sft") else planned(case, arm)
    path.write_text(as_json(result) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="folder for gpu.json and gpu.md")
    parser.add_argument("--wheels", type=Path, help="install these first, without a network")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for the cases together; default: 480")
    parser.add_argument("--toy", action="store_true", help="one toy case of each kind")
    parser.add_argument("--no_tests", action="store_true", help="skip `pytest -m gpu`")
    parser.add_argument("--no_look", action="store_true", help="skip one_look.py")
    parser.add_argument(
        "--replan", type=Path, metavar="FILE", help="put what today's plan says into a gpu.json, and end"
    )
    parser.add_argument("--_case", help=argparse.SUPPRESS)
    parser.add_argument("--_folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    if args._case:
        print(json.dumps(measure(json.loads(args._case), args._folder, args.rounds)))
        return
    if args.replan:
        replan(args.replan)
        return
    if args.out is None:
        parser.error("--out is missing: name a folder for gpu.json and gpu.md.")
    if args.wheels:
        install(args.wheels)
    import torch

    from hf_lingudistill.machine import machine

    if not (machine().gpus > 0 or args.toy):
        parser.error("no CUDA device here: run it on one, or with --toy.")
    sizes = {"length": 2048, "image_size": 448}
    cases = [{**case, **sizes} for case in CASES]
    if args.toy:
        toy = {"shape": "toy", "length": 128, "image_size": 64, "response": 16, "batch": 2}
        cases = [
            {**toy, "checkpointing": on, "teacher": teacher} for on in (True, False) for teacher in ("nf4", "none")
        ]
    started, done = time.perf_counter(), []
    tests = {"summary": "skipped", "failed": []} if args.no_tests else gpu_tests()
    skipped = "toy size" if args.toy else "skipped" if args.no_look else ""
    frozen = {"failed": skipped} if skipped else one_look(args.budget / 3)
    with tempfile.TemporaryDirectory() as tmp:
        for case in cases:
            left = args.budget - (time.perf_counter() - started)
            if left <= 10:
                done.append({**case, "failed": "no time left"})
                continue
            folder = Path(tmp) / case["shape"]
            if not folder.exists():
                make_shape(case["shape"], folder, case["image_size"])
            done.append(run_case(case, folder, args.rounds, left))
            print(json.dumps(done[-1]), file=sys.stderr, flush=True)
    cuda = machine().gpus > 0
    result = {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {machine().threads} cores (toy size)",
        "dtype": "bf16" if cuda else "fp32",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "tests": tests,
        "rounds": args.rounds,
        "one_look": frozen,
        "cases": done,
    }
    from hf_lingudistill.labs.json_text import as_json

    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu.json").write_text(as_json(result) + "\n", encoding="utf-8")
    (args.out / "gpu.md").write_text(table(result), encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
