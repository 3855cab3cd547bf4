"""`lingudistill blend`: the weights between two VLMs, what they are held to, and what is saved."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_lingudistill.cli import main
from hf_lingudistill.folders import record
from hf_lingudistill.hub.card import render_card
from hf_lingudistill.hub.run_facts import SCHEMA, read_run_facts, write_run_facts
from hf_lingudistill.labs.blend import Blend, NotBlendable, blend, parse_condition, run
from hf_lingudistill.labs.blend.report import FILES
from hf_lingudistill.labs.blend.run import _front
from hf_lingudistill.labs.blend.weights import blend_into, drift_of, group_of
from hf_lingudistill.labs.diagnose.weights import weight_drift

SUITE = """
name: small
resamples: 50
fidelity:
  - {name: instructions, builtin: instructions, n: 3, max_new_tokens: 6}
vision:
  - {name: colors, builtin: drawn_colors, n: 4, max_new_tokens: 2, controls: []}
"""


def moved(model: Any, amount: float, seed: int) -> Any:
    """The model with noise on every weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(amount * weight.std().nan_to_num() * torch.randn(weight.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The VLM before has drifted from its LM; the one after is halfway back, and a record says how it was trained."""
    folder = tmp_path_factory.mktemp("blend")
    lm, before = tiny.make_lm(1), tiny.make_vlm(0)
    with torch.no_grad():
        theirs = dict(lm.model.named_parameters())
        for name, weight in before.get_decoder().named_parameters():
            weight[: len(theirs[name])].copy_(theirs[name])
    after = tiny.make_vlm(0)
    after.load_state_dict(before.state_dict())
    moved(before.get_decoder().layers[1], 0.5, 0)
    moved(after.get_decoder().layers[0], 0.1, 1)
    for name, vlm in (("before", before), ("after", after)):
        vlm.save_pretrained(folder / name)
        tiny.make_processor().save_pretrained(folder / name)
    facts = {"schema": SCHEMA, "student": {"id": None, "name": "before"}, "teacher": {"id": None, "name": "lm"}}
    write_run_facts({**facts, "training": {"steps": 7}, "settings": {"seed": 0}}, folder / "after")
    lm.save_pretrained(folder / "lm")
    tiny.make_tokenizer(extra=False).save_pretrained(folder / "lm")
    (folder / "suite.yaml").write_text(SUITE)
    return {name: str(folder / name) for name in ("before", "after", "lm", "suite.yaml")}


def loaded(path: str) -> Any:
    return AutoModelForImageTextToText.from_pretrained(path)


# --------------------------------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shares", ["uniform", "drift"])
def test_the_ends_are_the_two_models_and_the_middle_lies_between(models: dict[str, str], shares: str) -> None:
    drift = (("0", 0.1), ("1", 0.3)) if shares == "drift" else ()
    before, after = (dict(loaded(models[name]).named_parameters()) for name in ("before", "after"))
    for weight, expected in ((0.0, before), (1.0, after)):
        model = loaded(models["before"])
        blend_into(model, models["after"], Blend(weight, shares, drift))
        assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
    model = loaded(models["before"])
    blend_into(model, models["after"], Blend(0.25, shares, drift))
    changed = 0
    for name, weight in model.named_parameters():
        share = 0.25
        if shares == "drift" and ".layers." in name and "text_model" in name:
            share = 0.25 ** (0.2 / (0.1 if ".layers.0." in name else 0.3))
        expected = (1 - share) * before[name].double() + share * after[name].double()
        torch.testing.assert_close(weight.double(), expected, atol=1e-6, rtol=0)
        changed += not torch.equal(weight, before[name])
    assert changed  # control: the two models differ
    # The head is tied: moved once, not twice
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_shares_follow_what_diagnose_measures(models: dict[str, str]) -> None:
    before = loaded(models["before"])
    found = weight_drift(before, tiny.make_lm(1), len(tiny.make_tokenizer(extra=False)))
    drift = drift_of({"layers": found.layers, "outside": found.outside})
    point = Blend(0.5, "drift", drift)
    assert (
        point.share("0") == 0.0 and point.share("1") > 0.5
    )  # the first layer is the original's, the second has moved
    assert point.share("embeddings") == 0.0 and point.share("outside") == 0.5
    assert Blend(0.5, "drift", (("0", 0.0), ("1", 0.0))).share("0") == 0.5  # nothing has moved: as uniform
    shares = [Blend(weight / 10, "drift", (("0", 0.1), ("1", 0.3))).share("1") for weight in range(11)]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1
    names = {group_of(name, "model.text_model.") for name, _ in before.named_parameters()}
    assert names == {"0", "1", "embeddings", "final norm", "outside"}
    with pytest.raises(NotBlendable, match="Not every layer"):
        drift_of({"layers": [{}], "outside": {}})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": 3}, "missing before, .* Expected two VLMs of one build"),
        ({"hidden_size": 48}, r"\(32,? ?.*before, .* Expected two VLMs of one build"),
        ({"tie_word_embeddings": False}, "The head of before is tied to its embeddings, the other's is not"),
    ],
)
def test_models_of_other_builds_are_refused_before_any_is_loaded(
    change: dict[str, Any], said: str, models: dict[str, str], tmp_path: Path
) -> None:
    tiny.make_vlm(0, **change).save_pretrained(tmp_path / "other")
    tiny.make_processor().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=said):
        blend(models["before"], str(tmp_path / "other"), "quick", "vision >= before", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_refused(models: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a LoRA adapter alone. Merge it"):
        blend(models["before"], str(tmp_path / "adapter"), "quick", "vision >= before", tmp_path / "out")


# --------------------------------------------------------------------------------------------------------------------
# The condition
# --------------------------------------------------------------------------------------------------------------------
TASKS = [
    {
        "name": "vision/colors",
        "group": "vision",
        "metric": "exact_match",
        "higher_is_better": True,
        "differences": [],
        "scores": {
            name: {"value": value, "low": value - 0.1, "high": value + 0.1}
            for name, value in (("before", 0.8), ("after", 0.6), ("a", 0.79), ("b", 0.7))
        },
    },
    {
        "name": "fidelity/instructions/text_kl",
        "group": "language",
        "metric": "text_kl",
        "higher_is_better": False,
        "differences": [],
        "scores": {
            name: {"value": value, "low": value - 0.1, "high": value + 0.1}
            for name, value in (("original", 0.0), ("before", 3.0), ("after", 0.5), ("a", 2.0), ("b", 1.0))
        },
    },
]


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("vision >= before - 0.01", {"before", "a"}),
        ("vision>=before-0.1", {"before", "a", "b"}),
        ("vision >= before", {"before"}),
        ("vision >= before - 1e-2", {"before", "a"}),
        ("vision>=before-1.5E-1 and vision <= 8e-1", {"before", "a", "b"}),
        ("vision/colors >= 0.75", {"before", "a"}),
        ("vision >= after + .05 and fidelity/instructions/text_kl <= 1.5", {"b"}),
        ("fidelity/instructions/text_kl <= original + 1", {"after", "b"}),
    ],
)
def test_a_condition_holds_for_whom_it_says(text: str, holds: set[str]) -> None:
    condition = parse_condition(text)
    assert {name for name in ("before", "after", "a", "b") if condition.holds(TASKS, name)} == holds
    assert parse_condition(str(condition)) == condition


def test_what_is_kept_surely_is_kept_at_the_worse_end_of_the_paired_interval() -> None:
    pairs = [{"of": name, "minus": "before", "low": low, "high": 0.1} for name, low in (("a", -0.005), ("b", -0.3))]
    tasks: list[dict[str, Any]] = [{**TASKS[0], "differences": pairs}, TASKS[1]]

    def surely(text: str, name: str) -> bool | None:
        return parse_condition(text).holds_surely(tasks, name)

    # The scores' own intervals, 0.1 to either side, would have refused both
    assert surely("vision >= before - 0.01", "a") is True and surely("vision >= before - 0.01", "b") is False
    assert surely("vision >= 0.69", "a") is True and surely("vision >= 0.7", "a") is False
    assert surely("fidelity/instructions/text_kl <= 2.1", "a") is True
    assert surely("fidelity/instructions/text_kl <= 2.05", "a") is False
    assert surely("vision >= before", "before") is True and surely("vision >= before + 0.1", "before") is False
    # Not compared in the report, and of several tasks
    assert surely("vision >= after", "a") is None
    assert surely("vision >= after and vision >= before - 0.01", "b") is False
    tasks.append({**tasks[0], "name": "vision/shapes"})
    assert surely("vision >= before - 0.01", "a") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "vision",
        "vision > before",
        "vision >= base",
        "vision >= before * 2",
        "vision >= before - ",
        "vision >= before - e-2",
        "vision >= before - 1e",
        "vision >= 0.1 or 1 <= 2",
    ],
)
def test_a_condition_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not understood; expected SCORE >= MODEL - NUMBER"):
        parse_condition(text)


def test_scores_that_cannot_be_compared_are_refused() -> None:
    mixed = [*TASKS, {**TASKS[1], "name": "bits_per_byte/news/plain", "metric": "bits_per_byte"}]
    with pytest.raises(ValueError, match=r"The group 'language' holds several metrics"):
        parse_condition("language <= before").holds(mixed, "a")
    with pytest.raises(ValueError, match=r"has neither a task nor a group 'sight'"):
        parse_condition("sight >= 1").holds(TASKS, "a")
    with pytest.raises(ValueError, match=r"has no score of 'original'"):
        parse_condition("vision >= original").holds(TASKS, "a")


@pytest.mark.parametrize(
    ("keep", "chosen", "reason"),
    [
        ("vision >= before - 0.01", "a", None),
        ("vision >= before - 0.15", "b", None),
        ("vision >= 0.1", "after", None),
        ("vision >= before + 0.1", None, "no weight meets"),
    ],
)
def test_most_language_among_those_that_keep(keep: str, chosen: str | None, reason: str | None) -> None:
    class Point:
        def __init__(self, name: str, weight: float) -> None:
            self.name, self.weight, self.shares = name, weight, "uniform"

    points: Any = [Point("a", 0.3), Point("b", 0.6)]
    front = _front({"tasks": TASKS}, points, parse_condition(keep), "fidelity/instructions/text_kl")
    assert front["chosen"] == chosen and (front["reason"] is None if reason is None else reason in front["reason"])
    worse = [TASKS[0], {**TASKS[1], "scores": {**TASKS[1]["scores"], "before": {"value": 0.1, "low": 0, "high": 1}}}]
    front = _front({"tasks": worse}, points, parse_condition(keep), "fidelity/instructions/text_kl")
    assert front["chosen"] is None  # the VLM before already has more language


# --------------------------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------------------------
def words_of(models: dict[str, str], out: Path, keep: str, *more: str) -> list[str]:
    words = ["blend", "--before", models["before"], "--after", models["after"], "--suite", models["suite.yaml"]]
    return [*words, "--keep", keep, "--output_dir", str(out), "--original", models["lm"], *more]


def test_the_command_saves_what_keeps_and_goes_on(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_of(models, tmp_path / "out", "vision >= 0", "--weights", "0.5")
    assert main(words) == 0
    front = json.loads((tmp_path / "out/blend.json").read_text())
    names = {point["name"] for point in front["points"]}
    assert (
        names == {"before", "after", "uniform-0.5", "drift-0.5"} and front["most"] == "fidelity/instructions/text_kl"
    )
    values = {point["name"]: point["scores"][front["most"]]["value"] for point in front["points"]}
    assert front["chosen"] == min(names - {"before"}, key=values.__getitem__)
    assert all(math.isfinite(value) for value in values.values()) and values["uniform-0.5"] != values["drift-0.5"]
    assert all((tmp_path / "out" / name).exists() for name in FILES)
    assert "<- saved" in capsys.readouterr().out and "|---|---" in (tmp_path / "out/blend.md").read_text()
    # What is saved loads with plain transformers, and is the blend that was chosen
    model = loaded(str(tmp_path / "out/model"))
    AutoProcessor.from_pretrained(tmp_path / "out/model")
    point = next(p for p in front["points"] if p["name"] == front["chosen"])
    drift = weight_drift(loaded(models["before"]), tiny.make_lm(1), len(tiny.make_tokenizer(extra=False)))
    shares = drift_of({"layers": drift.layers, "outside": drift.outside}) if point["shares"] == "drift" else ()
    expected = loaded(models["before"])
    blend_into(expected, models["after"], Blend(point["weight"], point["shares"], shares))
    for (name, weight), (_, saved) in zip(expected.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(saved, weight, atol=1e-6, rtol=0, msg=name)
    # The record is that of the model after, and says that this is a blend; so does the card
    facts = read_run_facts(tmp_path / "out/model")
    assert facts["training"]["steps"] == 7 and facts["blend"]["weight"] == point["weight"]
    assert facts["blend"]["before"]["name"] == "before" and facts["blend"]["keep"] == "vision >= 0"
    card = render_card(facts, {}).content
    assert f"Its weights are a blend: {point['weight']:g} of" in card and "A blend: its weight was chosen" in card
    assert "blend" not in render_card({**facts, "blend": None}, {}).content
    card = render_card({**facts, "recipe": {"dataset_name": "rows"}}, {}).content
    command = "lingudistill blend --before before --original lm --after OUT --suite small --keep 'vision >= 0' --output_dir BLEND"
    assert f"{command} --weights 0.5 --shares {point['shares']}" in card
    # A rerun reads the cache, and replaces what it wrote itself
    cache = sorted((tmp_path / "out/evaluation/items").rglob("*.jsonl"))
    before = [path.read_text() for path in cache]
    assert main(words) == 0 and [path.read_text() for path in cache] == before
    (tmp_path / "out/model/config.json").write_text("mine")
    capsys.readouterr()
    assert main(words) == 2 and "is in the way" in capsys.readouterr().err


def test_code_that_comes_with_the_models_is_allowed_wherever_their_configs_are_read(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, reached = run.read_config, RuntimeError("the evaluation")

    def strict(name: str, path: str, *, trust_remote_code: bool = False) -> Any:
        assert trust_remote_code, name
        return read(name, path, trust_remote_code=trust_remote_code)

    def evaluation(*args: Any, **kwargs: Any) -> Any:
        raise reached

    monkeypatch.setattr(run, "read_config", strict)
    monkeypatch.setattr(run, "evaluate_models", evaluation)
    words = (models["before"], models["after"], models["suite.yaml"], "vision >= 0", tmp_path / "out")
    with pytest.raises(RuntimeError, match="^the evaluation$"):
        run.blend(*words, weights=(0.5,), trust_remote_code=True)
    with pytest.raises(AssertionError):  # control
        run.blend(*words, weights=(0.5,))


def test_none_keeps(models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = words_of(models, tmp_path / "out", "vision >= 2", "--weights", "0.5", "--shares", "uniform")
    assert main(words) == 1
    assert "Nothing was saved: no weight meets vision >= 2." in capsys.readouterr().out
    assert not (tmp_path / "out/model").exists() and (tmp_path / "out/front.png").is_file()


def test_a_model_that_an_earlier_run_chose_stays_where_none_is_chosen(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model is hours of work, and a condition is typed in a second. Control: where one is chosen, it is replaced."""
    out = tmp_path / "out"
    some = ("--weights", "0.5", "--shares", "uniform")
    assert main(words_of(models, out, "vision >= 0", *some)) == 0
    saved = {path: path.read_bytes() for path in sorted((out / "model").rglob("*")) if path.is_file()}
    assert saved and "stays" not in capsys.readouterr().out
    assert main(words_of(models, out, "vision >= 2", *some)) == 1
    assert f"{out / 'model'} is of an earlier run, and stays." in capsys.readouterr().out
    assert {path: path.read_bytes() for path in sorted((out / "model").rglob("*")) if path.is_file()} == saved
    assert json.loads((out / "blend.json").read_text())["chosen"] is None
    assert main(words_of(models, out, "vision >= -1", *some)) == 0
    assert read_run_facts(out / "model")["blend"]["keep"] == "vision >= -1"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--keep", "vision > 1"], "is not understood"),
        (["--keep", "sight >= 1"], "'sight' is no score of the suite 'small'"),
        (["--most", "bits_per_byte/news"], "'bits_per_byte/news' is no score of the suite"),
        (["--weights", "0", "0.5"], "--weights must lie between 0 (before) and 1 (after)"),
        (["--shares", "half"], "--shares must be some of uniform, drift; got 'half'"),
        (["--after", "{lm}"], "after: '{lm}' is a language model that takes no images"),
        (["--batch_size", "0"], "--batch_size must be at least 1"),
    ],
)
def test_bad_input_is_one_sentence(
    more: list[str], said: str, models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_of(models, tmp_path / "out", "vision >= before", *(word.format(**models) for word in more))
    assert main(words) == 2
    err = capsys.readouterr().err
    assert said.format(**models) in err and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("keep", "most", "said"),
    [
        ("language <= before", None, "The group 'language' holds several metrics"),
        ("vision >= before", "language", "The group 'language' holds several metrics"),
        ("vision >= original", None, "has no score of 'original'"),
    ],
)
def test_what_the_two_models_tell_is_told_before_a_blend_is_made(
    models: dict[str, str],
    tmp_path: Path,
    keep: str,
    most: str | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hours of scoring hang on it. Control: a condition that the two meet is read, and a blend is made."""
    made: list[str] = []

    def make(*args: Any, **kwargs: Any) -> None:
        made.append("one")
        raise RuntimeError("made")

    monkeypatch.setattr(run, "blend_into", make)
    args = (models["before"], models["after"], models["suite.yaml"])
    options: dict[str, Any] = {"original": models["lm"], "weights": [0.5], "progress": False}
    with pytest.raises(ValueError, match=said):
        blend(*args, keep, tmp_path / "out", most=most, **options)
    assert not made and not (tmp_path / "out" / "blend.json").exists()
    with pytest.raises(RuntimeError, match="made"):
        blend(*args, "vision >= before", tmp_path / "out", **options)
    assert made == ["one"]


def test_drift_needs_the_original(models: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--shares drift needs the LM"):
        blend(models["before"], models["after"], models["suite.yaml"], "vision >= 0", tmp_path, shares=["drift"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_is_made_is_scored_as_one_in_a_folder(
    models: dict[str, str], tmp_path: Path, dtype: torch.dtype
) -> None:
    """The blend in memory, and the same weights saved and scored by name: same answers, same KL, in whatever they are scored in."""
    from hf_lingudistill.labs.evaluation import evaluate_models

    front = blend(
        models["before"], models["after"], models["suite.yaml"], "vision >= 0", tmp_path / "out",
        original=models["lm"], weights=[0.5], shares=["uniform"], dtype=dtype, progress=False,
    )  # fmt: skip
    model = loaded(models["before"])
    blend_into(model, models["after"], Blend(0.5, "uniform"))
    model.save_pretrained(tmp_path / "saved")
    AutoProcessor.from_pretrained(models["before"]).save_pretrained(tmp_path / "saved")
    named = {"original": models["lm"], "before": models["before"], "half": str(tmp_path / "saved")}
    report = evaluate_models(named, models["suite.yaml"], tmp_path / "eval", dtype=dtype, progress=False)
    for task in report["tasks"]:
        if task["name"] == front["most"]:
            made = next(p for p in front["points"] if p["name"] == "uniform-0.5")["scores"][front["most"]]["value"]
            assert task["scores"]["half"]["value"] == pytest.approx(made, rel=1e-5)
            assert task["scores"]["before"]["value"] != pytest.approx(made, rel=1e-2)  # control
            return
    raise AssertionError("the score of language is not in the report")


@pytest.mark.parametrize("role", ["before", "after"])
def test_a_blend_is_never_saved_over_a_model_that_it_is_made_of(
    models: dict[str, str], tmp_path: Path, role: str
) -> None:
    """An earlier blend's own folder, which a later one could replace, is one of the two. Control: with others it goes on."""
    shutil.copytree(models["after"], tmp_path / "out" / "model")
    record(tmp_path / "out", "model", by="blend")
    pair = {"before": models["before"], "after": models["after"], role: str(tmp_path / "out" / "model")}
    with pytest.raises(ValueError, match=f"the blend's folder '.*model' is the folder of the {role}, or lies in it"):
        blend(*pair.values(), "quick", "vision >= before", tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="weights"):
        blend(models["before"], models["after"], "quick", "vision >= before", tmp_path / "out", weights=[2.0])
