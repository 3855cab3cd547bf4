"""Rows and batches: bad images, the flag that selects rows, lengths, skipped rows, and mixtures."""

from __future__ import annotations

import contextlib
import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, List, Value, load_dataset
from PIL import Image as PILImage
from trl import DatasetMixtureConfig, get_dataset
from trl.scripts.utils import DatasetConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_lingudistill.bad_rows import SOURCE_COLUMN, flag_of
from hf_lingudistill.batch import (
    ROW_COLUMN,
    BadRow,
    DistillCollator,
    check_distill_column,
    decode_image,
    drop_bad_rows,
    prepare_dataset,
)
from hf_lingudistill.mixtures import DistillMixtureConfig, load_mixture

Row = dict[str, Any]
EXIF_ORIENTATION, EXIF_ROTATE_270 = 0x0112, 6


def encoded(image: PILImage.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(size: tuple[int, int] = (32, 32)) -> PILImage.Image:
    return PILImage.effect_noise(size, 60).convert("RGB")


PNG = encoded(noise())
JPEG = encoded(noise(), "JPEG", quality=95)
TRUNCATED_JPEG = JPEG[: len(JPEG) // 2]


def pixels(image: PILImage.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image).astype(int)


def stored(data: bytes | None, path: str | None = None) -> Row:
    """An image as `datasets` stores it."""
    return {"bytes": data, "path": path}


# --------------------------------------------------------------------------------------------------------------------
# decode_image
# --------------------------------------------------------------------------------------------------------------------
RED = PILImage.new("RGB", (6, 4), (200, 30, 30))


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (RED, "PNG"),
        (RED.convert("RGBA"), "PNG"),
        (RED.quantize(4), "PNG"),
        (RED.convert("CMYK"), "JPEG"),
        (RED, "GIF"),
        (RED, "WEBP"),
        (RED, "BMP"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.mode,
)
def test_every_mode_and_format_becomes_rgb_of_the_same_colour(image: PILImage.Image, kind: str) -> None:
    decoded = decode_image(encoded(image, kind))
    assert decoded.mode == "RGB" and decoded.size == (6, 4)
    assert np.abs(pixels(decoded) - (200, 30, 30)).max() < 12  # palettes, JPEG and WebP are not exact


def test_grey_becomes_three_equal_channels() -> None:
    grey = PILImage.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10)
    assert grey.mode == "L"
    decoded = pixels(decode_image(encoded(grey)))
    assert (decoded == pixels(grey)[..., None]).all()


def sixteen_bit(values: list[list[int]]) -> PILImage.Image:
    return PILImage.fromarray(np.array(values, dtype=np.uint16))


def test_a_16_bit_image_is_scaled_and_not_clipped() -> None:
    image = sixteen_bit([[0, 20_000], [40_000, 65_535]])
    decoded = pixels(decode_image(encoded(image)))[..., 0]
    assert np.abs(decoded - [[0, 78], [156, 255]]).max() <= 1
    clipped = pixels(PILImage.open(io.BytesIO(encoded(image))).convert("L"))
    assert len(np.unique(clipped)) < 4  # control: what PIL's own conversion makes of it


@pytest.mark.parametrize("level", [10_000, 40_000])
def test_a_16_bit_image_keeps_its_brightness(level: int) -> None:
    """Stretched to its own minimum and maximum, an even grey would turn black whatever its level."""
    decoded = pixels(decode_image(encoded(sixteen_bit([[level, level], [level, level]]))))
    assert np.abs(decoded - level / 257).max() <= 1


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [PILImage.new("RGB", (6, 4), colour) for colour in ((200, 30, 30), (30, 30, 200))]
    animation = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert PILImage.open(io.BytesIO(animation)).n_frames == 2
    assert np.abs(pixels(decode_image(animation)) - (200, 30, 30)).max() < 12


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_rotation_is_applied(kind: str) -> None:
    image = PILImage.new("RGB", (8, 4), "black")
    image.paste((255, 255, 255), (0, 0, 4, 4))  # white on the left
    exif = PILImage.Exif()
    exif[EXIF_ORIENTATION] = EXIF_ROTATE_270
    decoded = decode_image(encoded(image, kind, exif=exif))
    assert decoded.size == (4, 8)
    assert pixels(decoded)[0].mean() > 200 > 50 > pixels(decoded)[-1].mean()  # white on top
    assert decode_image(encoded(image, kind)).size == (8, 4)  # control


def test_an_image_comes_as_object_bytes_path_or_stored_row(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(PNG)
    expected = pixels(decode_image(PNG))
    for value in (
        PILImage.open(path),
        str(path),
        path,
        stored(PNG),
        stored(None, str(path)),
        stored(PNG, "elsewhere.png"),
    ):
        assert (pixels(decode_image(value)) == expected).all()
    assert (pixels(decode_image(JPEG)) != expected).any()  # control


def test_an_image_inside_an_archive_is_read_as_datasets_reads_it(tmp_path: Path) -> None:
    """Image folders in archives, and streamed ones, are stored as `zip://...` and `hf://...` paths without bytes."""
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("image.png", PNG)
    for streaming in (True, False):
        dataset = load_dataset("imagefolder", data_files=str(archive), split="train", streaming=streaming)
        (row,) = prepare_dataset(dataset)
        assert row["image"]["bytes"] is None and "::" in row["image"]["path"]
        assert (pixels(decode_image(row["image"])) == pixels(decode_image(PNG))).all()


BAD_IMAGES = [
    (TRUNCATED_JPEG, "image unreadable", r"an image cannot be read \(OSError: .*truncated.*\)"),
    (PNG[: len(PNG) // 2], "image unreadable", r"an image cannot be read \(OSError: .*truncated.*\)"),
    (b"no image", "image unreadable", r"an image cannot be read \(UnidentifiedImageError: .*\)"),
    (stored(b"no image"), "image unreadable", r"an image cannot be read \(UnidentifiedImageError: .*\)"),
    ("nowhere.png", "image unreadable", r"an image cannot be read \(FileNotFoundError: .*nowhere\.png.*\)"),
    (PILImage.new("RGB", (0, 3)), "image of zero size", r"an image has the size 0x3"),
    (PILImage.new("RGB", (3, 0)), "image of zero size", r"an image has the size 3x0"),
    (None, "image missing", r"an image is missing \(null\)"),
    (stored(None), "image missing", r"an image is missing \(null\)"),
    (stored(b""), "image missing", r"an image is missing \(null\)"),
    (17, "image of wrong type", r"an image was expected, found int"),
    (
        [RED],
        "image of wrong type",
        r"an image was expected, found list; of an array of pixels, `PIL.Image.fromarray` makes one",
    ),
    (
        np.zeros((4, 4, 3), np.uint8),
        "image of wrong type",
        r"an image was expected, found ndarray; of an array of pixels, `PIL.Image.fromarray` makes one",
    ),
]


@pytest.mark.parametrize(("value", "reason", "message"), BAD_IMAGES, ids=[str(case[1:]) for case in BAD_IMAGES])
def test_a_bad_image_is_named_with_its_reason(value: Any, reason: str, message: str) -> None:
    with pytest.raises(BadRow) as refusal:
        decode_image(value)
    assert refusal.value.reason == reason
    assert re.fullmatch(message, str(refusal.value))


def test_an_image_too_large_to_decode_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 100)  # PIL refuses at twice this
    with pytest.raises(BadRow, match="too large to decode") as refusal:
        decode_image(PNG)
    assert refusal.value.reason == "image too large"


# --------------------------------------------------------------------------------------------------------------------
# DistillCollator, around a collator that behaves as TRL's does
# --------------------------------------------------------------------------------------------------------------------
IMAGE_TOKEN, TOKENS_PER_IMAGE = 900, 5


class FakeInner:
    """Prompt and completion are one token a character, `<` is an image. Edits its rows in place, as TRL's does."""

    def __init__(self, completion_only: bool = True) -> None:
        self.max_length: int | None = 1000  # what the trainer would have set; the wrapper must take over
        self.completion_only = completion_only

    def __call__(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        sequences = []
        for row in rows:
            assert not {"distill", "is_text", ROW_COLUMN} & set(row)
            if "image" in row:
                row["images"] = [row.pop("image")]
            images = row.pop("images")
            assert all(isinstance(image, PILImage.Image) and image.mode == "RGB" for image in images)
            if "explode" in row["prompt"]:
                raise RuntimeError("no template")
            assert row["prompt"].count("<") == len(images)
            prompt = [
                token for c in row["prompt"] for token in ([IMAGE_TOKEN] * TOKENS_PER_IMAGE if c == "<" else [ord(c)])
            ]
            answer = [ord(c) for c in row["completion"]]
            labels = [-100 if self.completion_only else token for token in prompt] + answer
            sequences.append((prompt + answer, labels))
        T = max(len(ids) for ids, _ in sequences)
        if self.max_length is not None:
            T = min(T, self.max_length)

        def padded(values: list[int], fill: int) -> list[int]:
            return (values + [fill] * (T - len(values)))[:T]

        return {
            "input_ids": torch.tensor([padded(ids, 0) for ids, _ in sequences]),
            "attention_mask": torch.tensor([padded([1] * len(ids), 0) for ids, _ in sequences]),
            "labels": torch.tensor([padded(labels, -100) for _, labels in sequences]),
            "pixel_values": torch.zeros(len(rows), 1, 3, 2, 2),
        }


def vision_row(prompt: str = "<what?", completion: str = "red", **columns: Any) -> Row:
    return {"images": [stored(PNG)] * prompt.count("<"), "prompt": prompt, "completion": completion, **columns}


def make_collator(completion_only: bool = True, **settings: Any) -> DistillCollator:
    return DistillCollator(FakeInner(completion_only), image_token_ids=(IMAGE_TOKEN,), **settings)


def refusal_of(collator: DistillCollator, rows: list[Row]) -> BadRow:
    with pytest.raises(BadRow) as refusal:
        collator(rows)
    return refusal.value


def test_the_batch_carries_the_flag_of_each_row() -> None:
    rows = [vision_row(distill=True), vision_row(distill=False), vision_row()]
    batch = make_collator()(rows)
    assert batch["distill"].dtype == torch.bool
    assert batch["distill"].tolist() == [True, False, True]  # without the column: distilled
    rows = [vision_row(is_text=False), vision_row(is_text=True)]
    assert make_collator(distill_column="is_text")(rows)["distill"].tolist() == [False, True]


def test_the_flag_may_be_of_numpys_boolean_type() -> None:
    rows = [vision_row(distill=np.bool_(True)), vision_row(distill=np.bool_(False))]
    assert make_collator()(rows)["distill"].tolist() == [True, False]


@pytest.mark.parametrize("value", [None, "true", "no", 2, 0.5, []], ids=repr)
def test_a_flag_that_is_not_boolean_is_refused_and_the_row_named(value: Any) -> None:
    error = refusal_of(make_collator(), [vision_row(distill=True), vision_row(distill=value, **{ROW_COLUMN: 41})])
    assert error.reason == "distill flag not boolean"
    assert (
        str(error)
        == f"Row 41: column 'distill' must be true or false; found {value!r}. Repair it, or pass --skip_bad_rows."
    )


def test_the_rows_of_the_dataset_stay_as_they_were() -> None:
    rows = [vision_row(distill=True, **{ROW_COLUMN: 0}), {**vision_row(), "images": None, "prompt": "what?"}]
    before = [dict(row) for row in rows]
    make_collator()(rows)
    assert rows == before


def test_text_rows_of_a_vision_dataset_have_no_images() -> None:
    rows = [vision_row("say"), {**vision_row("say"), "images": None}, vision_row()]
    assert make_collator()(rows)["input_ids"].shape[0] == 3


def test_a_text_collator_is_left_to_its_own_length_and_images() -> None:
    inner = DataCollatorForLanguageModeling(pad_token_id=0)
    batch = DistillCollator(inner, vision=False, max_length=2)([{"input_ids": [1, 2, 3], "distill": False}])
    assert batch["input_ids"].tolist() == [[1, 2, 3]] and batch["distill"].tolist() == [False]


def test_a_padding_free_batch_has_a_flag_for_each_of_its_rows() -> None:
    """TRL joins the rows to one; a flag for each of the old ones would point outside the batch."""
    inner = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch = DistillCollator(inner, vision=False)([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}])
    assert batch["input_ids"].shape == (1, 5)
    assert batch["distill"].shape[0] == 1 and batch["distill"].all()


def test_a_bad_image_stops_the_batch_and_names_the_row() -> None:
    good = vision_row(**{ROW_COLUMN: 3})
    bad = {**vision_row(**{ROW_COLUMN: 17}), "images": [stored(TRUNCATED_JPEG)]}
    error = refusal_of(make_collator(), [good, bad])
    assert error.reason == "image unreadable"
    assert str(error).startswith("Row 17: an image cannot be read (OSError: ")
    assert str(error).endswith("Repair or remove the row, or pass --skip_bad_rows to skip such rows.")
    assert make_collator()([good])["input_ids"].shape[0] == 1  # control


@pytest.mark.parametrize(
    ("columns", "begins"),
    [
        ({"prompt": "What is this?"}, "What is this?"),
        ({"text": "a" * 100}, "a" * 60),
        ({"messages": [{"role": "user", "content": "Hello"}]}, "Hello"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour?"}]}
                ]
            },
            "Which colour?",
        ),
        ({}, ""),
    ],
    ids=["prompt", "text", "messages", "parts", "nothing"],
)
def test_a_row_without_a_number_is_named_by_how_it_begins(columns: Row, begins: str) -> None:
    error = refusal_of(make_collator(), [{"images": [None], **columns}])
    assert str(error).startswith(f"The row that begins {begins!r}: an image is missing (null).")


@pytest.mark.parametrize("completion", ["", "  \n", [], [{"role": "assistant", "content": ""}]], ids=repr)
def test_an_empty_completion_is_refused(completion: Any) -> None:
    error = refusal_of(make_collator(), [vision_row(completion=completion, **{ROW_COLUMN: 5})])
    assert error.reason == "empty answer"
    assert str(error) == "Row 5 has an empty completion. Give it an answer, or pass --skip_bad_rows."


def test_a_vision_row_without_an_image_column_is_refused() -> None:
    error = refusal_of(make_collator(), [{"prompt": "a", "completion": "b", ROW_COLUMN: 6}])
    assert error.reason == "image column missing"
    assert str(error).startswith("Row 6 has no 'images' column, found ['completion', 'prompt']")


@pytest.mark.parametrize("value", [stored(PNG), RED, "a/path.png"], ids=["stored", "object", "path"])
def test_an_images_column_that_holds_no_list_is_refused_as_such(value: Any) -> None:
    error = refusal_of(make_collator(), [{**vision_row(**{ROW_COLUMN: 8}), "images": value}])
    assert "Row 8" in str(error) and "list" in str(error)


def test_a_single_image_column_is_decoded() -> None:
    row = vision_row()
    row["image"] = row.pop("images")[0]
    assert make_collator()([row])["input_ids"].shape == (1, TOKENS_PER_IMAGE + 5 + 3)


def test_a_row_that_the_processor_fails_on_is_found_in_its_batch() -> None:
    rows = [vision_row(**{ROW_COLUMN: 1}), vision_row("explode", **{ROW_COLUMN: 2}), vision_row(**{ROW_COLUMN: 3})]
    for batch in (rows, rows[1:2]):
        error = refusal_of(make_collator(), batch)
        assert error.reason == "processor failed"
        assert str(error) == "Row 2 cannot be processed (RuntimeError: no template)."


def test_a_failure_of_the_batch_as_a_whole_is_raised_as_it_is() -> None:
    def only_alone(rows: list[Row]) -> dict[str, torch.Tensor]:
        if len(rows) > 1:
            raise RuntimeError("rows do not fit together")
        return FakeInner()(rows)

    with pytest.raises(RuntimeError, match="rows do not fit together"):
        DistillCollator(only_alone)([vision_row(), vision_row()])


# --------------------------------------------------------------------------------------------------------------------
# Lengths
# --------------------------------------------------------------------------------------------------------------------
def test_truncation_cuts_what_runs_along_the_tokens_and_nothing_else() -> None:
    rows = [vision_row("<what?", "red"), vision_row("<what is this thing?", "a green cube")]
    whole, cut = make_collator()(rows), make_collator(max_length=25)(rows[1:])
    for key in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(cut[key], whole[key][1:, :25])
    assert cut["pixel_values"].shape == (1, 1, 3, 2, 2)
    assert whole["input_ids"].shape[1] > 25  # control: the inner collator did not truncate


def told_length(error: BadRow) -> int:
    (number,) = re.findall(r"at least (\d+)", str(error))
    return int(number)


@pytest.mark.parametrize("completion_only", [True, False], ids=["answer labels", "all labels"])
@pytest.mark.parametrize("prompt", ["<", "look: <", "<what?", "a<b<c", "text only"])
def test_the_length_that_is_told_is_enough_and_one_less_is_not(prompt: str, completion_only: bool) -> None:
    """From every max_length that is too short, the message leads to the shortest that works."""
    row = vision_row(prompt, "red", **{ROW_COLUMN: 9})
    tokens = len(make_collator(completion_only)([row])["input_ids"][0])
    refused = {}
    for max_length in range(1, tokens + 1):
        with contextlib.suppress(BadRow):
            make_collator(completion_only, max_length=max_length)([row])
            continue
        refused[max_length] = refusal_of(make_collator(completion_only, max_length=max_length), [row])
    shortest = max(refused) + 1  # all shorter ones are refused
    assert list(refused) == list(range(1, shortest)) and shortest <= tokens
    for error in refused.values():
        assert str(error).startswith("Row 9")
        assert told_length(error) == shortest


def test_truncated_image_tokens_and_truncated_answers_are_told_apart() -> None:
    row = vision_row("<what?", "red")
    first_label = TOKENS_PER_IMAGE + len("what?")
    assert refusal_of(make_collator(max_length=TOKENS_PER_IMAGE - 1), [row]).reason == "image tokens over max_length"
    error = refusal_of(make_collator(max_length=first_label), [row])
    assert error.reason == "no label" and f"max_length={first_label}" in str(error)
    assert make_collator(max_length=first_label + 1)([row])["labels"].tolist()[0][-1] == ord("r")


def test_the_row_whose_image_is_cut_is_named_among_others() -> None:
    rows = [vision_row("<", "red", **{ROW_COLUMN: 1}), vision_row("long text before <", "red", **{ROW_COLUMN: 2})]
    assert str(refusal_of(make_collator(max_length=10), rows)).startswith("Row 2")


def test_a_row_whose_labels_are_all_masked_is_refused_whatever_the_length() -> None:
    def masked(rows: list[Row]) -> dict[str, torch.Tensor]:
        batch = FakeInner(completion_only=False)(rows)
        batch["labels"][-1] = -100
        return batch

    for max_length in (None, 100):
        collator = DistillCollator(masked, image_token_ids=(IMAGE_TOKEN,), max_length=max_length)
        error = refusal_of(collator, [vision_row(**{ROW_COLUMN: 4}), vision_row(**{ROW_COLUMN: 5})])
        assert error.reason == "no label"
        assert str(error).startswith("Row 5 has no token to train on: all labels are masked.")


def test_a_label_on_the_first_token_alone_trains_nothing() -> None:
    """It has no position before it that could predict it."""

    def first_only(rows: list[Row]) -> dict[str, torch.Tensor]:
        batch = FakeInner(completion_only=False)(rows)
        batch["labels"][:, 1:] = -100
        return batch

    assert refusal_of(DistillCollator(first_only), [vision_row()]).reason == "no label"


# --------------------------------------------------------------------------------------------------------------------
# Datasets
# --------------------------------------------------------------------------------------------------------------------
VISION_FEATURES = Features(
    {"images": List(Image()), "prompt": Value("string"), "completion": Value("string"), "distill": Value("bool")}
)


def vision_dataset(rows: list[Row]) -> Dataset:
    columns = {name: [row.get(name) for row in rows] for name in VISION_FEATURES}
    return Dataset.from_dict(columns, features=VISION_FEATURES)


def plain_dataset(size: int = 4) -> Dataset:
    return vision_dataset([vision_row(f"<{index}", distill=True) for index in range(size)])


def test_prepare_numbers_the_rows_and_leaves_images_undecoded() -> None:
    single = Dataset.from_dict(
        {"image": [stored(PNG)] * 3, "prompt": ["a", "b", "c"]},
        features=Features({"image": Image(), "prompt": Value("string")}),
    )
    for dataset, column in ((plain_dataset(3), "images"), (single, "image")):
        prepared = prepare_dataset(dataset)
        assert prepared[ROW_COLUMN] == [0, 1, 2]
        images = prepared[1][column] if column == "images" else [prepared[1][column]]
        assert [image["bytes"] for image in images] == [PNG]
        before = dataset[1][column]
        assert isinstance(before[0] if column == "images" else before, PILImage.Image)  # control, and no side effect


def test_prepare_makes_a_bad_image_a_matter_of_its_row_alone() -> None:
    rows = [vision_row(), {**vision_row(), "images": [stored(TRUNCATED_JPEG)]}]
    dataset = vision_dataset(rows)
    with pytest.raises(OSError, match="truncated"):
        dataset[:]  # control
    assert len(prepare_dataset(dataset)[:]["images"]) == 2


def test_prepare_leaves_alone_what_has_no_images_or_has_its_numbers() -> None:
    text = Dataset.from_dict({"text": ["a", "b"]})
    assert prepare_dataset(text) is text
    some = prepare_dataset(plain_dataset(4)).select([3, 1])
    assert prepare_dataset(some)[ROW_COLUMN] == [3, 1]


def test_prepare_copies_no_image(tmp_path: Path) -> None:
    """A dataset of a hundred gigabytes must not be written a second time, be it shuffled or not."""
    plain_dataset(20).save_to_disk(tmp_path / "saved")
    files = set((tmp_path / "saved").iterdir())
    for dataset in (
        Dataset.load_from_disk(tmp_path / "saved"),
        Dataset.load_from_disk(tmp_path / "saved").shuffle(seed=0),
    ):
        prepared = prepare_dataset(dataset)
        assert prepared["prompt"] == dataset["prompt"]
        assert isinstance(prepared[0]["images"][0], dict)
        written = {Path(file["filename"]) for file in prepared.cache_files} - files
        assert not [file for file in written if file.stat().st_size > len(PNG)]


def test_prepare_numbers_a_stream() -> None:
    rows = list(prepare_dataset(plain_dataset(3).to_iterable_dataset()))
    assert [row[ROW_COLUMN] for row in rows] == [0, 1, 2]
    assert [row["images"][0]["bytes"] for row in rows] == [PNG] * 3


def test_check_distill_column_gives_the_share_of_marked_rows() -> None:
    dataset = Dataset.from_dict({"distill": [True, False, False, True, True]})
    assert check_distill_column(dataset, "distill") == (True, 0.6)
    assert check_distill_column(dataset, "is_text") == (False, None)
    assert check_distill_column(dataset.to_iterable_dataset(), "distill") == (True, None)


def test_check_distill_column_refuses_when_no_row_is_marked() -> None:
    with pytest.raises(ValueError) as refusal:
        check_distill_column(Dataset.from_dict({"is_text": [False] * 3}), "is_text")
    assert str(refusal.value) == (
        "No row is marked for distillation: column 'is_text' is false in all 3 rows. Mark the language-intensive rows "
        "true, or train with trl.SFTTrainer."
    )
    check_distill_column(Dataset.from_dict({"is_text": [False, False, True]}), "is_text")  # control


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([True, None], "None in 1 of 2"),
        (["yes", "no"], "'yes' in 2 of 2"),
        ([0.0, 0.5], "0.5 in 1 of 2"),
        ([1, 2], "2 in 1 of 2"),
    ],
    ids=repr,
)
def test_check_distill_column_refuses_what_is_not_boolean(values: list[Any], found: str) -> None:
    with pytest.raises(ValueError) as refusal:
        check_distill_column(Dataset.from_dict({"distill": values}), "distill")
    sentence = f"Column 'distill' must hold true or false in every row; found {found}. Repair them"
    assert str(refusal.value) == f"{sentence}, or pass --skip_bad_rows."
    dataset = Dataset.from_dict({"distill": values})
    if "2 of 2" in found:  # nothing would be left
        with pytest.raises(ValueError, match="Repair them.$"):
            check_distill_column(dataset, "distill", skip_bad=True)
    elif values[0]:
        assert check_distill_column(dataset, "distill", skip_bad=True) == (True, 1.0)
    else:
        with pytest.raises(ValueError, match="is false in all 1 rows"):
            check_distill_column(dataset, "distill", skip_bad=True)


# Ten rows: 0, 4 and 8 can be trained on.
MIXED_ROWS = [
    vision_row(distill=True),
    {**vision_row(distill=True), "images": [stored(TRUNCATED_JPEG)]},
    {**vision_row(distill=True), "images": [None]},
    vision_row(completion=" ", distill=True),
    vision_row("no image", distill=False),
    vision_row(distill=None),
    vision_row("explode", distill=True),
    {**vision_row(distill=True), "images": [stored(b"no image")]},
    vision_row("<and<", distill=False),
    vision_row("a very long text before the image <", distill=True),
]
GOOD_ROWS = [0, 4, 8]
DROPPED = Counter(
    {
        "image unreadable": 2,
        "image missing": 1,
        "empty answer": 1,
        "distill flag not boolean": 1,
        "processor failed": 1,
        "image tokens over max_length": 1,
    }
)


@pytest.mark.parametrize("streaming", [False, True], ids=["dataset", "stream"])
def test_drop_bad_rows_counts_by_reason_and_keeps_every_good_row(streaming: bool) -> None:
    dataset = vision_dataset(MIXED_ROWS)
    prepared = prepare_dataset(dataset.to_iterable_dataset() if streaming else dataset)
    collator = make_collator(max_length=30)
    kept, dropped = drop_bad_rows(prepared, collator)
    rows = list(kept)  # a stream is filtered, and counted, as it is read
    assert [row[ROW_COLUMN] for row in rows] == GOOD_ROWS
    assert dropped == DROPPED
    assert isinstance(kept, IterableDataset if streaming else Dataset)
    assert collator(rows)["distill"].tolist() == [True, False, False]
    with pytest.raises(BadRow):
        collator(list(prepared))  # control


def test_drop_bad_rows_leaves_a_good_dataset_alone() -> None:
    dataset = prepare_dataset(plain_dataset())
    kept, dropped = drop_bad_rows(dataset, make_collator())
    assert kept is dataset and not dropped


def test_drop_bad_rows_refuses_to_leave_nothing() -> None:
    dataset = prepare_dataset(vision_dataset([MIXED_ROWS[1], MIXED_ROWS[3], MIXED_ROWS[7]]))
    with pytest.raises(ValueError, match="No usable row is left of 3: ") as refusal:
        drop_bad_rows(dataset, make_collator())
    assert "'image unreadable': 2" in str(refusal.value) and "'empty answer': 1" in str(refusal.value)


# --------------------------------------------------------------------------------------------------------------------
# Mixtures
# --------------------------------------------------------------------------------------------------------------------
def write_json(path: Path, rows: list[Row]) -> Row:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return {"path": "json", "data_files": str(path)}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    """text: 4 rows. flagged: 4 rows with a column of their own. images, image: 3 rows each, saved to disk as JPEG."""
    folder = tmp_path_factory.mktemp("sources")
    text = [{"prompt": f"t{index}", "completion": "a"} for index in range(4)]
    vision_rows = [{"prompt": f"<{index}", "completion": "a"} for index in range(3)]
    plain = {"prompt": Value("string"), "completion": Value("string")}

    def saved(name: str, column: str, data: bytes) -> Row:
        feature, value = (Image(), stored(data)) if column == "image" else (List(Image()), [stored(data)])
        rows = {key: [row[key] for row in vision_rows] for key in plain}
        Dataset.from_dict({**rows, column: [value] * 3}, features=Features({**plain, column: feature})).save_to_disk(
            folder / name
        )
        return {"path": str(folder / name)}

    DatasetDict({"train": Dataset.from_list(text), "test": Dataset.from_list(text[:1])}).save_to_disk(
        folder / "splits"
    )
    return {
        "text": write_json(folder / "text.jsonl", text),
        "flagged": write_json(
            folder / "flagged.jsonl", [{**row, "distill": index % 2 == 0} for index, row in enumerate(text)]
        ),
        "images": saved("images", "images", JPEG),
        "image": saved("image", "image", JPEG),
        "bad_images": saved("bad_images", "images", TRUNCATED_JPEG),
        "bad_image": saved("bad_image", "image", TRUNCATED_JPEG),
        "splits": {"path": str(folder / "splits")},
    }


def mixture(*chosen: Row, **settings: Any) -> DatasetDict:
    column = settings.pop("distill_column", "distill")
    return load_mixture(DistillMixtureConfig(datasets=[dict(source) for source in chosen], **settings), column)


def mixed_rows(*chosen: Row, **settings: Any) -> list[Row]:
    """The rows of a mixture, source after source: of streams they come in turns."""
    rows = list(mixture(*chosen, **settings)["train"])
    of = [int(re.match(r"datasets\[(\d+)\]", row[SOURCE_COLUMN])[1]) for row in rows]  # type: ignore[index]
    if settings.get("streaming") and len(chosen) > 1:
        assert of[: len(chosen)] == list(range(len(chosen)))
    return [row for _, row in sorted(zip(of, rows, strict=True), key=lambda pair: pair[0])]


STREAMING = pytest.mark.parametrize("streaming", [False, True], ids=["datasets", "streams"])


@STREAMING
def test_every_row_gets_the_flag_of_its_source(sources: dict[str, Row], streaming: bool) -> None:
    rows = mixed_rows(
        {**sources["text"], "distill": True},
        {**sources["text"], "distill": False},
        sources["text"],
        streaming=streaming,
    )
    assert [row["distill"] for row in rows] == [True] * 4 + [False] * 4 + [True] * 4
    assert all(isinstance(row["distill"], bool) for row in rows)


@STREAMING
def test_a_source_keeps_its_own_column_unless_the_recipe_says_otherwise(
    sources: dict[str, Row], streaming: bool
) -> None:
    own = mixed_rows(sources["flagged"], streaming=streaming)
    assert [row["distill"] for row in own] == [True, False, True, False]
    told = mixed_rows({**sources["flagged"], "distill": False}, streaming=streaming)
    assert [row["distill"] for row in told] == [False] * 4


def test_the_flag_goes_to_the_column_that_the_config_names(sources: dict[str, Row]) -> None:
    rows = mixed_rows({**sources["text"], "distill": False}, distill_column="is_text")
    assert [row["is_text"] for row in rows] == [False] * 4 and "distill" not in rows[0]


@STREAMING
@pytest.mark.parametrize("column", ["images", "image"])
def test_sources_with_and_without_images_mix(sources: dict[str, Row], column: str, streaming: bool) -> None:
    rows = mixed_rows({**sources[column], "distill": False}, sources["text"], streaming=streaming)
    assert [row["prompt"] for row in rows] == ["<0", "<1", "<2", "t0", "t1", "t2", "t3"]
    assert [row["distill"] for row in rows] == [False] * 3 + [True] * 4
    assert [len(row["images"] or []) for row in rows] == [1] * 3 + [0] * 4
    batch = make_collator()(rows)
    assert batch["distill"].tolist() == [False] * 3 + [True] * 4


@pytest.mark.parametrize("column", ["images", "image"])
def test_a_mixture_passes_the_image_files_on_as_they_are(sources: dict[str, Row], column: str) -> None:
    """Decoded and encoded again, a JPEG would lose quality with every load."""
    rows = mixed_rows(sources[column], sources["text"])
    assert [image["bytes"] for row in rows for image in row["images"]] == [JPEG] * 3


@pytest.mark.parametrize("column", ["bad_images", "bad_image"])
def test_an_unreadable_image_does_not_stop_a_mixture_from_loading(sources: dict[str, Row], column: str) -> None:
    """It is the collator that names the row, or skips it."""
    prepared = prepare_dataset(mixture(sources[column], sources["text"])["train"])
    _, dropped = drop_bad_rows(prepared, make_collator())
    assert dropped == {"image unreadable": 3}


def test_a_mixture_of_text_alone_has_no_image_column(sources: dict[str, Row]) -> None:
    assert set(mixture(sources["text"], sources["flagged"])["train"].column_names) == {
        "prompt",
        "completion",
        "distill",
        SOURCE_COLUMN,
    }


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.25, 0.75), (3.0, 1.0), (0.1, 0.9)], ids=str)
def test_fractions_mean_what_they_mean_in_trl(sources: dict[str, Row], fractions: tuple[float, float]) -> None:
    chosen = [{**sources[name], "fraction": share} for name, share in zip(("text", "flagged"), fractions, strict=True)]
    theirs = [{**source, "data_files": sources["text"]["data_files"]} for source in chosen]
    expected = get_dataset(DatasetMixtureConfig(datasets=[DatasetConfig(**source) for source in theirs]))["train"]
    rows = mixed_rows(*chosen)
    assert [row["prompt"] for row in rows] == expected["prompt"]
    assert len(rows) < 8 or fractions == (0.5, 0.5)  # control: the shares do matter


def test_fractions_come_before_flags(sources: dict[str, Row]) -> None:
    rows = mixed_rows(
        {**sources["text"], "fraction": 0.2, "distill": False}, {**sources["text"], "fraction": 0.8, "distill": True}
    )
    assert [row["distill"] for row in rows] == [False] + [True] * 4


def test_a_split_of_a_saved_folder_and_chosen_columns_are_taken(sources: dict[str, Row]) -> None:
    assert len(mixed_rows({**sources["splits"], "split": "test"})) == 1
    assert len(mixed_rows(sources["splits"])) == 4
    rows = mixed_rows({**sources["splits"], "columns": ["prompt"]})
    assert set(rows[0]) == {"prompt", "distill", SOURCE_COLUMN}


def test_a_test_split_is_set_aside(sources: dict[str, Row]) -> None:
    parts = mixture(sources["text"], test_split_size=0.25)
    assert {name: len(part) for name, part in parts.items()} == {"train": 3, "test": 1}
    assert set(mixture(sources["text"])) == {"train"}


def test_a_test_split_holds_out_the_same_rows_each_time(sources: dict[str, Row]) -> None:
    """A run that resumes, and each process of a run, splits anew: rows that were trained on must not be evaluated on."""

    def held_out(seed: int) -> list[str]:
        np.random.seed(len(drawn))  # whatever else was drawn before
        many = DistillMixtureConfig(datasets=[dict(sources["text"]) for _ in range(5)], test_split_size=8)
        drawn.append([row["prompt"] for row in load_mixture(many, seed=seed)["test"]])
        return drawn[-1]

    drawn: list[list[str]] = []
    assert held_out(0) == held_out(0) == held_out(0)
    assert held_out(1) != held_out(0)  # control


@STREAMING
@pytest.mark.parametrize("flag", [0.3, 2, "false", None], ids=repr)
def test_a_flag_of_a_source_is_read_as_that_of_a_single_dataset(flag: Any, tmp_path: Path, streaming: bool) -> None:
    """A column of booleans would take 0.3, 2 and "false" for true."""
    rows = [{"prompt": "a", "completion": "b", "distill": value} for value in (flag, flag)]
    source = {"path": "json", "data_files": str(tmp_path / "rows.jsonl")}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = re.escape(
        f"datasets[1] (json), row 0: column 'distill' must be true or false; found {flag!r}. Repair it"
    )
    with pytest.raises(ValueError, match=message):
        list(
            load_mixture(DistillMixtureConfig(datasets=[dict(source, distill=True), source], streaming=streaming))[
                "train"
            ]
        )
    config = DistillMixtureConfig(datasets=[dict(source, distill=True), dict(source)], streaming=streaming)
    kept = [row["distill"] for row in load_mixture(config, skip_bad_rows=True)["train"]]
    assert sorted(kept, key=repr) == [None, None, True, True]  # the trainer skips and counts them
    assert [flag_of({"distill": value}, "distill") for value in (1, 0, 1.0)] == [True, False, True]  # control


def refused_mixture(*chosen: Any, **settings: Any) -> str:
    with pytest.raises(ValueError) as refusal:
        load_mixture(DistillMixtureConfig(datasets=list(chosen), **settings))
    return str(refusal.value)


KNOWN = "['columns', 'data_dir', 'data_files', 'distill', 'fraction', 'name', 'split']"


def test_a_mixture_that_cannot_be_meant_is_refused(sources: dict[str, Row]) -> None:
    text = sources["text"]
    assert refused_mixture() == "The mixture is empty: list at least one source under `datasets:`."
    assert refused_mixture(dict(text), {**text, "distil": True}) == (
        f"datasets[1]: expected 'path' and any of {KNOWN}; found unknown ['distil']."
    )
    assert refused_mixture({"distill": True}) == f"datasets[0]: expected 'path' and any of {KNOWN}; 'path' is missing."
    for fractions in ([0.5, None], [0.5, 0.0], [0.5, -1.0]):
        message = refused_mixture(*({**text, "fraction": fraction} for fraction in fractions))
        assert message == f"`fraction` must be a positive number for every source or for none; found {fractions}."
    assert "`fraction` needs the number of rows" in refused_mixture({**text, "fraction": 1.0}, streaming=True)


def test_a_source_that_is_only_a_name_is_refused() -> None:
    assert "datasets[0]" in refused_mixture("some/dataset")


def test_a_split_that_a_saved_folder_does_not_have_is_refused(sources: dict[str, Row]) -> None:
    message = refused_mixture({**sources["splits"], "split": "validation"})
    assert "validation" in message and "train" in message


@pytest.fixture(autouse=True, scope="module")
def _no_progress_bars() -> Iterator[None]:
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar

    disable_progress_bar()
    yield
    enable_progress_bar()


@pytest.mark.parametrize("placed", [False, True], ids=["in a column alone", "with a place of its own"])
def test_several_turns_about_an_image(placed: bool) -> None:
    """The commonest rows of all: TRL puts the image before a later question as well, if the first has its place."""
    from tiny import make_processor

    from hf_lingudistill.conversations import Conversations

    first = [{"type": "image"}, {"type": "text", "text": "what shape?"}] if placed else "what shape?"
    questions, answers = [first, "and its color?", "is it large?"], ["a circle", "red", "no"]
    turns = [
        {"role": role, "content": content}
        for pair in zip(questions, answers, strict=True)
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]
    conversations = Conversations(make_processor())
    row = conversations.read({"images": [PILImage.new("RGB", (40, 40))], "messages": turns}, "row 0")
    text = conversations.render(row, as_text=True).row["text"]
    assert text.count("<image>") == 1 and text.index("<image>") < text.index("what shape?")
    assert all(said in text for said in ("and its color?", "is it large?", *answers))
