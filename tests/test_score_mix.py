"""`lingudistill score-mix`: sources whose answers the image decides are told from those that language decides."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from hf_lingudistill.cli import main
from hf_lingudistill.labs.evaluation.models import load_scored, user_turn
from hf_lingudistill.labs.evaluation.reading import answer_inputs
from hf_lingudistill.labs.score_mix import FILES, as_text, read_sources, score_mix

QUESTION, ABOUT_THE_SEA = "what shape is in the image?", "tell me about the sea"
NAMES = {(255, 0, 0): "a small red circle", (0, 0, 255): "a blue triangle", (0, 128, 128): "a teal rectangle"}
SEA = "the sea is deep, wide and full of salt. the cat sat on the mat and looked at the sea."
ROWS = 9


def save(folder: Path, question: str, answers: list[str], images: list[list[PILImage.Image]]) -> str:
    turns = List({"role": Value("string"), "content": Value("string")})
    rows = [
        {
            "images": shown,
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        for answer, shown in zip(answers, images, strict=True)
    ]
    features = Features({"images": List(Image()), "prompt": turns, "completion": turns})
    Dataset.from_list(rows, features=features).save_to_disk(folder)
    return str(folder)


PICTURES = [[PILImage.new("RGB", (40, 40), color)] for color in NAMES] * (ROWS // len(NAMES))
ANSWERS = list(NAMES.values()) * (ROWS // len(NAMES))


@pytest.fixture(scope="module")
def pair(saved_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A student that has learnt to name three pictures, and a sentence about the sea with and without one; and its teacher."""
    student = load_scored("student", str(saved_pair[0]))
    names, shown = list(NAMES.values()), PICTURES[: len(NAMES)]
    batches = [(QUESTION, names, shown), (ABOUT_THE_SEA, [SEA] * len(shown), shown), (ABOUT_THE_SEA, [SEA], [[]])]
    inputs = []
    for question, answers, images in batches:
        prompts = [student.render(user_turn(question, len(group))) for group in images]
        row, labels = answer_inputs(student, prompts, images, [student.ids(answer) for answer in answers])
        before = labels.new_full((len(answers), row["input_ids"].shape[1] - labels.shape[1]), -100)
        inputs.append({**row, "labels": torch.cat([before, labels], dim=1)})
    optimizer = torch.optim.Adam(student.model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = sum(student.model(**batch).loss for batch in inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("pair") / "student"
    student.model.save_pretrained(folder)
    student.processing.save_pretrained(folder)
    return str(folder), str(saved_pair[1])


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Names of pictures; a long answer beside pictures; a word; a long answer alone."""
    folder, alone = tmp_path_factory.mktemp("mix"), [[]] * ROWS
    return {
        "seen": save(folder / "seen", QUESTION, ANSWERS, PICTURES),
        "beside": save(folder / "beside", ABOUT_THE_SEA, [SEA] * ROWS, PICTURES),
        "short": save(folder / "short", ABOUT_THE_SEA, ["yes."] * ROWS, alone),
        "text": save(folder / "text", ABOUT_THE_SEA, [SEA] * ROWS, alone),
    }


@pytest.fixture(scope="module")
def report(pair: tuple[str, str], mix: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    sources = read_sources(list(mix.values()), rows=ROWS)
    return score_mix(*pair, sources, tmp_path_factory.mktemp("out"), progress=False)


def of(report: Any, name: str) -> Any:
    return next(source for source in report["sources"] if source["name"] == name)


def test_what_the_image_decides_is_told_from_what_it_stands_beside(report: Any) -> None:
    seen, beside, short, text = (of(report, name) for name in ("seen", "beside", "short", "text"))
    assert seen["dependence"]["low"] > 0.5 and not seen["distill"] and seen["sure"]
    assert abs(beside["dependence"]["value"]) < 0.2 and beside["distill"]  # the same pictures
    assert text["dependence"]["value"] == 0 and text["with_image"] == 0 and text["distill"] and text["sure"]
    assert text["language"]["value"] == pytest.approx(beside["language"]["value"])  # the teacher sees no image
    assert not short["distill"] and short["language"]["high"] < 10  # a word holds no language


def test_a_student_that_does_not_look_finds_nothing_that_depends(
    pair: tuple[str, str], mix: dict[str, str], report: Any, tmp_path: Path
) -> None:
    blind = load_scored("student", pair[0])
    with torch.no_grad():
        for parameter in blind.model.model.connector.parameters():
            parameter.zero_()
    blind.model.save_pretrained(tmp_path / "blind")
    blind.processing.save_pretrained(tmp_path / "blind")
    pictures = [mix["seen"], mix["beside"]]
    found = score_mix(
        str(tmp_path / "blind"),
        pair[1],
        read_sources(pictures, rows=ROWS),
        tmp_path / "out",
        progress=False,
    )
    for source in found["sources"]:
        assert {source["dependence"][end] for end in ("value", "low", "high")} == {0.0}
    said = "No source is shown to need its images"
    assert said in as_text(found) and said not in as_text(report)  # control: with the sighted student one is


def test_a_source_that_cannot_be_told_from_none_is_no_source_that_needs_images(report: Any) -> None:
    """Nor are fewer rows than an interval needs, whose ends are infinite."""
    seen = of(report, "seen")
    for low, high in ((-0.004, 0.006), (-0.02, -0.001), (0.0, 0.0), (-math.inf, math.inf)):
        source = {**seen, "dependence": {"value": 0.0, "low": low, "high": high, "n": 9}}
        assert "No source is shown to need its images" in as_text({**report, "sources": [source]}), (low, high)
    assert "No source" not in as_text({**report, "sources": [seen]})


def test_a_row_is_what_plain_forwards_say(pair: tuple[str, str], mix: dict[str, str], report: Any) -> None:
    (source,) = read_sources([mix["seen"]], rows=ROWS)
    prompt, row = source.prompts[3], report["rows"][3]
    student, teacher = load_scored("student", pair[0]), load_scored("teacher", pair[1])

    def log_probs(model: Any, text: str, images: list[PILImage.Image]) -> torch.Tensor:
        inputs = model.with_images([text], [images]) if model.sees else {"input_ids": torch.tensor([model.ids(text)])}
        answer = torch.tensor([model.ids(prompt.answer)])
        ids = torch.cat([inputs["input_ids"], answer], dim=1)
        with torch.no_grad():
            logits = model.model(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[
                0, -answer.shape[1] - 1 : -1
            ]
        return logits.float().log_softmax(-1)

    answer = torch.tensor(student.ids(prompt.answer))[:, None]
    own = -log_probs(student, student.render(user_turn(QUESTION, 1)), list(prompt.images)).gather(1, answer).mean()
    grey = [PILImage.new("RGB", image.size, (127, 127, 127)) for image in prompt.images]
    blank = -log_probs(student, student.render(user_turn(QUESTION, 1)), grey).gather(1, answer).mean()
    assert row["loss"] == pytest.approx(float(own), abs=1e-3)
    assert row["loss_grey_image"] == pytest.approx(float(blank), abs=1e-3)
    assert row["dependence"] == pytest.approx(float(blank - own), abs=1e-3)
    said = log_probs(teacher, teacher.render([{"role": "user", "content": QUESTION}]), [])
    assert row["language"] == pytest.approx(float(-(said.exp() * said).sum()), rel=1e-3)


def test_the_command_writes_and_goes_on(
    pair: tuple[str, str], mix: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {"datasets": [{"path": mix["seen"], "distill": True}, {"path": mix["text"], "distill": True}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "out"
    words = [
        "score-mix",
        str(tmp_path / "recipe.yaml"),
        "--student",
        pair[0],
        "--teacher",
        pair[1],
    ]
    words += ["--output_dir", str(out), "--rows", "5"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "seen: marked true now, proposed false." in printed and "no image" in printed
    summary = json.loads((out / "mix.json").read_text())
    assert [source["n"] for source in summary["sources"]] == [5, 5]
    assert len((out / "rows.jsonl").read_text().splitlines()) == 10
    proposed = yaml.safe_load((out / "datasets.yaml").read_text())["datasets"]
    assert [(entry["path"], entry["distill"]) for entry in proposed] == [(mix["seen"], False), (mix["text"], True)]
    assert all((out / name).is_file() for name in FILES)
    before = (out / "items/student.jsonl").read_text()
    assert main(words) == 0 and (out / "items/student.jsonl").read_text() == before
    (out / "mix.json").write_text("mine")
    assert main(words) == 2 and "is in the way" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "more", "said"),
    [
        (["nowhere"], [], "no such file or folder"),
        (["{recipe}"], [], "has no `datasets:` section"),
        (["{bad}"], [], "none of 2 rows can be scored"),
        (["{text}"], ["--rows", "1"], "--rows must be at least 2 per source, got 1"),
        (["{text}"], ["--batch_size", "0"], "--batch_size must be at least 1, got 0"),
        (["{text}"], ["--max_dependence", "nan"], "max_dependence must be a finite number of nats, got nan"),
        (["{text}"], ["--min_language", "inf"], "min_language must be a finite number of nats, got inf"),
        (["{text}"], ["--student", "{teacher}"], "is a language model that takes no images"),
        (["{text}"], ["--teacher", "{student}"], "is a vision-language model"),
        (
            ["{text}"],
            ["--teacher", "{untold}"],
            "has no chat template, in which it is asked here. Save its tokenizer with one.",
        ),
    ],
)
def test_bad_input_is_one_sentence(
    data: list[str],
    more: list[str],
    said: str,
    pair: tuple[str, str],
    mix: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "recipe.yaml").write_text("learning_rate: 1\n")
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n' * 2)
    places = {"recipe": tmp_path / "recipe.yaml", "bad": tmp_path / "bad.jsonl", "text": mix["text"]}
    shutil.copytree(pair[1], tmp_path / "untold")
    tokenizer = tiny.make_tokenizer(extra=False)
    tokenizer.chat_template = None
    (tmp_path / "untold" / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(tmp_path / "untold")
    places |= {"student": pair[0], "teacher": pair[1], "untold": str(tmp_path / "untold")}
    words = [
        "score-mix",
        *data,
        "--student",
        "{student}",
        "--teacher",
        "{teacher}",
        "--output_dir",
        str(tmp_path / "o"),
    ]
    assert main([word.format(**places) for word in (*words, *more)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lingudistill: ")]
    assert len(lines) == 1 and said in lines[0], lines
    assert not (tmp_path / "o").exists()


def test_rows_that_cannot_be_read_are_left_out_and_counted(mix: dict[str, str], report: Any, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}]}]
    rows += [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "the sea"}]}] * 3
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (source,) = read_sources([str(tmp_path / "rows.jsonl")])
    assert len(source.prompts) == 3 and dict(source.unusable) == {"not usable": 1}
    entry = {**of(report, "text"), "unusable": {"not usable": 1}}
    assert "text: 1 rows left out (not usable: 1)." in as_text({**report, "sources": [entry]})


def test_texts_beside_pictures_dilute_nothing_of_what_the_pictures_decide(
    pair: tuple[str, str], mix: dict[str, str], report: Any, tmp_path: Path
) -> None:
    """Long answers without a picture outweigh short ones about one, token for token; of pictures they say nothing."""
    both = save(tmp_path / "both", QUESTION, [*ANSWERS, *[SEA] * ROWS], [*PICTURES, *[[]] * ROWS])
    found = score_mix(*pair, read_sources([both], rows=2 * ROWS), tmp_path / "out", progress=False)["sources"][0]
    alone = of(report, "seen")
    assert (found["with_image"], found["n"]) == (ROWS, 2 * ROWS)
    assert found["dependence"]["value"] == pytest.approx(alone["dependence"]["value"], rel=1e-4)
    assert not found["distill"] and found["language"]["value"] > alone["language"]["value"]
