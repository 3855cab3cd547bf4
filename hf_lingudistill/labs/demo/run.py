"""The embedded demo, end to end: a language model learns to see and forgets how to talk; its talk is distilled back, and measured."""

from __future__ import annotations

import copy
import gc
import os
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets.utils.logging import disable_progress_bar
from transformers import AutoModelForImageTextToText, AutoProcessor, PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from ..._version import __version__
from ...config import LinguDistillConfig
from ...folders import claim, replacing
from ...hub.run_facts import SETTINGS
from ...sentences import typed
from ...trainer import LinguDistillTrainer
from ...weights import load_whole
from ..demo_report import Report, fidelity_entry, prompts_text, table, verdict, vision_entry, write_report
from ..evaluation.fidelity import Question, Reference, fidelity, original_answers, text_measures
from ..evaluation.models import Scored, load_scored
from ..evaluation.reading import write_answers
from ..world.pictures import Picture
from ..world.questions import as_dataset, row_of, sentence
from .measure import what_accuracy
from .models import SeeingRecipe, teach_to_see
from .stages import aligned_vlm, ask, keep_eyes, long_rows, original_lm, readable, short_rows, shuffled
from .story import Story, pictures_of, read_story, views

# What a demo writes to its OUT
PRODUCTS = ("original", "before", "after", "drawings", "report.json", "report.png")
SHORT_SHARE = 4  # of the rows of the cure, one in four is a short question


@dataclass(frozen=True)
class Size:
    """How much of everything. Steps and rows per step of the two stages before the cure; tokens of the original's answers that are
    trained on, and of those that are measured and shown; pictures and instructions that fidelity is measured on."""

    align: tuple[int, int] = (240, 24)
    seeing: SeeingRecipe = SeeingRecipe(steps=8, batch_size=12, lm_lr=3e-4, vision_lr=0.0, warmup_steps=2)
    trained_tokens: int = 48
    measured_tokens: int = 40
    shown_tokens: int = 64
    pictures: int = 16


def recipe() -> Path:
    """The YAML of the demo: the settings of its distillation step."""
    return Path(__file__).with_name("recipe.yaml")


def run_demo(
    config: LinguDistillConfig,
    *,
    story: Story | None = None,
    size: Size | None = None,
    load: Callable[[], tuple[Any, Any]] = original_lm,
    say: Callable[[str], None] | None = None,
) -> Report:
    """Run the demo and write OUT/original, OUT/before, OUT/after, OUT/drawings, OUT/report.json and OUT/report.png.

    All of them appear at the end, or none; what an earlier demo wrote to OUT is replaced, and nothing else is.

    Args:
        config: settings of the distillation step; `output_dir` is OUT.
        story, size, load: what is shown and asked, how much of it, and the LM with its tokenizer; the demo's own by default.
        say: takes every line of the story; by default they are printed.

    Raises:
        ModuleNotFoundError: if a data package is missing; the message holds the command that installs it.
        NotOurs: if OUT holds what no demo wrote; nothing is touched.
        ValueError: under several processes, which would all write the same files.
    """
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(f"The demo runs in one process, found {processes}: accelerate launch --num_processes 1 ...")
    say = _print if say is None else say
    out = Path(str(config.output_dir))
    claim(out, by="demo")
    story = read_story() if story is None else story
    pictures = pictures_of(story.things)  # before anything takes time: it names a package that is missing
    with replacing(out, *PRODUCTS, by="demo") as folder, _quiet():
        report = _Run(config, folder, story, size or Size(), pictures, say).all(load)
    say(f"\nReport:  {out}/report.json and report.png")
    say(f"Models:  {out}/original, {out}/before, {out}/after (plain transformers)")
    say(f"Next:    {typed('check', f'{out}/before', f'{out}/original')}")
    return report


@dataclass
class _Run:
    """One run in the empty folder `out`."""

    config: LinguDistillConfig
    out: Path
    story: Story
    size: Size
    pictures: list[Picture]
    say: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)

    def all(self, load: Callable[[], tuple[Any, Any]]) -> Report:
        config, story, size, seed = self.config, self.story, self.size, self.config.seed
        with self._timed("total", None):
            with self._timed("original", "1/6  The original language model"):
                lm, tokenizer = load()
                lm.save_pretrained(self.out / "original")
                tokenizer.save_pretrained(self.out / "original")
                original = Scored("original", str(self.out / "original"), "lm", lm, tokenizer, "")
            with self._timed(
                "aligned", f"2/6  Eyes: a vision tower learns to name {len(story.things)} drawings, the LM untouched"
            ):
                steps, batch = size.align
                vlm, processor, record = aligned_vlm(
                    lm, tokenizer, self.pictures, steps=steps, batch_size=batch, bf16=bool(config.bf16), seed=seed
                )
                self.say(f"     {record['right']:.0%} of the captions' tokens seen right")
            with self._timed(
                "before", "3/6  The damage: short questions about pictures, and nothing else (plain trl.SFTTrainer)"
            ):
                n = size.seeing.steps * size.seeing.batch_size
                rows = shuffled(short_rows(self.pictures, story, n, seed=seed), seed=seed)
                keep_eyes(vlm)
                teach_to_see(
                    vlm, processor, rows, self.out / "before", size.seeing, seed=seed, bf16=config.bf16, use_cpu=config.use_cpu,
                    disable_tqdm=True, callbacks=[_Steps(self.say)],
                )  # fmt: skip
                del vlm
            with self._timed("answers", "4/6  The original writes long answers about pictures that it is told about"):
                n = config.max_steps * config.per_device_train_batch_size * config.gradient_accumulation_steps
                short = short_rows(self.pictures, story, n // SHORT_SHARE, seed=seed + 1)
                long = long_rows(
                    original, self.pictures, story, n - len(short), max_tokens=size.trained_tokens, seed=seed + 1
                )
                self.say(f"     {len(long)} answers, beside {len(short)} short questions; no row is text alone")
            with self._timed("after", "5/6  The cure: the original distilled back into the VLM (LinguDistillTrainer)"):
                history, mib = self._distil(shuffled(short + long, seed=seed))
            with self._timed("measuring", "6/6  Measuring"):
                report = self._measure(original)
                report["prompts"] = self._prompts(original)
                report["drawings"] = "OpenMoji, CC BY-SA 4.0"
        for kind, found in (("seconds", self.seconds), ("cpu_seconds", self.cpu_seconds)):
            report[kind] = {name: round(value, 1) for name, value in found.items()}
        report["config"] = {name: getattr(config, name) for name in (*SETTINGS, "max_steps")}
        report["config"] |= {"demo": True, "teacher_mib": round(mib, 2)}
        report["training"] = history
        report["machine"] = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
            "hf_lingudistill": __version__,
        }
        write_report(report, self.out)
        self.say(f"\n{prompts_text(report['prompts'])}\n\n{table(report)}\n\n{textwrap.fill(verdict(report), 100)}")
        return report

    @contextmanager
    def _timed(self, name: str, title: str | None) -> Iterator[None]:
        if title:
            self.say(title)
        started, cpu_started = time.perf_counter(), time.process_time()
        yield
        gc.collect()
        self.seconds[name], self.cpu_seconds[name] = time.perf_counter() - started, time.process_time() - cpu_started
        if title:
            self.say(f"     {self.seconds[name]:.0f} s")

    def _distil(self, rows: Any) -> tuple[list[dict[str, Any]], float]:
        """OUT/before -> OUT/after. -> (the log, MiB of the teacher)."""
        args = copy.copy(self.config)
        args.output_dir, args.disable_tqdm = str(self.out / "after"), True
        student = load_whole(AutoModelForImageTextToText, self.out / "before", dtype=torch.float32)
        # At the LM's learning rate 16 steps moved the connector by 6 %, and no caption was seen right any more
        keep_eyes(student)
        trainer = LinguDistillTrainer(
            model=student,
            args=args,
            train_dataset=rows,
            processing_class=AutoProcessor.from_pretrained(self.out / "before"),
            teacher_model=str(self.out / "original"),
            callbacks=[_Steps(self.say)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.save_model(str(self.out / "after"))
        (self.out / "after" / "training_args.bin").unlink(missing_ok=True)  # the trainer's own, no part of a model
        return [entry for entry in trainer.state.log_history if "ce_loss" in entry], trainer.teacher.footprint / 2**20

    def _measure(self, original: Scored) -> Report:
        story, seed = self.story, self.config.seed
        asked = {"text": [Question(f"text{i}", text) for i, text in enumerate(story.text_instructions)]}
        shown = views(self.pictures, 1, seed=seed + 2)[:: max(1, len(self.pictures) // self.size.pictures)]
        asked["pictures"] = [
            Question(
                f"picture{i}",
                story.image_instructions[i % len(story.image_instructions)],
                caption=f"{sentence(one.caption)}.",
                images=(one.image(),),
            )
            for i, one in enumerate(shown[: self.size.pictures])
        ]
        questions = [*asked["text"], *asked["pictures"]]
        answers = original_answers(original, questions, max_new_tokens=self.size.measured_tokens)
        reference = Reference.of(original, questions, answers)
        question = story.short_questions[0]
        named = as_dataset(
            [row_of(question, sentence(one.caption), picture=one) for one in views(self.pictures, 1, seed=seed + 3)]
        )
        kl: dict[str, dict[str, Any]] = {"text": {}, "pictures": {}}
        right: dict[str, Any] = {}
        blind: dict[str, Any] = {}
        for arm in ("before", "after"):
            scored = load_scored(arm, str(self.out / arm), dtype=torch.float32)
            found = fidelity(reference, scored)
            for kind, some in asked.items():
                kl[kind][arm] = text_measures({question.key: found[question.key] for question in some})["kl"]
            right[arm] = what_accuracy(scored.model, scored.processing, named)
            blind[arm] = what_accuracy(scored.model, scored.processing, named, shuffled=True, seed=seed)
        return {
            "language": fidelity_entry("KL to the original on the original's answers to unseen instructions", kl["text"]),
            "pictures": fidelity_entry("KL to the original told the caption on the original's answers about pictures", kl["pictures"]),
            "vision": vision_entry(right, blind, "names of drawings, exact match, views that were not trained on"),
        }  # fmt: skip

    def _prompts(self, original: Scored) -> list[dict[str, Any]]:
        """Every prompt of the story with the answers of all three: greedy, no penalty, nothing picked."""
        entries: list[dict[str, Any]] = []
        pictures: list[Picture | None] = []
        for index, asked in enumerate(self.story.prompts):
            thing = asked.get("thing")
            one = next((one for one in self.pictures if one.name == thing), None)
            entry = {"prompt": asked["prompt"]}
            if one is not None:
                one = views([one], 1, seed=self.config.seed + 4 + index)[0]
                entry |= {
                    "image": f"drawings/{one.name}.png",
                    "shows": one.caption,
                }  # the Space asks about the file again
                (self.out / "drawings").mkdir(exist_ok=True)
                (self.out / entry["image"]).write_bytes(one.png())
            pictures.append(one)
            entries.append(entry)
        for arm in ("original", "before", "after"):
            scored = original if arm == "original" else load_scored(arm, str(self.out / arm), dtype=torch.float32)
            for sees in (False, True):
                some = [i for i, one in enumerate(pictures) if (one is not None) == sees]
                turns = [ask(scored, entries[i]["prompt"], pictures[i]) for i in some]
                written = write_answers(
                    scored,
                    [prompt for prompt, _ in turns],
                    [images for _, images in turns],
                    max_new_tokens=self.size.shown_tokens,
                ) if some else []  # fmt: skip
                for i, answer in zip(some, written, strict=True):
                    entries[i][arm] = readable(scored, answer, open_end=True)
        return entries


class _Steps(TrainerCallback):
    """A line per log entry, in place of transformers' dictionaries."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.say(f"     step {state.global_step}/{state.max_steps}, loss {float(logs['loss']):.2f}")


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, no notes of the libraries: the demo tells its own story."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    disable_progress_bar()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _print(line: str) -> None:
    print(line, flush=True)  # into a pipe, too
