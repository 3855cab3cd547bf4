"""docs/evaluate.md: its suite is read, its Python runs, and what it lists is what there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from hf_lingudistill.labs.evaluation import load_suite
from hf_lingudistill.labs.evaluation.suite import BUILT_IN

PAGE = (Path(__file__).parents[1] / "docs" / "evaluate.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_its_suites_are_read(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    (tmp_path / "mine.yaml").write_text(text)
    found = load_suite(str(tmp_path / "mine.yaml"))
    assert len(found.fidelity) == 3 and found.ifeval is not None and len(found.vision) == 2
    rows: list[Any] = re.findall(r"\| `(\S+/\S+)` \| `(.+)` \|", PAGE)
    assert len(rows) == 6
    for path, settings in rows:
        task = yaml.safe_load("{" + settings + "}")
        (tmp_path / "hub.yaml").write_text(yaml.safe_dump({"vision": [{"name": "t", "path": path, **task}]}))
        assert load_suite(str(tmp_path / "hub.yaml")).vision[0].metric == task["metric"]


def test_it_lists_the_suites_of_the_package() -> None:
    assert set(re.findall(r"^\| `(\w+)`", PAGE, flags=re.MULTILINE)) >= {file.stem for file in BUILT_IN.glob("*.yaml")}


def test_its_python_runs(saved_pair: tuple[Path, Path], tmp_path: Path) -> None:
    student, teacher = saved_pair
    code = blocks("python")[0].replace('"LM"', repr(str(teacher))).replace('"VLM"', repr(str(student)))
    names: dict[str, Any] = {}
    asks = "original_answers(original, questions)"
    assert asks in code
    exec(code.replace(asks, "original_answers(original, questions, max_new_tokens=4)"), names)
    assert set(names["found"]) == set("012345")
