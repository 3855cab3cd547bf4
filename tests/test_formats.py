"""Rows as people have them: what each becomes, held against plain `SFTTrainer` where that takes it, and what is refused."""

from __future__ import annotations

import base64
import io
import json
import logging
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, Json, List, Value
from packaging.version import Version
from PIL import Image as PILImage
from PIL import ImageDraw
from trl import SFTTrainer

import hf_lingudistill
from hf_lingudistill.answers import answer_spans, trained_tokens
from hf_lingudistill.bad_rows import BadRow
from hf_lingudistill.formats import as_trl_row
from hf_lingudistill.images import decode_image
from hf_lingudistill.rgb import to_rgb

MakeTrainer = Callable[..., Any]
Row = dict[str, Any]
QUESTION, ANSWER = "what shape is in the image?", "a small red circle"
BLACK = Version(transformers.__version__) < Version("5.21")  # its processors turn transparency black
IN_ORDER = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 4}


def encoded(image: PILImage.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(seed: int = 0) -> PILImage.Image:
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 40, 3), dtype=np.uint8))


PNG = encoded(picture())


def batch_of(trainer: Any) -> dict[str, torch.Tensor]:
    return next(iter(trainer.get_train_dataloader()))


def assert_same(batch: Any, other: Any, *keys: str) -> None:
    for key in keys or ("input_ids", "labels", "attention_mask", "pixel_values"):
        assert torch.equal(batch[key], other[key]), key


# --------------------------------------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------------------------------------
def drawing(mode: str = "RGBA") -> PILImage.Image:
    """Black on nothing."""
    image = PILImage.new("RGBA", (40, 40), (0, 0, 0, 0))
    ImageDraw.Draw(image).rectangle((10, 10, 30, 30), fill=(0, 0, 0, 255))
    return image.convert(mode)


def palette() -> PILImage.Image:
    image = PILImage.new("P", (40, 40), 0)
    image.putpalette([0, 0, 0, 0, 0, 0, 200, 0, 0])
    ImageDraw.Draw(image).rectangle((10, 10, 30, 30), fill=1)
    ImageDraw.Draw(image).rectangle((0, 0, 8, 8), fill=2)
    return image


def rotated() -> bytes:
    exif = PILImage.Exif()
    exif[0x0112] = 6
    return encoded(picture(), "PNG", exif=exif)


STORED = {
    "RGBA": encoded(drawing()),
    "LA": encoded(drawing("LA")),
    "P, one index": encoded(palette(), transparency=0),
    "P, each index": encoded(palette(), transparency=bytes([0, 255, 128])),
    "RGB, one colour": encoded(drawing().convert("RGB"), transparency=(0, 0, 0)),
    "CMYK": encoded(picture().convert("CMYK"), "JPEG"),
    "1": encoded(picture().convert("1")),
    "L": encoded(picture().convert("L")),
    "animation": encoded(picture(), "GIF", save_all=True, append_images=[picture(1)]),
    "transparent animation": encoded(palette(), "GIF", transparency=0, save_all=True, append_images=[palette()]),
    "rotated": rotated(),
    "WebP": encoded(drawing(), "WEBP", lossless=True),
}
SEE_THROUGH = {"RGBA", "LA", "P, one index", "P, each index", "WebP", "transparent animation"}
BLACK_ONCE = {*SEE_THROUGH, "RGB, one colour"}  # before transformers 5.21


def on_white(stored: bytes) -> bytes:
    image = PILImage.open(io.BytesIO(stored)).convert("RGBA")
    return encoded(PILImage.alpha_composite(PILImage.new("RGBA", image.size, "white"), image).convert("RGB"))


@pytest.mark.parametrize("kind", STORED)
def test_pixels_are_those_of_plain_sft(make_trainer: MakeTrainer, kind: str) -> None:
    row = {"prompt": [{"role": "user", "content": QUESTION}], "completion": [{"role": "assistant", "content": ANSWER}]}
    message = List({"role": Value("string"), "content": Value("string")})
    features = Features({"prompt": message, "completion": message, "images": List(Image())})

    def batch(trainer: type, image: bytes) -> Any:
        rows = [{**row, "images": [{"bytes": image, "path": None}]}] * 4
        return batch_of(make_trainer(trainer, train_dataset=Dataset.from_list(rows, features=features)))

    ours = batch(hf_lingudistill.LinguDistillTrainer, STORED[kind])
    plain = batch(SFTTrainer, on_white(STORED[kind]) if kind in BLACK_ONCE and BLACK else STORED[kind])
    assert_same(ours, plain)
    naive = PILImage.open(io.BytesIO(STORED[kind])).convert("RGB")  # control: what became of it before
    assert (np.asarray(naive) == np.asarray(decode_image(STORED[kind]))).all() == (
        kind not in {*BLACK_ONCE, "rotated"}
    )


def test_images_become_rgb_in_one_place() -> None:
    """Another `convert("RGB")` would turn what is transparent black. Drawings of our own on white are no input."""
    root = Path(hf_lingudistill.__file__).parent
    found = {
        str(path.relative_to(root))
        for folder in (root, root.parent / "examples" / "space")
        for path in folder.rglob("*.py")
        if re.search(r"""convert\(["']RGB["']\)""", path.read_text(encoding="utf-8"))
        if folder == root
    }
    assert found <= {"labs/world/art.py", "labs/world/pictures.py"}
    space = (root.parent / "examples" / "space" / "visitor.py").read_text(encoding="utf-8")
    assert 'convert("RGB")' not in space and "from rgb import to_rgb" in space  # `rgb.py` there is the library's own


@pytest.mark.parametrize(
    "value",
    [
        PNG,
        bytearray(PNG),
        {"bytes": PNG, "path": None},
        {"url": "data:image/png;base64," + base64.b64encode(PNG).decode()},
        "data:image/png;base64," + base64.b64encode(PNG).decode(),
        base64.b64encode(PNG).decode(),
        base64.encodebytes(PNG).decode(),
        base64.urlsafe_b64encode(PNG).decode().rstrip("="),
    ],
    ids=["bytes", "bytearray", "stored", "url in a dict", "data URI", "base64", "base64 in lines", "base64 for URLs"],
)
def test_an_image_may_be_stored_in_many_ways(value: Any) -> None:
    assert (np.asarray(decode_image(value)) == np.asarray(picture())).all()
    with pytest.raises(BadRow):
        decode_image(value[: len(value) // 2] if not isinstance(value, dict) else {"url": "data:,x"})


def test_an_image_may_be_a_path_or_a_file_uri(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    for value in (
        str(tmp_path / "a.png"),
        tmp_path / "a.png",
        (tmp_path / "a.png").as_uri(),
        {"path": str(tmp_path / "a.png")},
    ):
        assert (np.asarray(decode_image(value)) == np.asarray(picture())).all()


@pytest.mark.parametrize(
    "value", ["nowhere.png", "A" * 90_000, "data:image/png;base64,####" + "x" * 9_000, "x" * 9_000 + "."]
)
def test_a_text_that_is_no_image_is_named_in_a_short_sentence(value: str) -> None:
    with pytest.raises(BadRow, match="an image cannot be read") as refusal:
        decode_image(value)
    assert len(str(refusal.value)) < 500


# --------------------------------------------------------------------------------------------------------------------
# Formats
# --------------------------------------------------------------------------------------------------------------------
def place(*texts: str) -> list[Row]:
    return [{"type": "image"}, *({"type": "text", "text": text} for text in texts)]


SAME = {
    "text": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}],
    "parts": [
        {"role": "user", "content": place(QUESTION)},
        {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
    ],
    "nulls": [
        {
            "role": "user",
            "content": [{"type": "image", "text": None}, {"type": "text", "text": QUESTION}],
            "tool_calls": None,
        },
        {
            "role": "assistant",
            "content": [{"type": "text", "text": ANSWER}, {"type": "text", "text": None}],
            "name": None,
        },
    ],
    "LLaVA": [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": ANSWER}],
    "other names": [{"role": "Human", "content": QUESTION}, {"role": "model", "content": ANSWER}],
    "JSON": json.dumps([{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]),
    "of lists": {"role": ["user", "assistant"], "content": [QUESTION, ANSWER]},
    "image in the turn": [
        {"role": "user", "content": [{"type": "image", "image": PNG}, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": ANSWER},
    ],
    "image_url": [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(PNG).decode()}},
                {"type": "text", "text": QUESTION},
            ],
        },
        {"role": "assistant", "content": ANSWER},
    ],
    "untyped parts": [
        {"role": "user", "content": [{"image": PNG}, {"text": QUESTION}]},
        {"role": "assistant", "content": ANSWER},
    ],
}


@pytest.fixture
def collate(make_trainer: MakeTrainer) -> Callable[[list[Row]], dict[str, torch.Tensor]]:
    """The batch of any rows, by the collator of a trainer of images."""
    return make_trainer().data_collator  # type: ignore[no-any-return]


@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize("kind", SAME)
def test_a_conversation_in_any_form_is_the_same_batch(
    collate: Callable[[list[Row]], Any], kind: str, column: str
) -> None:
    expected = collate([{"messages": SAME["text"], "images": [PNG]}])
    row = {column: SAME[kind], "images": [] if "image" in kind or kind == "untyped parts" else [PNG]}
    assert_same(collate([row]), expected)
    other = collate([{**row, "images": row["images"] and [encoded(picture(1))]}])
    assert torch.equal(other["pixel_values"], expected["pixel_values"]) == (not row["images"])  # control


def test_messages_are_labelled_as_prompt_and_completion_are(collate: Callable[[list[Row]], Any]) -> None:
    turns = SAME["text"]
    split = collate([{"prompt": turns[:1], "completion": turns[1:], "images": [PNG]}])
    assert_same(collate([{"messages": turns, "images": [PNG]}]), split)


def test_all_turns_are_those_of_plain_sft(make_trainer: MakeTrainer) -> None:
    rows = [{"messages": SAME["text"], "images": [picture(i)]} for i in range(4)]
    data = Dataset.from_list(rows).cast_column("images", List(Image()))
    plain = batch_of(make_trainer(SFTTrainer, train_dataset=data, **IN_ORDER))
    ours = batch_of(make_trainer(train_dataset=data, **IN_ORDER))
    assert_same(ours, plain, "input_ids", "attention_mask", "pixel_values")
    assert not torch.equal(ours["labels"], plain["labels"])
    assert_same(batch_of(make_trainer(train_dataset=data, answers_only=False, **IN_ORDER)), plain)


LONG = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": place("what is it? a cat?")},
    {"role": "assistant", "content": "no."},
    {"role": "user", "content": [{"type": "text", "text": "no. and this one?"}, {"type": "image"}]},
    {"role": "assistant", "content": "a teal rectangle."},
]


def trained_text(processor: Any, batch: Any) -> str:
    return processor.tokenizer.decode(batch["input_ids"][0][batch["labels"][0] != -100])


@pytest.mark.parametrize("splitting", [False, True], ids=["one tile", "tiles"])
def test_every_answer_of_a_conversation_is_labelled_between_its_images(
    make_trainer: MakeTrainer, splitting: bool
) -> None:
    processor = tiny.make_processor()
    processor.image_processor.do_image_splitting = splitting
    processor.image_processor.size = {"longest_edge": 64}
    collator = make_trainer(processing_class=processor).data_collator
    batch = collator([{"messages": LONG, "images": [PNG, encoded(picture(1))]}])
    assert trained_text(processor, batch) == "no.<|im_end|>\na teal rectangle.<|im_end|>\n"


@pytest.mark.parametrize("splitting", [False, True], ids=["one tile", "tiles"])
def test_words_that_come_again_between_images_are_labelled_where_they_stand(
    make_trainer: MakeTrainer, splitting: bool
) -> None:
    """Chats of few words, so that whole turns are said again; of one, all was trained on once. Oracle: the row, read as ChatML."""
    processor = tiny.make_processor()
    processor.image_processor.do_image_splitting = splitting
    processor.image_processor.size = {"longest_edge": 64}
    collator = make_trainer(processing_class=processor).data_collator
    draw = random.Random(0)
    asked = [("and?", True), ("shape?", True), ("and?", True), ("shape?", False), ("and?", True)]
    chats = [[(*turn, "no.") for turn in asked]]
    chats += [
        [
            (draw.choice(["shape?", "and?"]), index == 0 or draw.random() < 0.6, draw.choice(["no.", "yes."]))
            for index in range(draw.randint(3, 8))
        ]
        for _ in range(60)
    ]
    for chat in chats:
        turns = []
        for question, sees, answer in chat:
            turns.append(
                {"role": "user", "content": [{"type": "image"}] * sees + [{"type": "text", "text": question}]}
            )
            turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        batch = collator([{"messages": turns, "images": [PNG] * sum(sees for _, sees, _ in chat)}])
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        opened = processor.tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
        closed = processor.tokenizer("<|im_end|>\n", add_special_tokens=False)["input_ids"]
        expected, row, place = torch.full_like(ids, -100), ids.tolist(), 0
        while place < len(row):
            if row[place : place + len(opened)] != opened:
                place += 1
                continue
            start = place + len(opened)
            place = next(i for i in range(start, len(row)) if row[i : i + len(closed)] == closed) + len(closed)
            expected[start:place] = ids[start:place]
        assert torch.equal(labels, expected), chat
        assert trained_text(processor, batch) == "".join(f"{answer}<|im_end|>\n" for _, _, answer in chat)


def test_a_template_that_marks_its_answers_is_asked(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    marked = tiny.CHATML.replace(
        "{% if m['content'] is string %}",
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'][0]['text'] }}{% endgeneration %}"
        "{% elif m['content'] is string %}",
    )
    processor = tiny.make_processor()
    processor.chat_template = processor.tokenizer.chat_template = marked
    collator = make_trainer(processing_class=processor).data_collator
    batch = collator([{"messages": LONG, "images": [PNG, encoded(picture(1))]}])
    assert trained_text(processor, batch) == "no.a teal rectangle."  # as it is marked, without the end of the turn


def test_a_template_whose_prefixes_do_not_nest_trains_whole_rows_and_says_so(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    processor = tiny.make_processor()
    processor.chat_template = processor.tokenizer.chat_template = "{{ messages | length }} " + tiny.CHATML
    data = Dataset.from_list([{"messages": SAME["text"], "images": [picture(i)]} for i in range(4)])
    data = data.cast_column("images", List(Image()))
    batch = batch_of(make_trainer(train_dataset=data, processing_class=processor, max_steps=2))
    assert QUESTION in trained_text(processor, batch)
    said = [record.getMessage() for record in caplog.records if "trained on whole" in record.getMessage()]
    assert len(said) == 1
    caplog.clear()
    make_trainer(train_dataset=data)  # control
    said = [record.getMessage() for record in caplog.records]
    assert sum("assistant's turns alone" in text for text in said) == 1 and not any(
        "trained on whole" in t for t in said
    )


def test_a_span_is_found_in_tokens_that_stand_for_an_image() -> None:
    tokenizer = tiny.make_tokenizer(extra=True)
    text = "the cat<image>yes. no.<image>yes."
    image = tokenizer.convert_tokens_to_ids("<image>")
    ids = [token for token in tokenizer(text)["input_ids"] for _ in range(5 if token == image else 1)]
    spans = [(text.rindex("yes."), len(text))]
    trained = trained_tokens(ids, text, spans, tokenizer)
    assert (
        trained is not None
        and tokenizer.decode([t for t, inside in zip(ids, trained, strict=True) if inside]) == "yes."
    )
    assert trained_tokens(ids[:-1], text, spans, tokenizer) is None  # control: a token of the span is not there


def test_spans_of_a_conversation_without_an_answer_are_none_at_all() -> None:
    processor = tiny.make_tokenizer(extra=False)
    assert answer_spans(processor, SAME["text"][:1]) == []
    ((start, end),) = answer_spans(processor, SAME["text"]) or []
    assert processor.apply_chat_template(SAME["text"], tokenize=False)[start:end] == ANSWER + "<|im_end|>\n"


def test_an_answer_that_comes_first_is_trained_on_without_what_announces_it() -> None:
    processor = tiny.make_tokenizer(extra=False)
    turns = [{"role": "assistant", "content": "Good day."}, *SAME["text"]]
    text = processor.apply_chat_template(turns, tokenize=False)
    spans = answer_spans(processor, turns) or []
    assert [text[start:end] for start, end in spans] == ["Good day.<|im_end|>\n", ANSWER + "<|im_end|>\n"]


@pytest.mark.parametrize("images", [False, True], ids=["text", "vision"])
def test_prompts_and_completions_may_be_texts_or_turns(make_trainer: MakeTrainer, images: bool) -> None:
    """With an image and no word for it, a text is a question: the chat template places the image."""
    turns = {"prompt": SAME["text"][:1], "completion": SAME["text"][1:]}
    forms = [turns, {**turns, "completion": ANSWER}, {**turns, "prompt": QUESTION}]
    if images:
        forms += [{"prompt": QUESTION, "completion": ANSWER}]
    batches = []
    for form in forms:
        rows = [{**form, **({"images": [PNG]} if images else {})}] * 4
        data = Dataset.from_list(rows)
        if images:
            data = data.cast_column("images", List(Image()))
        batches.append(batch_of(make_trainer(train_dataset=data)))
    plain = (
        batch_of(make_trainer(SFTTrainer, train_dataset=Dataset.from_list([turns] * 4))) if not images else batches[0]
    )
    for batch in batches:
        assert_same(batch, plain, "input_ids", "labels")


def test_a_text_that_names_its_image_is_plain_text_as_in_sft(make_trainer: MakeTrainer) -> None:
    rows = [{"prompt": "<image>a picture of", "completion": " a cat", "images": [picture(i)]} for i in range(4)]
    data = Dataset.from_list(rows).cast_column("images", List(Image()))
    plain = batch_of(make_trainer(SFTTrainer, train_dataset=data, **IN_ORDER))
    assert_same(batch_of(make_trainer(train_dataset=data, **IN_ORDER)), plain)


def refused(row: Row, **options: Any) -> str:
    with pytest.raises(BadRow) as refusal:
        as_trl_row(row, "Row 7", **options)
    assert len(str(refusal.value)) < 600
    return str(refusal.value)


USER = {"role": "user", "content": QUESTION}
SAID = {"messages": [USER, {"role": "assistant", "content": ANSWER}]}
STORED_IMAGE = {"bytes": PNG, "path": None}


@pytest.mark.parametrize("kind", [SAID, {"prompt": QUESTION, "completion": ANSWER}], ids=["messages", "prompt"])
@pytest.mark.parametrize(
    ("column", "value"),
    [
        *((name, "clips/1.mp4") for name in ("video", "videos", "video_path", "audio", "audio_url")),
        ("videos", ["clips/1.mp4"]),
        ("audio", {"array": [0.0], "sampling_rate": 16000}),
        *((name, "pictures/1.png") for name in ("img", "image_path", "image_file", "img_path", "picture", "file_name", "Photo")),
        ("image_paths", ["pictures/1.JPG"]),
        ("image_url", "https://pictures.example/show?id=1"),
        ("image_url", "data:image/png;base64,AAAA"),
        ("jpg", PNG),
        ("drawn", STORED_IMAGE),
        ("drawn", [STORED_IMAGE]),
        ("drawn", picture()),
    ],
)  # fmt: skip
def test_media_under_a_name_that_nobody_reads_are_not_dropped_in_silence(kind: Row, column: str, value: Any) -> None:
    as_trl_row(kind, "Row 7")  # control
    said = refused({**kind, column: value})
    assert said.startswith("Row 7 has ") and repr(column) in said and "drop " in said.lower()


@pytest.mark.parametrize(
    "more",
    [
        {"video": None, "videos": [], "audio": ""},
        {"has_video": True, "video": False, "audio": 0},  # flags
        {"image_id": "17", "file_name": "book.txt", "image_name": "000017", "filename": "notes.md"},
        {"img": None, "image_path": ""},
        {"url": "https://example.org/a.png", "source": "a.png"},  # whose names say nothing of an image
    ],
    ids=str,
)
def test_columns_that_hold_no_media_are_left_alone(more: Row) -> None:
    assert as_trl_row({**SAID, **more}, "Row 7")["messages"] == SAID["messages"]


def test_beside_images_that_are_read_a_picture_is_the_datas_own_matter_and_a_video_is_not() -> None:
    shown = {**SAID, "images": [PNG]}
    assert as_trl_row({**shown, "image_path": "pictures/1.png", "mask": STORED_IMAGE}, "Row 7")["images"] == [PNG]
    assert "of media only images are read" in refused({**shown, "videos": ["clips/1.mp4"]})


@pytest.mark.parametrize("where", ["images", "image", "turn"])
def test_a_path_object_is_a_path(make_trainer: MakeTrainer, tmp_path: Path, where: str) -> None:
    picture().save(tmp_path / "a.png")
    row: Row = {**SAID, "images": [tmp_path / "a.png"]}
    if where == "image":
        row = {**SAID, "image": tmp_path / "a.png"}
    elif where == "turn":
        parts = [{"type": "image", "image": tmp_path / "a.png"}, {"type": "text", "text": QUESTION}]
        row = {"messages": [{"role": "user", "content": parts}, SAID["messages"][1]]}
    batch = batch_of(make_trainer(train_dataset=[row] * 4))
    plain = batch_of(make_trainer(train_dataset=[{**SAID, "images": [str(tmp_path / "a.png")]}] * 4))
    assert_same(batch, plain)


@pytest.mark.parametrize(
    "kind", [SAID, {"prompt": QUESTION, "completion": ANSWER}, {"text": ANSWER}], ids=["messages", "prompt", "text"]
)
def test_a_row_of_a_stream_whose_flag_is_no_flag_is_named(make_trainer: MakeTrainer, kind: Row) -> None:
    def rows(last: Any) -> Any:
        yield from [{**kind, "distill": True}] * 3
        yield {**kind, "distill": last}

    def read(last: Any) -> list[Any]:
        data = IterableDataset.from_generator(rows, gen_kwargs={"last": last})
        return list(make_trainer(train_dataset=data, max_steps=1).get_train_dataloader())

    with pytest.raises(ValueError, match="Row 3: column 'distill' must be true or false; found 'yes'"):
        read("yes")
    assert read(False)  # control


def test_a_stream_without_rows_is_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match="train_dataset is a stream without rows"):
        make_trainer(train_dataset=IterableDataset.from_generator(lambda: iter(())), max_steps=1)


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_what_the_system_says_in_a_column_of_its_own_comes_first(column: str) -> None:
    said = {"role": "system", "content": "Be brief."}
    expected = [said, *SAID["messages"]]
    assert as_trl_row({**SAID, column: "Be brief."}, "Row 7")["messages"] == expected
    sharegpt = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
    assert as_trl_row({"conversations": sharegpt, column: "Be brief."}, "Row 7")["messages"] == expected
    turns = {"prompt": [USER], "completion": ANSWER, column: "Be brief."}
    assert as_trl_row(turns, "Row 7")["prompt"] == [said, USER]
    # once, where the turns say it too; nothing where the column is empty
    assert as_trl_row({"messages": expected, column: "Be brief."}, "Row 7")["messages"] == expected
    for nothing in (None, "", "  "):
        assert as_trl_row({**SAID, column: nothing}, "Row 7")["messages"] == SAID["messages"]
    assert "another in its turns" in refused({"messages": expected, column: "Be long."})
    assert "which no chat template reads" in refused({"prompt": QUESTION, "completion": ANSWER, column: "Be brief."})


@pytest.mark.parametrize("streamed", [False, True], ids=["map-style", "stream"])
@pytest.mark.parametrize("kind", [SAID, {"prompt": QUESTION, "completion": ANSWER}], ids=["messages", "prompt"])
def test_a_dataset_whose_pictures_nobody_reads_is_refused_before_the_first_step(
    make_trainer: MakeTrainer, kind: Row, streamed: bool
) -> None:
    def made(values: list[Any]) -> Any:
        data = Dataset.from_list([{**kind, "img": value} for value in values]).cast_column("img", Image())
        return data.to_iterable_dataset() if streamed else data

    with pytest.raises(ValueError, match="Row 0 has an image in its column 'img'"):
        make_trainer(train_dataset=made([STORED_IMAGE] * 4))
    with pytest.raises(ValueError, match="Row 2 has an image in its column 'img'"):  # a later row, when its turn comes
        list(make_trainer(train_dataset=made([None, None, STORED_IMAGE, None])).get_train_dataloader())
    make_trainer(train_dataset=made([None] * 4)).train()  # control


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "a", "answer": "b"},
            "Row 7 has the columns answer, question: expected 'messages', 'prompt' and",
        ),
        ({"messages": [{"from": "narrator", "value": "x"}]}, "turn 0: expected a 'role' .* found 'narrator'"),
        ({"messages": [{"speaker": "user", "text": "x"}]}, "found None and the fields \\['speaker', 'text'\\]"),
        ({"messages": "no turns"}, "expected a list of turns, found the text 'no turns'"),
        ({"messages": [QUESTION]}, "turn 0: expected {'role', 'content'}"),
        ({"messages": [{"role": "user", "content": None}]}, "the content of the user's turn is missing"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "video": "x"}]}]},
            "of type text or image, found 'video'",
        ),
        ({"messages": [{"from": "human", "value": "<image>?"}], "images": [PNG, PNG]}, "1 places .* and 2 images"),
        ({"messages": [{"role": "user", "content": place("a")}], "images": []}, "1 places .* and 0 images"),
        ({"messages": [{"role": "user", "content": "<image> what?"}]}, "its text names 1 images \\('<image>'\\)"),
        ({"messages": [{"role": "assistant", "content": "x"}], "images": [PNG]}, "0 places .* and 1 images"),
        ({"prompt": "<image> a", "completion": "b"}, "1 places .* and 0 images"),
        ({"prompt": [], "completion": "b"}, "empty prompt"),
        (
            {"prompt": [USER], "completion": [{"role": "assistant", "content": [{"image": PNG}]}]},
            "an image in its completion",
        ),
        ({"text": "<image> a", "images": []}, "1 places .* and 0 images"),
        ({"messages": [USER], "images": "a.png"}, "must hold a list of images, found str"),
        (
            {"messages": [USER], "images": [PNG], "image": encoded(picture(1))},
            "1 images in column 'images' and others in",
        ),
        ({"prompt": "a", "completion": 2}, "column 'completion' holds the number 2, expected a text"),
        (
            {"messages": [{"role": "user", "content": [{"image": PNG}]}], "images": [encoded(picture(1))]},
            "1 images in its turns and others in its image column",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_cannot_be_told_is_refused_with_the_row(row: Row, message: str) -> None:
    assert re.search(message, found := refused(row, image_token="<image>")), found
    assert found.startswith("Row 7")


@pytest.mark.parametrize(
    "row",
    [
        {"images": [PNG], "image": None},
        {"images": None, "image": PNG},
        {"images": [], "image": PNG},
        {"images": None, "image": [PNG]},
        {"images": [PNG], "image": PNG},
    ],
    ids=["images", "null and image", "empty and image", "null and a list", "both alike"],
)
def test_a_row_fills_one_of_two_image_columns(row: Row, collate: Callable[[list[Row]], Any]) -> None:
    """Files that were joined have both columns, and each row one of them filled."""
    assert_same(collate([{"messages": SAME["text"], **row}]), collate([{"messages": SAME["text"], "images": [PNG]}]))


def test_without_any_of_two_image_columns_a_row_is_text(collate: Callable[[list[Row]], Any]) -> None:
    batch = collate([{"messages": SAME["text"], "images": None, "image": None}])
    assert_same(batch, collate([{"messages": SAME["text"], "images": []}]), "input_ids", "labels")
    assert batch["input_ids"].shape != collate([{"messages": SAME["text"], "images": [PNG]}])["input_ids"].shape


@pytest.mark.parametrize(
    "part",
    [
        {"image": PNG, "text": QUESTION},
        {"text": QUESTION, "image": PNG},
        {"type": "image", "image": PNG, "text": QUESTION},
        {"type": "text", "text": QUESTION, "image": PNG},
        {
            "type": "image_url",
            "image_url": {"url": "data:image/png;base64," + base64.b64encode(PNG).decode()},
            "text": QUESTION,
        },
    ],
    ids=["image and text", "text and image", "type image", "type text", "type image_url"],
)
def test_a_part_that_holds_an_image_and_a_text_loses_neither(part: Row, collate: Callable[[list[Row]], Any]) -> None:
    asked = {"role": "user", "content": [part]}
    answered = [asked, {"role": "assistant", "content": ANSWER}]
    expected = [USER, {"role": "assistant", "content": ANSWER}]
    assert_same(collate([{"messages": answered, "images": []}]), collate([{"messages": expected, "images": [PNG]}]))


@pytest.mark.parametrize("streamed", [False, True], ids=["map-style", "stream"])
@pytest.mark.parametrize("kind", ["messages", "texts", "turns"])
def test_a_text_row_whose_prompt_fills_max_length_is_named_or_counted(
    make_trainer: MakeTrainer, kind: str, streamed: bool
) -> None:
    def row(question: str) -> Row:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": ANSWER}]
        if kind == "messages":
            return {"messages": turns}
        asked, answered = (question, ANSWER) if kind == "texts" else (turns[:1], turns[1:])
        return {"prompt": asked, "completion": answered}

    data: Any = Dataset.from_list([row("why?"), row("why? " * 60), row("who?")])
    data = data.to_iterable_dataset() if streamed else data
    options = {"per_device_train_batch_size": 1, "max_length": 64}
    with pytest.raises(
        ValueError, match="^Row 1 has no token to train on within max_length=64: .* Set max_length to at"
    ) as error:
        list(make_trainer(train_dataset=data, **options).train_dataset)
    enough = int(re.findall(r"at least (\d+)", str(error.value))[0])
    whole = make_trainer(train_dataset=data, **{**options, "max_length": enough})
    assert len(list(whole.train_dataset)) == 3
    skipping = make_trainer(train_dataset=data, skip_bad_rows=True, **options)
    assert len(list(skipping.train_dataset)) == 2 and dict(skipping.skipped_rows) == {"no label": 1}


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated")
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_a_stream_is_cut_as_trl_cuts(make_trainer: MakeTrainer, mode: str) -> None:
    """The rows that are left, token by token, against plain SFT on the same rows in memory."""
    rows = [
        {"prompt": "why? " * length, "completion": ANSWER + " and so on" * more}
        for length, more in ((1, 1), (30, 40), (2, 90), (6, 2))
    ]
    options = {"per_device_train_batch_size": 1, "max_length": 48, "truncation_mode": mode}
    data = Dataset.from_list(rows)
    ours = list(make_trainer(train_dataset=data.to_iterable_dataset(), skip_bad_rows=True, **options).train_dataset)
    trls = list(make_trainer(SFTTrainer, train_dataset=data, **options).train_dataset)
    assert [(row["input_ids"], row["labels"]) for row in ours] == [(row["input_ids"], row["labels"]) for row in trls]
    assert len(ours) == (4 if mode == "keep_end" else 3) and max(len(row["labels"]) for row in ours) == 48


def test_a_streamed_row_whose_labels_are_all_masked_is_named(make_trainer: MakeTrainer) -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": labels} for labels in ([5, 6, 7], [-100] * 3, [-100, 6, 7])]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    with pytest.raises(ValueError, match="^Row 1 has no token to train on: all of its labels are masked"):
        list(make_trainer(train_dataset=stream).train_dataset)
    assert len(list(make_trainer(train_dataset=stream, skip_bad_rows=True).train_dataset)) == 2


def test_images_named_twice_are_one(collate: Callable[[list[Row]], Any]) -> None:
    twice = {"messages": SAME["image in the turn"], "images": [picture()]}
    assert_same(collate([twice]), collate([{"messages": SAME["text"], "images": [PNG]}]))


def test_tools_reach_the_template_of_rows_with_images(make_trainer: MakeTrainer) -> None:
    processor = tiny.make_processor()
    processor.chat_template = processor.tokenizer.chat_template = (
        "{% if tools %}{{ tools | length }} tools {% endif %}" + tiny.CHATML
    )
    data = Dataset.from_list([{"messages": SAME["text"], "images": [PNG], "tools": '[{"name": "a"}]'}] * 4)
    batch = batch_of(make_trainer(train_dataset=data.cast_column("images", List(Image())), processing_class=processor))
    assert processor.tokenizer.decode(batch["input_ids"][0]).startswith("1 tools")


# --------------------------------------------------------------------------------------------------------------------
# Texts alone
# --------------------------------------------------------------------------------------------------------------------
def texts(*conversations: Any, **more: Any) -> Dataset:
    return Dataset.from_list(
        [{"messages": turns, **more} for turns in conversations for _ in range(4)], on_mixed_types="use_json"
    )


@pytest.mark.parametrize("kind", ["text", "other names", "JSON", "ShareGPT"])
def test_texts_in_any_form_are_the_tokens_of_plain_sft(make_trainer: MakeTrainer, kind: str) -> None:
    sharegpt = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
    column = "conversations" if kind == "ShareGPT" else "messages"
    data = Dataset.from_list([{column: sharegpt if kind == "ShareGPT" else SAME[kind]}] * 4)
    plain = batch_of(make_trainer(SFTTrainer, train_dataset=texts(SAME["text"])))
    ours = batch_of(make_trainer(train_dataset=data, answers_only=False))
    assert_same(ours, plain, "input_ids", "labels")
    split = Dataset.from_list([{"prompt": SAME["text"][:1], "completion": SAME["text"][1:]}] * 4)
    answers = batch_of(make_trainer(train_dataset=data))
    assert_same(answers, batch_of(make_trainer(SFTTrainer, train_dataset=split)), "input_ids", "labels")


@pytest.mark.parametrize("streamed", [False, True], ids=["map-style", "stream"])
def test_a_text_row_that_cannot_be_tokenised_is_named(make_trainer: MakeTrainer, streamed: bool) -> None:
    data: Any = texts(
        SAME["text"], [{"role": "user", "content": "<image> in a text"}, {"role": "assistant", "content": "a"}]
    )
    data = data.to_iterable_dataset() if streamed else data
    with pytest.raises(ValueError, match=r"^Row 4: its text names 1 images"):
        list(make_trainer(train_dataset=data).train_dataset)
    assert len(list(make_trainer(train_dataset=texts(SAME["text"])).train_dataset)) == 4  # control


def test_a_template_that_refuses_a_text_row_names_it(make_trainer: MakeTrainer) -> None:
    processor = tiny.make_processor()
    processor.chat_template = processor.tokenizer.chat_template = (
        "{% if messages | length > 2 %}{{ raise_exception('roles must alternate') }}{% endif %}" + tiny.CHATML
    )
    odd = [USER, USER, {"role": "assistant", "content": "a"}]
    with pytest.raises(ValueError, match=r"^Row 4 cannot be processed \(TemplateError: roles must alternate\)"):
        make_trainer(train_dataset=texts(SAME["text"], odd), processing_class=processor)
    split = Dataset.from_list([{"prompt": turns[:-1], "completion": turns[-1:]} for turns in (SAME["text"], odd)])
    with pytest.raises(ValueError, match=r"^Row 1 cannot be processed \(TemplateError: roles must alternate\)"):
        make_trainer(train_dataset=split, processing_class=processor)


def test_running_text_that_names_an_image_is_refused(make_trainer: MakeTrainer) -> None:
    rows = [{"text": "the sea is deep."}] * 2 + [{"text": "the <image> shows the sea"}] * 2
    with pytest.raises(ValueError, match="^Row 2 has 1 places for images .* and 0 images"):
        make_trainer(train_dataset=Dataset.from_list(rows))
    image = tiny.make_tokenizer(extra=True).convert_tokens_to_ids("<image>")
    tokens = Dataset.from_list(
        [{"input_ids": [5, 6, token, 7], "labels": [5, 6, 7, 8]} for token in (8, 9, 10, image)]
    )
    with pytest.raises(ValueError, match="holds the token that stands for an image"):
        make_trainer(train_dataset=tokens).train()
    make_trainer(train_dataset=tokens.select(range(3))).train()  # control


# --------------------------------------------------------------------------------------------------------------------
# Datasets
# --------------------------------------------------------------------------------------------------------------------
def test_a_list_of_rows_is_a_dataset(make_trainer: MakeTrainer) -> None:
    rows = [{"messages": SAME["text"], "images": [picture(i)], "distill": i > 0} for i in range(4)]
    listed = batch_of(make_trainer(train_dataset=rows, **IN_ORDER))
    stored = batch_of(
        make_trainer(train_dataset=Dataset.from_list(rows).cast_column("images", List(Image())), **IN_ORDER)
    )
    assert_same(listed, stored, "input_ids", "labels", "pixel_values", "distill")
    mixed = [*rows, {"messages": LONG[:1] + SAME["text"], "distill": True}]
    assert make_trainer(train_dataset=mixed, eval_dataset=mixed).evaluate()


def asked(number: int, **more: Any) -> Row:
    turns = SAME["text"]
    return {"prompt": [{**turns[0], "content": f"what {number}"}], "completion": turns[1:], **more}


@pytest.mark.parametrize("evaluated", [False, True], ids=["training", "evaluation"])
def test_a_column_that_the_first_row_of_a_list_lacks_is_not_lost(make_trainer: MakeTrainer, evaluated: bool) -> None:
    late = [asked(0), *(asked(i, distill=i > 2) for i in range(1, 5))]
    whole = [asked(i, distill=i > 2) for i in range(5)]
    sets = {"train_dataset": whole, "eval_dataset": late} if evaluated else {"train_dataset": late}
    with pytest.raises(ValueError, match="must hold true or false in every row; found None in 1 of 5"):
        make_trainer(**sets)
    trainer = make_trainer(**sets, skip_bad_rows=True)
    kept = trainer.eval_dataset if evaluated else trainer.train_dataset
    assert list(kept["distill"]) == [False, False, True, True]
    assert make_trainer(train_dataset=whole).distill_share == 0.4  # control
    tools = [asked(0), asked(1, tools=[{"type": "function", "function": {"name": "f"}}])]
    (column,) = (make_trainer(train_dataset=given).train_dataset["tools"] for given in (tools,))
    assert column[0] is None and column[1]


@pytest.mark.parametrize("first", [0, 1, 2], ids=["turns", "messages", "running text"])
@pytest.mark.parametrize("skip", [False, True], ids=["", "skipping"])
def test_a_list_of_several_formats_keeps_every_row_whichever_comes_first(
    make_trainer: MakeTrainer, first: int, skip: bool
) -> None:
    kinds: list[Row] = [
        asked(0),
        {"messages": SAME["text"]},
        {"text": "the sea is deep"},
        {"prompt": "a", "completion": "b"},
    ]
    rows = [kinds[first], *(row for row in kinds if row is not kinds[first])]
    trainer = make_trainer(train_dataset=rows, skip_bad_rows=skip)
    assert dict(trainer.skipped_rows) == {} and len(trainer.train_dataset) == 4
    found = dict(zip([str(row) for row in rows], trainer.train_dataset["input_ids"], strict=True))
    for row in rows:  # each as in a list of its own kind
        (alone,) = make_trainer(train_dataset=[row]).train_dataset["input_ids"]
        assert found[str(row)] == alone, row
    beside = [
        row for row in rows if "messages" not in row
    ]  # TRL reads one of these two formats in all rows, or the other
    assert len(make_trainer(train_dataset=beside, skip_bad_rows=skip).train_dataset) == 3
    renamed = [{("body" if key == "text" else key): value for key, value in row.items()} for row in beside]
    renamed = Dataset.from_list(
        [{**dict.fromkeys(("prompt", "completion", "body")), **row} for row in renamed], on_mixed_types="use_json"
    )
    assert len(make_trainer(train_dataset=renamed, dataset_text_field="body", skip_bad_rows=skip).train_dataset) == 3


@pytest.mark.parametrize("as_list", [True, False])
def test_running_text_is_read_from_the_column_that_is_named(make_trainer: MakeTrainer, as_list: bool) -> None:
    rows = [{"body": "the cat sat"}, {"body": "on the mat"}]
    (named, plain) = (
        make_trainer(train_dataset=given if as_list else Dataset.from_list(given), **options).train_dataset[
            "input_ids"
        ]
        for given, options in (
            (rows, {"dataset_text_field": "body"}),
            ([{"text": row["body"]} for row in rows], {}),
        )
    )
    assert list(named) == list(plain)


@pytest.mark.parametrize("form", ["pairs", "text"])
@pytest.mark.parametrize("stream", [False, True], ids=["", "stream"])
def test_columns_called_as_trl_calls_its_own_are_ignored_like_others(
    make_trainer: MakeTrainer, form: str, stream: bool
) -> None:
    rows: list[Row] = [{"prompt": "a", "completion": "b c"}, {"prompt": "d e", "completion": "f"}]
    if form == "text":
        rows = [{"text": "the cat sat"}, {"text": "on the mat"}]
    beside = [{**row, "labels": [1, 2], "assistant_masks": [0, 0], "attention_mask": [1]} for row in rows]
    more = {"max_steps": 1, "per_device_train_batch_size": 2, **IN_ORDER}
    losses = []
    for given in (rows, beside):
        data = Dataset.from_list(given)
        trainer = make_trainer(train_dataset=data.to_iterable_dataset() if stream else data, **more)
        losses.append(trainer.train().training_loss)
    assert losses[0] == losses[1]


def test_columns_that_a_transform_makes_are_named(make_trainer: MakeTrainer) -> None:
    """Control: a transform of columns that are there stays, as an augmentation does."""
    data = Dataset.from_dict({"q": ["what", "who"]})
    data.set_transform(lambda batch: {"prompt": batch["q"], "completion": ["yes"] * len(batch["q"])})
    with pytest.raises(
        ValueError, match=r"train_dataset makes its column 'prompt' when a row is read \(set_transform\)"
    ):
        make_trainer(train_dataset=data)
    pictures, seen = tiny.make_dataset(4), []
    kept = pictures.with_transform(lambda batch: seen.append(1) or batch)
    make_trainer(train_dataset=kept).train()
    assert seen


def test_an_image_by_its_uri_and_an_array(tmp_path: Path) -> None:
    folder = tmp_path / "some pictures"
    folder.mkdir()
    picture(3).save(folder / "a b.png")
    uri = (folder / "a b.png").as_uri()
    assert "%20" in uri
    assert decode_image(uri).tobytes() == decode_image(str(folder / "a b.png")).tobytes()
    with pytest.raises(BadRow, match="found ndarray; of an array of pixels, `PIL.Image.fromarray` makes one"):
        decode_image(np.zeros((4, 4, 3), dtype=np.uint8))


@pytest.mark.parametrize("form", ["numpy", "torch", "pandas"])
@pytest.mark.parametrize("images", [True, False], ids=["images", "texts"])
@pytest.mark.parametrize("skip", [False, True], ids=["", "skipping"])
def test_a_dataset_may_be_in_any_format_of_datasets(
    make_trainer: MakeTrainer, form: str, images: bool, skip: bool
) -> None:
    plain = tiny.make_dataset(4, images=images)
    given = plain.with_format(form)
    assert type(given[0]["distill"]) is not bool  # control: these rows are of another kind
    trainer = make_trainer(train_dataset=given, eval_dataset=given, skip_bad_rows=skip, **IN_ORDER)
    assert dict(trainer.skipped_rows) == {}
    assert_same(
        batch_of(trainer), batch_of(make_trainer(train_dataset=plain, **IN_ORDER)), "input_ids", "labels", "distill"
    )
    assert trainer.evaluate(given)["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"])
    stream = given.to_iterable_dataset()
    assert_same(batch_of(make_trainer(train_dataset=stream)), batch_of(trainer), "input_ids", "labels")


def test_a_collator_of_the_callers_own_gets_rows_in_the_format_that_they_are_in(make_trainer: MakeTrainer) -> None:
    seen: list[Any] = []

    def collate(rows: list[Row]) -> Row:
        seen.extend(type(row["input_ids"]) for row in rows)
        batch = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}

    row = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
    tokens = Dataset.from_list([row] * 4).with_format("torch")
    make_trainer(train_dataset=tokens, data_collator=collate).train()
    assert set(seen) == {torch.Tensor}


@pytest.mark.parametrize("images", [True, False], ids=["images", "texts"])
@pytest.mark.parametrize("value", [42, 0.5, True], ids=repr)
@pytest.mark.parametrize("kind", ["completion", "turn", "messages"])
def test_an_answer_that_is_no_text_is_not_called_empty(
    make_trainer: MakeTrainer, value: Any, kind: str, images: bool
) -> None:
    turn = {"role": "assistant", "content": value}
    answers = {
        "completion": {"prompt": "a", "completion": value},
        "turn": {"prompt": [SAME["text"][0]], "completion": [turn]},
    }
    row = answers.get(kind, {"messages": [SAME["text"][0], turn]})
    good = {key: (ANSWER if key == "completion" else SAME["text"] if key == "messages" else "a") for key in row}
    good = good if kind != "turn" else asked(0)
    rows = [{**one, **({"images": []} if images else {})} for one in (good, good, row, good)]
    data = Dataset.from_list(rows, on_mixed_types="use_json")
    with pytest.raises(ValueError, match=rf"Row 2.*{value}.*expected a text|Row 2.*expected a text.*{value}"):
        make_trainer(train_dataset=data, per_device_train_batch_size=1, max_steps=4).train()
    skipped = make_trainer(train_dataset=data, skip_bad_rows=True).skipped_rows
    assert dict(skipped) == {"not a conversation": 1}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "found an empty list"),
        ([1], "found list"),
        ("data.jsonl", "found str"),
        (DatasetDict(train=tiny.make_dataset(2)), r"Did you mean to select dataset\['train'\]"),
        ([{"messages": SAME["text"]}, {"question": "x"}], "^Row 1 has the columns question"),
    ],
    ids=["empty", "of numbers", "a name", "splits", "a bad row"],
)
def test_what_is_no_dataset_is_refused(make_trainer: MakeTrainer, data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(train_dataset=data)


def test_a_format_nobody_knows_is_refused_before_training(make_trainer: MakeTrainer) -> None:
    rows = Dataset.from_list([{"question": QUESTION, "answer": ANSWER}] * 4)
    for data in (rows, rows.to_iterable_dataset(), IterableDataset.from_generator(lambda: iter(list(rows)))):
        with pytest.raises(ValueError, match="^Row 0 has the columns answer, question"):
            make_trainer(train_dataset=data)
    with pytest.raises(ValueError, match="^Row 0 of evaluation set 'b' has the columns"):
        make_trainer(eval_dataset={"a": tiny.make_dataset(4), "b": rows})


@pytest.mark.parametrize("known", [True, False], ids=["schema", "no schema"])
def test_images_in_the_turns_of_a_stream_are_seen(make_trainer: MakeTrainer, known: bool) -> None:
    rows = [{"messages": SAME["image_url"]}] * 4
    stored = Dataset.from_list(rows, on_mixed_types="use_json")
    stream = stored.to_iterable_dataset() if known else IterableDataset.from_generator(lambda: iter(rows))
    assert_same(
        batch_of(make_trainer(train_dataset=stream)), make_trainer().data_collator([{**rows[0], "images": []}] * 4)
    )


@pytest.mark.parametrize("trained", [True, False], ids=["on images", "on texts"])
def test_evaluation_sets_of_another_kind_are_measured(make_trainer: MakeTrainer, trained: bool) -> None:
    vision, language = tiny.make_dataset(4, seed=1), tiny.make_dataset(4, seed=1, images=False)
    both = {"vision": vision, "language": language}
    trainer = make_trainer(train_dataset=tiny.make_dataset(8, images=trained), eval_dataset=both)
    found = trainer.evaluate()
    assert found["eval_vision_loss"] != found["eval_language_loss"]
    assert "pixel_values" in next(iter(trainer.get_eval_dataloader("vision")))
    later = trainer.evaluate(vision)
    assert later["eval_loss"] == pytest.approx(found["eval_vision_loss"], rel=1e-5)
    texts_only = make_trainer(train_dataset=language)
    with pytest.raises(ValueError, match="has images and the training set has none"):
        texts_only.evaluate(vision)
    with pytest.raises(ValueError, match="packing and padding_free are for texts alone"):
        unmarked = {name: part.remove_columns("distill") for name, part in both.items()}
        make_trainer(train_dataset=unmarked["language"], eval_dataset=unmarked["vision"], packing=True)


def test_a_stream_counts_a_bad_row_once_however_often_it_is_read(make_trainer: MakeTrainer) -> None:
    rows = tiny.make_rows(8)
    rows[3]["completion"] = [{"role": "assistant", "content": ""}]
    stream = Dataset.from_list(rows).cast_column("images", List(Image())).to_iterable_dataset()
    trainer = make_trainer(train_dataset=stream, skip_bad_rows=True, max_steps=6, per_device_train_batch_size=7)
    trainer.train()
    assert trainer.state.global_step == 6 and dict(trainer.skipped_rows) == {"empty answer": 1}


def test_rows_of_a_list_that_are_bad_are_skipped_and_counted(make_trainer: MakeTrainer) -> None:
    rows = [{"messages": SAME["text"]}] * 4 + [{"messages": [QUESTION]}, {"messages": []}]
    trainer = make_trainer(train_dataset=rows, skip_bad_rows=True)
    assert dict(trainer.skipped_rows) == {"not a conversation": 1, "empty answer": 1}
    assert len(trainer.train_dataset) == 4


def test_empty_answers_of_a_stream_without_a_schema_are_skipped(make_trainer: MakeTrainer) -> None:
    rows = [{"prompt": QUESTION, "completion": answer} for answer in (ANSWER, "", ANSWER, ANSWER)]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    trainer = make_trainer(train_dataset=stream, skip_bad_rows=True)
    assert len(list(trainer.train_dataset)) == 3 and dict(trainer.skipped_rows) == {"empty answer": 1}
    with pytest.raises(ValueError, match="^Row 1 has an empty completion"):  # control
        list(make_trainer(train_dataset=stream).train_dataset)


def test_a_stream_may_begin_with_a_bad_row(make_trainer: MakeTrainer) -> None:
    rows = [{"messages": ["no turn"]}, *({"messages": SAME["text"]} for _ in range(4))]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    assert len(list(make_trainer(train_dataset=stream, skip_bad_rows=True).train_dataset)) == 4


def test_a_flag_that_may_come_later_is_not_taken_for_absent(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    plain = [{"text": "the sea is deep, wide and full of salt."}] * 70
    late = IterableDataset.from_generator(lambda: iter([*plain, {**plain[0], "distill": False}]))
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(train_dataset=late)
    assert trainer.has_distill_column is None and not any("every row is" in r.getMessage() for r in caplog.records)
    packed = make_trainer(train_dataset=late, packing=True, max_length=64, max_steps=100)
    with pytest.raises(ValueError, match="packing joins rows"):
        packed.train()
    assert make_trainer(train_dataset=Dataset.from_list(plain)).has_distill_column is False  # control


def test_messages_and_prompts_share_a_batch(make_trainer: MakeTrainer) -> None:
    """Rows of a mixture, each with the labels it has alone."""
    collator = make_trainer().data_collator
    turns = SAME["text"]
    rows = [
        {"messages": turns, "prompt": None, "completion": None, "images": [PNG]},
        {"messages": None, "prompt": turns[:1], "completion": turns[1:], "images": [PNG]},
    ]
    batch = collator(rows)
    for index in range(2):
        alone = collator([rows[index]])
        assert batch["input_ids"][index].tolist() == alone["input_ids"][0].tolist()
        assert batch["labels"][index].tolist() == alone["labels"][0].tolist()
    data = Dataset.from_list(
        [{k: v for k, v in row.items() if k != "images"} for row in rows] * 2,
        features=Features({"messages": Json(), "prompt": Json(), "completion": Json()}),
    )
    assert_same(
        batch_of(make_trainer(train_dataset=data)),
        batch_of(make_trainer(train_dataset=texts(turns))),
        "input_ids",
        "labels",
    )


def test_an_image_of_numbers_that_are_none_is_refused_and_not_turned_black() -> None:
    values = np.linspace(0, 1, 1600, dtype=np.float32).reshape(40, 40)
    assert np.asarray(to_rgb(PILImage.fromarray(values))).max() == 255
    for bad in (np.nan, np.inf):
        values[3, 3] = bad
        with pytest.raises(BadRow, match="its pixels hold NaN or infinite values"):
            decode_image(PILImage.fromarray(values))


def test_rgb_is_left_as_it_is() -> None:
    image = picture()
    assert to_rgb(image).tobytes() == image.tobytes()


def test_images_stand_in_the_order_of_their_places() -> None:
    """A part may hold its image where another names a place for one of the column."""
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "image", "image": PNG}, {"type": "image"}]}
    row = as_trl_row({"messages": [turn, SAME["text"][1]], "images": ["first", "last"]}, "Row 0")
    assert row["images"] == ["first", PNG, "last"]
    assert row["messages"][0]["content"] == [{"type": "image"}] * 3


def test_a_text_prompt_with_an_answer_in_turns_is_labelled_after_the_prompt(make_trainer: MakeTrainer) -> None:
    mixed = Dataset.from_list([{"prompt": QUESTION, "completion": SAME["text"][1:]}] * 4)
    plain = Dataset.from_list([{"prompt": SAME["text"][:1], "completion": SAME["text"][1:]}] * 4)
    expected = batch_of(make_trainer(SFTTrainer, train_dataset=plain))
    assert_same(batch_of(make_trainer(train_dataset=mixed)), expected, "input_ids", "labels")
    assert (expected["labels"] == -100).any()  # control


# --------------------------------------------------------------------------------------------------------------------
# FineVision and The Cauldron
# --------------------------------------------------------------------------------------------------------------------
def pairs(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"user": user, "assistant": assistant, "source": "somewhere"} for user, assistant in turns]


def test_pairs_of_question_and_answer_are_turns(make_trainer: MakeTrainer) -> None:
    texts = pairs((QUESTION, ANSWER), ("and the sea?", "deep"))
    turns = [{"role": role, "content": turn[role]} for turn in texts for role in ("user", "assistant")]
    image = {"bytes": PNG, "path": None}
    of_lists = {key: [turn[key] for turn in texts] for key in texts[0]}
    for value in (texts, of_lists):
        row = as_trl_row({"texts": value, "images": [image], "source": "docvqa"}, "Row 0")
        assert row["messages"][1:] == turns[1:] and row["images"] == [image] and row["source"] == "docvqa"
        assert row["messages"][0]["content"] == [{"type": "image"}, {"type": "text", "text": QUESTION}]
    features = Features({"images": List(Image()), "texts": List(dict.fromkeys(texts[0], Value("string")))})
    data = Dataset.from_list([{"images": [image], "texts": texts}] * 4, features=features)
    plain = Dataset.from_list([{"images": [picture()], "messages": turns}] * 4)
    batch, other = (batch_of(make_trainer(train_dataset=rows, **IN_ORDER)) for rows in (data, plain))
    assert_same(batch, other)
    stream = batch_of(make_trainer(train_dataset=data.to_iterable_dataset(), **IN_ORDER))
    assert_same(stream, other)


def test_a_column_of_that_name_is_left_alone_beside_another_format() -> None:
    for beside in (
        {"text": "running"},
        {"messages": [{"role": "user", "content": "a"}]},
        {"prompt": "a", "completion": "b"},
    ):
        row = as_trl_row({"texts": ["unrelated"], **beside}, "Row 0", chat=False)
        assert row["texts"] == ["unrelated"] and row.keys() >= beside.keys()
    with pytest.raises(BadRow, match=r"Row 0, 'texts', turn 0: expected \{'role', 'content'\}"):
        as_trl_row({"texts": ["unrelated"]}, "Row 0")
    with pytest.raises(BadRow, match="content of the assistant's turn is missing"):
        as_trl_row({"texts": [{"user": "a", "assistant": None}]}, "Row 0")
