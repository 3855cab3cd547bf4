"""README and docs: their figures are those of the result files, their commands and links exist, the tutorial runs."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scripts import script
from trl import TrlParser

from hf_lingudistill import cli, exit_codes
from hf_lingudistill.config import LinguDistillConfig, OnPolicyLinguDistillConfig
from hf_lingudistill.labs.plan import Setup
from hf_lingudistill.mixtures import DistillMixtureConfig
from hf_lingudistill.options import DistillScriptArguments, StudentArguments

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *ROOT.glob("*/recipes/*/README.md"),
]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """docs/fill_readme.py, which is no module of a package."""
    return script("docs/fill_readme.py")


def test_generated_blocks_are_current(tool: ModuleType) -> None:
    names: set[str] = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found = re.findall(r"<!-- results:(\w+) -->", text)
        names |= set(found)
        assert not found or page in tool.FILLED, page
        assert tool.fill(text) == text, f"{page.name} is stale: run `make results`"
    assert {"modes", "demo_table", "demo", "step_cost", "plan_smallest"} <= names
    readme = tool.FILLED[0].read_text(encoding="utf-8")
    begin = readme.index("<!-- results:demo_table -->")
    digit = re.compile(r"\d").search(readme, begin)
    assert digit is not None
    typed = readme[: digit.start()] + "99" + readme[digit.end() :]
    assert tool.fill(typed) == readme != typed  # control: a typed figure is overwritten


def test_readme_is_read_in_minutes() -> None:
    """Rules of tables are not read."""
    words = re.findall(r"\S*\w\S*", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(words) <= 820, f"README.md has {len(words)} words: move some of them to docs/"


def missing(text: str, page: Path) -> list[str]:
    """Relative links, and paths in code, that lead nowhere."""
    links = re.findall(r"\]\(((?!https?:|#|mailto:)[^)#\s]+)", text)
    if "Not measured yet" in text:  # its plots come with its figures
        links = [link for link in links if not link.startswith("results/")]
    gone = [link for link in links if not (page.parent / link).exists()]
    named = re.findall(r"`((?:docs|benchmarks|tests|examples|model_cards|hf_lingudistill)/[\w./-]+)`", text)
    return gone + [path for path in named if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_links_to_exists(page: Path) -> None:
    assert not missing(page.read_text(encoding="utf-8"), page)
    assert missing("[x](no/such.md)", page) == ["no/such.md"]  # control


def test_the_exit_codes_are_told_as_they_are() -> None:
    assert exit_codes.__doc__ is not None
    table = [line for line in exit_codes.__doc__.splitlines() if line.startswith("|")]
    page = (ROOT / "docs/install.md").read_text(encoding="utf-8").splitlines()
    assert len(table) == 9 and set(table) <= set(page)


# --------------------------------------------------------------------------------------------------------------------
# Commands
# --------------------------------------------------------------------------------------------------------------------
def flags_of(*groups: type) -> set[str]:
    """The flags that a parser of dataclasses takes."""
    parser = TrlParser(groups, allow_abbrev=False)  # type: ignore[arg-type]
    return set(parser._option_string_actions) | {"--config"}


@cache
def flags() -> dict[str, set[str]]:
    """{subcommand of lingudistill: its flags}"""
    (commands,) = (action for action in cli._parsers()[0]._actions if isinstance(action, argparse._SubParsersAction))
    found = {name: set(parser._option_string_actions) for name, parser in commands.choices.items()}
    training = (DistillScriptArguments, LinguDistillConfig, StudentArguments, DistillMixtureConfig)
    on_policy = (DistillScriptArguments, OnPolicyLinguDistillConfig, StudentArguments, DistillMixtureConfig)
    found["distill"] = flags_of(*training) | flags_of(*on_policy) | {"--help_all"}
    found["plan"] = flags_of(cli.plan.PlanArguments, Setup)
    return found


def wrong(command: str) -> list[str]:
    """What a command of a page names and this repository does not have."""
    words = shlex.split(command, comments=True)
    while words and (re.fullmatch(r"\w+=.*", words[0]) or words[0] == "!"):
        words = words[1:]  # environment variables
    if not words:
        return []
    given = [word.split("=")[0] for word in words if word.startswith("--")]
    program = Path(words[0]).name
    if program == "lingudistill":
        known = flags()
        if words[1].startswith("--"):
            return [flag for flag in given if flag not in ("--help", "--version")]
        return [words[1]] if words[1] not in known else [flag for flag in given if flag not in known[words[1]]]
    if program == "make":
        targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        return [word for word in words[1:] if "=" not in word and word not in targets]
    if program in ("python", "accelerate"):
        scripts = [word for word in words if word.endswith(".py") and not word.startswith("llama.cpp/")]
        absent = [script for script in scripts if not (ROOT / script).is_file()]
        if scripts == ["examples/distill.py"]:
            after = words[words.index(scripts[0]) :]
            absent += [
                f for f in (w.split("=")[0] for w in after if w.startswith("--")) if f not in flags()["distill"]
            ]
        elif scripts and not absent:
            source = (ROOT / scripts[0]).read_text(encoding="utf-8")
            absent += [
                flag for flag in given if flag not in source and flag not in ("--config_file", "--num_processes")
            ]
        return absent
    return []


def commands(text: str) -> list[str]:
    """The commands of all shell blocks of a page, lines that go on joined."""
    blocks = re.findall(r"^( *)```(?:bash|console|sh)\n(.*?)^\1```", text, flags=re.MULTILINE | re.DOTALL)
    blocks += [
        (
            "",
            "\n".join(
                line[4:] for line in text.splitlines() if re.match(r"    (make|python|lingudistill|accelerate) ", line)
            ),
        )
    ]
    lines = "\n".join(block for _, block in blocks).replace("\\\n", " ").splitlines()
    inline = re.findall(r"`((?:lingudistill|make) [^`\n]+)`", text)
    return [line.strip() for line in lines] + [line for line in inline if not re.search(r"[.…]{3}|[|<]", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_exist(page: Path) -> None:
    for command in commands(page.read_text(encoding="utf-8")):
        assert not wrong(command), command


def test_a_command_that_does_not_exist_is_found() -> None:
    """Control of the test above."""
    assert wrong("lingudistill cure VLM") == ["cure"]
    assert wrong("lingudistill check VLM LM --teach x") == ["--teach"]
    assert wrong("lingudistill distill --student VLM --kv_shared full") == ["--kv_shared"]
    assert wrong("OMP_NUM_THREADS=1 lingudistill plan --student VLM --many") == ["--many"]
    assert wrong("make tea PYTHON=python3.12") == ["tea"]
    assert wrong("python docs/no_such.py") == ["docs/no_such.py"]
    assert wrong("accelerate launch --num_processes 2 examples/distill.py --datum x") == ["--datum"]
    assert not wrong("lingudistill distill --student VLM --teacher LM --use_peft --merge_adapter true")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {command.split()[1] for command in commands(text) if command.startswith("lingudistill")} >= {
        "check",
        "distill",
        "evaluate",
    }


@pytest.mark.slow
def test_the_tutorial_runs_and_tells_the_story_that_it_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cells = json.loads((ROOT / "docs/tutorial.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    original, before, after = (names["loss_on_text"](names[name]) for name in ("original", "before", "after"))
    assert before > original + 0.2, "its language was not broken"
    assert after < original + 0.25 * (before - original), "it did not come back"
    assert names["colors_right"](names["after"]) > 0.8
