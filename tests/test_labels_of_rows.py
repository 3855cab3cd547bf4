"""Which tokens of a row are trained on, read back from the labels, where rows are of unusual kinds; and what says so where it cannot be."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_families
import torch
from datasets import Dataset
from PIL import Image
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from hf_lingudistill.bad_rows import BadRow
from hf_lingudistill.batch import DistillCollator
from hf_lingudistill.conversations import Conversations
from hf_lingudistill.mixtures import DistillMixtureConfig, DistillSource, load_mixture
from hf_lingudistill.sources import load_source

MakeTrainer = Callable[..., Any]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def picture(shade: int = 0) -> Image.Image:
    return Image.new("RGB", (32, 32), (shade, 90, 200))


def trained(batch: Any, tokenizer: Any, row: int = 0) -> str:
    labels = batch["labels"][row]
    return str(tokenizer.decode(labels[labels != -100]))


def near(count: int, between: str) -> list[dict[str, Any]]:
    """A question whose images stand near to one another."""
    parts = [[{"type": "image"}, {"type": "text", "text": between.format(n)}] for n in range(count)]
    return [*(part for pair in parts for part in pair), {"type": "text", "text": "which one is red?"}]


@pytest.mark.parametrize("family", ["idefics3", "gemma3", "internvl", "llava", "qwen2_5_vl"])
@pytest.mark.parametrize("between", [", ", " and ", "{}", "\n"])
def test_of_many_images_that_stand_close_together_the_answer_alone_is_trained_on(family: str, between: str) -> None:
    processor = tiny_families.make_processor(family)
    collator = DistillCollator(
        DataCollatorForVisionLanguageModeling(processor, completion_only_loss=False),
        image_token_ids=(processor.tokenizer.convert_tokens_to_ids(processor.image_token),),
    )
    for count in (2, 4, 7, 12):
        turns = [user(near(count, between)), assistant("the second"), user("why?"), assistant("it is red")]
        images = [picture(shade) for shade in range(count)]
        for asked, said in ((turns[:2], ["the second"]), (turns, ["the second", "it is red"])):
            found = trained(collator([{"messages": asked, "images": images}]), processor.tokenizer)
            assert [part.strip() for part in found.split("<|im_end|>") if part.strip()] == said


def test_a_row_whose_answer_is_not_found_among_its_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    conversations = Conversations(tiny.make_tokenizer(extra=True), tiny.make_tokenizer(extra=True).chat_template)
    row = {"messages": [user("why?"), assistant("it is red")]}
    assert -100 in conversations.tokens(row, "Row 3")["labels"]  # control
    monkeypatch.setattr("hf_lingudistill.conversations.trained_tokens", lambda *_: None)
    with pytest.raises(BadRow, match="Row 3: its answers cannot be found among its tokens"):
        conversations.tokens(row, "Row 3")


LONG = "the cat sat on it " * 40


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user(LONG), assistant("the sea")]},
        {"prompt": LONG, "completion": "the sea"},
        {"prompt": [user(LONG)], "completion": [assistant("the sea")]},
    ],
    ids=["messages", "texts", "turns"],
)
def test_packing_says_which_rows_have_no_label_within_their_length(
    make_trainer: MakeTrainer, row: dict[str, Any]
) -> None:
    short = {
        name: [user("why?"), assistant("red")] if name == "messages" else ("why?" if name == "prompt" else "red")
        for name in row
    }
    if isinstance(row.get("prompt"), list):
        short = {"prompt": [user("why?")], "completion": [assistant("red")]}
    rows = Dataset.from_list([short, row, row, short])
    settings: dict[str, Any] = {"packing": True, "max_length": 64, "anchor": "none", "kv_source": "student"}
    with pytest.raises(BadRow, match=r"Row 1 has no token to train on within max_length=64"):
        make_trainer(train_dataset=rows, **settings)
    trainer = make_trainer(train_dataset=rows, skip_bad_rows=True, **settings)
    assert dict(trainer.skipped_rows) == {"no label": 2}
    labels = [label for one in trainer.train_dataset for label in one["labels"] if label != -100]
    assert labels and tiny.make_tokenizer(extra=True).decode(labels).count("red") == 2
    with pytest.raises(ValueError, match="no answer token lies within max_length=64"):
        make_trainer(train_dataset=rows.select([1, 2]), skip_bad_rows=True, **settings)
    # Control: a strategy that splits rows loses none
    split = make_trainer(train_dataset=rows, **{**settings, "packing_strategy": "bfd_split"})
    assert not split.skipped_rows


@pytest.mark.parametrize("kind", ["prompt and completion", "text"])
def test_a_text_ends_beside_pictures_as_it_does_alone(make_trainer: MakeTrainer, kind: str) -> None:
    text = {"prompt": "tell me", "completion": " the sea"} if kind != "text" else {"text": "tell me the sea"}
    seen = {"prompt": "what is it?", "completion": "a cat"} if kind != "text" else {"text": "<image> a cat"}
    alone = make_trainer(train_dataset=Dataset.from_list([text] * 4))
    beside = make_trainer(
        train_dataset=[
            {**text, "images": []},
            {**seen, "images": [picture()]},
            {**text, "images": []},
            {**text, "images": []},
        ]
    )
    tokenizer = alone.processing_class.tokenizer
    expected = trained(next(iter(alone.get_train_dataloader())), tokenizer)
    batch = beside.data_collator([beside.train_dataset[0], beside.train_dataset[2]])
    assert expected.endswith(tokenizer.eos_token) and trained(batch, tokenizer) == expected


SILENT = {
    "a call": {"tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"at": "sea"}}}]},
    "a thought": {"reasoning_content": "it is warm"},
}


@pytest.mark.parametrize("silent", SILENT)
def test_a_turn_of_which_the_template_writes_nothing_is_refused(silent: str) -> None:
    turns = [user("how warm?"), assistant("", **SILENT[silent]), user("and now?"), assistant("12 degrees")]
    tokenizer = tiny.make_tokenizer(extra=True)
    key = next(iter(SILENT[silent]))
    with pytest.raises(
        BadRow, match=rf"Row 0: of its turn 1 .*, which has {key} and no text, the chat template writes nothing"
    ):
        Conversations(tokenizer, tokenizer.chat_template).tokens({"messages": turns}, "Row 0")
    # Control: a template that writes it
    writes = tokenizer.chat_template.replace("{{ m['content'] }}", f"{{{{ m['content'] ~ (m.get('{key}') or '') }}}}")
    assert writes != tokenizer.chat_template
    assert Conversations(tokenizer, writes).tokens({"messages": turns}, "Row 0")["labels"]


@pytest.mark.parametrize("content", [[], [{"type": "text", "text": ""}]], ids=["none", "an empty text"])
def test_a_question_of_empty_parts_is_a_picture_alone(make_trainer: MakeTrainer, content: Any) -> None:
    rows = [{"messages": [user(content), assistant("a cat")], "images": [picture()]}] * 4
    trainer = make_trainer(train_dataset=rows)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert "[]" not in trainer.processing_class.tokenizer.decode(batch["input_ids"][0])


@pytest.mark.parametrize("text", ["<image>\nWhat is it?", "What is it?\n<image>", "<image>"])
def test_a_place_without_its_image_is_refused_whatever_the_processor_calls_one(text: str) -> None:
    from hf_lingudistill.formats import as_trl_row

    row = {"messages": [user(text), assistant("a cat")], "images": []}
    with pytest.raises(BadRow, match="has 1 places for images"):
        as_trl_row(row, "Row 0", "<|image_pad|>")
    talk = {"messages": [user("What does <image> mean in HTML?"), assistant("nothing")], "images": []}
    assert as_trl_row(talk, "Row 0", "<|image_pad|>")  # control


def test_a_template_that_refuses_the_first_row_names_it(make_trainer: MakeTrainer) -> None:
    refuses = "{{ raise_exception('roles must alternate') }}" + tiny.make_tokenizer(extra=True).chat_template
    processor = tiny.make_processor()
    processor.chat_template = processor.tokenizer.chat_template = refuses
    rows = [{"messages": [user("why?"), assistant("red")]}] * 4
    with pytest.raises(BadRow, match="Row 0 cannot be processed .*roles must alternate"):
        make_trainer(train_dataset=Dataset.from_list(rows), processing_class=processor)


def test_a_missing_image_in_a_list_of_rows_is_named(make_trainer: MakeTrainer) -> None:
    row = {"messages": [user("which?"), assistant("a cat")], "images": [picture()]}
    bad = {**row, "images": [picture(), None]}
    with pytest.raises(BadRow, match="Row 1: an image is missing"):
        make_trainer(train_dataset=[row, bad, row])
    assert dict(make_trainer(train_dataset=[row, bad, row], skip_bad_rows=True).skipped_rows) == {"image missing": 1}


def test_bad_texts_are_skipped_as_bad_pictures_are(make_trainer: MakeTrainer, caplog: Any) -> None:
    processor = tiny.make_processor()
    template = (
        "{% if 'bad' in (messages[0]['content'] | string) %}{{ raise_exception('no') }}{% endif %}"
        + processor.chat_template
    )
    processor.chat_template = processor.tokenizer.chat_template = template
    rows = Dataset.from_list(
        [{"messages": [user(said), assistant("red")]} for said in ("why?", "bad", "how?", "bad", "x")]
    )
    with pytest.raises(BadRow, match="Row 1 cannot be processed"):
        make_trainer(train_dataset=rows, processing_class=processor)
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(train_dataset=rows, eval_dataset=rows, processing_class=processor, skip_bad_rows=True)
    assert dict(trainer.skipped_rows) == {"processor failed": 2} and len(trainer.train_dataset) == 3
    assert "Skipped 2 rows of an evaluation set: {'processor failed': 2}" in caplog.text
    with pytest.raises(ValueError, match="No usable row is left of 2"):
        make_trainer(train_dataset=rows.select([1, 3]), processing_class=processor, skip_bad_rows=True)


@pytest.mark.parametrize("taken", ["add_generation_prompt", "continue_final_message", "tokenize"])
def test_a_row_does_not_say_what_is_rendered(taken: str) -> None:
    row = {"messages": [user("why?"), assistant("red")], "chat_template_kwargs": {taken: True}}
    tokenizer = tiny.make_tokenizer(extra=True)
    with pytest.raises(BadRow, match=f"Row 0: its chat_template_kwargs set '{taken}', which training sets itself"):
        Conversations(tokenizer, tokenizer.chat_template).tokens(row, "Row 0")


def test_a_silent_turn_is_refused_by_templates_that_read_parts(make_trainer: MakeTrainer) -> None:
    """SmolVLM's own reads the first part of each turn, and cannot render one without."""
    reads_parts = (
        "{% for m in messages %}{{ m['role'] }}:{% if m['content'][0]['type'] == 'image' %}{% endif %}"
        "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    processor = tiny.make_processor()
    processor.chat_template = processor.tokenizer.chat_template = reads_parts
    conversations = Conversations(processor, reads_parts)
    turns = [user("how warm?"), assistant("", **SILENT["a call"]), user("and now?"), assistant("12 degrees")]
    for row in ({"messages": turns}, {"prompt": turns[:3], "completion": turns[3:]}):
        with pytest.raises(BadRow, match="which has tool_calls and no text, the chat template writes nothing"):
            conversations.tokens(row, "Row 0")
    assert conversations.tokens({"messages": [user("how warm?"), assistant("12 degrees")]}, "Row 0")  # control


def test_fields_that_other_rows_have_are_not_rendered() -> None:
    """Arrow gives each row the fields of all, as nulls: another row's parameters, and `enable_thinking: null`."""
    template = "{{ tools | tojson }}{% if enable_thinking is defined %}thinks{% endif %}" + str(
        tiny.make_tokenizer(extra=True).chat_template
    )
    conversations = Conversations(tiny.make_tokenizer(extra=True), template)
    row: dict[str, Any] = {"messages": [user("why?"), assistant("red")]}
    tools = [{"name": "weather", "parameters": {"city": "text"}}]
    plain = conversations.tokens({**row, "tools": tools}, "Row 0")
    nulls = [{"name": "weather", "parameters": {"city": "text", "a": None}}]
    assert (
        conversations.tokens({**row, "tools": nulls, "chat_template_kwargs": {"enable_thinking": None}}, "Row 0")
        == plain
    )
    told = conversations.tokens({**row, "tools": tools, "chat_template_kwargs": '{"enable_thinking": true}'}, "Row 0")
    assert told != plain  # control; and a text of JSON is read


LIKE_JSON = ['["cat", "dog"]', '"dog"', "42", "true", '{"a": 1}']


@pytest.mark.parametrize("given", ["a list", "a file", "a stream of a file"])
def test_an_answer_that_looks_like_json_stays_a_text(make_trainer: MakeTrainer, tmp_path: Path, given: str) -> None:
    """Beside a row whose contents are lists of parts, which makes Arrow keep contents as JSON."""
    parts = {"messages": [user([{"type": "text", "text": "hi"}]), assistant([{"type": "text", "text": "hello"}])]}
    rows: Any = [parts, *({"messages": [user(f"say {said}"), assistant(said)]} for said in LIKE_JSON)]
    if given != "a list":
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        rows = load_source(DistillSource(path=str(file)), streaming=given != "a file")
    trainer = make_trainer(train_dataset=rows)
    tokenizer = trainer.processing_class.tokenizer
    labels = [torch.tensor(row["labels"]) for row in trainer.train_dataset]
    assert [trained({"labels": [one]}, tokenizer) for one in labels] == [
        f"{said}<|im_end|>\n" for said in ("hello", *LIKE_JSON)
    ]
    questions = [tokenizer.decode(row["input_ids"]) for row in trainer.train_dataset]
    assert all(f"say {said}<|im_end|>" in asked for said, asked in zip(LIKE_JSON, questions[1:], strict=True))


def test_in_a_mixture_of_turns_and_texts_too(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    sources = []
    for name, rows in {
        "turns": [{"prompt": [user("hi")], "completion": [assistant("hello")]}],
        "texts": [{"prompt": "say", "completion": said} for said in LIKE_JSON],
    }.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources.append({"path": str(file)})
    mixture = load_mixture(DistillMixtureConfig(datasets=sources))["train"]
    trainer = make_trainer(train_dataset=mixture)
    tokenizer = trainer.processing_class.tokenizer
    labels = [trained({"labels": [torch.tensor(row["labels"])]}, tokenizer) for row in trainer.train_dataset]
    assert sorted(label.removesuffix("\n").removesuffix("<|im_end|>") for label in labels) == sorted(
        ["hello", *LIKE_JSON]
    )


def test_a_picture_in_memory_is_seen_as_its_file_is(make_trainer: MakeTrainer) -> None:
    """A photograph that lies on its side, a palette with transparency, and a JPEG, which Arrow would compress again."""
    upright = Image.new("RGB", (32, 32), "white")
    upright.paste((200, 0, 0), (0, 0, 32, 16))
    noise = Image.effect_noise((32, 32), 90).convert("RGB")
    palette = Image.new("P", (32, 32), 0)
    palette.putpalette([200, 0, 0, 0, 0, 0])
    palette.paste(1, (8, 8, 24, 24))
    turned = Image.Exif()
    turned[0x0112] = 6

    def file(image: Image.Image, kind: str, **more: Any) -> bytes:
        written = io.BytesIO()
        image.save(written, kind, **more)
        return written.getvalue()

    files = [file(upright, "JPEG", exif=turned), file(palette, "PNG", transparency=0), file(noise, "JPEG", quality=60)]
    turns = {"messages": [user("what?"), assistant("a cat")]}
    rows = [{**turns, "images": [Image.open(io.BytesIO(one))]} for one in files]
    trainer = make_trainer(train_dataset=rows)
    seen = trainer.data_collator(list(trainer.train_dataset))["pixel_values"]
    from hf_lingudistill.images import decode_image

    expected = trainer.data_collator([{**turns, "images": [decode_image(one)]} for one in files])["pixel_values"]
    assert torch.equal(seen, expected) and not torch.equal(seen[0], seen[1])
