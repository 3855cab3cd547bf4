"""HTML and SVG of the page, from answers and a report. Everything that a model or a visitor wrote is escaped here."""

from __future__ import annotations

import difflib
import html
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from answers import Answer
from checkpoints import Checkpoint
from report import NAMES, Plane, Report, Score, Task

# What each model is, and what it is called where it has no name on the Hub
ROLES = {
    "before": ("VLM before", "as it was"),
    "after": ("VLM restored", "the same VLM, distilled"),
    "original": ("Original LM", "what both were built from"),
}
PAPER = "https://arxiv.org/abs/2604.00829"
Scale = Callable[[float], float]  # a value -> where it lies, in units of the drawing
CHANGE, RECOVERED = "After − before", "Came back"
DOES_NOT_SEE = '<span class="ld-none">does not see</span>'
NOT_EVALUATED = '<span class="ld-none">not evaluated</span>'
EYE_OFF = (
    '<svg class="ld-eye" viewBox="0 0 48 28" aria-hidden="true"><path d="M3 10 C14 24 34 24 45 10 M9 16 L5 21 M18 20 L16 26'
    ' M30 20 L32 26 M39 16 L43 21" fill="none" stroke="currentColor" stroke-width="2.4" stroke-linecap="round"/></svg>'
)


# --------------------------------------------------------------------------------------------------------------------
# The frame
# --------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Label:
    """How a model is called on the page. source: its Hub id, where it has one; url: its page there."""

    name: str
    role: str
    size: str
    source: str | None = None
    url: str | None = None


def names(checkpoints: Mapping[str, Checkpoint]) -> dict[str, str]:
    """{"before", "after", ...: the name on the Hub, without the organisation where that tells them apart}"""
    short = {name: one.label.rpartition("/")[2] for name, one in checkpoints.items()}
    clash = len(set(short.values())) < len(short)
    return {
        name: ROLES[name][0] if one.url is None else one.label if clash else short[name]
        for name, one in checkpoints.items()
    }


def labels(checkpoints: Mapping[str, Checkpoint]) -> dict[str, Label]:
    """How each model is called on the page."""
    return {
        name: Label(called, ROLES[name][1], f"{_size(one)} parameters", one.label if one.url else None, one.url)
        for (name, one), called in zip(checkpoints.items(), names(checkpoints).values(), strict=True)
    }


def header(checkpoints: Mapping[str, Checkpoint], code: str | None) -> str:
    """What this page is, and the way to models, paper and code. code: an address, where there is one."""
    called = names(checkpoints)
    links = [(called[name], checkpoints[name].url) for name in ("after", "before", "original") if name in checkpoints]
    links += [("Paper", PAPER), ("Code", code)]
    listed = "".join(f"<li>{_link(text, url)}</li>" for text, url in links if url)
    return (
        f'<h1><span class="ld-after">{html.escape(called["after"])}</span></h1>'
        "<p>Learning to see costs a language model some of its language. This one was trained with LinguDistill to get it back, from "
        "the language model that it was built from: the same model, of the same size. Ask it, and the model as it was before, the "
        "same question.</p>"
        f'<ul class="ld-links">{listed}</ul>'
    )


def _link(text: str, url: str | None) -> str:
    if url is None:
        return html.escape(text)
    return f'<a href="{html.escape(url)}" target="_blank" rel="noopener">{html.escape(text)}</a>'


def _size(checkpoint: Checkpoint) -> str:
    count = checkpoint.model.num_parameters()
    return f"{count / 1e6:,.0f} M" if count >= 1e7 else f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"


def models_table(checkpoints: Mapping[str, Checkpoint]) -> str:
    """What runs here: each model's id, size, precision and loading time."""
    heads = ("Model", "Id", "Parameters", "Runs in", "Loaded in")
    body, called = "", names(checkpoints)
    for name, one in checkpoints.items():
        precision = str(one.model.dtype).removeprefix("torch.")
        cells = (
            _link(one.label, one.url),
            _size(one),
            f"{precision} on {one.model.device.type}",
            f"{one.seconds:.1f} s",
        )
        row = "".join(_cell(head, cell) for head, cell in zip(heads[1:], cells, strict=True))
        body += f'<tr><th scope="row">{html.escape(called[name])}</th>{row}</tr>'
    return f"<h2>What runs here</h2>{_table('Models', heads, f'<tbody>{body}</tbody>')}"


# --------------------------------------------------------------------------------------------------------------------
# Answers
# --------------------------------------------------------------------------------------------------------------------
def mark_differences(one: str, other: str) -> tuple[str, str, int, int]:
    """Two answers as HTML, with the words that only one of them has in <mark>. -> (one, other, words that only one has,
    words that only the other has). Blanks and line breaks stay as they are."""
    first, second = _words(one), _words(other)
    matcher = difflib.SequenceMatcher(None, [word for word, _ in first], [word for word, _ in second], autojunk=False)
    changed: tuple[set[int], set[int]] = (set(), set())
    for operation, a, b, c, d in matcher.get_opcodes():
        if operation != "equal":
            changed[0].update(range(a, b))
            changed[1].update(range(c, d))
    return (*(_marked(words, at) for words, at in zip((first, second), changed, strict=True)), *map(len, changed))


def _words(text: str) -> list[tuple[str, str]]:
    """[(word, the blanks after it)]"""
    return re.findall(r"(\S+)(\s*)", text)


def _marked(words: list[tuple[str, str]], changed: set[int]) -> str:
    """Neighbours in a line share one <mark>: a reader, or a screen reader, meets a phrase and not a row of single words."""
    parts = []
    joined = {at for at in changed if at + 1 in changed and "\n" not in words[at][1]}  # to the next word
    for at, (word, blank) in enumerate(words):
        opening = "<mark>" if at in changed and at - 1 not in joined else ""
        closing = "</mark>" if at in changed and at not in joined else ""
        parts.append(f"{opening}{html.escape(word)}{closing}{html.escape(blank)}")
    return "".join(parts)


def answer_columns(answers: Mapping[str, Answer], labels: Mapping[str, Label]) -> str:
    """The columns. Differences are marked once both answers are complete."""
    texts = {name: html.escape(answer.text) for name, answer in answers.items()}
    if comparable(answers):
        texts["before"], texts["after"], _, _ = mark_differences(answers["before"].text, answers["after"].text)
    columns = "".join(_column(name, labels[name], answer, texts[name]) for name, answer in answers.items())
    return f'<div class="ld-answers" data-columns="{len(answers)}">{columns}</div>'


def empty_columns(labels: Mapping[str, Label]) -> str:
    """The columns before the first question."""
    columns = "".join(_frame(name, label, '<p class="ld-idle">…</p>', "", "idle") for name, label in labels.items())
    return f'<div class="ld-answers" data-columns="{len(labels)}">{columns}</div>'


def comparable(answers: Mapping[str, Answer]) -> bool:
    """Whether before and after are both complete."""
    return all(answers[name].state in ("done", "cut") for name in ("before", "after"))


def _column(name: str, label: Label, answer: Answer, text: str) -> str:
    foot = f"{answer.seconds:.2f} s · {answer.tokens} token{'s' * (answer.tokens != 1)}"
    if answer.state == "blind":
        body = f'<p class="ld-blind">{EYE_OFF}<span>Has no eyes: it reads text only. Remove the picture to ask it.</span></p>'
        return _frame(name, label, body, "", answer.state)
    if answer.state == "failed":
        body = '<p class="ld-failed">This model could not answer. The others go on; please try another question.</p>'
        return _frame(name, label, body, "", answer.state)
    if answer.state == "waiting":
        return _frame(name, label, '<p class="ld-idle">reading …</p>', "", answer.state)
    if not answer.text and answer.state != "writing":
        body = '<p class="ld-idle">Not a word.</p>'
    else:
        caret = '<span class="ld-caret" aria-hidden="true"></span>' if answer.state == "writing" else ""
        body = f'<p class="ld-text">{text}{"…" * (answer.state in ("cut", "stopped"))}{caret}</p>'
    return _frame(
        name, label, body, foot + {"cut": " · cut off", "stopped": " · stopped"}.get(answer.state, ""), answer.state
    )


def _frame(name: str, label: Label, body: str, foot: str, state: str) -> str:
    title = html.escape(label.name)
    source = f"{_link(label.source, label.url)}, " if label.source else ""
    return (
        f'<section class="ld-answer" data-model="{name}" data-state="{state}" aria-label="{title}: {label.role}">'
        f'<header><h3>{title}</h3><p>{label.role}</p></header><div class="ld-body">{body}</div>'
        f'<footer><span class="ld-id">{source}{label.size}</span><span class="ld-time">{foot}</span></footer></section>'
    )


def verdict(answers: Mapping[str, Answer]) -> str:
    """One sentence on the finished answers, with the key to the marks where there are any."""
    if not comparable(answers):
        return notice("Not every model could answer.")
    _, _, only_before, only_after = mark_differences(answers["before"].text, answers["after"].text)
    if not only_before and not only_after:
        return notice("Before and after say the same, word for word.")
    words = f"{only_before} word{'s' * (only_before != 1)} only before, {only_after} only after"
    key = '<span class="ld-key" aria-hidden="true">Underlined: <mark>words that the other answer lacks</mark></span>'
    return f'<p class="ld-notice" role="status">{words}. {key}</p>'


def notice(text: str) -> str:
    """A sentence about how things stand."""
    return f'<p class="ld-notice" role="status">{html.escape(text)}</p>'


def problem(text: str) -> str:
    """A sentence about what the visitor can change; a screen reader speaks it at once."""
    return f'<p class="ld-problem" role="alert"><strong>Not asked.</strong> {html.escape(text)}</p>'


# --------------------------------------------------------------------------------------------------------------------
# The report
# --------------------------------------------------------------------------------------------------------------------
def number(value: float) -> str:
    """Three significant digits, without an exponent: 0.92, 12.3, 311."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def benchmark_table(report: Report | None, called: Mapping[str, str]) -> str:
    """Every task with every model's score, the paired change and the share that came back. called: the models' names."""
    if report is None:
        return '<p class="ld-none">Not evaluated: this Space came without a report.</p>'
    changed = any(task.change for task in report.tasks)
    called = {**NAMES, **called}
    heads = [*(called.get(name, name) for name in report.models), *([CHANGE] * changed), RECOVERED]
    body = ""
    for group in dict.fromkeys(task.group for task in report.tasks):
        rows = "".join(_row(task, report.models, called, changed) for task in report.tasks if task.group == group)
        title = f'<th scope="rowgroup" colspan="{len(heads) + 1}">{html.escape(group.capitalize())}</th>'
        body += f'<tbody><tr class="ld-group">{title}</tr>{rows}</tbody>'
    facts = " · ".join(f"{html.escape(name)} {html.escape(value)}" for name, value in report.facts.items())
    note = "Score, and below it the 95 % interval."
    if any(task.shuffled for task in report.tasks):
        note += " “Images exchanged” is the score with another question’s image: what guessing reaches."
    return f'{_table("Benchmarks", ["Benchmark", *heads], body)}<p class="ld-facts">{note}<br>{facts}</p>'


def _table(name: str, heads: Iterable[str], body: str) -> str:
    head = "".join(f'<th scope="col">{html.escape(title)}</th>' for title in heads)
    return (
        f'<div class="ld-scroll" role="region" tabindex="0" aria-label="{name}">'
        f'<table class="ld-table"><thead><tr>{head}</tr></thead>{body}</table></div>'
    )


def _row(task: Task, models: Iterable[str], called: Mapping[str, str], changed: bool) -> str:
    direction = "↑ higher is better" if task.higher_is_better else "↓ lower is better"
    about = " · ".join(filter(None, [task.unit, direction, f"n = {task.n:,}" if task.n else ""]))
    cells = [_score_cell(task, name, called.get(name, name)) for name in models]
    if changed:
        cells.append(_cell(CHANGE, _change(task)))
    recovered = f"<b>{task.recovered.value:.0%}</b>" if task.recovered else "–"
    cells.append(_cell(RECOVERED, recovered + _interval(task.recovered, "{:.0%}".format)))
    return (
        f'<tr><th scope="row">{html.escape(task.title)}<small>{html.escape(about)}</small></th>{"".join(cells)}</tr>'
    )


def _score_cell(task: Task, model: str, name: str) -> str:
    score, shuffled = task.scores.get(model), task.shuffled.get(model)
    content = DOES_NOT_SEE if model == "original" and task.group in ("vision", "grounded") else NOT_EVALUATED
    if score is not None:
        control = f"<small>images exchanged: {number(shuffled.value)}</small>" if shuffled else ""
        content = f"<b>{number(score.value)}</b>{_interval(score, number)}{control}"
    return _cell(name, content, model)


def _cell(title: str, content: str, model: str = "") -> str:
    """title: of the column; on a telephone, where a row is a card, it stands in the cell."""
    return f'<td data-title="{html.escape(title)}" data-model="{html.escape(model)}">{content}</td>'


def _interval(score: Score | None, form: Callable[[float], str]) -> str:
    if score is None or score.low is None or score.high is None:
        return ""
    return f"<small>{form(score.low)} to {form(score.high)}</small>"


def _change(task: Task) -> str:
    change = task.change
    if change is None:
        return NOT_EVALUATED
    better = (change.value > 0) == task.higher_is_better
    sure = change.low is not None and change.high is not None and (change.low > 0 or change.high < 0)
    word = ("▲ better" if better else "▼ worse") if sure else "within the noise"
    return f"<b>{change.value:+.3f}</b>{_interval(change, '{:+.3f}'.format)}<small>{word}</small>"


# --------------------------------------------------------------------------------------------------------------------
# Language against vision
# --------------------------------------------------------------------------------------------------------------------
WIDTH, HEIGHT = 640, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 40, 60
SHAPES = {
    "before": '<path d="M0 -8 L8 6 L-8 6 Z"/>',  # a triangle
    "after": '<circle r="7.5"/>',
}
OTHER_SHAPE = '<rect x="-6" y="-6" width="12" height="12"/>'


def trade_off(report: Report | None, called: Mapping[str, str]) -> str:
    """The plane of language and vision as an SVG that follows the page's colors: up and to the right is better."""
    if report is None or report.plane is None:
        return '<p class="ld-none">Not evaluated: the report holds no language and vision score of two models.</p>'
    plane, called = report.plane, {**NAMES, **called}
    x_extent = _extent([point.x for point in plane.points.values()], plane.original_x)
    y_extent = _extent([point.y for point in plane.points.values()])
    # The far end comes first on both axes: lower is better to the right, and SVG's y grows downwards.
    x_scale, y_scale = _scale(x_extent, LEFT, WIDTH - RIGHT), _scale(y_extent, TOP, HEIGHT - BOTTOM)
    x_ticks, y_ticks = _log_ticks(*x_extent) if plane.log else _ticks(*x_extent), _ticks(*y_extent)
    parts = [_grid(plane, x_scale, x_ticks, y_scale, y_ticks)]
    if {"before", "after"} <= set(plane.points):
        start, end = (plane.points[name] for name in ("before", "after"))
        parts.append(
            _arrow(x_scale(start.x.value), y_scale(start.y.value), x_scale(end.x.value), y_scale(end.y.value))
        )
    # "after" comes last: where points lie on each other, it is on top
    names = sorted(plane.points, key=lambda name: name == "after")
    parts += [_point(name, plane.points[name].x, plane.points[name].y, x_scale, y_scale) for name in names]
    legend = "".join(
        f'<li data-model="{html.escape(name)}"><svg viewBox="-10 -10 20 20" aria-hidden="true">{_shape(name)}</svg>'
        f"<span>{html.escape(called.get(name, name))}<small>language {_plain_x(plane, point.x.value)}, vision "
        f"{number(point.y.value)}</small></span></li>"
        for name, point in plane.points.items()
    )
    return (
        f'<figure class="ld-plane"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(_spoken(plane, called))}">'
        f"{''.join(parts)}</svg><figcaption><ul>{legend}</ul>Up: sees better. To the right: speaks better. The bars are 95 % "
        "intervals; the dashed line is the original LM, which speaks and does not see.</figcaption></figure>"
    )


def _plain(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _plain_x(plane: Plane, value: float) -> str:
    return number(math.exp(value) if plane.log else value)


def _spoken(plane: Plane, called: Mapping[str, str]) -> str:
    points = "; ".join(
        f"{called.get(name, name)} {_plain_x(plane, point.x.value)} and {number(point.y.value)}"
        for name, point in plane.points.items()
    )
    original = "" if plane.original_x is None else f"; original LM {_plain_x(plane, plane.original_x)}, no vision"
    return f"{plane.x_label}, lower is better, and {plane.y_label}, higher is better: {points}{original}."


def _extent(scores: list[Score], also: float | None = None) -> tuple[float, float]:
    values = [value for score in scores for value in (score.value, score.low, score.high) if value is not None]
    values += [] if also is None else [also]
    low, high = min(values), max(values)
    margin = 0.16 * (high - low) or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def _scale(extent: tuple[float, float], start: float, end: float) -> Scale:
    low, high = extent
    return lambda value: round(end - (value - low) / (high - low) * (end - start), 1)


def _ticks(low: float, high: float) -> list[float]:
    """At most five round values."""
    step = 10 ** math.floor(math.log10((high - low) / 5))
    step = next(step * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (step * factor) <= 5)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Logarithms of round values, at most about seven."""
    decades = range(math.floor(low / math.log(10)), math.ceil(high / math.log(10)) + 1)
    candidates = [
        [math.log(factor * 10.0**decade) for decade in decades for factor in factors]
        for factors in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1,))
    ]
    inside = [[tick for tick in ticks if low <= tick <= high] for ticks in candidates]
    return next((ticks for ticks in inside if len(ticks) <= 7), inside[-1])


def _grid(plane: Plane, x_scale: Scale, x_ticks: list[float], y_scale: Scale, y_ticks: list[float]) -> str:
    floor, middle = HEIGHT - BOTTOM, (LEFT + WIDTH - RIGHT) / 2
    lines = [f'<path d="M{LEFT} {y_scale(tick)}H{WIDTH - RIGHT}"/>' for tick in y_ticks]
    lines += [f'<path d="M{x_scale(tick)} {TOP}V{floor}"/>' for tick in x_ticks]
    texts = [
        f'<text x="{LEFT - 8}" y="{y_scale(tick) + 4}" text-anchor="end">{_plain(tick)}</text>' for tick in y_ticks
    ]
    texts += [
        f'<text x="{x_scale(tick)}" y="{floor + 22}" text-anchor="middle">'
        f"{_plain(math.exp(tick) if plane.log else tick)}</text>"
        for tick in x_ticks
    ]
    texts.append(f'<text x="{middle}" y="{HEIGHT - 12}" text-anchor="middle">{html.escape(plane.x_label)} →</text>')
    texts.append(f'<text x="8" y="16">↑ {html.escape(plane.y_label)}</text>')
    original = ""
    if plane.original_x is not None:
        x = x_scale(plane.original_x)
        original = f'<path class="ld-original" d="M{x} {TOP}V{floor}"/><text x="{x}" y="{TOP - 8}" text-anchor="middle">original LM</text>'
    return f'<g class="ld-grid">{"".join(lines)}</g><g class="ld-axis">{"".join(texts)}{original}</g>'


def _arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    length = math.hypot(x2 - x1, y2 - y1)
    if length < 50:
        return ""
    ux, uy = (x2 - x1) / length, (y2 - y1) / length
    a, b, c, d = x1 + 16 * ux, y1 + 16 * uy, x2 - 16 * ux, y2 - 16 * uy
    head = f"M{c - 10 * ux - 5 * uy:.1f} {d - 10 * uy + 5 * ux:.1f}L{c:.1f} {d:.1f}L{c - 10 * ux + 5 * uy:.1f} {d - 10 * uy - 5 * ux:.1f}"
    return f'<path class="ld-arrow" d="M{a:.1f} {b:.1f}L{c:.1f} {d:.1f}{head}"/>'


def _point(name: str, x: Score, y: Score, x_scale: Scale, y_scale: Scale) -> str:
    at_x, at_y = x_scale(x.value), y_scale(y.value)
    bars = ""
    if x.low is not None and x.high is not None:
        bars += f'<path d="M{x_scale(x.low)} {at_y}H{x_scale(x.high)}"/>'
    if y.low is not None and y.high is not None:
        bars += f'<path d="M{at_x} {y_scale(y.low)}V{y_scale(y.high)}"/>'
    return f'<g data-model="{html.escape(name)}">{bars}<g transform="translate({at_x} {at_y})">{_shape(name)}</g></g>'


def _shape(name: str) -> str:
    return SHAPES.get(name, OTHER_SHAPE)
