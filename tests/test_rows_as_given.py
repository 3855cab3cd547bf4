"""Rows, templates and readers of unusual kinds: what is trained on is what the row says, or the row is refused by name."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset, IterableDataset
from test_labels_of_rows import assistant, picture, user

from hf_lingudistill.bad_rows import BadRow
from hf_lingudistill.conversations import Conversations
from hf_lingudistill.formats import as_trl_row
from hf_lingudistill.images import decode_image
from hf_lingudistill.row_checks import check_answer

MakeTrainer = Callable[..., Any]

ASKED = {"messages": [user("why?"), assistant("it is red")]}


def stream(rows: Sequence[dict[str, Any]]) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(rows))


def said(trainer: Any) -> list[str]:
    """What is trained on of each row."""
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    rows = [[label for label in row["labels"] if label != -100] for row in trainer.train_dataset]
    return [str(tokenizer.decode(row)).replace("<|im_end|>", "").strip() for row in rows]


# --------------------------------------------------------------------------------------------------------------------
# Chat templates
# --------------------------------------------------------------------------------------------------------------------
_TURN = "{{% for m in messages %}}<|im_start|>{{{{ m['role'] }}}}\n{}<|im_end|>\n{{% endfor %}}"
_ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_PARTS = (
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "parts": _TURN.format(_PARTS) + _ASK,
    "texts": _TURN.format("{{ m['content'] }}") + _ASK,
    "both": tiny.CHATML,
}
AS_PARTS = {
    "messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in ASKED["messages"]]
}
AS_TURNS = {"prompt": ASKED["messages"][:1], "completion": ASKED["messages"][1:]}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("reader", ["processor", "tokenizer"])
@pytest.mark.parametrize("row", [ASKED, AS_PARTS, AS_TURNS], ids=["texts", "parts", "prompt and completion"])
def test_a_template_is_given_what_it_reads(
    make_trainer: MakeTrainer, template: str, reader: str, row: dict[str, Any]
) -> None:
    """One that loops over parts writes nothing of a text, and one that writes texts writes a list as Python does."""
    processor: Any = tiny.make_processor() if reader == "processor" else tiny.make_tokenizer(extra=True)
    processor.chat_template = TEMPLATES[template]
    trainer = make_trainer(train_dataset=Dataset.from_list([row] * 4), processing_class=processor)
    assert set(said(trainer)) == {"it is red"}
    tokenizer = getattr(processor, "tokenizer", processor)
    whole = "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\nit is red<|im_end|>\n"
    assert {tokenizer.decode(one["input_ids"]) for one in trainer.train_dataset} == {whole}


def test_a_template_of_texts_has_no_place_for_an_image() -> None:
    row = {**ASKED, "images": [picture()]}
    for template in TEMPLATES:
        conversations = Conversations(tiny.make_processor(), TEMPLATES[template])
        if template == "texts":
            with pytest.raises(BadRow, match="Row 2 has an image, and the chat template reads texts alone"):
                conversations.render(conversations.read(row, "Row 2"), "Row 2", as_text=True)
        else:
            rendered = conversations.render(conversations.read(row, "Row 2"), "Row 2", as_text=True)
            assert rendered.row["text"].startswith("<|im_start|>user\n<image>why?")


# --------------------------------------------------------------------------------------------------------------------
# Turns, marks and places
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mark", [0, 0.0, False, "0", "0.0", "0.", "false", " False ", "no", "off", "00"])
@pytest.mark.parametrize("key", ["weight", "train", "loss"])
def test_an_answer_that_is_marked_as_not_to_be_trained_on_is_refused(key: str, mark: Any) -> None:
    with pytest.raises(BadRow, match=f"answer 1 in its messages is marked as not to be trained on .{key}"):
        check_answer({"messages": [user("a"), assistant("b"), user("c"), assistant("d", **{key: mark})]}, "Row 0")


@pytest.mark.parametrize("mark", [1, 1.0, True, "1", "0.5", "true", "yes", None, "", "heavy"])
def test_another_mark_is_not(mark: Any) -> None:
    check_answer({"messages": [user("a"), assistant("b", weight=mark)]}, "Row 0")


@pytest.mark.parametrize("role", ["user", "human", "system", "developer", "User"])
@pytest.mark.parametrize("images", [True, False])
def test_a_completion_is_the_assistants(make_trainer: MakeTrainer, role: str, images: bool) -> None:
    key = "from" if role == "human" else "role"
    for turns in ([{key: role, "content": "no"}], [assistant("red"), {key: role, "content": "no"}, assistant("blue")]):
        row = {"prompt": [user("why?")], "completion": turns}
        trainer_row = {**row, "images": [picture()]} if images else row
        with pytest.raises(
            BadRow, match="has a turn of the (user|system) in its completion, which is trained on whole"
        ):
            trainer = make_trainer(train_dataset=[trainer_row] * 4)
            trainer.data_collator([trainer.train_dataset[0]])
    check_answer({"completion": [assistant("a"), {"role": "tool", "content": "7"}, assistant("b")]}, "")  # control


def test_a_word_in_an_answer_is_no_place_for_an_image() -> None:
    about = {"messages": [user("what marks a picture?"), assistant("The word <image> does.")], "images": [picture()]}
    row = as_trl_row(about, "Row 0")
    assert (
        row["messages"][0]["content"][0] == {"type": "image"}
        and row["messages"][1]["content"] == about["messages"][1]["content"]
    )
    named = {**about, "messages": [user("<image>what marks it?"), assistant("The word <image> does.")]}
    assert as_trl_row(named, "Row 0")["messages"][1]["content"] == "The word <image> does."


@pytest.mark.parametrize(
    ("numbers", "count", "order"),
    [
        ([0, 1], 2, [0, 1]),
        ([1, 0], 2, [1, 0]),
        ([0, 0], 1, [0, 0]),
        ([1, 0, 1], 2, [1, 0, 1]),
        ([0, 0], 2, [0, 1]),  # of each turn: the images in their order
        ([1, 2], 2, [0, 1]),  # counted from 1
        ([None, 1], 2, [0, 1]),
    ],
)
def test_images_stand_where_the_parts_number_them(numbers: list[Any], count: int, order: list[int]) -> None:
    shades = [picture(50 * shade) for shade in range(count)]
    parts = [{"type": "image", "index": number, "text": None} for number in numbers]
    row = {"messages": [user([*parts, {"type": "text", "text": "which?", "index": None}]), assistant("red")]}
    found = as_trl_row({**row, "images": shades}, "Row 0")
    assert [shades.index(image) for image in found["images"]] == order
    assert found["messages"][0]["content"][: len(numbers)] == [{"type": "image"}] * len(numbers)


def test_what_the_system_says_in_a_pair_is_kept() -> None:
    pair = {"system": "be brief", "user": "why?", "assistant": "red"}
    turns = as_trl_row({"texts": [pair]}, "Row 0")["messages"]
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant"]
    for silent in (None, ""):
        turns = as_trl_row({"texts": [{**pair, "system": silent}]}, "Row 0")["messages"]
        assert [turn["role"] for turn in turns] == ["user", "assistant"]


def test_lists_of_fields_that_differ_in_length_are_refused() -> None:
    with pytest.raises(
        BadRow, match=r"Row 0, 'messages': its lists of fields differ in length \('role' 2, 'content' 1\)"
    ):
        as_trl_row({"messages": {"role": ["user", "assistant"], "content": ["a"]}}, "Row 0")


TURNS_AS_TEXT = '[{"role": "user", "content": "why?"}]'


@pytest.mark.parametrize("column", ["prompt", "completion"])
@pytest.mark.parametrize("images", [True, False])
def test_turns_as_json_text_are_not_trained_on_as_they_are_written(
    make_trainer: MakeTrainer, column: str, images: bool
) -> None:
    row: dict[str, Any] = {"prompt": "why?", "completion": "red", column: TURNS_AS_TEXT}
    row |= {"images": [picture()]} if images else {}
    with pytest.raises(BadRow, match=f"column '{column}' holds the JSON text of turns"):
        trainer = make_trainer(train_dataset=[row] * 4)
        trainer.data_collator([trainer.train_dataset[0]])
    # Control: other JSON is an answer like any other
    other = {**row, column: '[{"name": "a cat"}]'}
    make_trainer(train_dataset=[other] * 4)


def test_bytes_that_name_a_file_are_its_image(tmp_path: Path) -> None:
    """Arrow makes bytes of all paths of a column in which one row has bytes."""
    written = io.BytesIO()
    picture(70).save(written, "PNG")
    file = tmp_path / "cät.png"
    file.write_bytes(written.getvalue())
    for value in (str(file).encode(), written.getvalue()):
        assert decode_image(value).getpixel((3, 3)) == (70, 90, 200)
    with pytest.raises(BadRow, match="cannot be read"):
        decode_image(str(tmp_path / "none.png").encode())


# --------------------------------------------------------------------------------------------------------------------
# Streams, tokens and readers of the caller's own
# --------------------------------------------------------------------------------------------------------------------
CALL = {"function": {"name": "look", "arguments": "{}"}}
BAD = {
    "no label": {"messages": [user("only asked")]},
    "empty answer": {"messages": [user("x"), assistant("", tool_calls=[CALL])]},
    "not a conversation": {"messages": [user("x"), {"role": "narrator", "content": "he said"}, assistant("y")]},
}


@pytest.mark.parametrize("reason", BAD)
def test_a_stream_of_texts_leaves_out_what_a_file_leaves_out(make_trainer: MakeTrainer, reason: str) -> None:
    rows = [*[ASKED] * 9, BAD[reason], ASKED]
    counts = []
    for given in (stream(rows), rows):
        trainer = make_trainer(train_dataset=given, skip_bad_rows=True, max_steps=1)
        assert said(trainer) == ["it is red"] * 10
        counts.append(dict(trainer.skipped_rows))
        with pytest.raises(BadRow):  # control
            list(make_trainer(train_dataset=given, max_steps=1).train_dataset)
    assert counts == [{reason: 1}] * 2


def test_rows_that_an_evaluation_leaves_out_are_not_the_trainings(make_trainer: MakeTrainer) -> None:
    evaluated = stream([*[ASKED] * 2, BAD["no label"], ASKED])
    trainer = make_trainer(train_dataset=stream([ASKED] * 4), eval_dataset=evaluated, skip_bad_rows=True, max_steps=1)
    assert len(list(trainer.eval_dataset)) == 3 and not dict(trainer.skipped_rows)


TOKENS = {
    "labels": ({"labels": [-100, -100, -100]}, {"labels": [-100, 5, 6]}),
    "a mask": ({"completion_mask": [0, 0, 0]}, {"completion_mask": [0, 1, 1]}),
    "two masks": (
        {"completion_mask": [0, 1, 0], "assistant_masks": [0, 0, 1]},
        {"completion_mask": [0, 1, 1], "assistant_masks": [1, 1, 1]},
    ),
}


@pytest.mark.parametrize("kind", TOKENS)
@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("max_length", [None, 64])
def test_tokens_without_a_label_are_refused_or_counted_and_masks_hold(
    make_trainer: MakeTrainer, kind: str, streamed: bool, max_length: int | None
) -> None:
    bad, good = ({"input_ids": [4, 5, 6], **more} for more in TOKENS[kind])
    rows = [good, bad, good, good]
    given = stream(rows) if streamed else Dataset.from_list(rows)
    settings = {"max_length": max_length, "max_steps": 1}
    with pytest.raises(BadRow, match="Row 1 has no token to train on: all of its labels are masked"):
        list(make_trainer(train_dataset=given, **settings).train_dataset)
    trainer = make_trainer(train_dataset=given, skip_bad_rows=True, **settings)
    assert [row["labels"] for row in trainer.train_dataset] == [[-100, 5, 6]] * 3
    assert dict(trainer.skipped_rows) == {"no label": 1}
    trainer.train()
    # Control: a mask of completions is passed over where that is asked for
    if kind == "a mask" and not streamed:
        whole = make_trainer(train_dataset=Dataset.from_list([good] * 4), completion_only_loss=False, **settings)
        assert [row["labels"] for row in whole.train_dataset] == [[4, 5, 6]] * 4


@pytest.mark.parametrize("row", [ASKED, AS_TURNS, {"prompt": "why?", "completion": "red"}, {"text": "why? red"}])
@pytest.mark.parametrize("streamed", [True, False])
def test_a_formatting_function_says_what_is_trained_on(
    make_trainer: MakeTrainer, row: dict[str, Any], streamed: bool
) -> None:
    """TRL reads the conversation beside it in its stead."""
    rows = [{**row, "distill": True}] * 4
    given = stream(rows) if streamed else Dataset.from_list(rows)
    settings = {"completion_only_loss": False, "max_steps": 1}
    trainer = make_trainer(train_dataset=given, formatting_func=lambda one: f"made of {len(one)}", **settings)
    assert said(trainer) == [f"made of {len(rows[0])}"] * 4
    assert all(one["distill"] for one in trainer.train_dataset)
    with pytest.raises(ValueError, match=r"formatting_func gave list \['a'\] for Row 0: expected a text"):
        list(make_trainer(train_dataset=given, formatting_func=lambda one: ["a"], **settings).train_dataset)
    with pytest.raises(ValueError, match="formatting_func is not called for rows with images"):
        make_trainer(train_dataset=[{**row, "images": [picture()]}] * 4, formatting_func=lambda one: "a", **settings)


def test_evaluation_sets_may_be_named_by_numbers(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(train_dataset=[ASKED] * 4, eval_dataset={1: [ASKED] * 2, "other": [ASKED] * 2})
    found = trainer.evaluate()
    assert {"eval_1_loss", "eval_other_loss"} <= found.keys() and torch.tensor(found["eval_1_loss"]).isfinite()
