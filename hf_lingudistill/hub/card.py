"""The model card: rendered from the facts of the run and an evaluation report, with no network and no model in memory.

What a reader needs and neither holds is shown as "not evaluated"; what nobody asked is left out. Names, titles and texts in them
may be anybody's: they are put into metadata only where they are what the field asks for (a Hub id, a licence code), and into the
page only with their Markdown and HTML escaped. `edits.py` lets people change the card.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..sharing import MODES
from .edits import sealed
from .escape import HUB, fenced, linked, markdown, plain, repo_or_none
from .metadata import card_data, licence_of
from .results import Facts, Task, is_finite, overlaid, run_facts_of_demo, run_facts_of_models, tasks_of
from .score_tables import headline, language_table, reading, vision_reading, vision_table
from .training_table import TEACHER_PARTS, has_two_judges, training_rows
from .usage import Usage

TEMPLATE = Path(__file__).with_name("templates") / "model_card.md"
PAPER = "https://arxiv.org/abs/2604.00829"


def render_card(
    run_facts: Facts,
    report: Facts,
    *,
    repo_id: str | None = None,
    name: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    tags: Iterable[str] = (),
    plots: Mapping[str, str] | None = None,
    command: str | None = None,
    main: str | None = None,
    usage: Usage | None = None,
    space: str | None = None,
) -> ModelCard:
    """Render the card of a distilled model.

    Args:
        run_facts: of the training run, or empty; the embedded demo's report holds its own.
        report: of `lingudistill evaluate` or of the demo, or empty.
        repo_id: where the model is or will be.
        name: the title; left out, the repository's name.
        base_model: Hub id of the VLM before, where `run_facts` has none.
        license: a licence code of the Hub; left out, the base model's.
        plots: {caption: path or URL in the repository}.
        command: what makes this model anew; left out, the recipe beside the card.
        main: the model of the report that this is; left out, `main_model`.
        usage: how to run it; left out, as whole weights in the repository, or in the folder of the card.
        space: Hub id of the Space that shows it.

    Raises:
        ValueError: if `huggingface_hub` finds the metadata invalid.
    """
    run_facts = overlaid(run_facts_of_demo(report) if "language" in report else run_facts_of_models(report), run_facts)
    tasks = tasks_of(report, main)
    title = name or (repo_id or "").split("/")[-1] or "This model"
    student = {**(run_facts.get("student") or {}), **({"id": base_model} if base_model else {})}
    teacher = run_facts.get("teacher") or {}
    usage = usage or usage_of(repo_id)
    data = card_data(
        run_facts,
        report,
        name=title,
        base_model=base_model,
        license=license,
        tags=tags,
        main=main,
        adapter=usage.adapter,
    )
    before = linked(student, "the VLM before")
    card: ModelCard = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=markdown(title, 96),
        paper_url=PAPER,
        before=before,
        teacher=linked(teacher, "its original language model"),
        teacher_is=TEACHER_PARTS.get(str(teacher.get("part")), "the\nlanguage model that it was built from"),
        same_model=_same_model(student) + _blended(run_facts),
        headline=headline(tasks),
        space=f"{HUB}/spaces/{space}" if repo_or_none(space) else "",
        needs=usage.needs(),
        snippet=usage.snippet(),
        other_ways=usage.other_ways(),
        language_table=language_table(tasks),
        reading=reading(report, tasks),
        plots=_plots(plots or {}),
        prompts=_prompts(report.get("prompts") or []),
        vision_table=vision_table(tasks),
        vision_reading=vision_reading(tasks),
        training=training_rows(run_facts),
        method=_method(run_facts),
        limits=_limits(run_facts, report, tasks),
        licence=_licence_text(student, teacher, license),
        **_reproduce(run_facts, report, repo_id, command),
        versions=", ".join(f"{markdown(k)} {markdown(v)}" for k, v in (run_facts.get("versions") or {}).items()),
    )
    card.content = sealed(str(card))
    return card


def usage_of(repo_id: str | None, *, adapter: bool = False, base: str | None = None, **known: Any) -> Usage:
    """How to run the model of a repository; without one, of the folder in which the card lies. known: more of `Usage`."""
    source = repo_or_none(repo_id)
    place = {"source": source} if source else {"source": ".", "made_by": "the folder of this card"}
    return Usage(**{**place, "adapter": adapter, "base": repo_or_none(base), **known})


def _same_model(student: Facts) -> str:
    size = student.get("parameters")
    count = ""
    if size and is_finite(size):
        count = f" ({size / 1e6:,.1f}M parameters)" if size >= 1e6 else f" ({size:,} parameters)"
    return (
        f"It has the same architecture{count} and costs the same to run as before; it loads in plain transformers, without "
        "`hf_lingudistill`."
    )


def _blended(run_facts: Facts) -> str:
    """That it is a blend, of what, and how it was chosen; empty for any other model."""
    blend = run_facts.get("blend")
    if not blend:
        return ""
    before, after = (linked(blend.get(name) or {}, f"the VLM {name}") for name in ("before", "after"))
    per = ", more in the layers that had moved further from the original" if blend.get("shares") == "drift" else ""
    return (
        f" Its weights are a blend: {markdown(blend.get('weight'))} of {after}, the rest of {before}{per}; chosen for the best "
        f"{markdown(blend.get('most'))} of those with {markdown(blend.get('keep'))}, on the suite {markdown(blend.get('suite'))}."
    )


def _plots(plots: Mapping[str, str]) -> str:
    return "\n\n".join(f"![{markdown(caption)}]({path})" for caption, path in plots.items())


def _prompts(prompts: Sequence[Facts]) -> str:
    lines = []
    for entry in prompts:
        lines.append(f"> {plain(entry.get('prompt', ''), 400)}" + ("  [with an image]" if entry.get("image") else ""))
        for arm, label in (("original", "original LM"), ("before", "VLM before"), ("after", "this model")):
            if entry.get(arm) is not None:
                answer = f"  {label:<12} {plain(entry[arm], 400) or '(nothing)'}"
                lines += textwrap.wrap(answer, 92, subsequent_indent=" " * 15) or [answer]
    return fenced("\n".join(lines)) if lines else ""


def _method(run_facts: Facts) -> str:
    settings = run_facts.get("settings") or {}
    mode = MODES.get(str(settings.get("kv_sharing")))
    reads = "may read the student's keys and values" if mode is None else mode.in_words
    more = ""
    if settings.get("kv_source") == "before":
        more += " These are the keys and values of the VLM before training; they do not change."
    if isinstance(weight := settings.get("blind_weight"), int | float) and weight > 0:
        more += (
            f" It answers a second time without the image, and teaches the mean of both ({weight:g} of the second)."
        )
    others = "the others are trained with cross-entropy"
    if settings.get("distill_tokens") == "confident":
        others = "the others, and tokens whose label it finds less likely than the student does, are trained with cross-entropy"
    if settings.get("anchor") == "before":
        others += "; on rows that are not marked, the VLM before is a second teacher"
    who = f"The frozen language model has never seen an image: layer by layer it {reads}.{more}"
    if (part := (run_facts.get("teacher") or {}).get("part")) == "whole" or settings.get("kv_sharing") == "images":
        who = "The frozen teacher is a VLM that reads the images itself; nothing of the student is shared with it."
    elif part == "text half":
        who = f"The frozen teacher is the text half of a VLM, without its tower: layer by layer it {reads}.{more}"
    if run_facts.get("sampling"):
        seen = " On rows that are not marked, the VLM before judges them." if has_two_judges(run_facts) else ""
        return (
            f"{who} The student answers prompts itself, and its own answers are judged, token by token, against that model's next-token "
            f"distribution.{seen} The judges are dropped after training."
        )
    return (
        f"{who} Rows that are marked for distillation are trained towards its next-token distribution; {others}. It is dropped after "
        "training."
    )


def _limits(run_facts: Facts, report: Facts, tasks: Sequence[Task]) -> list[str]:
    """What a reader must not conclude."""
    groups = {task.group for task in tasks}
    names = {"language": "language", "vision": "vision", "grounded": "long answers about an image"}
    missing = [title for group, title in names.items() if group not in groups]
    limits = []
    if missing:
        limits.append(f"Not evaluated: {', '.join(missing)}.")
    limits.append("Not evaluated: safety, bias, factuality, and languages other than those of the benchmarks.")
    if tasks and not report.get("intervals"):  # a report over seeds says so itself
        limits.append("One training run: the intervals are over items, not over seeds.")
    if run_facts.get("blend"):
        limits.append(
            "A blend: its weight was chosen on the suite that the card names, so that scores there are a little too good. What is said of "
            "training is about the model that was blended in."
        )
    if (report.get("config") or {}).get("demo"):
        limits.append("A demonstration that is made in minutes, not a model to use.")
    limits.append(
        "Distillation gives back what the language model knew; it teaches nothing new and does not improve vision. What the "
        "VLM before got wrong about images, and the biases of its training data, are still there."
    )
    return limits


def _licence_text(student: Facts, teacher: Facts, chosen: str | None) -> str:
    code, name, link = licence_of(student, chosen)
    other = teacher.get("license")
    if code is None:
        text = (
            "**Not chosen yet.** The card of the VLM before names no licence, or could not be read, and none is guessed here: read the terms of both "
            "models and of the data, then set `license:` at the top of this card (`lingudistill publish --license ID`)."
        )
    elif chosen:
        text = f"`{code}`, chosen by the publisher."
    else:
        shown = f"[{markdown(name or code)}]({link})" if link else f"`{markdown(name or code)}`"
        text = f"{shown}, inherited from the VLM before, whose terms also hold here."
    if isinstance(other, str) and other != code:
        text += f" The teacher's licence is `{_licence_code(other)}`: check that the two, and the data's, go together."
    return text


def _licence_code(code: str) -> str:
    return re.sub(r"[^\w.+-]", "", code)[:60] or "unknown"


def _reproduce(run_facts: Facts, report: Facts, repo_id: str | None, command: str | None) -> dict[str, str]:
    """{"command", "command_note"} of the section on how to make this model anew."""
    demo = (report.get("config") or {}).get("demo")
    if command is None and demo:
        command = "make demo"
    if command is not None:
        return {"command": command, "command_note": "In a clone of hf_lingudistill:"}
    recipe = run_facts.get("recipe") or {}
    if not recipe:
        return {"command": "", "command_note": "The recipe of this run is not known to this card."}
    notes = []
    if not recipe.get("dataset_name") and not recipe.get("datasets"):
        notes.append("The rows were given in Python: add them to `recipe.yaml` as `dataset_name` or `datasets`.")
    notes.append("Names in `recipe.yaml` without an organisation are folders that are not on the Hub.")
    commands = ["pip install -e .  # in a clone of hf_lingudistill: it is not on PyPI yet"]
    if where := repo_or_none(repo_id):
        commands.append(f"hf download {where} recipe.yaml --local-dir .")
    else:
        notes.insert(0, "`recipe.yaml` is published with the model; `lingudistill.json` has the same under `recipe`.")
    processes = (run_facts.get("hardware") or {}).get("processes") or 1
    launch = f"accelerate launch --num_processes {processes} -m hf_lingudistill.scripts.distill"
    run = "lingudistill distill" if processes == 1 else launch
    commands.append(f"{run} --config recipe.yaml --output_dir OUT")
    commands += _blend_command(run_facts)
    return {
        "command": "\n".join(commands),
        "command_note": " ".join(notes),
    }


def _blend_command(run_facts: Facts) -> list[str]:
    """What makes a blend of OUT; nothing where the blend is OUT itself, or no blend."""
    blend = run_facts.get("blend") or {}
    if blend.get("weight") in (None, 1.0):
        return []
    named = {"before": blend.get("before"), "original": run_facts.get("teacher")}
    asked = {role: (fact or {}).get("id") or (fact or {}).get("name") for role, fact in named.items()}
    asked |= {"after": "OUT", "suite": blend.get("suite"), "keep": blend.get("keep"), "output_dir": "BLEND"}
    asked |= {"weights": blend.get("weight"), "shares": blend.get("shares")}
    options = [f"--{name} {shlex.quote(plain(value))}" for name, value in asked.items() if value is not None]
    return [" ".join(["lingudistill blend", *options])]
