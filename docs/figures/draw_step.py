"""Draw the README's figure of one training step: `python docs/figures/draw_step.py` (seconds, CPU).

A small batch goes through the library's own `plan_queries`, with the defaults of `LinguDistillConfig`; cells, arrows and losses are
coloured from what it returns. Only the words of the batch are invented. The output holds no date: the same versions draw the same bytes.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch, Polygon, Rectangle
from matplotlib.textpath import TextPath

from hf_lingudistill.config import LinguDistillConfig
from hf_lingudistill.queries import QueryPlan, Vocabulary, plan_queries
from hf_lingudistill.sharing import MODES, sharing

Source = Literal["student", "own", "features", "nothing"]

LM_MODES = [name for name, mode in MODES.items() if not mode.sees]  # a VLM that sees for itself shares nothing to draw
NUMBERS = {4: "Four", 5: "Five", 6: "Six"}
DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(LinguDistillConfig)}

# --------------------------------------------------------------------------------------------------------------------
# The batch
# --------------------------------------------------------------------------------------------------------------------
IMAGE = "[image]"
PAD = "[pad]"
GROUPS = (
    ("prompt", ("Be", "brief")),
    ("image", (IMAGE,) * 3),
    ("question", ("Car", "or", "van?", "AI:")),
    ("response", ("A", "red", "bus", ".", "eos")),
)
MARKED = tuple(token for _, tokens in GROUPS for token in tokens)
UNMARKED = ("Be", "brief", IMAGE, IMAGE, IMAGE, "Is", "it", "red?", "AI:", "Yes", ".", "eos", PAD, PAD)
NUM_RESPONSE = {MARKED: 5, UNMARKED: 3}


@dataclass(frozen=True)
class Batch:
    """input_ids, labels, attention_mask: (B, T) long. distill: (B,) bool. vocabulary: what the teacher can read: all but the image."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor
    distill: torch.Tensor
    vocabulary: Vocabulary

    def plan(self, kv_sharing: str) -> QueryPlan:
        plan: QueryPlan = plan_queries(
            self.input_ids,
            self.labels,
            self.distill,
            sharing=sharing(kv_sharing),
            vocabulary=self.vocabulary,
            attention_mask=self.attention_mask,
        )
        return plan


def make_batch() -> Batch:
    """The two rows: the first marked for distillation, the second not."""
    rows = (MARKED, UNMARKED)
    words = sorted({token for row in rows for token in row} - {IMAGE})
    ids = {word: index for index, word in enumerate([*words, IMAGE])}
    input_ids = torch.tensor([[ids[token] for token in row] for row in rows])
    attention_mask = torch.tensor([[int(token != PAD) for token in row] for row in rows])
    labels = torch.full_like(input_ids, -100)
    for index, row in enumerate(rows):
        end = int(attention_mask[index].sum())
        labels[index, end - NUM_RESPONSE[row] : end] = input_ids[index, end - NUM_RESPONSE[row] : end]
    vocabulary = Vocabulary(size=len(ids), shared_size=ids[IMAGE])
    return Batch(input_ids, labels, attention_mask, torch.tensor([True, False]), vocabulary)


# --------------------------------------------------------------------------------------------------------------------
# What the plan says
# --------------------------------------------------------------------------------------------------------------------
def queried(plan: QueryPlan) -> list[int]:
    """Positions of the marked row that the teacher computes."""
    assert not plan.rows.any()  # the other row is not asked about
    return plan.positions.tolist()


def sources(plan: QueryPlan) -> list[Source]:
    """For each position of the marked row (no padding): whose keys and values the teacher's queries find there, and where
    they are the teacher's own, whether it made them from the student's image features."""
    own = dict(zip(plan.positions[plan.own].tolist(), plan.readable[plan.own].tolist(), strict=True))
    last = max(queried(plan))  # causal: no query looks further

    def source(position: int) -> Source:
        if position in own:
            return "own" if own[position] else "features"
        return "student" if plan.sharing.reads_student and position <= last else "nothing"

    return [source(position) for position in range(plan.length)]


@dataclass(frozen=True)
class Losses:
    """ce, kl: (B, T - 1) weights, at the position that predicts. candidates: loss positions of the marked row."""

    ce: torch.Tensor
    kl: torch.Tensor
    candidates: list[int]


def losses(batch: Batch, plan: QueryPlan) -> Losses:
    """Where cross-entropy and KL fall, with the trainer's own weights."""
    if DEFAULTS["distill_tokens"] != "all":
        raise ValueError(
            "The figure has KL at every token that the teacher is asked about: redraw it for this default."
        )
    at = plan.loss_rows, plan.loss_positions
    ce = (batch.labels[:, 1:] != -100).float()
    kl = torch.zeros_like(ce)
    ce[at], kl[at] = DEFAULTS["ce_weight"], DEFAULTS["distill_weight"]
    return Losses(ce=ce, kl=kl, candidates=plan.loss_positions.tolist())


# --------------------------------------------------------------------------------------------------------------------
# Drawing, in pixels at the width the README shows
# --------------------------------------------------------------------------------------------------------------------
WIDTH = 800
MARGIN = 18
INSET = 12  # of the text in a box
COLUMN, CELL, CELL_HEIGHT = 34, 31, 20
ROW = 25  # from one row of cells to the next
LEFT = 76  # of the first column
RIGHT = LEFT + COLUMN * len(MARKED)

INK, MUTED, LINE, CARD = "#1f2933", "#56606b", "#c3cbd3", "#ffffff"
STUDENT, STUDENT_FILL, STUDENT_PALE = "#08437a", "#98c4ec", "#f2f7fc"
TEACHER, TEACHER_FILL, TEACHER_PALE = "#8f3f00", "#fccb98", "#fef6ee"

TEXT, HEADING, TOKEN = 11, 12.5, 10.5
DASHED = (0, (2, 2))


class Canvas:
    """Flat shapes and text on one axes whose units are pixels, y downwards."""

    def __init__(self) -> None:
        self.figure = plt.figure()
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.axis("off")

    def finish(self, height: float) -> Figure:
        """Put everything on a card of this height: white, so that it reads in dark mode too."""
        self.figure.set_size_inches(WIDTH / 100, height / 100)
        self.axes.set(xlim=(0, WIDTH), ylim=(height, 0))
        self.box(0.5, 0.5, WIDTH - 1, height - 1, 8, facecolor=CARD, edgecolor=LINE, zorder=0)
        return self.figure

    def box(self, x: float, y: float, width: float, height: float, radius: float = 3, **style: Any) -> None:
        style = {"linewidth": 0.6, "facecolor": "none", "edgecolor": "none", **style}
        shape = f"round,pad=0,rounding_size={radius}"
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, **style))

    def text(self, x: float, y: float, text: str, size: float = TEXT, color: str = INK, **style: Any) -> float:
        """Text whose capitals are centred on y. Returns the right end of left-aligned text."""
        points = size * 72 / 100
        # On the baseline: centring each text on its own extent would lift those with descenders
        self.axes.text(x, y + 0.365 * size, text, fontsize=points, color=color, va="baseline", **style)
        font = FontProperties(family="DejaVu Sans", weight=style.get("weight", "normal"))
        return x + float(TextPath((0, 0), text, size, prop=font).get_extents().x1)

    def heading(self, x: float, y: float, heading: str, text: str = "", color: str = INK) -> None:
        """A bold heading with text behind it."""
        end = self.text(x, y, heading, HEADING, color, weight="bold")
        if text:
            self.text(end + 8, y, text)

    def line(self, *points: tuple[float, float], color: str, width: float = 0.9) -> None:
        x, y = zip(*points, strict=True)
        self.axes.plot(x, y, color=color, linewidth=width, solid_capstyle="butt", solid_joinstyle="miter")

    def tip(self, x: float, y: float, dx: int, dy: int, color: str) -> None:
        """An arrow head that ends at (x, y), pointing along (dx, dy)."""
        base = (x - 5 * dx, y - 5 * dy)
        corners = [(x, y), (base[0] - 3 * dy, base[1] - 3 * dx), (base[0] + 3 * dy, base[1] + 3 * dx)]
        self.axes.add_patch(Polygon(corners, facecolor=color, linewidth=0))

    def bar(self, x: float, y: float, width: float, height: float, color: str) -> None:
        self.axes.add_patch(Rectangle((x, y), width, height, facecolor=color, linewidth=0))

    def cell(self, x: float, y: float, text: str = "", *, fill: str = "none", color: str = INK, **style: Any) -> None:
        """One position; (x, y) is the top left corner of its column."""
        self.box(x + (COLUMN - CELL) / 2, y, CELL, CELL_HEIGHT, facecolor=fill, **style)
        if text:
            self.text(x + COLUMN / 2, y + CELL_HEIGHT / 2, text, TOKEN, color, ha="center")

    def brace(self, x: float, y: float, columns: int, name: str) -> None:
        """A name over columns whose cells begin at y."""
        x0, x1 = x + 2, x + COLUMN * columns - 2
        self.text((x0 + x1) / 2, y - 13, name, color=MUTED, ha="center")
        self.line((x0, y - 5), (x1, y - 5), color=MUTED, width=0.7)

    def tokens(self, tokens: Sequence[str], y: float, left: float = LEFT) -> None:
        for index, token in enumerate(tokens):
            x = left + COLUMN * index
            if token == PAD:
                self.cell(x, y, edgecolor=LINE, linestyle=DASHED)
                continue
            self.cell(x, y, "" if token == IMAGE else token, fill=CARD, edgecolor=LINE)
            if token == IMAGE:
                for i, j in itertools.product(range(5), range(3)):
                    shade = ("#dde2e8", "#bcc5cf", "#98a4b1")[(2 * i + j) % 3]
                    self.bar(x + COLUMN / 2 - 10 + 4 * i, y + 4 + 4 * j, 4, 4, shade)


def column(position: int) -> float:
    return LEFT + COLUMN * position


def middle(position: int) -> float:
    return column(position) + COLUMN / 2


def draw_groups(canvas: Canvas, y: float) -> None:
    start = 0
    for name, tokens in GROUPS:
        canvas.brace(column(start), y, len(tokens), name)
        start += len(tokens)


def draw_models(canvas: Canvas, plan: QueryPlan, top: float) -> float:
    """Student, VLM before, teacher, one under the other, and what the last reads of the second. Returns the bottom."""
    if plan.sharing.source != "before":
        raise ValueError(
            f"With kv_sharing={plan.sharing.name!r} the VLM before lends nothing: redraw the figure for this default."
        )
    reads, queries, lent = sources(plan), set(queried(plan)), plan.columns_read
    width = WIDTH - 2 * MARGIN

    def box(y: float, height: float, heading: str, text: str, below: str, *, of_teacher: bool = False) -> None:
        pale, edge, ink = (
            (TEACHER_PALE, TEACHER_FILL, TEACHER) if of_teacher else (STUDENT_PALE, STUDENT_FILL, STUDENT)
        )
        canvas.box(MARGIN, y, width, height, 6, facecolor=pale, edgecolor=edge)
        canvas.heading(MARGIN + INSET, y + 16, heading, text, ink)
        canvas.text(MARGIN + INSET, y + 33, below)

    def layers(y: float) -> list[float]:
        """Where the first and the last layer's cells begin; dots between them."""
        for height, name in ((y, "layer 1"), (y + 42, "layer L")):
            canvas.text(MARGIN + INSET, height + CELL_HEIGHT / 2, name, color=MUTED)
        for dot in range(3):
            canvas.bar(MARGIN + INSET + 18, y + 25 + 5 * dot, 1.6, 1.6, MUTED)
        return [y, y + 42]

    box(top, 98, "Student", "the VLM, in training", "runs once over every token")
    draw_groups(canvas, top + 66)
    canvas.tokens(MARKED, top + 66)

    y = top + 98 + 12
    ends = "runs to the last image token, and leaves its keys and values (KV) at every layer"
    box(y, 116, "VLM before", "frozen: a copy, or what lies under the adapter", ends)
    for height in layers(y + 46):
        for position in range(lent):
            canvas.cell(column(position), height, "KV", fill=STUDENT_FILL, color=STUDENT)
    bottom_before = y + 116

    y = bottom_before + 26
    read = [position for position, source in enumerate(reads) if source == "student" and position < lent]
    says = "computes the text; at the image it reads the KV of the VLM before, layer by layer"
    quantization = DEFAULTS["teacher_quantization"].upper()
    box(y, 116, "Teacher", f"its original LM: frozen, {quantization}, has no eyes", says, of_teacher=True)
    for height in layers(y + 46):
        for position, source in enumerate(reads):
            if source == "student":
                canvas.cell(column(position), height, "KV", fill=STUDENT_FILL, color=STUDENT)
            elif position in queries:
                canvas.cell(column(position), height, "QKV", fill=TEACHER_FILL, color=TEACHER)
    x = middle(read[len(read) // 2])
    left, right = (middle(position) for position in (read[0], read[-1]))
    start, end = bottom_before + 3, y + 1  # under the last layer's cells
    for position in read:
        canvas.line((middle(position), start - 10), (middle(position), start), color=STUDENT)
    canvas.line((left, start), (right, start), color=STUDENT)
    canvas.line((x, start), (x, end - 4), color=STUDENT)
    canvas.tip(x, end, 0, 1, STUDENT)
    canvas.text(x + 10, (bottom_before + y) / 2, "image tokens alone", color=STUDENT)
    return y + 116


def draw_losses(canvas: Canvas, found: Losses, top: float) -> float:
    """What each position predicts, and the loss there. Returns the bottom."""
    remark = column(found.candidates[0]) - 8
    y = top + 22
    canvas.heading(MARGIN + INSET, y, "Loss")
    canvas.text(remark, y, "next token", color=MUTED, ha="right")
    for position in found.candidates:
        canvas.line((middle(position), top + 1), (middle(position), top + 8), color=TEACHER)
        canvas.tip(middle(position), top + 12, 0, 1, TEACHER)
        canvas.text(middle(position), y, MARKED[position + 1], TOKEN, ha="center")
    y += 16
    weight = DEFAULTS["ce_weight"]
    beside = "" if weight == 1 else f" (\u00d7{weight:g} beside KL)"
    canvas.text(remark, y + 10, "cross-entropy: every response token" + beside, ha="right")
    draw_cross_entropy(canvas, found, 0, y)
    y += ROW
    canvas.text(remark, y + 10, "KL: every token that the teacher is asked about", ha="right")
    for position in found.candidates:
        if found.kl[0, position] > 0:
            canvas.cell(column(position), y, "KL", fill=TEACHER_FILL, color=TEACHER)
        else:
            canvas.cell(column(position), y, edgecolor=TEACHER_FILL, linestyle=DASHED)
    canvas.text(RIGHT + 18, top + 22, "Teacher and copy are dropped")
    canvas.text(RIGHT + 18, top + 38, "after training: same VLM,")
    canvas.text(RIGHT + 18, top + 54, "same cost")
    return y + CELL_HEIGHT


def draw_cross_entropy(canvas: Canvas, found: Losses, row: int, y: float) -> None:
    for position in found.ce[row].nonzero().flatten().tolist():
        canvas.cell(column(position), y, "CE", fill=MUTED, color=CARD)


def draw_unmarked(canvas: Canvas, found: Losses, top: float) -> float:
    """The row that is not distilled. Returns the bottom."""
    canvas.heading(MARGIN + INSET, top + 8, "Another row, not marked for distillation", "the teacher skips it")
    canvas.tokens(UNMARKED, top + 22)
    draw_cross_entropy(canvas, found, 1, top + 22 + ROW)
    return top + 22 + ROW + CELL_HEIGHT


def draw_modes(canvas: Canvas, batch: Batch, top: float) -> float:
    """For each sharing mode: whose K/V are read where, and where the teacher computes. Returns the bottom."""
    styles: dict[Source, dict[str, str]] = {
        "student": {"fill": STUDENT_FILL},
        "own": {"fill": TEACHER_FILL},
        "features": {"fill": TEACHER_FILL, "edgecolor": STUDENT, "linewidth": 1.6},
        "nothing": {"edgecolor": LINE},
    }
    canvas.heading(MARGIN + INSET, top + 8, f"{NUMBERS[len(LM_MODES)]} ways to share", "kv_sharing")
    canvas.text(RIGHT + 18, top + 8, "Q: the teacher computes here", color=MUTED)
    y = top + 40
    draw_groups(canvas, y)
    for mode in LM_MODES:
        plan = batch.plan(mode)
        queries = queried(plan)
        canvas.text(MARGIN + INSET, y + 10, mode)
        for position, source in enumerate(sources(plan)):
            # Letters as in the models above: the strip reads without colours too
            content = "QKV" if source in ("own", "features") else "Q" if position in queries else ""
            canvas.cell(column(position), y, content, color=TEACHER, **styles[source])
        default = " (default)" if mode == DEFAULTS["kv_sharing"] else ""
        canvas.text(RIGHT + 18, y + 10, f"computes {len(queries)} of {len(MARKED)} tokens{default}")
        y += ROW
    y += 4
    x = float(LEFT)
    for label, content, style in (
        ("the VLM's KV", "", styles["student"]),
        ("the teacher's own KV", "KV", styles["own"]),
        ("from the VLM's image features", "KV", styles["features"]),
        ("not read", "", styles["nothing"]),
    ):
        canvas.cell(x, y, content, color=TEACHER, **style)
        x = canvas.text(x + COLUMN + 4, y + 10, label, color=MUTED) + 20
    return y + CELL_HEIGHT


def draw() -> Figure:
    batch = make_batch()
    plan = batch.plan(DEFAULTS["kv_sharing"])
    found = losses(batch, plan)
    canvas = Canvas()
    y = draw_models(canvas, plan, MARGIN)
    y = draw_losses(canvas, found, y)
    y = draw_unmarked(canvas, found, y + 22)
    y = draw_modes(canvas, batch, y + 24)
    return canvas.finish(y + MARGIN)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw training_step.png.")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent)
    folder = parser.parse_args().output_dir
    with plt.rc_context({"font.family": "DejaVu Sans"}):
        figure = draw()
        figure.savefig(folder / "training_step.png", dpi=200, transparent=True, metadata={"Software": None})


if __name__ == "__main__":
    main()
