"""The scores on a card: two tables, and what may be read from them. All text is escaped here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .escape import markdown
from .metadata import identifier
from .results import Facts, Score, Task, number

# Names of models in a report, as readers know them. Any other arm is left out of the card: its report has it.
COLUMNS = {
    "original": "original LM",
    "before": "VLM before",
    "ce_only": "same steps, CE only",
    "ce": "same steps, CE only",
}


def headline(tasks: Sequence[Task]) -> str:
    """The first language benchmark in one sentence."""
    task = next((task for task in tasks if task.group == "language" and "before" in task.scores), None)
    if task is None:
        return ""
    unit = task.unit or task.metric.replace("_", " ")
    text = f"On {markdown(task.title)}: {number(task.scores['before'].value)} {markdown(unit)} before, "
    text += f"**{number(task.scores['after'].value)}** now"
    if "original" in task.scores:
        text += f", {number(task.scores['original'].value)} in the original language model"
    if isinstance(task.recovered, Score):
        text += f"; {task.recovered.value:z.0%} of what was lost came back"
        if task.unit == "perplexity":
            text += " (in log-perplexity)"
    return text + "."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _columns(tasks: Sequence[Task], wanted: Sequence[str]) -> dict[str, str]:
    """{model: heading} of those that some task has, this model's in bold."""
    headings = {**COLUMNS, "after": "**this model**"}
    return {model: headings[model] for model in wanted if any(model in task.scores for task in tasks)}


def language_table(tasks: Sequence[Task]) -> str:
    """Scores of language as a Markdown table; empty where there are none."""
    rows = [task for task in tasks if task.group == "language"]
    if not rows:
        return ""
    columns = _columns(rows, ("original", "before", "after", "ce_only", "ce"))
    with_ce = any(task.ce_recovered for task in rows)
    body = []
    for task in rows:
        scores = [str(task.scores[model]) if model in task.scores else "-" for model in columns]
        scores = [f"**{text}**" if model == "after" else text for model, text in zip(columns, scores, strict=True)]
        by_ce = [_share(task.ce_recovered)] if with_ce else []
        body.append([_label(task), str(task.n or "-"), *scores, _share(task.recovered), *by_ce])
    heads = ["benchmark", "items", *columns.values(), "recovered", *(["recovered by CE only"] if with_ce else [])]
    return _table(heads, body)


def _label(task: Task) -> str:
    direction = "higher" if task.higher_is_better else "lower"
    unit = task.unit or task.metric.replace("_", " ")
    return f"{markdown(task.title)} ({markdown(unit)}, {direction} is better)"


def _share(recovered: Score | str | None) -> str:
    if recovered is None:
        return "not evaluated"
    if isinstance(recovered, str):
        return markdown(recovered)
    if recovered.low is None or recovered.high is None:
        return f"{recovered.value:z.0%}"
    return f"{recovered.value:z.0%} [{recovered.low:z.0%}, {recovered.high:z.0%}]"


def reading(report: Facts, tasks: Sequence[Task]) -> str:
    """How to read that table, and what follows from it."""
    intervals = report.get("intervals")
    language = [task for task in tasks if task.group == "language"]
    shares = [share for task in language for share in (task.recovered, task.ce_recovered) if isinstance(share, Score)]
    scores = [*shares, *(score for task in language for score in task.scores.values())]
    if intervals is None and any(score.low is not None for score in scores):
        intervals = "95 % bootstrap intervals over items"
    text = f"In brackets: {markdown(intervals)}. " if intervals else ""
    text += "*Recovered*: the share of what the original language model had and the VLM before had lost that came back"
    text += "; of a perplexity, of its logarithm." if any(t.unit == "perplexity" for t in tasks) else "."
    suite, config = report.get("suite") or {}, report.get("config") or {}
    if isinstance(suite, Mapping) and suite.get("name"):
        text += f" Suite `{identifier(str(suite['name']))}`{_seed(suite)}."
    elif "demo" in config:
        text += f" {_demo_size(report)}"
    return " ".join([text, *_against_ce(tasks)])


def _against_ce(tasks: Sequence[Task]) -> list[str]:
    """Sentences on what distillation adds to plain cross-entropy: as important to a reader as the gain itself."""
    rows = [task for task in tasks if {"ce_only", "ce"} & task.scores.keys()]
    if not rows:
        return []
    found: dict[str, list[str]] = {"better": [], "worse": [], "not told apart": []}
    for task in rows:
        if verdict := _verdict(task.ce_change, task, *found):
            found[verdict].append(markdown(task.title))
    sentences = ["*CE only* is the same start, rows and steps with plain cross-entropy."]
    if any(found.values()):
        parts = [f"{word} on {'; '.join(titles)}" for word, titles in found.items() if titles]
        sentences.append(f"Against it, this model is {'. It is '.join(parts)}.")
    return sentences


def _verdict(change: Score | None, task: Task, better: str, worse: str, neither: str) -> str | None:
    """What a paired difference with its interval says; None without one."""
    if change is None or change.low is None or change.high is None:
        return None
    if change.low <= 0 <= change.high:
        return neither
    return better if (change.value > 0) == task.higher_is_better else worse


def _demo_size(report: Facts) -> str:
    tokens = (report.get("language") or {}).get("n_tokens")
    return f"One run{_seed(report['config'])}" + (f"; {tokens:,} tokens of text." if isinstance(tokens, int) else ".")


def _seed(settings: Facts) -> str:
    return f", seed {markdown(settings['seed'])}" if settings.get("seed") is not None else ""


def vision_table(tasks: Sequence[Task]) -> str:
    """Scores on images as a Markdown table, blind controls beside them; empty where there are none."""
    rows = [task for task in tasks if task.group in ("vision", "grounded")]
    if not rows:
        return ""
    columns = _columns(rows, ("before", "after", "ce_only", "ce"))
    controls = list(dict.fromkeys(name for task in rows for name in task.controls))
    body = []
    for task in rows:
        scores = [str(task.scores[model]) if model in task.scores else "-" for model in columns]
        scores = [f"**{text}**" if model == "after" else text for model, text in zip(columns, scores, strict=True)]
        change = task.change.signed() if task.change else "-"
        blind = [str(task.controls[name]) if name in task.controls else "-" for name in controls]
        body.append([_label(task), str(task.n or "-"), *scores, change, *blind])
    blind_heads = [f"images {markdown(name)}" for name in controls]
    return _table(["benchmark", "items", *columns.values(), "this model - before", *blind_heads], body)


def vision_reading(tasks: Sequence[Task]) -> str:
    """What follows from that table, a sentence per task."""
    rows = [task for task in tasks if task.group in ("vision", "grounded")]
    sentences = []
    for task in rows:
        nothing = f"no difference that {task.n or 'these'} items can show"
        if task.chosen_by is not None:
            sentences.append(
                f"{markdown(task.title)}: no verdict, since the tokens were chosen where the {COLUMNS.get(task.chosen_by, 'this model')} is sure, which "
                "favours it."
            )
        elif verdict := _verdict(task.change, task, "a gain", "a loss", nothing):
            sentences.append(f"{markdown(task.title)}: {verdict}.")
        elif task.change is not None:
            sentences.append(
                f"{markdown(task.title)}: {task.change.value:+z.3f}, with no interval of the difference itself."
            )
    if any(task.controls for task in rows):
        sentences.append(
            "On the right, this model's scores when the images are exchanged or blank: a score that these reach too says nothing "
            "about vision."
        )
    return " ".join(sentences)
