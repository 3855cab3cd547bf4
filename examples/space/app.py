"""A Space that asks a VLM before and after distillation, and the LM it was built from, the same question.

    LINGUDISTILL_SPACE_CONFIG=config.json python app.py

Runs on the free CPU hardware and on ZeroGPU. It needs transformers, torch, gradio and pillow, and no hf_lingudistill.
`visitor.py` checks what is asked, `answers.py` streams what the models say, `markup.py` draws it.
"""

from __future__ import annotations

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported: nothing is reported to anyone

try:
    import spaces  # before torch: on ZeroGPU it stands in for CUDA until a GPU is lent
except ImportError:
    spaces = None

import functools
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gradio as gr
import markup
from answers import MAX_NEW_TOKENS, Answer, check_fits, stopped, stream
from checkpoints import Checkpoint, Settings, load_all, read_settings
from gradio.themes.utils.fonts import LocalFont
from pictures import draw_all
from report import Report, read_report
from visitor import BadInput, check_length, check_question, open_picture

HERE = Path(__file__).parent
GPU_SECONDS = 60  # what one question may take of a visitor's ZeroGPU quota
WAITING_ROOM = 20  # visitors in the queue; the next one is told to come back
LARGEST_FILE = "30mb"
DEFAULT_LENGTH = 48
WRITING = "They are writing, a token each in turn …"
WELCOME = "Ask all of them the same thing, or pick an example."

# Examples where neither the Space's config nor the report has any: (picture's name or None, question)
SHAPES = (("red circle", "what color is the shape?"), ("blue triangle", "what shape is in the image?"))
PICTURES = (("receipt", "How much was it in total?"), ("chart", "Which day sold the most coffee?"))
TEXTS = ("Why do leaves fall in autumn?", "How does a bridge stay up?")
MOST_EXAMPLES = 4

# On a telephone the answers are below the fold. Takes the event's inputs and passes them on.
SHOW_ANSWERS = """(...inputs) => {
    const columns = document.querySelector("#ld-columns");
    if (columns.getBoundingClientRect().top > 0.8 * window.innerHeight) {
        document.querySelector("#ld-notice").scrollIntoView();
    }
    return inputs;
}"""

# Fonts come with Gradio: a page that asks another host for them tells it who is reading.
THEME = gr.themes.Base(
    primary_hue="teal",
    secondary_hue="amber",
    neutral_hue="stone",
    radius_size="lg",
    font=[LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"],  # 600 lacks most letters
    font_mono=["ui-monospace", "monospace"],
).set(
    body_background_fill="*neutral_50",
    body_background_fill_dark="*neutral_950",
    block_background_fill="white",
    block_background_fill_dark="*neutral_900",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_800",
    button_primary_text_color="white",
)


def examples(settings: Settings, report: Report | None, pictures: Mapping[str, Path]) -> list[tuple[Path | None, str]]:
    """[(picture's file or None, question)] that the models here can answer, two with a picture and two without.

    The Space's own, else the prompts of the report in its order, filled up from the usual ones: shapes for models that learned
    them, a receipt and a chart for any other.
    """
    if settings.examples:
        return list(settings.examples)
    asked = report.prompts if report else []
    usual = SHAPES if report and report.shapes else PICTURES
    seen = [entry for entry in asked if entry[0]] + [(pictures[name], question) for name, question in usual]
    read = [entry for entry in asked if not entry[0]] + [(None, question) for question in TEXTS]
    return [*seen[: MOST_EXAMPLES // 2], *read[: MOST_EXAMPLES // 2]]


@dataclass
class Visit:
    """One question. ended: which button the visitor pressed meanwhile; a new question ends the one before. over: it has its
    answers, or never will."""

    ended: Literal["", "stop", "clear"] = ""
    over: bool = False

    def end(self, how: Literal["stop", "clear"] = "stop") -> None:
        self.ended = self.ended or how


def make_asker(checkpoints: Mapping[str, Checkpoint]) -> Callable[..., Iterator[tuple[str, Any]]]:
    """The function behind the Ask button."""
    labels = markup.labels(checkpoints)
    control_tokens = set().union(*(checkpoint.control_tokens() for checkpoint in checkpoints.values()))

    def on_gpu(question: str, picture: Any, length: int) -> Iterator[dict[str, Answer]]:
        yield from stream(checkpoints, question, picture, length)

    if spaces is not None:  # does nothing outside ZeroGPU
        on_gpu = spaces.GPU(duration=GPU_SECONDS)(on_gpu)

    def ask(
        file: Mapping[str, Any] | None, question: str | None, length: float, visit: Visit
    ) -> Iterator[tuple[str, Any]]:
        """file: as Gradio uploads it, not opened. -> (notice, columns) again and again. What is refused is a notice."""
        try:
            yield from answer(file, question, length, visit)
        finally:
            visit.over = True

    def answer(
        file: Mapping[str, Any] | None, question: str | None, length: float, visit: Visit
    ) -> Iterator[tuple[str, Any]]:
        try:
            question = check_question(question, control_tokens)
            picture = open_picture(file.get("path") or "") if file else None
            length = check_length(length, MAX_NEW_TOKENS)
            check_fits(checkpoints, question, picture, length)
        except BadInput as refusal:
            yield markup.problem(str(refusal)), gr.skip()
            return
        answers: dict[str, Answer] = {}
        try:
            with closing(on_gpu(question, picture, length)) as growing:
                for answers in growing:
                    if visit.ended:
                        break
                    yield markup.notice(WRITING), markup.answer_columns(answers, labels)
        except Exception:
            logging.exception("A question was not answered.")
            yield markup.problem("Something broke on this side, not on yours; please ask again."), gr.skip()
            return
        if visit.ended == "clear":
            yield markup.notice(WELCOME), markup.empty_columns(labels)
        elif visit.ended:
            yield markup.notice("Stopped."), markup.answer_columns(stopped(answers), labels)
        else:
            yield markup.verdict(answers), markup.answer_columns(answers, labels)

    return ask


def build_page(
    checkpoints: Mapping[str, Checkpoint], settings: Settings, report: Report | None, pictures: Mapping[str, Path]
) -> gr.Blocks:
    """The whole page. pictures: {name: file} of the usual example pictures."""
    labels, names = markup.labels(checkpoints), markup.names(checkpoints)
    with gr.Blocks(title=f"{names['after']}: before and after", analytics_enabled=False) as page:
        gr.HTML(markup.header(checkpoints, settings.code or _own_files()), elem_id="ld-header")
        with gr.Tabs():
            with gr.Tab("Ask", id="ask"):
                _ask_tab(make_asker(checkpoints), labels, examples(settings, report, pictures))
            with gr.Tab("Benchmarks", id="benchmarks"):
                gr.HTML(markup.benchmark_table(report, names), elem_id="ld-benchmarks")
            with gr.Tab("Trade-off", id="trade-off"):
                gr.HTML(markup.trade_off(report, names), elem_id="ld-trade-off")
            with gr.Tab("How it works", id="how"):
                gr.HTML((HERE / "how_it_works.html").read_text(encoding="utf-8"), elem_id="ld-how")
                gr.HTML(markup.models_table(checkpoints), elem_id="ld-models")
    return page


def _own_files() -> str | None:
    """On the Hub, where the code of this page lies."""
    space = os.environ.get("SPACE_ID")
    return f"https://huggingface.co/spaces/{space}/tree/main" if space else None


def _ask_tab(ask: Callable[..., Any], labels: dict[str, markup.Label], samples: list[tuple[Path | None, str]]) -> None:
    with gr.Row(elem_id="ld-ask", equal_height=True):
        picture = gr.Image(
            label="Picture (optional)",
            sources=["upload", "clipboard"],
            type="filepath",
            image_mode=None,
            height=190,
            scale=2,
            min_width=200,
            buttons=[],
            elem_id="ld-picture",
        )
        with gr.Column(scale=5, min_width=280):
            question = gr.Textbox(
                label="Question",
                placeholder="Ask about the picture, or anything at all without one",
                lines=1,
                max_lines=5,
                elem_id="ld-question",
            )
            with gr.Row(elem_id="ld-buttons"):
                ask_button = gr.Button("Ask", variant="primary", elem_id="ld-ask-button", scale=3, min_width=100)
                stop_button = gr.Button("Stop", elem_id="ld-stop", scale=1, min_width=80, interactive=False)
                clear_button = gr.Button("Clear", elem_id="ld-clear", scale=1, min_width=80)
    with gr.Row(elem_id="ld-examples"):
        chips = [
            gr.Button(text, icon=str(file) if file else None, size="sm", min_width=120, elem_classes="ld-chip")
            for file, text in samples
        ]
    notice = gr.HTML(markup.notice(WELCOME), elem_id="ld-notice")
    columns = gr.HTML(markup.empty_columns(labels), elem_id="ld-columns")
    with gr.Accordion("Longest answer", open=False, elem_id="ld-settings"):
        length = gr.Slider(
            8, MAX_NEW_TOKENS, DEFAULT_LENGTH, step=8, label="Tokens", info="A token is a word or a part of one."
        )

    visit = gr.State(None)
    quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    asking = {
        "fn": ask,
        "inputs": [picture, question, length, visit],
        "outputs": [notice, columns],
        # The file as it was uploaded: `visitor.py` opens it, and says what is wrong with it in words.
        "preprocess": False,
        "concurrency_id": "models",
        "concurrency_limit": 1,  # one question at a time: two would share the same two cores
        "show_progress": "minimal",  # the place in the queue
        "show_progress_on": [notice],
        "js": SHOW_ANSWERS,
        "api_visibility": "private",
    }
    idle = {"fn": _idle, "inputs": [visit], "outputs": [stop_button], **quick}
    started = [
        gr.on([ask_button.click, question.submit], _begin, inputs=[visit], outputs=[visit, stop_button], **quick)
    ]
    for chip, (file, text) in zip(chips, samples, strict=True):
        pick = functools.partial(_pick, str(file) if file else None, text)
        started.append(chip.click(pick, inputs=[visit], outputs=[picture, question, visit, stop_button], **quick))
    for start in started:
        start.then(**asking).then(**idle)
    # Not Gradio's `cancels`: it leaves "Error" on the page, and a half-written answer that looks as if it went on.
    stop_button.click(lambda visit: visit and visit.end("stop"), inputs=[visit], **quick)

    def clear(visit: Visit | None) -> tuple[None, str, str, str]:
        if visit:
            visit.end("clear")
        return None, "", markup.notice(WELCOME), markup.empty_columns(labels)

    clear_button.click(clear, inputs=[visit], outputs=[picture, question, notice, columns], **quick)


def _begin(before: Visit | None) -> tuple[Visit, Any]:
    if before:
        before.end()
    return Visit(), gr.update(interactive=True)


def _pick(picture: str | None, question: str, before: Visit | None) -> tuple[str | None, str, Visit, Any]:
    return picture, question, *_begin(before)


def _idle(latest: Visit | None) -> Any:
    """Nothing is left to stop, unless a new question was asked while this one was answered."""
    return gr.update(interactive=latest is not None and not latest.over)


def main() -> int:
    """Load the models once, then serve the page until it is stopped."""
    try:
        settings = read_settings()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    checkpoints = load_all(settings)
    for name, checkpoint in checkpoints.items():
        print(
            f"{name}: {checkpoint.label}, {checkpoint.model.dtype} on {checkpoint.model.device}, {checkpoint.seconds:.1f} s"
        )
    with tempfile.TemporaryDirectory(prefix="lingudistill-space-") as folder:
        page = build_page(checkpoints, settings, read_report(settings.report), draw_all(Path(folder)))
        page.queue(max_size=WAITING_ROOM).launch(
            theme=THEME,
            css_paths=HERE / "style.css",
            allowed_paths=[folder, *(str(file) for file, _ in settings.examples if file)],
            max_file_size=LARGEST_FILE,
            footer_links=["gradio"],
            ssr_mode=False,  # the page is drawn by the browser alone: one process fewer on small hardware
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
