"""Photograph the Space for the README: `make screenshots`, or `python docs/figures/shoot_space.py [--folder OUT]` (a minute, CPU).

The folder is that of a finished demo: `original`, `before`, `after` and `report.json`. The Space is started on it, asked in a
Chromium without a window, and photographed at two widths. Needs the extras `space` and `dev`, and an installed Chromium.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).parents[2]
START_SECONDS, ANSWER_MS = 300, 300_000
COMPLETE = ':is([data-state="done"], [data-state="cut"])'


@dataclass(frozen=True)
class Shot:
    """name: of the file. width, height: of the window, in CSS pixels. scheme: "light" or "dark". ask: of the example clicked, as a
    CSS selector of which the first is meant."""

    name: str
    width: int
    height: int
    scheme: str
    ask: str


@contextmanager
def space(folder: Path) -> Iterator[str]:
    """The Space on a demo's checkpoints, at a free port. -> its address"""
    with tempfile.TemporaryDirectory() as scratch, socket.socket() as free:
        config = Path(scratch) / "config.json"
        names = {name: str((folder / name).resolve()) for name in ("before", "after", "original")}
        config.write_text(json.dumps({**names, "report": str((folder / "report.json").resolve())}))
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        server = subprocess.Popen(
            [sys.executable, str(ROOT / "examples/space/app.py")],
            env=os.environ
            | {
                "LINGUDISTILL_SPACE_CONFIG": str(config),
                "GRADIO_SERVER_NAME": "127.0.0.1",
                "GRADIO_SERVER_PORT": str(port),
                "GRADIO_TEMP_DIR": scratch,
            },
        )
        try:
            yield _awaited(f"http://127.0.0.1:{port}", server)
        finally:
            server.terminate()
            server.wait()


def _awaited(address: str, server: subprocess.Popen[bytes]) -> str:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return address
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise RuntimeError("The Space did not start; what it printed above says why.")


def shoot(browser: Browser, address: str, shot: Shot, out: Path) -> Path:
    """Click an example, wait for both answers, photograph the whole page at twice the resolution."""
    context = browser.new_context(
        viewport={"width": shot.width, "height": shot.height}, color_scheme=shot.scheme, device_scale_factor=2
    )
    page = context.new_page()
    page.goto(address)
    page.locator(shot.ask).first.click(timeout=ANSWER_MS)
    for name in ("before", "after"):
        page.wait_for_selector(f'.ld-answer[data-model="{name}"]{COMPLETE}', timeout=ANSWER_MS)
    page.wait_for_function("!document.querySelector('[data-state=writing], [data-state=waiting]')", timeout=ANSWER_MS)
    page.wait_for_function("document.querySelector('#ld-stop').disabled", timeout=ANSWER_MS)  # as a visitor reads it
    page.mouse.move(0, 0)
    page.wait_for_timeout(1000)  # transitions and the picture
    path = out / f"{shot.name}.png"
    page.screenshot(path=path, full_page=True)
    context.close()
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs/demo")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        parser.error("No Chromium was found on the PATH; install one (`apt-get install chromium`).")
    shots = (
        Shot("space_text", 1280, 900, "light", ".ld-chip:not(:has(img))"),
        Shot("space_picture", 375, 812, "dark", ".ld-chip:has(img)"),
    )
    with space(arguments.folder) as address, sync_playwright() as playwright:
        # Without a sandbox, because a container's user is often root, whom Chromium would refuse.
        with playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"]) as browser:
            for shot in shots:
                print(shoot(browser, address, shot, arguments.out))


if __name__ == "__main__":
    main()
