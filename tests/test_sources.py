"""Datasets by name, as people keep them on disk: opened with one flag or none, or refused in a sentence."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage

from hf_lingudistill.bad_rows import SOURCE_COLUMN
from hf_lingudistill.formats import as_trl_row
from hf_lingudistill.hub.run_facts import dataset_fact
from hf_lingudistill.images import decode_image
from hf_lingudistill.labs.evaluation.data import image_items, text_items
from hf_lingudistill.labs.evaluation.suite import TextTask, VisionTask
from hf_lingudistill.mixtures import DistillMixtureConfig, DistillSource, load_mixture
from hf_lingudistill.sources import load_source

Row = dict[str, Any]
TURNS = [{"role": "user", "content": "what shape?"}, {"role": "assistant", "content": "a circle"}]
LLAVA = [{"from": "human", "value": "<image>\nwhat shape?"}, {"from": "gpt", "value": "a circle"}]


def picture(seed: int = 0) -> PILImage.Image:
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 255, (12, 12, 3), dtype=np.uint8))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two pictures in `data/pictures`, and a working directory that is another one, with another picture of that name."""
    pictures = tmp_path / "data" / "pictures"
    pictures.mkdir(parents=True)
    picture(0).save(pictures / "a.png")
    picture(1).save(pictures / "b.png")
    (tmp_path / "cwd").mkdir()
    picture(7).save(tmp_path / "cwd" / "c.png")
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "data"


def opened(path: Path | str, *, streaming: bool = False, image_folder: str | None = None, **fields: Any) -> list[Row]:
    return list(load_source(DistillSource(path=str(path), **fields), streaming=streaming, image_folder=image_folder))


def seeds(rows: list[Row], column: str = "images") -> list[int | None]:
    """Which pictures the rows hold."""
    known = {picture(seed).tobytes(): seed for seed in (0, 1, 7)}
    values = [value for row in rows for value in (row[column] if isinstance(row[column], list) else [row[column]])]
    return [known.get(decode_image(value).tobytes()) for value in values]


def lines(path: Path, rows: list[Row], *, end: str = "\n", start: bytes = b"") -> Path:
    path.write_bytes(start + "".join(json.dumps(row) + end for row in rows).encode())
    return path


@pytest.mark.parametrize("streaming", [False, True], ids=["dataset", "stream"])
@pytest.mark.parametrize("column", ["images", "image"])
def test_paths_of_images_begin_at_the_file(elsewhere: Path, column: str, streaming: bool) -> None:
    names = [
        "pictures/a.png",
        str(elsewhere / "pictures" / "b.png"),
        "c.png",
    ]  # relative, absolute, and to the start of the run
    rows = [{"messages": TURNS, column: [name] if column == "images" else name} for name in names]
    file = lines(elsewhere / "rows.jsonl", rows)
    for path, more in ((file, {}), (elsewhere, {}), ("json", {"data_files": str(file)})):
        assert seeds(opened(path, streaming=streaming, **more), column) == [0, 1, 7]


def test_an_image_folder_comes_first(elsewhere: Path) -> None:
    file = lines(elsewhere / "rows.jsonl", [{"messages": TURNS, "images": ["a.png"]}])
    with pytest.raises(ValueError, match="cannot be read"):
        seeds(opened(file))
    assert seeds(opened(file, image_folder=str(elsewhere / "pictures"))) == [0]
    mixture = DistillMixtureConfig(datasets=[{"path": str(file), "data_dir": str(elsewhere / "pictures")}])
    assert seeds(list(load_mixture(mixture)["train"])) == [0]


def test_paths_in_the_turns_of_a_conversation_begin_at_the_file_too(elsewhere: Path) -> None:
    content = [{"type": "image", "image": "pictures/a.png"}, {"type": "text", "text": "pictures/b.png"}]
    file = lines(elsewhere / "rows.jsonl", [{"messages": [{"role": "user", "content": content}, TURNS[1]]}] * 2)
    (first, second), _ = (row["messages"][0]["content"] for row in opened(file))
    assert decode_image(first["image"]).tobytes() == picture(0).tobytes() and second["text"] == "pictures/b.png"


@pytest.mark.parametrize(
    ("end", "start"),
    [("\n", b""), ("\r\n", b""), ("\n", b"\xef\xbb\xbf"), ("\r\n", b"\xef\xbb\xbf")],
    ids=["unix", "dos", "bom", "both"],
)
def test_json_lines_from_any_system(elsewhere: Path, end: str, start: bytes) -> None:
    file = lines(elsewhere / "rows.jsonl", [{"messages": TURNS, "id": i} for i in range(3)], end=end, start=start)
    assert [row["id"] for row in opened(file)] == [0, 1, 2]


def test_a_llava_file_is_a_list_of_rows_some_without_an_image(elsewhere: Path) -> None:
    rows = [
        {"id": "0", "image": "pictures/a.png", "conversations": LLAVA},
        {"id": 1, "conversations": [{"from": "human", "value": "hello"}, LLAVA[1]]},
    ]
    (elsewhere / "llava.json").write_text(json.dumps(rows))
    found = opened(elsewhere / "llava.json")
    assert seeds(found[:1], "image") == [0] and found[1]["image"] is None
    mixture = DistillMixtureConfig(datasets=[{"path": str(elsewhere / "llava.json")}])
    assert [len(row["images"]) for row in load_mixture(mixture)["train"]] == [1, 0]


def test_tables_of_every_kind(elsewhere: Path) -> None:
    data = Dataset.from_list([{"prompt": "a", "completion": "b"}] * 3)
    data.to_parquet(elsewhere / "rows.parquet")
    data.to_csv(elsewhere / "rows.csv", index=False)
    data.to_json(elsewhere / "rows.jsonl.gz", compression="gzip")
    for name in ("rows.parquet", "rows.csv", "rows.jsonl.gz"):
        assert opened(elsewhere / name) == list(data)


def test_parquet_with_the_bytes_of_images(elsewhere: Path) -> None:
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    features = Features({"images": List(Image()), "prompt": Value("string"), "completion": Value("string")})
    row = {"images": [{"bytes": buffer.getvalue(), "path": None}], "prompt": "a", "completion": "b"}
    Dataset.from_list([row], features=features).to_parquet(elsewhere / "rows.parquet")
    assert seeds(opened(elsewhere / "rows.parquet")) == [0]
    text = base64.b64encode(buffer.getvalue()).decode()
    file = lines(elsewhere / "rows.jsonl", [{"messages": TURNS, "images": [text, "data:image/png;base64," + text]}])
    assert seeds(opened(file)) == [0, 0]


def test_a_folder_of_images_with_their_rows(elsewhere: Path) -> None:
    lines(
        elsewhere / "pictures" / "metadata.jsonl",
        [{"file_name": f"{name}.png", "prompt": "x", "completion": name} for name in "ab"],
    )
    rows = opened(elsewhere / "pictures")
    assert seeds(rows, "image") == [{"a": 0, "b": 1}[row["completion"]] for row in rows] and len(rows) == 2


def test_images_beside_a_table_are_not_taken_for_its_rows(elsewhere: Path) -> None:
    lines(elsewhere / "train.jsonl", [{"messages": TURNS, "images": ["pictures/a.png"]}])
    lines(elsewhere / "validation.jsonl", [{"messages": TURNS, "images": ["pictures/b.png"]}])
    assert seeds(opened(elsewhere)) == [0] and seeds(opened(elsewhere, split="validation")) == [1]


def test_a_split_is_a_word_of_its_own_in_a_file_name(elsewhere: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("medieval", "contest", "devices", "restrained", "train-2"):
        lines(elsewhere / f"{name}.jsonl", [{"messages": TURNS, "images": ["pictures/a.png"]}])
    assert len(opened(elsewhere)) == 5 and not caplog.records
    lines(elsewhere / "shapes_val.jsonl", [{"messages": TURNS, "images": ["pictures/b.png"]}])
    assert len(opened(elsewhere)) == 5 and seeds(opened(elsewhere, split="validation")) == [1]
    assert "validation: shapes_val.jsonl" in caplog.text


def test_a_table_below_the_folder_of_its_images_is_found(elsewhere: Path) -> None:
    (elsewhere / "rows").mkdir()
    lines(elsewhere / "rows" / "a.jsonl", [{"messages": TURNS, "images": ["pictures/a.png"]}])
    assert seeds(opened(elsewhere)) == [0]


@pytest.mark.parametrize("images", [True, False], ids=["with images", "texts"])
def test_tables_of_several_kinds_in_a_folder_are_not_left_out_silently(elsewhere: Path, images: bool) -> None:
    folder = elsewhere if images else elsewhere / "texts"
    folder.mkdir(exist_ok=True)
    lines(folder / "a.jsonl", [{"messages": TURNS}] * 2)
    (folder / "dataset_info.json").write_text("{}")  # no rows: datasets' own
    assert len(opened(folder)) == 2
    (folder / "b.csv").write_text("prompt,completion\na,b\n")
    assert "holds tables of several kinds (a.jsonl, b.csv)" in refused(folder)
    assert len(opened(folder / "b.csv")) == 1


def test_what_a_download_brings_along_holds_no_rows(elsewhere: Path) -> None:
    lines(elsewhere / "train.jsonl", [{"messages": TURNS, "images": ["pictures/a.png"]}])
    (elsewhere / ".cache").mkdir()
    (elsewhere / ".cache" / "x.csv").write_text("a,b\n1,2\n")
    lines(elsewhere / "pictures" / "metadata.jsonl", [{"file_name": "a.png"}])  # the table on top counts
    assert seeds(opened(elsewhere)) == [0]
    (elsewhere / "pictures" / "metadata.jsonl").unlink()
    (elsewhere / "scores.csv").write_text("a,b\n1,2\n")
    assert "several kinds" in refused(elsewhere)  # control
    (elsewhere / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: train.jsonl\n---\n")
    assert len(opened(elsewhere)) == 1


@pytest.mark.parametrize("streaming", [False, True], ids=["dataset", "stream"])
def test_a_part_of_a_saved_split_is_read_as_load_dataset_reads_it(elsewhere: Path, streaming: bool) -> None:
    rows = [{"prompt": str(number), "completion": "x"} for number in range(10)]
    DatasetDict(train=Dataset.from_list(rows[:6]), test=Dataset.from_list(rows[6:])).save_to_disk(elsewhere / "saved")

    def prompts(split: str) -> str:
        return "".join(row["prompt"] for row in opened(elsewhere / "saved", split=split, streaming=streaming))

    assert prompts("train[:2]") == "01" and prompts("train[-2:]") == "45" and prompts("test[50%:]") == "89"
    assert prompts("train[:1]+test[:1]") == "06"
    assert "has no part 'trian[:1]'" in refused(elsewhere / "saved", split="trian[:1]", streaming=streaming)
    assert "has no part 'train[:a]'" in refused(elsewhere / "saved", split="train[:a]", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True], ids=["dataset", "stream"])
def test_a_saved_split_without_rows_is_named(elsewhere: Path, streaming: bool) -> None:
    rows = Dataset.from_list([{"messages": TURNS}])
    DatasetDict(train=rows, test=rows.select([])).save_to_disk(elsewhere / "saved")
    rows.select([]).save_to_disk(elsewhere / "one")
    for name in ("saved", "one"):
        assert "holds a split without rows: give it some" in refused(elsewhere / name, streaming=streaming)
    with pytest.raises(ValueError, match="holds a split without rows"):
        text_items(TextTask(name="t", path=str(elsewhere / "one"), column="text"), 0)


@pytest.mark.parametrize("streaming", [False, True], ids=["dataset", "stream"])
@pytest.mark.parametrize("column", ["images", "image"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("size", [200, 900, 3000])
def test_an_image_in_base64_may_have_any_length(
    elsewhere: Path, streaming: bool, column: str, kind: str, size: int
) -> None:
    """A text longer than the name of a file may be (255) makes `Path.is_file` fail; one of less than 1,024 may be a path."""
    small = PILImage.new("RGB", (2, 2), "red")
    small.save(elsewhere / "small", kind)
    stored = (elsewhere / "small").read_bytes()
    padded = stored + b"\xfb\xff" * ((size - len(stored) * 4 // 3) // 3)  # what follows the image is not read
    text = base64.b64encode(padded).decode()
    assert len(text) < 1024 or size > 1024
    row = {"messages": TURNS, column: [text] if column == "images" else text, "question": "what?", "answer": "red"}
    file = lines(elsewhere / "rows.jsonl", [row])
    (found,) = opened(file, streaming=streaming)
    value = found[column][0] if column == "images" else found[column]
    assert np.abs(np.asarray(decode_image(value), int) - np.asarray(small, int)).max() < 4
    (item,) = image_items(VisionTask(name="t", path=str(file), split="train", image=column), 0)
    assert item.images[0].size == (2, 2)
    with pytest.raises(ValueError, match="FileNotFoundError: '/data/"):  # control: a path is one
        decode_image("/data/" + "folder/" * 20 + "name")


def test_one_text_among_lists_of_images_leaves_the_others_paths(elsewhere: Path) -> None:
    rows = [{"messages": TURNS, "images": images} for images in (["pictures/a.png"], "pictures/b.png", [])]
    found = opened(lines(elsewhere / "rows.jsonl", rows))
    assert seeds(found[:1]) == [0] and found[2]["images"] == []
    with pytest.raises(ValueError, match="^Row 1: column 'images' must hold a list of images, found str"):
        as_trl_row(found[1], "Row 1")


def test_an_empty_file_has_no_rows(elsewhere: Path) -> None:
    (elsewhere / "empty.jsonl").write_text("")
    assert refused(elsewhere / "empty.jsonl").endswith(": holds no rows.")


def refused(path: Path | str, **fields: Any) -> str:
    with pytest.raises(ValueError) as refusal:
        opened(path, **fields)
    message = str(refusal.value)
    assert len(message) < 600 and "\n" not in message and message.startswith(f"{path}: ")
    return message


@pytest.mark.parametrize("streaming", [False, True], ids=["dataset", "stream"])
def test_a_split_that_is_not_there_is_named_with_those_that_are(elsewhere: Path, streaming: bool) -> None:
    lines(elsewhere / "validation.jsonl", [{"messages": TURNS}])
    sentence = "has no split 'train', found ['validation']: name one of them (--dataset_train_split or "
    assert sentence in refused(elsewhere, streaming=streaming)
    assert len(opened(elsewhere, split="validation", streaming=streaming)) == 1
    DatasetDict(validation=Dataset.from_list([{"messages": TURNS}])).save_to_disk(elsewhere / "saved")
    assert sentence in refused(elsewhere / "saved", streaming=streaming)
    # a single file is for training: evaluation must not read it by accident
    assert "has no split 'test', found ['train']" in refused(
        elsewhere / "validation.jsonl", split="test", streaming=streaming
    )


@pytest.mark.parametrize("streaming", [False, True], ids=["dataset", "stream"])
def test_what_cannot_be_read_is_one_sentence(elsewhere: Path, streaming: bool) -> None:
    (elsewhere / "broken.jsonl").write_text('{"messages": [' + "x" * 90_000 + "\n")
    (elsewhere / "rows.docx").write_text("x")
    (elsewhere / "broken.parquet").write_bytes(b"PAR1" + b"x" * 100)
    for name in ("broken.jsonl", "broken.parquet"):
        assert "cannot be read (" in refused(elsewhere / name, streaming=streaming)
    assert "expected one of .json, .jsonl" in refused(elsewhere / "rows.docx", streaming=streaming)
    assert "no such file or folder" in refused(elsewhere / "nowhere", streaming=streaming)
    assert "no such file or folder" in refused("some-org/no-such-dataset", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True], ids=["dataset", "stream"])
def test_tabs_part_the_columns_of_a_tsv(elsewhere: Path, streaming: bool) -> None:
    row = {"prompt": "what, shape?", "completion": "a circle"}
    for name, mark in (("a.tsv", "\t"), ("a.TSV", "\t")):
        (elsewhere / name).write_text("prompt\tcompletion\nwhat, shape?\ta circle\n".replace("\t", mark))
        assert opened(elsewhere / name, streaming=streaming) == [row]
    (elsewhere / "a.csv").write_text('prompt,completion\n"what, shape?",a circle\n')
    assert opened(elsewhere / "a.csv", streaming=streaming) == [row]


@pytest.mark.parametrize("option", ["image_folder", "data_dir"])
def test_a_folder_of_images_that_is_none_is_refused(elsewhere: Path, option: str) -> None:
    """Its name would be left out of every path, and each image be missing by itself."""
    file = lines(elsewhere / "rows.jsonl", [{"prompt": "a", "completion": "b", "images": ["a.png"]}])
    for folder in (elsewhere / "pictures" / "a.png", elsewhere / "nowhere"):
        with pytest.raises(ValueError, match=f"rows.jsonl: {option} '{folder}' is no folder"):
            opened(file, **{option: str(folder)})
    opened(file, **{option: str(elsewhere / "pictures")})


# --------------------------------------------------------------------------------------------------------------------
# Mixtures
# --------------------------------------------------------------------------------------------------------------------
PARTS = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what shape?"}]}, TURNS[1]]
SOURCES: dict[str, Row] = {
    "texts": {"id": 1, "messages": TURNS},
    "parts": {"id": "one", "messages": PARTS, "images": ["pictures/a.png"]},
    "LLaVA": {"id": "2", "conversations": LLAVA, "image": "pictures/a.png"},
    "pairs": {"prompt": "what shape?", "completion": "a circle"},
    "turns": {"prompt": TURNS[:1], "completion": TURNS[1:], "images": ["pictures/a.png"], "distill": True},
    "in the turn": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "image": "pictures/a.png"}, {"type": "text", "text": "what shape?"}],
            },
            TURNS[1],
        ]
    },
}


@pytest.mark.parametrize("images", [False, True], ids=["text", "images"])
@pytest.mark.parametrize("streaming", [False, True], ids=["datasets", "streams"])
@pytest.mark.parametrize("fault", ["empty answer", "image", "shape"])
def test_a_bad_row_of_a_mixture_is_named_by_its_source(
    elsewhere: Path, make_trainer: Any, streaming: bool, images: bool, fault: str
) -> None:
    shown = {"images": ["pictures/a.png"]} if images else {}
    bad: Row = {"messages": TURNS, **shown}
    if fault == "empty answer":
        bad["messages"] = [TURNS[0], {"role": "assistant", "content": ""}]
    elif fault == "shape":
        bad["messages"] = [TURNS[0], {"role": "bystander", "content": "a circle"}]
    elif images:
        bad["images"] = ["pictures/none.png"]
    else:
        pytest.skip("a text has no image")
    good = {"messages": TURNS, **shown}
    first, second = lines(elsewhere / "first.jsonl", [good] * 8), lines(elsewhere / "second.jsonl", [good, good, bad])

    def train(*paths: Path) -> None:
        mixture = DistillMixtureConfig(datasets=[{"path": str(path)} for path in paths], streaming=streaming)
        trainer = make_trainer(train_dataset=load_mixture(mixture)["train"], max_steps=2)
        for _ in itertools.islice(trainer.get_train_dataloader(), 8):
            pass

    with pytest.raises(ValueError, match=rf"datasets\[1\] \({re.escape(str(second))}\), row 2"):
        train(first, second)
    train(first, lines(elsewhere / "third.jsonl", [good] * 3))  # control


@pytest.mark.parametrize("streaming", [False, True], ids=["datasets", "streams"])
def test_sources_of_any_schemas_mix_and_train_together(elsewhere: Path, streaming: bool, make_trainer: Any) -> None:
    sources = [
        {"path": str(lines(elsewhere / f"{index}.jsonl", [row] * 2)), "distill": index > 0}
        for index, row in enumerate(SOURCES.values())
    ]
    mixed = load_mixture(DistillMixtureConfig(datasets=sources, streaming=streaming))["train"]
    rows = sorted(mixed, key=lambda row: row[SOURCE_COLUMN])  # of streams they come in turns
    assert [row["distill"] for row in rows] == [False] * 2 + [True] * 10
    assert [len(row["images"]) for row in rows] == [0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1]
    assert seeds([row for row in rows if row["images"]]) == [0] * 8
    trainer = make_trainer(train_dataset=mixed, train_sampling_strategy="sequential", per_device_train_batch_size=12)
    batch = next(iter(trainer.get_train_dataloader()))
    # each as it is alone, and all that show the picture alike
    collator = make_trainer().data_collator
    for index, (name, row) in enumerate(SOURCES.items()):
        row = {"images": [], **row}
        row["images"] = [decode_image(str(elsewhere / "pictures" / "a.png"))] if name not in ("texts", "pairs") else []
        if name == "in the turn":
            row["messages"] = PARTS
        alone = collator([{k: v for k, v in row.items() if k != "image"}])
        length = alone["input_ids"].shape[1]
        for at in (index, index + len(SOURCES)) if streaming else (2 * index, 2 * index + 1):
            assert batch["input_ids"][at, :length].tolist() == alone["input_ids"][0].tolist(), name
            assert batch["labels"][at, :length].tolist() == alone["labels"][0].tolist(), name
    trainer.train()


@pytest.mark.parametrize("streaming", [False, True], ids=["datasets", "streams"])
def test_a_source_none_of_whose_columns_is_trained_on_is_refused(elsewhere: Path, streaming: bool) -> None:
    """Joined with others its rows would have their columns, empty. Control: the column of its name is running text."""
    lines(elsewhere / "good.jsonl", [{"text": "the cat sat on the mat"}] * 2)
    lines(elsewhere / "other.jsonl", [{"question": "what shape?", "answer": "a circle"}] * 2)
    sources = [DistillSource(path=str(elsewhere / name)) for name in ("good.jsonl", "other.jsonl")]
    mixture = DistillMixtureConfig(datasets=sources, streaming=streaming)
    with pytest.raises(
        ValueError, match=r"datasets\[1\] \(.*other.jsonl\) has the columns answer, question: expected"
    ):
        load_mixture(mixture)
    lines(elsewhere / "other.jsonl", [{"body": "a circle"}] * 2)
    with pytest.raises(ValueError, match=r"datasets\[0\]"):
        load_mixture(mixture, text_column="body")
    lines(elsewhere / "good.jsonl", [{"body": "the cat sat on the mat"}] * 2)
    assert len(list(load_mixture(mixture, text_column="body")["train"])) == 4


def test_a_source_whose_rows_fill_either_image_column_keeps_both(elsewhere: Path) -> None:
    mixed = lines(
        elsewhere / "joined.jsonl",
        [{"messages": TURNS, "images": ["pictures/a.png"]}, {"messages": TURNS, "image": "pictures/b.png"}],
    )
    texts = lines(elsewhere / "texts.jsonl", [{"messages": TURNS}])
    sources = [{"path": str(path), "distill": True} for path in (mixed, texts)]
    rows = list(load_mixture(DistillMixtureConfig(datasets=sources))["train"])
    assert seeds(rows) == [0, 1] and [len(row["images"]) for row in rows] == [1, 1, 0]
    lines(mixed, [{"messages": TURNS, "images": ["pictures/a.png"], "image": "pictures/b.png"}])
    with pytest.raises(
        ValueError, match="joined.jsonl\\), row 0 has 1 images in column 'images' and others in column 'image'"
    ):
        load_mixture(DistillMixtureConfig(datasets=sources))


def test_a_schema_that_sources_share_stays_as_it_is(elsewhere: Path) -> None:
    first, second = (lines(elsewhere / f"{i}.jsonl", [{"messages": TURNS, "id": i}]) for i in range(2))
    mixed = load_mixture(DistillMixtureConfig(datasets=[{"path": str(first)}, {"path": str(second)}]))["train"]
    assert mixed.features["messages"] == Dataset.from_list([{"messages": TURNS}]).features["messages"]
    assert mixed["id"] == [0, 1]
    text = lines(elsewhere / "2.jsonl", [{"messages": TURNS, "id": "two"}])
    mixed = load_mixture(DistillMixtureConfig(datasets=[{"path": str(first)}, {"path": str(text)}]))["train"]
    assert set(mixed.column_names) == {"messages", "distill", SOURCE_COLUMN}


def test_files_on_the_hub_are_recorded_as_their_dataset(tmp_path: Path) -> None:
    commit = "3c380a731a3429c1d04693d6ec16d7e683def84c"
    files = f"hf://datasets/ORG/DATA@{commit}/docvqa/train-00000-of-*.parquet"
    fact = dataset_fact("parquet", data_files=files, split="train[:9]", distill=False)
    assert fact == {
        "id": "ORG/DATA",
        "name": "ORG/DATA",
        "revision": commit,
        "config": "docvqa",
        "split": "train[:9]",
        "distill": False,
    }
    # A loader's name is no dataset's
    local = dataset_fact("json", data_files={"train": [str(tmp_path / "a.jsonl"), "/data/b.jsonl"]})
    assert local == {"id": None, "name": "a.jsonl, b.jsonl", "revision": None}
    assert dataset_fact("ORG/DATA", data_files="a.parquet")["id"] == "ORG/DATA"
