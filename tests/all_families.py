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
import logging
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(os.environ.get("FAMILIES_JSON", ROOT / "docs/results/families.json"))
TIMEOUT_S = 240
ROUNDING = 1e-3  # of logits, relative to their spread
ITSELF = "itself"
LEFT_TO_THE_CHECKPOINT = ("vocabulary", "KV heads", "head_dim")


class Refused(Exception):
    """A pair that is not let through, with the sentence that a user reads."""


def run(model_type: str) -> dict[str, Any]:
    """What becomes of a class: with its LM as the teacher and, where there is none or where it is refused, with the text half of the
    VLM before."""
    logging.disable(logging.CRITICAL)
    row = attempt(model_type, itself=False)
    if row["stage"] not in ("check", "LM", "self-check"):
        return row
    own = attempt(model_type, itself=True)
    if row["stage"] == "LM":
        return own if own.get("fits") is not False else own | {"images": seeing(model_type)}
    if own["stage"] in ("check", "self-check"):
        return row | {"images": seeing(model_type)}
    return own | {"lm": row["lm"], "lm_note": row["note"]}


def attempt(model_type: str, *, itself: bool) -> dict[str, Any]:
    """The stages in order; the first that fails ends the row. itself: the teacher is the text half of the class itself."""
    row: dict[str, Any] = {"type": model_type}
    try:
        _go_through(row, model_type, itself)
    except Refused as refusal:
        row |= {"fits": False, "note": str(refusal)}
    except Exception as error:
        row["note"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
    return row


def seeing(model_type: str) -> str:
    """Whether a class that cannot share can be held to the VLM before with kv_sharing=images: "yes", or why not."""
    from family_shrunk import tiny
    from family_stages import as_itself, one_step
    from tiny import make_tokenizer

    from hf_lingudistill.compatibility import check_compatibility

    try:
        config, tokenizer = tiny(model_type), make_tokenizer(extra=False)
        report = check_compatibility(
            config, config, student_tokenizer=tokenizer, teacher_tokenizer=tokenizer, kv_sharing="images"
        )
        if not report.fits:
            return report.misfits[0].message
        student, teacher = build(config), build(config)
        as_itself(student, teacher)
        one_step(student, teacher, "images")
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
    return "yes"


def build(config: Any) -> Any:
    """A VLM with random weights.

    Raises:
        ValueError: if it is not small.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        shell = AutoModelForImageTextToText.from_config(config)
    if (size := sum(p.numel() for p in shell.parameters())) > 100_000_000:
        raise ValueError(f"still {size / 1e6:.0f}M parameters")
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config).float().eval()


def _go_through(row: dict[str, Any], model_type: str, itself: bool) -> None:
    import torch
    from families import randomise_
    from family_shrunk import LM_OF, lm_config, published, stand_in_for_timm, tiny
    from family_stages import copy_weights, measure, one_step, reload
    from tiny import make_tokenizer
    from transformers import AutoModelForCausalLM

    from hf_lingudistill.compatibility import check_compatibility
    from hf_lingudistill.compatibility.configs import _text_config
    from hf_lingudistill.self_check import self_check
    from hf_lingudistill.text_half import without_tower

    tokenizer = make_tokenizer(extra=False)
    stand_in_for_timm()

    def check(config: Any) -> Any:
        return check_compatibility(
            config,
            config if itself else lm_config(_text_config(config), other=False),
            student_tokenizer=tokenizer,
            teacher_tokenizer=tokenizer,
        )

    row["stage"] = "LM"
    config = published(model_type)
    text = _text_config(config).model_type
    row |= {"text": text, "lm": ITSELF if itself else LM_OF.get(text, text)}
    if not itself:
        lm_config(_text_config(config), other=False)
    row["stage"] = "check"  # as published, which needs no model
    report = check(config)
    if misfits := [found for found in report.misfits if found.name not in LEFT_TO_THE_CHECKPOINT]:
        raise Refused(misfits[0].message)

    row["stage"] = "build"
    config = tiny(model_type)
    student = build(config)
    row["class"] = type(student).__name__
    randomise_(student, seed=1)

    row["stage"] = "check"
    report = check(student.config)
    if not report.fits:
        raise Refused(report.misfits[0].message)
    row["note"] = "; ".join(check.reason for check in report.notes if check.name == "attention")

    row["stage"] = "LM"
    same, other = (
        without_tower(type(student))(student.config)
        if itself
        else AutoModelForCausalLM.from_config(lm_config(_text_config(student.config), other=o))
        for o in (False, True)
    )
    for seed, lm in enumerate((same, other), start=2):
        lm.float().eval()
        randomise_(lm, seed)
    copied = copy_weights(student, same)

    row["stage"] = "self-check"
    try:
        self_check(student, same, torch.randint(5, 300, (1, 40), generator=torch.Generator().manual_seed(5)))
    except ValueError as error:
        raise Refused(str(error)) from error
    row |= {"fits": True, "same_weights": copied}

    row["stage"] = "oracle"
    row |= measure(student, same, other, copied)
    row["stage"] = "step"
    row["step"] = one_step(student, other)
    row["stage"] = "reload"
    row["reload"] = reload(student)
    row["stage"] = "done"


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
    """One line for each family."""
    import transformers

    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    short = [
        {name: float(f"{value:.2g}") if isinstance(value, float) else value for name, value in rows[row].items()}
        for row in sorted(rows)
    ]
    lines = ",\n".join(map(json.dumps, short))
    RESULTS.write_text(f'{{"transformers": "{transformers.__version__}", "families": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main(sys.argv[1:])
