"""Distil a VLM's original LM back into it.

Your own models (flags, or the same names in a YAML with `--config`):

    accelerate launch examples/distill.py \\
        --student HuggingFaceTB/SmolVLM-256M-Instruct --teacher HuggingFaceTB/SmolLM2-135M-Instruct \\
        --dataset_name ORG/DATA --output_dir smolvlm-fluent

With `--demo` it runs the embedded demo: everything is made on the spot, no Hub needed.

    accelerate launch examples/distill.py --demo --output_dir outputs/demo

With `--on_policy`, the student samples the answers that it learns from; the data are prompts (docs/on_policy.md).

In order: options, then what can be checked without data and weights, data, models, training, saving, publishing. torch is imported
after the options are known to be asked for: the help appears at once.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._quiet import hush_libraries
from ..exit_codes import BAD_INPUT, DONE, INTERRUPTED, NOT_FINITE, NOT_PUBLISHED
from ..progress import calm_other_bars, watched
from ..sentences import count, how_to_see_more, one_sentence, typed
from .arguments import parse

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from ..config import LinguDistillConfig, OnPolicyLinguDistillConfig
    from ..hub.run_facts import RunFacts
    from ..mixtures import DistillMixtureConfig
    from ..on_policy import OnPolicyLinguDistillTrainer
    from ..options import DistillScriptArguments, StudentArguments
    from ..trainer import LinguDistillTrainer

    Config = LinguDistillConfig | OnPolicyLinguDistillConfig
    Trainer = LinguDistillTrainer | OnPolicyLinguDistillTrainer

GLOO_LETS_GO = 0.5  # seconds


class BadInput(ValueError):
    """Something kept a training from its first step. The message is one sentence."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in the middle of a training. The message says what is left of it."""


def load_data(
    script_args: DistillScriptArguments, config: Config, mixture: DistillMixtureConfig
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """-> (training rows, evaluation rows or None).

    Raises:
        ValueError: if a split is missing.
    """
    from ..mixtures import DistillSource, load_mixture
    from ..sources import load_source

    if mixture.datasets:
        rows = load_mixture(
            mixture,
            config.distill_column,
            seed=config.seed,
            skip_bad_rows=config.skip_bad_rows,
            text_column=getattr(config, "dataset_text_field", "text"),
        )
        parts: dict[str, Any] = dict(rows)
        return parts["train"], parts.get("test")

    def split(name: str) -> Dataset | IterableDataset:
        source = DistillSource(path=script_args.dataset_name, name=script_args.dataset_config, split=name)  # type: ignore[arg-type]
        return load_source(source, streaming=script_args.dataset_streaming, image_folder=script_args.image_folder)

    evaluation = split(script_args.dataset_test_split) if config.eval_strategy != "no" else None
    return split(script_args.dataset_train_split), evaluation


def distilled_share_of_tokens(trainer: LinguDistillTrainer, rows: int = 32) -> float:
    """Share of trained tokens that are offered to the teacher, over the first rows of the training set."""
    from itertools import islice

    offered = total = 0
    for row in islice(iter(trainer.train_dataset), rows):
        plan = trainer.step.planner(trainer.data_collator([row]))
        offered += plan.num_loss
        total += plan.num_labels
    return offered / max(total, 1)


def startup_summary(trainer: Trainer, model_name: str) -> str:
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
        else f"fits; `{typed('check', '--student', model_name, '--teacher', trainer.teacher_name_or_path)}` shows "
        f"{count(len(trainer.compatibility.notes), 'note')}"
    )
    loss, share = _loss_and_share(trainer)
    lines = {
        "Student": f"{model_name} ({size / 1e6:.1f}M parameters, {trained / 1e6:.1f}M trained"
        + ("; the vision tower stays as it is)" if trainer.decided["freeze_vision"] else ")"),
        "Teacher": f"{trainer.teacher_title} ({args.teacher_quantization}, "
        f"computed in {trainer.teacher_arithmetic}, {trainer.teacher.footprint / 2**20:.1f} MiB, {fit})",
        "Sharing": f"kv_sharing={args.kv_sharing}, kv_source={trainer.decided['kv_source']}, "
        + (f"blind_weight={args.blind_weight:g}, " if args.blind_weight else "")
        + f"distill_tokens={args.distill_tokens}",
        "Loss": loss,
        "Rows": f"{rows}; marked for distillation: {marked}; {share}",
        "Device": f"{trainer.accelerator.device}, {count(trainer.accelerator.num_processes, 'process', 'processes')}, "
        f"{'bf16' if args.bf16 else 'fp16' if args.fp16 else 'fp32'}",
    }
    return "\n".join(f"  {name:<8} {text}" for name, text in lines.items())


def _loss_and_share(trainer: Trainer) -> tuple[str, str]:
    """What is minimised, and which part of it is the teacher's."""
    args = trainer.args
    shape = f"(beta={args.beta:g}, temperature={args.temperature:g})"
    if trainer.step.sampled:
        others = "to the VLM before on the others" if trainer.step.judge is not None else "there are no others"
        answers = f"on answers of up to {args.max_completion_length} sampled tokens"  # type: ignore[union-attr]
        loss = f"{args.distill_weight:g} x divergence {shape} to the teacher on marked rows, {others}, {answers}"
        return loss, "the others go to the VLM before"
    elsewhere, weight = "CE elsewhere", args.anchor_weight
    if args.anchor == "before":
        elsewhere = f"{1 - weight:g} x CE + {weight:g} x KL(VLM before || student) on unmarked rows, {elsewhere}"
    loss = f"{args.ce_weight:g} x CE + {args.distill_weight:g} x divergence {shape} at distilled tokens, {elsewhere}"
    share = distilled_share_of_tokens(trainer)  # type: ignore[arg-type]
    return loss, f"{share:.0%} of trained tokens (first 32 rows) go to the teacher"


def save(trainer: Trainer, *, merge_adapter: bool) -> None:
    """Write the plain student (or the adapter) and its processor to `output_dir`."""
    from accelerate.utils import is_peft_model

    from ..checkpoints import set_aside_other_kind
    from ..hub.run_facts import FILE_NAME as RUN_FACTS

    output_dir = Path(str(trainer.args.output_dir))
    if not (merge_adapter and is_peft_model(trainer.model)):
        trainer.save_model(str(output_dir), _internal_call=True)  # publishing comes after the summary
        return
    trainer.save_model(str(output_dir / "adapter"), _internal_call=True)
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.is_main_process:
        merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
        merged.save_pretrained(output_dir)
        set_aside_other_kind(output_dir, adapter=False)
        trainer.processing_class.save_pretrained(output_dir)
        shutil.copy(output_dir / "adapter" / RUN_FACTS, output_dir)


def distill(
    script_args: DistillScriptArguments,
    config: Config,
    model_args: StudentArguments,
    mixture: DistillMixtureConfig,
) -> Trainer:
    """Train and save. -> the trainer, for its state and metrics.

    Raises:
        BadInput: for whatever happens before the first step.
        Interrupted: by Ctrl-C, once the training has begun.
    """
    from accelerate.utils import is_peft_model

    from ..adapter import check_mergeable
    from ..checkpoints import CheckpointError
    from ..finite import NotFinite
    from ..hub.publish import Published

    trainer = None
    try:
        trainer = prepare(script_args, config, model_args, mixture)
        if script_args.merge_adapter and is_peft_model(trainer.model):
            check_mergeable(trainer.model)
        say = trainer.accelerator.print
        say("LinguDistill\n" + startup_summary(trainer, str(model_args.model_name_or_path)))
        for note in trainer.compatibility.notes:
            if note.name != "vocabulary":  # which nearly every pair has: a VLM has tokens of its own
                say(f"  Note     {note.name}: {note.reason}")
        started = time.perf_counter()
        with _interruptible(trainer):
            trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
        seconds = time.perf_counter() - started
    except Exception as error:
        if trainer is None or not trainer.pace.started:
            raise BadInput(one_sentence(error)) from error
        if not isinstance(error, NotFinite | CheckpointError):  # they say themselves where the run stands
            error.add_note(f"{trainer.stopped()}.")
        raise
    with _interruptible(trainer):
        save(trainer, merge_adapter=script_args.merge_adapter)
        say(end_summary(trainer, seconds))
        try:
            if config.push_to_hub and isinstance(published := trainer.push_to_hub(save=False), Published):
                say(f"Published: {published.url} (tag {published.tag})")
        finally:
            if hasattr(trainer, "end"):  # not before transformers 5.18
                trainer.end()  # type: ignore[no-untyped-call]
    return trainer


@contextmanager
def _interruptible(trainer: Trainer) -> Iterator[None]:
    """Ctrl-C in here says where the training stood."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(trainer.interrupted()) from None


def prepare(
    script_args: DistillScriptArguments,
    config: Config,
    model_args: StudentArguments,
    mixture: DistillMixtureConfig,
) -> Trainer:
    """Check, load the data, load the models. -> a trainer that can begin."""
    from trl import get_peft_config, get_quantization_config

    from ..columns import check_named_column
    from ..hub.run_facts import recipe_of
    from .preflight import check_run

    check_run(script_args, config, model_args, mixture)
    recipe = recipe_of(model_args, script_args, mixture, config)
    config.disable_tqdm = bool(config.disable_tqdm) or not watched()
    config.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(config.model_init_kwargs if isinstance(config.model_init_kwargs, dict) else {}),
    }
    source = str(script_args.dataset_name) if not mixture.datasets else "datasets of the recipe"
    try:
        train_dataset, eval_dataset = load_data(script_args, config, mixture)
    except Exception as error:
        text = one_sentence(error)
        raise BadInput(text if source in text else f"The data ({source}) cannot be read: {text}") from error
    if hasattr(train_dataset, "__len__") and len(train_dataset) == 0:
        raise BadInput(f"The data ({source}) has no rows to train on.")
    if not mixture.datasets:
        check_named_column(config.distill_column, train_dataset, source=source)
    trainer: Trainer = _trainer_class(on_policy=script_args.on_policy)(
        model=str(model_args.model_name_or_path),
        args=config,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.recipe, trainer.dataset_facts = recipe, sources_of(script_args, mixture)
    return trainer


def _trainer_class(*, on_policy: bool) -> Any:
    if on_policy:
        from ..on_policy import OnPolicyLinguDistillTrainer

        return OnPolicyLinguDistillTrainer
    from ..trainer import LinguDistillTrainer

    return LinguDistillTrainer


def sources_of(script_args: DistillScriptArguments, mixture: DistillMixtureConfig) -> list[RunFacts]:
    """The data as a record keeps it: Hub ids pinned to the commit of now."""
    from ..hub.run_facts import dataset_fact

    if not mixture.datasets:
        name = str(script_args.dataset_name)
        return [dataset_fact(name, config=script_args.dataset_config, split=script_args.dataset_train_split)]
    return [
        dataset_fact(
            source.path,
            data_files=source.data_files,
            config=source.name,
            split=source.split,
            fraction=source.fraction,
            distill=getattr(source, "distill", None),
        )
        for source in mixture.datasets
    ]


def end_summary(trainer: Trainer, seconds: float) -> str:
    """What came out, where it is, and what to run next."""
    from ..hub.manifest import command_for
    from ..hub.run_facts import is_local

    logged = [entry for entry in trainer.state.log_history if "ce_loss" in entry]
    lines = [f"Done: {count(trainer.state.global_step, 'step')} in {seconds:.0f} s."]
    if logged:
        first, last = logged[0], logged[-1]
        for name in ("ce_loss", "kd_loss", "teacher_ce", "student_ce", "teacher_agreement", "confident_share"):
            if name in first and name in last:
                course = f"{first[name]:.3f} -> " if len(logged) > 1 else ""
                lines.append(f"  {name:<18} {course}{last[name]:.3f}")
    if trainer.skipped_steps:
        lines.append(f"  skipped steps      {trainer.skipped_steps} (not finite; the log names the rows)")
    if trainer.skipped_rows:
        lines.append(f"  skipped rows       {dict(trainer.skipped_rows)}")
    out = trainer.args.output_dir
    share, where = f"{command_for(str(out), trainer.args.hub_model_id or 'ORG/NAME')} --dry_run", ""
    is_adapter = (Path(str(out)) / "adapter_config.json").is_file()  # a merged one lies in a folder of its own
    if is_adapter and is_local(str(trainer._plain_student().config._name_or_path)):
        share, where = f"{share} --before ORG/VLM", ", once the VLM under the adapter is on the Hub as ORG/VLM"
    lines += [
        f"Saved to {out}. Next, without this library:",
        f"  AutoModelForImageTextToText.from_pretrained({str(out)!r}); AutoProcessor.from_pretrained({str(out)!r})",
        f"To share it{where}: {share}",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `examples/distill.py` and `lingudistill distill`. -> an exit code, see `exit_codes`."""
    calm_other_bars()
    hush_libraries()
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        from ..machine import take_threads

        take_threads()
        if arguments[0].demo:
            _demo(*arguments)
        else:
            distill(*arguments)
    except KeyboardInterrupt as stop:
        print(
            str(stop) or "Interrupted before the first step: nothing was trained, nothing was written.",
            file=sys.stderr,
        )
        return INTERRUPTED
    except Exception as error:
        return _reported(error)
    _leave_the_others()
    return DONE


def _leave_the_others() -> None:
    """Of several processes that are done: end what talks to the others.

    A thread of gloo (collectives on CPUs) that has not let go of its last tensor, as on a busy machine, waits for the GIL to do so. A
    thread that waits for it when Python ends is unwound, through C++ that forbids that: the process dies of SIGABRT, and a finished run
    counts as failed. The trainer has left the groups by now, but DeepSpeed holds them, and so their threads live on. While this one
    sleeps, they can let go.
    """
    from torch import distributed

    in_a_group = distributed.is_available() and distributed.is_initialized()
    if in_a_group:
        distributed.destroy_process_group()
    if in_a_group or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        time.sleep(GLOO_LETS_GO)


def _demo(
    script_args: DistillScriptArguments,
    config: Config,
    model_args: StudentArguments,
    mixture: DistillMixtureConfig,
) -> None:
    from ..config import LinguDistillConfig
    from ..hub.manifest import command_for
    from ..labs.demo import run_demo
    from .unread import check_demo

    check_demo(script_args, model_args, mixture)
    assert isinstance(config, LinguDistillConfig)  # `parse` gives no other with --demo
    if config.push_to_hub:
        raise ValueError(f"The demo is published after it has run: {command_for(str(config.output_dir), 'ORG/NAME')}")
    run_demo(config)


def _reported(error: Exception) -> int:
    """Say in one sentence what happened; of what nobody foresaw, the traceback. -> the exit code."""
    from ..finite import NotFinite
    from ..hub.manifest import PublishError

    if isinstance(error, PublishError):
        print(f"Trained and saved, but not published. {error}", file=sys.stderr)
        return NOT_PUBLISHED
    if isinstance(error, NotFinite):
        print(f"error: {error}", file=sys.stderr)
        return NOT_FINITE
    # OSError: also an unreachable Hub (ConnectionError) and a checkpoint that could not be written
    if not isinstance(error, ValueError | OSError | ImportError) or os.environ.get("LINGUDISTILL_DEBUG") == "1":
        raise error
    where = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
    print(f"error: {one_sentence(error)}{where}{how_to_see_more(error)}", file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
