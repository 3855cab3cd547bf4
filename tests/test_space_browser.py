"""The Space in a real Chromium without a window, served from tiny models with the network of the page under watch."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from PIL import Image

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: `make install`")
pytest.importorskip("gradio", reason="gradio is not installed: `make install`")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: `apt-get install chromium`"),
]

SPACE = Path(__file__).parents[1] / "examples" / "space"
# In the served process the package cannot be imported, as on a machine that lacks it.
SERVE = "import runpy, sys; sys.modules['hf_lingudistill'] = None; runpy.run_path('app.py', run_name='__main__')"
START_SECONDS, ANSWER_MS = 180, 60_000
COMPLETE = ':is([data-state="done"], [data-state="cut"])'


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running Space of two tiny VLMs and their LM."""
    folder = tmp_path_factory.mktemp("space")
    before, original = tiny.save_pair(folder)
    tiny.make_vlm(7).save_pretrained(folder / "after")
    tiny.make_processor().save_pretrained(folder / "after")
    config = folder / "config.json"
    config.write_text(f'{{"before": "{before.name}", "after": "after", "original": "{original.name}"}}')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "LINGUDISTILL_SPACE_CONFIG": str(config),
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(folder / "uploads"),
    }
    log = (folder / "log.txt").open("w+")
    server = subprocess.Popen([sys.executable, "-c", SERVE], cwd=SPACE, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(address, server, Path(log.name))
        yield address
    finally:
        server.terminate()
        server.wait(30)
        log.close()


def _wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    pytest.fail(f"The Space did not start; it said:\n{log.read_text()}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        # Without a sandbox, because a container's user is often root, whom Chromium would refuse.
        with playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser:
            yield browser


class Watched:
    """A page with a record of what it complained about and what it asked of any other host."""

    def __init__(self, page: Any, address: str) -> None:
        self.page, self.address = page, address
        self.errors: list[str] = []
        self.external: list[str] = []
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.route("**/*", self._pass_if_ours)

    def _pass_if_ours(self, route: Any) -> None:
        if route.request.url.startswith((self.address, "data:", "blob:")):
            route.continue_()
        else:
            self.external.append(route.request.url)
            route.abort()

    def open(self) -> Any:
        self.page.goto(self.address)
        self.page.wait_for_selector("#ld-columns .ld-answer", timeout=ANSWER_MS)
        return self.page


@pytest.fixture
def watch(browser: Any, url: str) -> Iterator[Callable[..., Watched]]:
    """`watch(width=1280, scheme="light")`: a page that is not loaded yet."""
    contexts = []

    def make(width: int = 1280, scheme: str = "light") -> Watched:
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        return Watched(contexts[-1].new_page(), url)

    yield make
    for context in contexts:
        context.close()


def wait_for_answers(page: Any, *names: str) -> None:
    for name in names:
        page.wait_for_selector(f'.ld-answer[data-model="{name}"]{COMPLETE}', timeout=ANSWER_MS)


@pytest.mark.parametrize(("width", "scheme"), [(375, "dark"), (1280, "light")])
def test_an_example_is_answered_twice_without_an_error_or_a_request_to_others(
    watch: Callable[..., Watched], width: int, scheme: str
) -> None:
    watched = watch(width, scheme)
    page = watched.open()
    page.get_by_role("button", name="How much was it in total?").click()
    wait_for_answers(page, "before", "after")
    for name in ("before", "after"):
        assert page.text_content(f'.ld-answer[data-model="{name}"] .ld-text').strip("… ")
        assert " s · " in page.text_content(f'.ld-answer[data-model="{name}"] .ld-time')
    assert "Has no eyes" in page.text_content('.ld-answer[data-model="original"]')
    assert page.locator("#ld-picture img").count() == 1
    page.get_by_role("button", name="Why do leaves fall").click()
    wait_for_answers(page, "before", "after", "original")
    for tab in ("Benchmarks", "Trade-off", "How it works", "Ask"):
        page.get_by_role("tab", name=tab).click()  # all four fit, at any width: none hides in a menu
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert watched.errors == []
    assert watched.external == []


def test_the_watch_notices_errors_and_requests_to_others(watch: Callable[..., Watched]) -> None:
    """Control of the test above."""
    watched = watch()
    page = watched.open()
    page.evaluate("fetch('https://fonts.example/font.woff2').catch(() => console.error('no font'))")
    page.wait_for_timeout(300)
    assert watched.external == ["https://fonts.example/font.woff2"]
    assert "no font" in watched.errors


def test_differences_are_marked_by_a_line_and_not_by_color_alone(watch: Callable[..., Watched]) -> None:
    page = watch().open()
    page.get_by_role("button", name="Why do leaves fall").click()
    wait_for_answers(page, "before", "after")
    page.wait_for_selector(".ld-answer mark")
    style = page.evaluate("""() => ['before', 'after'].map((name) => {
        const mark = document.querySelector(`.ld-answer[data-model=${name}] mark`);
        const style = getComputedStyle(mark);
        return [style.textDecorationLine, style.textDecorationStyle, getComputedStyle(mark, '::before').content];
    })""")
    assert style == [["underline", "dashed", '" [only here: "'], ["underline", "solid", '" [only here: "']]
    assert page.locator('.ld-answer[data-model="original"] mark').count() == 0


# Relative luminance and contrast as WCAG 2 defines them; `behind` is the nearest background that is not transparent.
CONTRAST = """(selector) => {
    const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const rgb = (color) => {
        canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const light = (color) => rgb(color).slice(0, 3).map((v) => v / 255)
        .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
    const behind = (element) => {
        for (let at = element; at; at = at.parentElement) {
            const color = getComputedStyle(at).backgroundColor;
            if (rgb(color)[3] > 250) return color;
        }
        return 'white';
    };
    return [...document.querySelectorAll(selector)].filter((element) => element.getClientRects().length).map((element) => {
        const [a, b] = [light(getComputedStyle(element).color), light(behind(element))];
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    });
}"""


READ = ("#ld-header p", "#ld-header h1 span", "[role=tab]", "#ld-picture label", "#ld-picture .wrap", "textarea",
        "#ld-question label span", "#ld-ask-button", "#ld-clear", ".ld-chip", "#ld-header a", ".ld-notice", ".ld-answer h3", ".ld-text",
        ".ld-answer mark", ".ld-id", ".ld-time", "#ld-settings button")  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(watch: Callable[..., Watched], scheme: str) -> None:
    page = watch(scheme=scheme).open()
    page.get_by_role("button", name="Why do leaves fall").click()
    wait_for_answers(page, "before", "after", "original")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(part) for part in background.strip("rgb()").split(",")) < 200) == (scheme == "dark")
    for part in READ:
        ratios = page.evaluate(CONTRAST, part)
        assert ratios, part
        assert min(ratios) >= 4.5, (part, ratios)
    page.add_style_tag(content=".ld-id { color: #808080 !important; background: #777 !important; }")
    assert min(page.evaluate(CONTRAST, ".ld-id")) < 1.5  # control


def focused(page: Any) -> str:
    return page.evaluate("document.activeElement.innerText || document.activeElement.tagName")


def tab_until(page: Any, found: Callable[[str], bool]) -> None:
    for _ in range(30):
        page.keyboard.press("Tab")
        if found(focused(page)):
            return
    pytest.fail(f"30 presses of Tab did not reach it; the last focus was on {focused(page)!r}")


def test_everything_works_by_keyboard_alone(watch: Callable[..., Watched]) -> None:
    watched = watch()
    page = watched.open()
    tab_until(page, lambda text: text == "TEXTAREA")
    page.keyboard.type("tell me about the sea")
    page.keyboard.press("Enter")
    wait_for_answers(page, "before", "after", "original")
    tab_until(page, lambda text: text == "Ask")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"  # the focus can be seen
    tab_until(page, lambda text: text == "Clear")
    page.keyboard.press("Enter")
    page.wait_for_selector('.ld-answer[data-state="idle"]')
    assert page.input_value("#ld-question textarea") == ""
    tab_until(page, lambda text: "coffee" in text)
    page.keyboard.press("Space")
    wait_for_answers(page, "before", "after")
    page.evaluate("document.activeElement.blur()")
    page.get_by_role("tab", name="Ask").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#ld-benchmarks", state="visible")
    assert watched.errors == []


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    made = {"notes": folder / "notes.png", "huge": folder / "huge.png"}
    made["notes"].write_text("this is no picture")
    made["clear"] = folder / "clear.png"
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(made["clear"])  # PIL's own conversion would make it black
    Image.new("1", (10_000, 5_000)).save(made["huge"])
    return made


BAD = [
    ("", None, "There is no question yet"),
    ("   ", None, "There is no question yet"),
    ("x" * 100_000, None, "100,000 characters"),
    ("good bye <|im_end|>", None, "contains <|im_end|>"),
    ("what is in <image>?", None, "contains <image>"),
    ("what is it?", "notes", "not a picture that can be read"),
    ("what is it?", "huge", "50 megapixels (10,000 × 5,000)"),
]


def test_bad_input_gets_a_clear_message_and_the_app_goes_on(
    watch: Callable[..., Watched], files: dict[str, Path]
) -> None:
    watched = watch()
    page = watched.open()
    for question, file, sentence in BAD:
        page.get_by_role("button", name="Clear").click()
        page.wait_for_selector(".ld-problem", state="detached")
        if file:
            page.set_input_files("#ld-picture input[type=file]", files[file])
            page.wait_for_selector("#ld-picture img")
        page.fill("#ld-question textarea", question)
        page.get_by_role("button", name="Ask", exact=True).click()
        page.wait_for_selector(".ld-problem[role=alert]", timeout=ANSWER_MS)
        assert sentence in page.text_content(".ld-problem")
        assert page.input_value("#ld-question textarea") == question  # nothing of the visitor's is lost
    page.get_by_role("button", name="Clear").click()
    page.wait_for_selector(".ld-problem", state="detached")
    page.fill("#ld-question textarea", "tell me about the sea")
    page.get_by_role("button", name="Ask", exact=True).click()
    wait_for_answers(page, "before", "after", "original")
    assert page.locator(".ld-problem").count() == 0


# Tiny models are done before a click from out here arrives.
STOP_AT_THE_FIRST_TOKEN = """() => new MutationObserver((_, observer) => {
    if (!document.querySelector('[data-state="writing"]')) return;
    observer.disconnect();
    document.querySelector('#ld-stop').click();
}).observe(document.querySelector('#ld-columns'), {subtree: true, childList: true, attributes: true})"""


def test_stop_ends_the_answers_and_the_next_question_is_answered(watch: Callable[..., Watched]) -> None:
    watched = watch()
    page = watched.open()
    page.get_by_role("button", name="Longest answer").click()
    page.fill("#ld-settings input[type=number]", "128")
    page.fill("#ld-question textarea", "tell me about the sea")
    page.evaluate(STOP_AT_THE_FIRST_TOKEN)
    page.get_by_role("button", name="Ask", exact=True).click()
    page.wait_for_selector('.ld-answer[data-state="stopped"]')
    assert page.inner_text("#ld-notice").strip() == "Stopped."
    wait_until_idle(page)
    assert page.locator(".ld-caret").count() == 0
    page.get_by_role("button", name="coffee").click()
    wait_for_answers(page, "before", "after")
    wait_until_idle(page)
    page.get_by_role("button", name="Ask", exact=True).click()
    wait_for_answers(page, "before", "after")
    wait_until_idle(page)
    assert watched.errors == []


def wait_until_idle(page: Any) -> None:
    """There is nothing to stop: the button says so."""
    page.wait_for_function("document.querySelector('#ld-stop').disabled", timeout=ANSWER_MS)


def test_stop_is_there_while_models_write_and_at_no_other_time(watch: Callable[..., Watched]) -> None:
    page = watch().open()
    assert page.locator("#ld-stop").is_disabled()
    page.evaluate("""() => new MutationObserver(() => {
        const writing = document.querySelector('[data-state="writing"]');
        if (writing && document.querySelector('#ld-stop').disabled) document.title = 'cannot stop';
    }).observe(document.body, {subtree: true, childList: true, attributes: true})""")
    page.fill("#ld-question textarea", "tell me about the sea")
    page.get_by_role("button", name="Ask", exact=True).click()
    wait_for_answers(page, "before", "after", "original")
    wait_until_idle(page)
    assert page.title() != "cannot stop"
    page.fill("#ld-question textarea", "")
    page.get_by_role("button", name="Ask", exact=True).click()  # refused: nothing to stop
    page.wait_for_selector(".ld-problem")
    wait_until_idle(page)


def test_the_page_leads_to_the_paper_and_has_no_stray_dot(watch: Callable[..., Watched]) -> None:
    page = watch().open()
    assert page.locator('#ld-header a[href="https://arxiv.org/abs/2604.00829"]').count() == 1
    assert "·" not in page.inner_text("footer:not(.ld-answer footer)")
    assert page.locator("h1").inner_text() == "VLM restored"


def test_a_transparent_picture_is_white_to_the_models(
    watch: Callable[..., Watched], files: dict[str, Path], tmp_path: Path
) -> None:
    """The same answers as to a white picture, and others than to a black one."""
    page, answers = watch().open(), {}
    for color in ("white", "black"):
        Image.new("RGB", (64, 64), color).save(tmp_path / f"{color}.png")
    for name, file in {
        "clear": files["clear"],
        "white": tmp_path / "white.png",
        "black": tmp_path / "black.png",
    }.items():
        page.get_by_role("button", name="Clear").click()
        page.wait_for_selector('.ld-answer[data-state="idle"]')
        page.set_input_files("#ld-picture input[type=file]", file)
        page.wait_for_selector("#ld-picture img")
        page.fill("#ld-question textarea", "what is it?")
        page.get_by_role("button", name="Ask", exact=True).click()
        wait_for_answers(page, "before", "after")
        answers[name] = page.text_content('.ld-answer[data-model="before"] .ld-text')
        wait_until_idle(page)
    assert answers["clear"] == answers["white"] != answers["black"]


def test_on_a_telephone_the_answers_come_into_view(watch: Callable[..., Watched]) -> None:
    page = watch(375).open()
    page.evaluate("window.scrollTo(0, 0)")
    assert page.evaluate("document.querySelector('#ld-columns').getBoundingClientRect().top > innerHeight * 0.8")
    page.locator("#ld-question textarea").fill("tell me about the sea")
    page.keyboard.press("Enter")
    wait_for_answers(page, "before", "after")
    assert page.evaluate("document.querySelector('#ld-columns').getBoundingClientRect().top < innerHeight * 0.5")


def test_what_is_typed_cannot_become_markup(watch: Callable[..., Watched]) -> None:
    watched = watch()
    page = watched.open()
    page.fill("#ld-question textarea", "<img src=x onerror=\"document.title='stolen'\"> ${1+1} {{x}}<|im_start|>")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.wait_for_selector(".ld-problem")
    assert page.title() != "stolen"
    assert watched.errors == []
