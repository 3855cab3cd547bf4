"""Data as it lies on disk, beside other files: the rows, images and answers that the files hold, or a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from test_labels_of_rows import assistant, picture, user

from hf_lingudistill.images import decode_image
from hf_lingudistill.mixtures import DistillMixtureConfig, DistillSource, load_mixture
from hf_lingudistill.sources import load_source

MakeTrainer = Callable[..., Any]
ROW = {"prompt": "what is it?", "completion": "a cat"}


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(path: Path | str, **more: Any) -> list[dict[str, Any]]:
    return list(load_source(DistillSource(path=str(path)), **more))


@pytest.fixture
def like_named(tmp_path: Path) -> Path:
    """Two folders with a table and an image each, all under the same names."""
    for folder, shade in (("a", 10), ("b", 200)):
        write(tmp_path / folder / "rows.jsonl", {**ROW, "image": "images/1.png"})
        (tmp_path / folder / "images").mkdir()
        picture(shade).save(tmp_path / folder / "images" / "1.png")
    return tmp_path


def test_like_named_images_of_two_folders_are_not_taken_for_one_another(like_named: Path) -> None:
    files = DistillSource(path="json", data_files=[str(like_named / name / "rows.jsonl") for name in "ab"])
    for source in (DistillSource(path=str(like_named)), files):
        with pytest.raises(ValueError, match=r"'images/1.png' lies in .*a' and in .*b', and which one a row means"):
            list(load_source(source))
    # What the sentence advises, and what is no question
    both = DistillMixtureConfig(datasets=[{"path": str(like_named / name / "rows.jsonl")} for name in "ab"])
    shades = [decode_image(row["images"][0]).getpixel((0, 0))[0] for row in load_mixture(both)["train"]]
    assert shades == [10, 200]
    told = load(like_named, image_folder=like_named / "b")
    assert [decode_image(row["image"]).getpixel((0, 0))[0] for row in told] == [200, 200]
    (like_named / "b" / "images" / "1.png").unlink()
    (like_named / "b" / "images" / "1.png").symlink_to(like_named / "a" / "images" / "1.png")
    assert len(load(like_named)) == 2  # the same file


@pytest.mark.parametrize(
    "others",
    [
        {"LICENSE.txt": b"MIT licence", "notes.txt": b"my notes", "more.txt": b"all rights"},
        {"a.xml": b"<a/>", "b.xml": b"<b/>"},
        {f"{number}.pdf": b"%PDF-1.4" for number in range(3)},
        {f"{number}.mp4": b"0000" for number in range(3)},
        {"README.md": b"# Rows"},
    ],
    ids=lambda others: next(iter(others)),
)
def test_a_table_is_read_whatever_lies_beside_it(tmp_path: Path, others: dict[str, bytes]) -> None:
    write(tmp_path / "rows.jsonl", *({**ROW, "completion": str(number)} for number in range(4)))
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    assert [row["completion"] for row in load(tmp_path)] == list("0123")


@pytest.mark.parametrize("name", ["rows[12].jsonl", "rows?.jsonl", "ro*ws.jsonl"])
def test_a_name_is_no_pattern(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "b [x]"
    write(folder / name, {**ROW, "completion": "mine"})
    write(tmp_path / "elsewhere" / "rows1.jsonl", ROW)
    for wanted in (folder / name, folder):
        assert [row["completion"] for row in load(wanted)] == ["mine"]
    write(folder / "rows1.jsonl", {**ROW, "completion": "another"})
    assert [row["completion"] for row in load(folder / name)] == ["mine"]
    assert sorted(row["completion"] for row in load(folder)) == ["another", "mine"]


def test_the_answers_of_a_csv_are_as_they_stand_there(tmp_path: Path) -> None:
    answers = ["3.50", "01234", "True", "None", "NA", "n/a", "null", "nan", "1e5", "yes"]
    file = tmp_path / "rows.csv"
    lines = [f"what?,{answer},{number % 2 == 0}" for number, answer in enumerate(answers)]
    # pandas decides by the first 10,000 rows
    file.write_text("\n".join(["prompt,completion,distill", *["q,7,true"] * 12_000, *lines]))
    for streaming in (False, True):
        rows = load(file, streaming=streaming)
        assert [row["completion"] for row in rows[-len(answers) :]] == answers and rows[0]["completion"] == "7"
        assert {type(row["distill"]) for row in rows} == {bool}
    file.write_text("prompt,completion\nwhat?,\n")
    assert load(file)[0]["completion"] is None  # an empty cell is none


def test_a_column_of_nulls_or_of_another_kind_of_text_is_the_same_in_a_mixture(tmp_path: Path) -> None:
    turns = {"messages": [user("who are you?"), assistant("arr")]}
    silent = write(tmp_path / "silent.jsonl", {**turns, "system": None})
    told = write(tmp_path / "told.jsonl", {**turns, "system": "Be a pirate."})
    both = DistillMixtureConfig(datasets=[{"path": str(silent)}, {"path": str(told)}])
    assert [row["system"] for row in load_mixture(both)["train"]] == [None, "Be a pirate."]
    (tmp_path / "t.csv").write_text("text\nof a table\n")
    lines = write(tmp_path / "t.jsonl", {"text": "of lines"})
    both = DistillMixtureConfig(datasets=[{"path": str(tmp_path / "t.csv")}, {"path": str(lines)}])
    assert [row["text"] for row in load_mixture(both)["train"]] == ["of a table", "of lines"]


def test_a_source_of_which_no_row_is_taken_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    many = write(tmp_path / "many.jsonl", *[ROW] * 40)
    few = write(tmp_path / "few.jsonl", *[ROW] * 4)
    mixed = DistillMixtureConfig(
        datasets=[{"path": str(many), "fraction": 0.999}, {"path": str(few), "fraction": 0.001}]
    )
    assert len(load_mixture(mixed)["train"]) == 40
    assert "datasets[1]: its fraction of 40 rows in all rounds to no row" in caplog.text


def test_turns_as_json_text_name_their_images_as_other_turns_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(70).save(tmp_path / "i.png")
    turns = [user([{"type": "image", "image": "i.png"}, {"type": "text", "text": "what?"}]), assistant("a cat")]
    cell = json.dumps(turns).replace('"', '""')
    (tmp_path / "rows.csv").write_text(f'messages\n"{cell}"\n')
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    picture(200).save("i.png")  # another image of that name, where the run was started
    (row,) = load(tmp_path / "rows.csv")
    (place,) = [part for part in json.loads(row["messages"])[0]["content"] if part["type"] == "image"]
    assert decode_image(place["image"]).getpixel((0, 0))[0] == 70


# --------------------------------------------------------------------------------------------------------------------
# What is left out, and under which name
# --------------------------------------------------------------------------------------------------------------------
NARRATED = {"messages": [user("x"), {"role": "narrator", "content": "he said"}, assistant("y")]}
UNTRAINED = {"messages": [user("x"), assistant("y", weight=0)]}
GOOD = {"messages": [user("why?"), assistant("it is red")]}


@pytest.mark.parametrize("images", [True, False])
def test_rows_that_are_left_out_are_counted_once_each(make_trainer: MakeTrainer, images: bool) -> None:
    rows = [{**row, "images": [picture()]} if images else row for row in (GOOD, NARRATED, UNTRAINED, NARRATED, GOOD)]
    trainer = make_trainer(train_dataset=rows, skip_bad_rows=True)
    assert len(trainer.train_dataset) == 2 and dict(trainer.skipped_rows) == {"not a conversation": 3}


def test_what_an_evaluation_leaves_out_is_said(make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture) -> None:
    make_trainer(train_dataset=[GOOD] * 4, eval_dataset=[GOOD, NARRATED, NARRATED], skip_bad_rows=True)
    assert "Skipped 2 rows of an evaluation set: {'not a conversation': 2}" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_a_row_of_a_stream_is_named_by_its_number_where_it_has_one(
    make_trainer: MakeTrainer, tmp_path: Path, workers: int
) -> None:
    """Of two workers, each counts its own part."""
    for name, rows in {
        "1": [ROW] * 8,
        "2": [*[ROW] * 5, {**ROW, "prompt": "which one?", "completion": ""}, *[ROW] * 2],
    }.items():
        write(tmp_path / f"{name}.jsonl", *rows)
    rows = load_source(DistillSource(path=str(tmp_path)), streaming=True)
    trainer = make_trainer(
        train_dataset=rows, max_steps=4, dataloader_num_workers=workers, dataloader_persistent_workers=False
    )
    named = r"The row that begins 'which one\?'" if workers else "Row 13"
    with pytest.raises(ValueError, match=f"{named} has an empty completion"):
        trainer.train()


def test_a_bad_row_of_a_mixture_with_images_in_its_turns_is_skipped(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    picture().save(tmp_path / "i.png")
    shown = user([{"type": "image", "image": "i.png"}, {"type": "text", "text": "what?"}])
    rows = [{"messages": [shown, assistant("a cat")]}] * 3 + [{"messages": [shown, {"role": "alien", "content": "?"}]}]
    mixed = DistillMixtureConfig(datasets=[{"path": str(write(tmp_path / "rows.jsonl", *rows))}])
    trainer = make_trainer(train_dataset=load_mixture(mixed, skip_bad_rows=True)["train"], skip_bad_rows=True)
    assert len(trainer.train_dataset) == 3 and sum(trainer.skipped_rows.values()) == 1
    with pytest.raises(ValueError, match="row 3.* found 'alien'"):
        load_mixture(mixed)


def test_a_transform_of_the_callers_own_sees_images(make_trainer: MakeTrainer) -> None:
    half = Image.new("RGB", (32, 32), "white")
    half.paste((200, 0, 0), (0, 0, 32, 16))
    rows = Dataset.from_list([{**GOOD, "images": [half]}] * 4)
    turned = rows.with_transform(
        lambda batch: {**batch, "images": [[i.rotate(90) for i in of] for of in batch["images"]]}
    )
    seen = [
        trainer.data_collator([trainer.train_dataset[0]])["pixel_values"]
        for trainer in (make_trainer(train_dataset=one) for one in (rows, turned))
    ]
    torch.testing.assert_close(seen[1][0, 0].rot90(-1, (1, 2)), seen[0][0, 0])
    assert not torch.equal(*seen)
