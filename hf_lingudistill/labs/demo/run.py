"""The embedded demo, end to end: make an LM, teach it to see until its language breaks, restore it, measure."""

from __future__ import annotations

import copy
import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, concatenate_datasets
from datasets.utils.logging import disable_progress_bar
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from trl import SFTTrainer

from ..._version import __version__
from ...config import LinguDistillConfig
from ...folders import claim, replacing
from ...hub.run_facts import SETTINGS
from ...trainer import LinguDistillTrainer
from ..demo_report import Report, language_entry, prompts_text, table, vision_entry, write_report
from .measure import answer, text_perplexity, what_accuracy
from .models import (
    SMOLLM2_135M,
    TINY,
    SeeingRecipe,
    build_vlm,
    load_smollm2,
    pretrain_vision,
    teach_to_see,
    train_small_lm,
)
from .text import HELD_OUT_SOURCE, held_out_texts, language_rows
from .vqa import grounded_rows, vqa_rows

Kind = Literal["tiny", "real"]
# What a demo writes to its OUT
PRODUCTS = ("original", "before", "after", "report.json", "report.png")


@dataclass(frozen=True)
class Demo:
    """What differs between the two demos. seeing: the stage that breaks the language. Numbers are rows or items.

    text_words: the longest completion of a text row.

    prompts: text prompts that are shown with the answers of all models.
    """

    seeing: SeeingRecipe
    vision_rows: int
    text_rows: int
    text_words: int
    grounded: int
    texts: int
    questions: int
    prompts: tuple[str, ...]


DEMOS: dict[str, Demo] = {
    "tiny": Demo(
        seeing=TINY,
        vision_rows=1260,
        text_rows=260,
        text_words=45,
        grounded=100,
        texts=96,
        questions=400,
        prompts=("Tell me about the history of Scotland.", "Tell me about a river."),
    ),
    "real": Demo(
        seeing=SMOLLM2_135M,
        vision_rows=120,
        text_rows=140,
        text_words=60,
        grounded=40,
        texts=32,
        questions=160,
        prompts=(
            "What is the capital of France?",
            "What is photosynthesis?",
            "Who wrote Romeo and Juliet?",
        ),
    ),
}


def recipe(kind: str) -> Path:
    """The YAML of a demo: the settings of its distillation step."""
    return Path(__file__).with_name(f"{kind}.yaml")


def distillation_mix(demo: Demo, seed: int) -> Dataset:
    """Vision-heavy rows (CE only), text-only rows and sentences about an image (both marked for distillation)."""
    parts = [
        vqa_rows("train", demo.vision_rows, seed=seed + 1),
        language_rows(demo.text_rows, seed=seed + 1, body_words=demo.text_words),
        grounded_rows("train", demo.grounded, seed=seed + 1),
    ]
    return concatenate_datasets(parts).shuffle(seed=seed)


def run_demo(
    kind: str, config: LinguDistillConfig, *, offline: bool = False, say: Callable[[str], None] = print
) -> Report:
    """Run a demo and write OUT/original, OUT/before, OUT/after, OUT/report.json and OUT/report.png.

    All of them appear at the end, or none; what an earlier demo wrote to OUT is replaced, and nothing else is.

    config: settings of the distillation step; `output_dir` is OUT. offline: for `real`, read the LM from the pip package.
    Returns the report.

    Raises:
        ModuleNotFoundError: if a data package is missing; the message holds the command that installs it.
        NotOurs: if OUT holds what no demo wrote; nothing is touched.
        ValueError: under several processes, which would all write the same files.
    """
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(f"The demo runs in one process, found {processes}: accelerate launch --num_processes 1 ...")
    out = Path(str(config.output_dir))
    claim(out, by="demo")
    with replacing(out, *PRODUCTS, by="demo") as folder:
        report = _run(DEMOS[kind], kind, config, folder, offline=offline, say=say)
    path = out / "report.json"
    say(
        f"Report: {path}, {path.with_suffix('.png')}. Checkpoints (plain transformers): {out}/original, before, after."
    )
    say(f"Next: lingudistill check {out}/before {out}/original")
    return report


def _run(
    demo: Demo, kind: str, config: LinguDistillConfig, out: Path, *, offline: bool, say: Callable[[str], None]
) -> Report:
    """All five stages, in the empty folder `out`."""
    seed = config.seed
    disable_progress_bar()
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    with _timed(seconds, "original", say, "1/5 the original language model"):
        if kind == "tiny":
            lm, tokenizer, record = train_small_lm(out / "original", seed=seed)
            say(
                f"    {record['parameters'] / 1e6:.1f}M parameters trained on {record['tokens']:,} tokens of real text"
            )
        else:
            lm, tokenizer = load_smollm2(offline=offline)
            lm.save_pretrained(out / "original")
            tokenizer.save_pretrained(out / "original")
    with _timed(seconds, "before", say, "2/5 teaching it to see (plain trl.SFTTrainer on image questions)"):
        vlm, processor = build_vlm(lm, tokenizer, seed=seed)
        pretrain_vision(vlm, processor, seed=seed)
        rows = vqa_rows("train", demo.seeing.steps * demo.seeing.batch_size, seed=seed)
        teach_to_see(vlm, processor, rows, out / "before", demo.seeing, seed=seed, bf16=config.bf16, disable_tqdm=True)
        del lm, vlm
    mix = distillation_mix(demo, seed)
    with _timed(seconds, "after", say, "3/5 distilling the original back into it (LinguDistillTrainer)"):
        trainer = _train(LinguDistillTrainer, out, "after", config, mix)
        teacher_mib = trainer.teacher.footprint / 2**20
        history = [entry for entry in trainer.state.log_history if "ce_loss" in entry]
        trainer.save_model(str(out / "after"))
        _keep_plain_files(out / "after")
        del trainer
    with _timed(seconds, "ce_only", say, "4/5 for comparison: the same rows and steps with cross-entropy only"):
        ce_model = _train(SFTTrainer, out, "ce_only", config, mix).model.eval()
    with _timed(seconds, "measuring", say, "5/5 measuring"):
        measured = _measure(demo, out, ce_model, seed)
        prompts = ask(demo, out, seed)

    language = language_entry(measured["perplexity"], f"{HELD_OUT_SOURCE.upper()} news")
    vision = vision_entry(
        measured["accuracy"], measured["shuffled"], 'easy-VQA "what" questions, exact match, test images'
    )
    seconds["total"] = time.perf_counter() - started
    report: Report = {
        "language": language,
        "vision": vision,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "config": {name: getattr(config, name) for name in (*SETTINGS, "max_steps")}
        | {"demo": kind, "teacher_mib": round(teacher_mib, 2)},
        "prompts": prompts,
        "training": history,
        "machine": {"torch": torch.__version__, "threads": torch.get_num_threads(), "hf_lingudistill": __version__},
    }
    write_report(report, out)
    say("\n" + table(report) + "\n")
    say(prompts_text(report["prompts"]) + "\n")
    if language["recovered"] is not None:
        share = f"{language['recovered']:.0%}"
        cost = vision["after"] - vision["before"]
        say(f"{share} of the lost log-perplexity came back; vision {cost:+.3f}. Total {seconds['total']:.0f} s.")
    return report


@contextmanager
def _timed(seconds: dict[str, float], name: str, say: Callable[[str], None], title: str) -> Iterator[None]:
    say(title)
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started
    gc.collect()


def _train(trainer_class: type[SFTTrainer], out: Path, name: str, config: LinguDistillConfig, mix: Dataset) -> Any:
    """Train OUT/before on the mix with this trainer class and the same settings; -> the trainer."""
    args = copy.copy(config)
    args.output_dir = str(out / name)
    args.disable_tqdm = True
    model = AutoModelForImageTextToText.from_pretrained(out / "before", dtype=torch.float32)
    kwargs: dict[str, Any] = {"processing_class": AutoProcessor.from_pretrained(out / "before")}
    if trainer_class is LinguDistillTrainer:
        kwargs["teacher_model"] = str(out / "original")
    trainer = trainer_class(model=model, args=args, train_dataset=mix, **kwargs)
    trainer.train()
    return trainer


def _keep_plain_files(folder: Path) -> None:
    """The trainer's own state is no part of a model folder."""
    (folder / "training_args.bin").unlink(missing_ok=True)


def _measure(demo: Demo, out: Path, ce_model: Any, seed: int) -> dict[str, Any]:
    texts = held_out_texts(demo.texts, seed=seed)
    questions = vqa_rows("test", demo.questions, seed=seed, kinds=("color", "shape"))
    results: dict[str, Any] = {"perplexity": {}, "accuracy": {}, "shuffled": {}}
    processor = AutoProcessor.from_pretrained(out / "before")
    for arm in ("original", "before", "after", "ce_only"):
        model, processing = (ce_model, processor) if arm == "ce_only" else _load(out, arm)
        results["perplexity"][arm] = text_perplexity(model, processing, texts)
        if arm != "original":
            results["accuracy"][arm] = what_accuracy(model, processing, questions)
            results["shuffled"][arm] = what_accuracy(model, processing, questions, shuffled=True, seed=seed)
    return results


def _load(out: Path, arm: str) -> tuple[Any, Any]:
    """(model, tokenizer or processor) of OUT/original, OUT/before or OUT/after."""
    if arm == "original":
        model: Any = AutoModelForCausalLM.from_pretrained(out / arm, dtype=torch.float32)
        return model.eval(), AutoTokenizer.from_pretrained(out / arm)
    model = AutoModelForImageTextToText.from_pretrained(out / arm, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(out / arm)


def ask(demo: Demo, out: Path, seed: int) -> list[dict[str, Any]]:
    """The demo's prompts, and one question about a test image, with the answers of OUT's three checkpoints."""
    question = vqa_rows("test", demo.questions, seed=seed, kinds=("color", "shape"))[0]
    prompts: list[dict[str, Any]] = [{"prompt": prompt} for prompt in demo.prompts]
    prompts.append(
        {"prompt": question["prompt"][0]["content"], "image": "easy-VQA test", "original": None}  # it has no eyes
    )
    for arm in ("original", "before", "after"):
        model, processing = _load(out, arm)
        for entry in prompts:
            if "image" not in entry:
                entry[arm] = answer(model, processing, entry["prompt"])
            elif arm != "original":
                entry[arm] = answer(model, processing, entry["prompt"], question["images"][0])
    return prompts
