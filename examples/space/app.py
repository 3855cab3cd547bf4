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
from checkpoints import Checkpoint, load_all, read_settings
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

PICTURE_EXAMPLES = (
    ("red circle", "what color is the shape?"),
    ("blue triangle", "what shape is in the image?"),
)
TEXT_EXAMPLES = ("Tell me about the history of Scotland.", "Tell me about a river.")

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


def examples(report: Report | None) -> list[tuple[str | None, str]]:
    """[(picture's name or None, question)]: pictures first, then the report's own prompts, where it has some."""
    texts = (report.prompts if report else None) or TEXT_EXAMPLES
    # The longest first: a demo's first prompt is one that it happens to answer in a word.
    return [*PICTURE_EXAMPLES, *((None, text) for text in sorted(texts, key=len, reverse=True)[:2])]


@dataclass
class Visit:
    """One question under way. ended: which button the visitor pressed meanwhile; a new question ends the one before."""

    ended: Literal["", "stop", "clear"] = ""

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
    checkpoints: Mapping[str, Checkpoint], report: Report | None, pictures: Mapping[str, Path]
) -> gr.Blocks:
    """The whole page. pictures: {name: file} of the example pictures."""
    labels = markup.labels(checkpoints)
    with gr.Blocks(title="Before and after LinguDistill", analytics_enabled=False) as page:
        gr.HTML(markup.HEADER, elem_id="ld-header")
        with gr.Tabs():
            with gr.Tab("Ask", id="ask"):
                _ask_tab(make_asker(checkpoints), labels, examples(report), pictures)
            with gr.Tab("Benchmarks", id="benchmarks"):
                gr.HTML(markup.benchmark_table(report), elem_id="ld-benchmarks")
            with gr.Tab("Trade-off", id="trade-off"):
                gr.HTML(markup.trade_off(report), elem_id="ld-trade-off")
            with gr.Tab("How it works", id="how"):
                gr.HTML((HERE / "how_it_works.html").read_text(encoding="utf-8"), elem_id="ld-how")
                gr.HTML(markup.models_table(checkpoints), elem_id="ld-models")
    return page


def _ask_tab(
    ask: Callable[..., Any],
    labels: dict[str, str],
    samples: list[tuple[str | None, str]],
    pictures: Mapping[str, Path],
) -> None:
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
                stop_button = gr.Button("Stop", elem_id="ld-stop", scale=1, min_width=80)
                clear_button = gr.Button("Clear", elem_id="ld-clear", scale=1, min_width=80)
    with gr.Row(elem_id="ld-examples"):
        chips = [
            gr.Button(
                text, icon=str(pictures[name]) if name else None, size="sm", min_width=120, elem_classes="ld-chip"
            )
            for name, text in samples
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
    gr.on([ask_button.click, question.submit], _begin, inputs=[visit], outputs=[visit], **quick).then(**asking)
    for chip, (name, text) in zip(chips, samples, strict=True):
        pick = functools.partial(_pick, str(pictures[name]) if name else None, text)
        chip.click(pick, inputs=[visit], outputs=[picture, question, visit], **quick).then(**asking)
    # Not Gradio's `cancels`: it leaves "Error" on the page, and a half-written answer that looks as if it went on.
    stop_button.click(lambda visit: visit and visit.end("stop"), inputs=[visit], **quick)

    def clear(visit: Visit | None) -> tuple[None, str, str, str]:
        if visit:
            visit.end("clear")
        return None, "", markup.notice(WELCOME), markup.empty_columns(labels)

    clear_button.click(clear, inputs=[visit], outputs=[picture, question, notice, columns], **quick)


def _begin(before: Visit | None) -> Visit:
    if before:
        before.end()
    return Visit()


def _pick(picture: str | None, question: str, before: Visit | None) -> tuple[str | None, str, Visit]:
    return picture, question, _begin(before)


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
        page = build_page(checkpoints, read_report(settings.report), draw_all(Path(folder)))
        page.queue(max_size=WAITING_ROOM).launch(
            theme=THEME,
            css_paths=HERE / "style.css",
            allowed_paths=[folder],
            max_file_size=LARGEST_FILE,
            footer_links=["gradio"],
            ssr_mode=False,  # the page is drawn by the browser alone: one process fewer on small hardware
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
