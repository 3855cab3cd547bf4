"""The Space's own functions: what may be asked, how answers stream, what the page says about a report. No browser."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "examples" / "space"))

import answers
import checkpoints
import markup
import pictures
import report
import tiny
import visitor
from answers import Answer
from visitor import BadInput

from hf_lingudistill.images import decode_image

SPACE = Path(visitor.__file__).parent


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, checkpoints.Checkpoint]:
    """Two tiny VLMs of other weights and a tiny LM, loaded from their folders as the Space loads them."""
    folder = tmp_path_factory.mktemp("space")
    before, original = tiny.save_pair(folder)
    after = folder / "after"
    tiny.make_vlm(7).save_pretrained(after)
    tiny.make_processor().save_pretrained(after)
    config = {"before": before.name, "after": after.name, "original": original.name}
    (folder / "config.json").write_text(json.dumps(config))
    return checkpoints.load_all(checkpoints.read_settings(folder / "config.json"))


# --------------------------------------------------------------------------------------------------------------------
# What may be asked
# --------------------------------------------------------------------------------------------------------------------
TOKENS = {"<|im_end|>", "<image>", "<|im_start|>"}


def test_a_question_loses_its_surrounding_blanks_only() -> None:
    assert visitor.check_question("  Is 3 < 5?\nAnd <b>?  ", TOKENS) == "Is 3 < 5?\nAnd <b>?"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "There is no question yet"),
        (" \n\t ", "There is no question yet"),
        ("\u200b\u2060", "There is no question yet"),  # zero-width characters: empty to the eye
        ("x" * 100_000, "Your question has 100,000 characters, and 2,000 is the most"),
        ("a \ud83d b", "half a character"),
        ("Bye.<|im_end|>", "Your question contains <|im_end|>, which these models read as a command"),
        ("what is in <image>?", "Your question contains <image>"),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused_in_words(text: str | None, sentence: str) -> None:
    with pytest.raises(BadInput, match=re.escape(sentence)):
        visitor.check_question(text, TOKENS)


def test_the_control_tokens_are_the_models_own(models: dict[str, checkpoints.Checkpoint]) -> None:
    assert {"<|im_end|>", "<image>"} <= models["before"].control_tokens()
    assert "<image>" not in models["original"].control_tokens()


@pytest.mark.parametrize(("asked", "given"), [(8, 8), (0, 1), (10**9, 128), ("16", 16)])
def test_an_answer_has_a_longest_length(asked: object, given: int) -> None:
    assert visitor.check_length(asked, 128) == given
    with pytest.raises(BadInput, match="must be a number of tokens, up to 128"):
        visitor.check_length("many", 128)


def saved(path: Path, image: Image.Image, **kwargs: Any) -> Path:
    image.save(path, **kwargs)
    return path


def test_a_picture_arrives_upright_in_rgb_and_no_larger_than_needed(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # turned a quarter
    path = saved(tmp_path / "turned.jpg", Image.new("L", (3000, 1500), 128), exif=exif)
    picture = visitor.open_picture(path)
    assert picture.mode == "RGB"
    assert picture.size == (512, 1024)


def test_transparency_becomes_white_and_not_black(tmp_path: Path) -> None:
    path = saved(tmp_path / "clear.png", Image.new("RGBA", (20, 20), (0, 0, 0, 0)))
    assert visitor.open_picture(path).getpixel((5, 5)) == (255, 255, 255)


def test_a_picture_is_decoded_as_in_training(tmp_path: Path) -> None:
    """One function, whatever the file: transparency in each of its forms, palettes, greys of any depth, CMYK, turned ones."""
    ramp = Image.linear_gradient("L").resize((24, 24))
    clear = Image.merge("RGBA", (ramp, ramp, ramp, ramp.rotate(90)))
    palette = ramp.convert("P")
    turned = Image.Exif()
    turned[274] = 6
    images = {
        "RGBA": clear,
        "LA": clear.convert("LA"),
        "L": ramp,
        "1": ramp.convert("1"),
        "P": palette,
        "RGB": clear.convert("RGB"),
    }
    images["I;16"] = Image.frombytes("I;16", (24, 24), bytes(range(256)) * 4 + bytes(range(128)))
    paths = {name: saved(tmp_path / f"{name.replace(';', '')}.png", image) for name, image in images.items()}
    paths["P with transparency"] = saved(tmp_path / "clear.png", palette, transparency=3)
    paths["CMYK"] = saved(tmp_path / "cmyk.jpg", clear.convert("CMYK"))
    paths["turned"] = saved(tmp_path / "turned.jpg", ramp.convert("RGB").resize((24, 12)), exif=turned)
    for name, path in paths.items():
        assert visitor.open_picture(path).tobytes() == decode_image(path).tobytes(), name
    assert (
        visitor.open_picture(paths["RGBA"]).tobytes() != clear.convert("RGB").tobytes()
    )  # control: PIL's own rule is another


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    path = saved(tmp_path / "deep.png", Image.new("I;16", (20, 20), 128 * 256))
    assert visitor.open_picture(path).getpixel((5, 5)) == (128, 128, 128)


def test_what_is_no_usable_picture_is_refused_in_words(tmp_path: Path) -> None:
    text = tmp_path / "notes.png"
    text.write_text("no picture")
    whole = saved(tmp_path / "whole.png", Image.effect_noise((200, 200), 50))
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:4000])
    cases = {
        text: "not a picture that can be read",
        cut: "This picture is damaged",
        saved(tmp_path / "large.png", Image.new("1", (10_000, 5_000))): "50 megapixels (10,000 × 5,000), and 25",
        saved(tmp_path / "bomb.png", Image.new("1", (20_000, 20_000))): "far more than 25 megapixels",
        saved(tmp_path / "dot.png", Image.new("RGB", (1, 1))): "each side needs at least 8",
        saved(tmp_path / "line.png", Image.new("RGB", (10, 4000))): "a mere line to the models",
    }
    for path, sentence in cases.items():
        with pytest.raises(BadInput, match=re.escape(sentence)):
            visitor.open_picture(path)
    visitor.open_picture(whole)  # control: the undamaged one is fine


# --------------------------------------------------------------------------------------------------------------------
# The models
# --------------------------------------------------------------------------------------------------------------------
def test_settings_without_models_say_what_to_write(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(ValueError, match="which is missing; write"):
        checkpoints.read_settings(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="must hold JSON"):
        checkpoints.read_settings(path)
    path.write_text('{"before": "ORG/VLM"}')
    with pytest.raises(ValueError, match="must name the models before and after"):
        checkpoints.read_settings(path)


def test_settings_know_a_folder_from_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"before": "here", "after": "ORG/VLM", "report": "report.json"}))
    monkeypatch.setenv(checkpoints.CONFIG_VARIABLE, str(path))
    settings = checkpoints.read_settings()
    assert settings.sources == {"before": str(tmp_path / "here"), "after": "ORG/VLM"}
    assert settings.report == tmp_path / "report.json"


def test_examples_of_the_config_are_read_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    saved(tmp_path / "cat.png", Image.new("RGB", (20, 20)))
    models = {"before": "ORG/VLM", "after": "ORG/VLM2"}
    entries = [{"question": "What is it?", "picture": "cat.png"}, {"question": "Why?"}]
    path.write_text(json.dumps({**models, "examples": entries, "code": "https://example.org"}))
    settings = checkpoints.read_settings(path)
    assert settings.examples == ((tmp_path / "cat.png", "What is it?"), (None, "Why?"))
    assert settings.code == "https://example.org"
    for wrong in ({"picture": "cat.png"}, {"question": "?", "picture": "dog.png"}, "why?", {"question": 3}):
        path.write_text(json.dumps({**models, "examples": [wrong], "code": "javascript:alert(1)"}))
        with pytest.raises(ValueError, match="An example in .* must be"):
            checkpoints.read_settings(path)
    path.write_text(json.dumps({**models, "code": "javascript:alert(1)"}))
    assert checkpoints.read_settings(path).code is None


def test_a_page_names_the_model_and_no_folder_of_the_machine(models: dict[str, checkpoints.Checkpoint]) -> None:
    assert [model.label for model in models.values()] == ["student", "after", "teacher"]
    assert str(Path(models["before"].source).parent) not in markup.models_table(models)
    assert list(markup.names(models).values()) == ["VLM before", "VLM restored", "Original LM"]
    page = markup.header(models, None)
    assert "VLM restored" in page and re.findall(r'href="([^"]+)"', page) == [markup.PAPER]


def test_models_of_the_hub_are_called_by_name_and_linked(models: dict[str, checkpoints.Checkpoint]) -> None:
    ids = {"before": "ORG/VLM", "after": "ann/VLM-restored", "original": "ORG/LM"}
    there = {name: dataclasses.replace(model, source=ids[name]) for name, model in models.items()}
    assert list(markup.names(there).values()) == ["VLM", "VLM-restored", "LM"]
    page = markup.header(there, "https://example.org/code")
    addresses = [f"https://huggingface.co/{ids[name]}" for name in ("after", "before", "original")]
    assert re.findall(r'href="([^"]+)"', page) == [*addresses, markup.PAPER, "https://example.org/code"]
    answered = markup.answer_columns({name: Answer("x", 1.0, 1, "done") for name in there}, markup.labels(there))
    assert all(f'<a href="{address}"' in answered for address in addresses)
    namesakes = {**there, "after": dataclasses.replace(there["after"], source="ann/VLM")}
    assert list(markup.names(namesakes).values()) == ["ORG/VLM", "ann/VLM", "ORG/LM"]


def test_the_examples_fit_the_models(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="the `space` extra is not installed")
    import app

    drawn, plain = pictures.draw_all(tmp_path), checkpoints.Settings({}, None)

    def asked(settings: checkpoints.Settings, raw: dict[str, Any] | None) -> list[tuple[str | None, str]]:
        found = read(tmp_path, raw) if raw else None
        return [(file and file.name, question) for file, question in app.examples(settings, found, drawn)]

    general = asked(plain, None)
    assert [file for file, _ in general] == ["receipt.png", "chart.png", None, None]
    without_shapes = json.loads(json.dumps(evaluation()).replace("easy-VQA", "DocVQA"))
    assert asked(plain, without_shapes) == general
    assert [file for file, _ in asked(plain, evaluation())][:2] == ["red-circle.png", "blue-triangle.png"]
    assert asked(plain, demo())[2:] == [(None, "Tell me."), general[2]]  # the report's own prompts come first
    saved(tmp_path / "cat.png", Image.new("RGB", (20, 20)))
    with_picture = {**demo(), "prompts": [{"prompt": "Whose is it?", "image": "cat.png"}, {"prompt": "Tell me."}]}
    assert asked(plain, with_picture)[0] == ("cat.png", "Whose is it?")
    own = checkpoints.Settings({}, None, None, ((tmp_path / "cat.png", "Mine?"),))
    assert asked(own, demo()) == [("cat.png", "Mine?")]


def test_the_report_may_call_this_model_anything(tmp_path: Path) -> None:
    """Published, it says which of its models lies in the repository."""
    renamed = json.loads(json.dumps(evaluation()).replace('"after"', '"prompt"'))
    assert read(tmp_path, {**renamed, "main": "prompt"}) == read(tmp_path, evaluation())
    assert read(tmp_path, renamed) != read(tmp_path, evaluation())  # control


def test_the_drawn_pictures_say_what_is_asked_about_them() -> None:
    assert sum(float(price) for _, price in pictures.RECEIPT) == 13.95
    assert max(pictures.SALES, key=lambda sale: sale[1])[0] == "Fri"
    for name in ("receipt", "chart"):
        assert len(set(pictures.draw(name).get_flattened_data())) > 10  # something is drawn, letters and all


def greedy(model: checkpoints.Checkpoint, question: str, picture: Image.Image | None, tokens: int) -> str:
    """The reference: the model alone, in one call, its prompt written out by the template and tokenized by itself."""
    inputs = {
        name: value.to(model.model.device) for name, value in answers.encode(model, question, picture, tokens).items()
    }
    with torch.no_grad():
        out = model.model.generate(**inputs, max_new_tokens=tokens, do_sample=False, repetition_penalty=1.0)
    return model.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("with_picture", [False, True])
def test_answers_in_turns_are_those_of_each_model_alone(
    models: dict[str, checkpoints.Checkpoint], with_picture: bool
) -> None:
    picture = pictures.draw("red circle") if with_picture else None
    *_, last = answers.stream(models, "what shape is it?", picture, 12)
    asked = ["before", "after"] if with_picture else list(models)
    for name in asked:
        assert last[name].text == greedy(models[name], "what shape is it?", picture, 12).strip().rstrip("\ufffd")
        assert last[name].seconds > 0
    assert last["before"].text != last["after"].text  # control: a mix-up would be seen
    assert (last["original"].state == "blind") == with_picture


def test_answers_depend_on_the_picture(models: dict[str, checkpoints.Checkpoint]) -> None:
    texts = []
    for name in pictures.SHAPES:
        *_, last = answers.stream(models, "what shape is it?", pictures.draw(name), 12)
        texts.append(last["before"].text)
    assert len(set(texts)) == len(texts)


def test_answers_stream_and_take_turns(models: dict[str, checkpoints.Checkpoint]) -> None:
    """No model gets more than a token ahead of another while both are writing."""
    order: list[str] = []
    original = answers.Writer.__call__

    def record(self: answers.Writer, *args: Any, **kwargs: Any) -> torch.Tensor:
        order.append(self.name)
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers.Writer, "__call__", record)
        *_, last = answers.stream(models, "tell me about the sea", None, 8)
    shortest = min(answer.tokens for answer in last.values())
    assert shortest > 1
    assert order[: 3 * shortest] == ["before", "after", "original"] * shortest


def test_an_answer_is_cut_at_the_longest_length_whatever_is_asked_for(
    models: dict[str, checkpoints.Checkpoint],
) -> None:
    endless = models["before"].model.generation_config
    before, endless.eos_token_id = endless.eos_token_id, None
    try:
        *_, last = answers.stream({"before": models["before"]}, "the sea", None, 10**9)
    finally:
        endless.eos_token_id = before
    assert last["before"].tokens == answers.MAX_NEW_TOKENS
    assert last["before"].state == "cut"


def test_closing_the_stream_stops_the_models(models: dict[str, checkpoints.Checkpoint]) -> None:
    threads = threading.active_count()
    stream = answers.stream(models, "tell me about the sea", None, 100)
    next(stream)
    next(stream)
    assert threading.active_count() > threads  # control: they were at work
    stream.close()
    assert threading.active_count() == threads


def test_a_model_that_fails_leaves_the_others_alone(models: dict[str, checkpoints.Checkpoint]) -> None:
    class Broken(torch.nn.Module):
        device, dtype = torch.device("cpu"), torch.float32

    broken = checkpoints.Checkpoint("broken", Broken(), models["after"].processing, 0.0)
    broken.model.config = models["after"].model.config
    *_, last = answers.stream({**models, "after": broken}, "tell me about the sea", None, 6)
    assert last["after"].state == "failed"
    assert last["before"].text
    assert "could not answer" in markup.answer_columns(last, dict.fromkeys(last, label("x")))


def test_bf16_answers_about_a_picture(
    models: dict[str, checkpoints.Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on hardware that multiplies in it: pixels arrive in fp32 and must follow the weights."""
    monkeypatch.setattr(checkpoints, "best_device_and_dtype", lambda: ("cpu", torch.bfloat16))
    model = checkpoints.load(models["before"].source, sees=True)
    assert model.model.dtype == torch.bfloat16
    *_, last = answers.stream({"before": model}, "what shape is it?", pictures.draw("red circle"), 6)
    assert last["before"].state in ("done", "cut")


def test_a_question_longer_than_the_context_is_refused_before_a_model_starts(
    models: dict[str, checkpoints.Checkpoint],
) -> None:
    with pytest.raises(BadInput, match="tokens long to student, and 464 is the most"):
        answers.check_fits(models, "⠿" * 400, None, 48)
    answers.check_fits(models, "⠿" * 40, None, 48)


# --------------------------------------------------------------------------------------------------------------------
# What is shown
# --------------------------------------------------------------------------------------------------------------------
def label(name: str) -> markup.Label:
    return markup.Label(name, "a role", "1 M parameters", name, f"https://huggingface.co/{name}")


def test_only_the_words_that_differ_are_marked() -> None:
    one, other, only_one, only_other = markup.mark_differences("the cat  sat\non a mat", "the dog  sat\non a red mat")
    assert one == "the <mark>cat</mark>  sat\non a mat"
    assert other == "the <mark>dog</mark>  sat\non a <mark>red</mark> mat"
    assert (only_one, only_other) == (1, 2)


def test_neighbours_share_a_mark_and_equal_answers_have_none() -> None:
    assert markup.mark_differences("red", "a blue <b>")[1] == "<mark>a blue &lt;b&gt;</mark>"
    assert markup.mark_differences("same words", "same words") == ("same words", "same words", 0, 0)
    assert markup.mark_differences("", "x")[:2] == ("", "<mark>x</mark>")
    assert (
        markup.mark_differences("", "x y\n\nz")[1] == "<mark>x y</mark>\n\n<mark>z</mark>"
    )  # no mark on an empty line


def test_marks_appear_when_both_answers_are_complete() -> None:
    state = {"before": Answer("a cat", 1.0, 2, "done"), "after": Answer("a", 1.0, 1, "writing")}
    names = {"before": label("x"), "after": label("y")}
    assert "<mark>" not in markup.answer_columns(state, names)
    state["after"] = Answer("a dog", 1.0, 2, "cut")
    assert markup.answer_columns(state, names).count("<mark>") == 2
    assert "1 word only before, 1 only after" in markup.verdict(state)


def test_what_a_model_writes_cannot_become_markup() -> None:
    hostile = "<script>alert(1)</script> ${1+1} {{x}} <img src=x onerror=alert(1)>"
    state = {name: Answer(hostile, 1.0, 2, "done") for name in ("before", "after")}
    page = markup.answer_columns(state, {"before": label("<i>"), "after": label('"><i>')})
    assert not re.search(r"<(script|img|i)\b", page)
    assert "&lt;script&gt;" in page


class _Balance(html.parser.HTMLParser):
    """Open tags that are left, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag != "br":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def evaluation() -> dict[str, Any]:
    def score(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 96}

    language = {
        "name": "bits_per_byte/xsum/plain",
        "group": "language",
        "title": "XSum <news>",
        "metric": "bits_per_byte",
        "unit": "bits/byte",
        "higher_is_better": False,
        "n": 96,
        "scores": {"original": score(1.2), "before": score(1.9), "after": score(1.3)},
        "controls": {},
        "differences": [
            {"of": "before", "minus": "original", **score(0.7)},
            {"of": "after", "minus": "original", **score(0.1)},
            {"of": "after", "minus": "before", "value": -0.6, "low": -0.7, "high": -0.5},
        ],
        "recovered": {"after": {"value": 0.86, "low": 0.8, "high": 0.9}},
    }
    vision = {
        "name": "vqa",
        "group": "vision",
        "title": "easy-VQA",
        "metric": "accuracy",
        "unit": "",
        "higher_is_better": True,
        "n": 400,
        "scores": {"before": score(0.7), "after": score(0.69)},
        "controls": {"shuffled": {"before": score(0.2)}},
        "differences": [{"of": "after", "minus": "before", "value": -0.01, "low": -0.05, "high": 0.03}],
        "recovered": {"after": {"value": None, "reason": "nothing was lost"}},
    }
    return {
        "schema": "lingudistill-evaluation/1",
        "suite": {"name": "quick", "seed": 0},
        "models": {"original": {}, "before": {}, "after": {}},
        "tasks": [language, vision],
        "machine": {"torch": "2.13.0"},
    }


def demo() -> dict[str, Any]:
    return {
        "language": {"metric": "KL", "original": 0.0, "before": 3.1, "after": 0.1, "recovered": 0.98},
        "vision": {"metric": "accuracy", "before": 0.9, "after": 0.91, "shuffled": {"before": 0.2}},
        "prompts": [{"prompt": "Tell me."}, {"prompt": "what color?", "image": "easy-VQA"}],
        "machine": {"torch": "2.13.0"},
    }


def read(tmp_path: Path, raw: Any) -> report.Report | None:
    path = tmp_path / "report.json"
    path.write_text(raw if isinstance(raw, str) else json.dumps(raw))
    return report.read_report(path)


def test_an_evaluation_is_read_with_intervals_changes_and_controls(tmp_path: Path) -> None:
    found = read(tmp_path, evaluation())
    assert found is not None and found.plane is not None
    table = markup.benchmark_table(found, {})
    assert "XSum &lt;news&gt;" in table
    assert "<b>1.900</b><small>1.800 to 2.000</small>" in table
    assert "▲ better" in table and "within the noise" in table
    assert "<b>86%</b><small>80% to 90%</small>" in table
    assert "images exchanged: 0.200" in table
    assert table.count("does not see") == 1 and "not evaluated" not in table  # the LM has no vision score
    assert found.plane.points["after"].x.value == pytest.approx(0.1)
    assert _Balance(table).open == []


@pytest.mark.parametrize("first", ["after", "mine"])
def test_the_scores_shown_are_of_the_model_that_is_shown(tmp_path: Path, first: str) -> None:
    """Where the report is about another one that is called `after`, too."""
    raw = evaluation()
    raw["main"] = "mine"
    for task in raw["tasks"]:
        theirs = {"value": 9.0, "low": 8.9, "high": 9.1}
        both = {"after": theirs, "mine": task["scores"]["after"]}
        others = {name: score for name, score in task["scores"].items() if name != "after"}
        task["scores"] = {**others, **dict(sorted(both.items(), reverse=first == "mine"))}
        changes = [{**change, "of": "mine"} for change in task.get("differences", []) if change.get("of") == "after"]
        task["differences"] = [{"of": "after", "minus": "before", **theirs}, *changes]
    raw["models"] = {**raw["models"], "mine": {}}
    shown, alone = read(tmp_path, raw), read(tmp_path, evaluation())
    assert shown is not None and alone is not None
    for ours, theirs in zip(shown.tasks, alone.tasks, strict=True):
        assert ours.scores["after"] == theirs.scores["after"] and ours.change == theirs.change


def test_the_demo_report_is_read_as_well(tmp_path: Path) -> None:
    found = read(tmp_path, demo())
    assert found is not None and found.plane is not None
    assert found.models == ["original", "before", "after"]
    assert found.prompts == [(None, "Tell me.")]  # "easy-VQA" is no file: it cannot be shown again
    assert "<b>98%</b>" in markup.benchmark_table(found, {})
    assert found.plane.original_x == 0.0


def test_in_the_plane_better_is_to_the_right_and_up(tmp_path: Path) -> None:
    for raw in (evaluation(), demo()):
        drawing = markup.trade_off(read(tmp_path, raw), {})
        at = {
            name: (float(x), float(y))
            for name, x, y in re.findall(r'<g data-model="(\w+)">.*?translate\(([\d.]+) ([\d.]+)\)', drawing)
        }
        assert at["after"][0] > at["before"][0]  # its language is better in both reports
        vision_is_better = "language" in raw  # only in the demo's report is its vision better, too
        assert (at["after"][1] < at["before"][1]) == vision_is_better
        assert _Balance(drawing).open == []


@pytest.mark.parametrize(
    "raw", ["{", "[]", '"x"', "{}", '{"tasks": 3}', '{"language": {"after": "NaN"}}', '{"tasks": [{}, 1]}']
)
def test_a_report_of_something_else_is_not_evaluated(tmp_path: Path, raw: str) -> None:
    found = read(tmp_path, raw)
    assert found is None
    assert "Not evaluated" in markup.benchmark_table(found, {})
    assert "Not evaluated" in markup.trade_off(found, {})


def every_pruned(raw: Any) -> Iterator[Any]:
    """The report with one key or entry missing, for each of them at any depth."""
    if isinstance(raw, dict):
        for key, value in raw.items():
            yield {k: v for k, v in raw.items() if k != key}
            yield {**raw, key: None}
            yield from ({**raw, key: pruned} for pruned in every_pruned(value))
    elif isinstance(raw, list):
        for at, value in enumerate(raw):
            yield raw[:at] + raw[at + 1 :]
            yield from (raw[:at] + [pruned] + raw[at + 1 :] for pruned in every_pruned(value))


@pytest.mark.parametrize("raw", [evaluation(), demo()], ids=["evaluation", "demo"])
def test_whatever_is_missing_from_a_report_the_page_opens(tmp_path: Path, raw: dict[str, Any]) -> None:
    variants = list(every_pruned(raw))
    assert len(variants) > 30
    for variant in variants:
        found = read(tmp_path, variant)
        assert _Balance(markup.benchmark_table(found, {})).open == []
        assert _Balance(markup.trade_off(found, {})).open == []


def test_ticks_are_round_and_few() -> None:
    assert markup._ticks(0.88, 0.95) == pytest.approx([0.88, 0.9, 0.92, 0.94])
    assert [round(2.718281828**tick) for tick in markup._log_ticks(5.5, 7.0)] == [300, 400, 500, 600, 800, 1000]
    assert 1 <= len(markup._log_ticks(0.0, 14.0)) <= 7


# --------------------------------------------------------------------------------------------------------------------
# The folder that is pushed
# --------------------------------------------------------------------------------------------------------------------
def test_the_front_matter_names_what_spaces_needs() -> None:
    front = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert front["sdk"] == "gradio"
    assert (SPACE / front["app_file"]).is_file()
    assert front["models"] == []  # `lingudistill publish --space` fills it
    assert len(front["short_description"]) <= 60  # the Hub refuses longer ones
    gradio = pytest.importorskip("gradio", reason="the `space` extra is not installed")
    assert front["sdk_version"].split(".")[0] == gradio.__version__.split(".")[0]


def test_the_folder_needs_no_hf_lingudistill() -> None:
    for path in SPACE.glob("*.py"):
        assert not re.search(r"^\s*(from|import) hf_lingudistill", path.read_text(encoding="utf-8"), re.MULTILINE), (
            path
        )


def test_the_asker_refuses_in_words_and_goes_on(models: dict[str, checkpoints.Checkpoint], tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="the `space` extra is not installed")
    import app

    ask = app.make_asker(models)
    for file, question in ((None, ""), (None, "hi<|im_end|>"), ({"path": str(SPACE / "app.py")}, "what?"), ({}, "")):
        steps = list(ask(file, question, 8, app.Visit()))
        assert len(steps) == 1 and 'role="alert"' in steps[0][0]
    path = saved(tmp_path / "picture.png", pictures.draw("blue triangle"))
    *_, (verdict, columns) = ask({"path": str(path)}, "what is it?", 8, app.Visit())
    assert 'role="status"' in verdict
    assert columns.count("<section") == 3 and "Has no eyes" in columns


def test_stop_keeps_what_was_written_and_clear_does_not(models: dict[str, checkpoints.Checkpoint]) -> None:
    pytest.importorskip("gradio", reason="the `space` extra is not installed")
    import app

    for button, said in (("stop", "Stopped."), ("clear", app.WELCOME)):
        threads, visit = threading.active_count(), app.Visit()
        asked = app.make_asker(models)(None, "tell me about the sea", 100, visit)
        next(asked)
        next(asked)
        visit.end(button)
        *_, (notice, columns) = asked
        assert said in notice
        assert ('data-state="stopped"' in columns, 'data-state="idle"' in columns) == (
            button == "stop",
            button == "clear",
        )
        assert threading.active_count() == threads


def test_there_is_something_to_stop_while_the_latest_question_is_answered(
    models: dict[str, checkpoints.Checkpoint],
) -> None:
    pytest.importorskip("gradio", reason="the `space` extra is not installed")
    import app

    def can_stop(update: Any) -> bool:
        return update["interactive"]

    ask = app.make_asker(models)
    first, button = app._begin(None)
    answering = ask(None, "tell me about the sea", 8, first)
    next(answering)
    assert can_stop(button) and can_stop(app._idle(first))
    second, button = app._begin(first)
    list(answering)  # the first one ends while the second is under way
    assert can_stop(button) and can_stop(app._idle(second))
    list(ask(None, "", 8, second))  # refused
    assert not can_stop(app._idle(second)) and not can_stop(app._idle(None))


def test_the_page_builds_with_and_without_original_and_report(
    models: dict[str, checkpoints.Checkpoint], tmp_path: Path
) -> None:
    pytest.importorskip("gradio", reason="the `space` extra is not installed")
    import app

    files = pictures.draw_all(tmp_path)
    two = {name: models[name] for name in ("before", "after")}
    for some, found in ((models, read(tmp_path, demo())), (two, None)):
        settings = checkpoints.Settings(dict.fromkeys(some, "x"), None)
        page = app.build_page(some, settings, found, files)
        values = [block.value for block in page.blocks.values() if isinstance(getattr(block, "value", None), str)]
        assert any(f'data-columns="{len(some)}"' in value for value in values)
        assert any("Not evaluated" in value for value in values) == (found is None)
