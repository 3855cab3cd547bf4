"""What a converted nanoVLM is given: token ids and pixels, of nanoVLM's own processor and of the stock one."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import nanovlm_golden as golden
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.models.deepseek_vl.processing_deepseek_vl import DeepseekVLProcessor
from transformers.models.granite_docling.processing_granite_docling import GraniteDoclingProcessor

from hf_lingudistill.labs.nanovlm import NanoVLMConfig, NanoVLMError, NanoVLMProcessor, from_nanovlm
from hf_lingudistill.labs.nanovlm.inputs import tiles
from hf_lingudistill.labs.nanovlm.stock import OFFSET


def chats() -> list[list[dict[str, Any]]]:
    """The goldens' conversations as transformers takes them."""
    return [
        [
            {"role": "user", "content": [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]},
            {"role": "assistant", "content": answer},
        ]
        for images, question, answer in golden.conversations()
    ]


def encode(processor: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    """-> (ids of each row without padding, pixel values)"""
    texts = [processor.apply_chat_template(chat) for chat in chats()]
    images = [row[0] for row in golden.conversations()]
    batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
    return [ids[mask == 1] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)], batch[
        "pixel_values"
    ]


@pytest.mark.parametrize("case", [case for case in golden.CASES if case[2]], ids=golden.name_of)
def test_input_ids_are_nanovlms(case, nanovlm_checkpoint, nanovlm_goldens) -> None:
    _, folder = nanovlm_checkpoint(case)
    expected = [nanovlm_goldens[f"{golden.name_of(case)}/ids/{row}"].long() for row in range(3)]
    exact, _ = encode(NanoVLMProcessor.from_pretrained(folder))
    assert all(torch.equal(found, wanted) for found, wanted in zip(exact, expected, strict=True))

    stock = AutoProcessor.from_pretrained(folder)
    found, _ = encode(stock)
    assert torch.equal(found[2], expected[2]), "without an image the two are one"
    if case[3] == "whole":
        assert isinstance(stock, DeepseekVLProcessor)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), "and where images are not split"
        return
    assert isinstance(stock, GraniteDoclingProcessor)
    differs = [not torch.equal(a, b) for a, b in zip(found, expected, strict=True)]
    assert differs == [True, True, False], "the control: where they are split, the stock order is another"
    # The same tokens, in an order that is nanoVLM's but for the whole image, which comes last.
    config, whole = golden.config_of(*case), stock.tokenizer.convert_tokens_to_ids("<|global_image|>")
    for ours, theirs, (images, _, _) in zip(found[:2], expected[:2], golden.conversations(), strict=False):
        if case[3] == "fitted" and max(max(image.size) for image in images) > config["max_img_size"]:
            assert len(ours) > len(theirs), "what is larger than any image of nanoVLM's is not shrunk: more tiles"
            continue
        assert Counter(ours.tolist()) == Counter(theirs.tolist())
        run = config["mp_image_token_length"]
        assert without_block(ours, whole, run) == without_block(theirs, whole, run)


def without_block(ids: torch.Tensor, start: int, run: int) -> list[int]:
    """ids without each `start` token and the `run` tokens after it."""
    kept, skip = [], 0
    for token in ids.tolist():
        skip = run + 1 if token == start else skip
        if skip:
            skip -= 1
        else:
            kept.append(token)
    return kept


@pytest.mark.parametrize("case", golden.PIXELS, ids=golden.pixel_name)
def test_tiles_are_nanovlms(case, nanovlm_goldens) -> None:
    size, longest, enlarge, width, height = case
    config = golden.config_of(size, 1, True, "fitted", patch=8, max_img_size=longest, resize_to_max_side_len=enlarge)
    found, (rows, cols) = tiles(NanoVLMConfig.read(json.dumps(config)), golden.picture(width, height))
    expected = nanovlm_goldens[golden.pixel_name(case)]
    assert found.shape == expected.shape and len(found) == (rows * cols + 1 if rows * cols > 1 else 1)
    assert torch.equal(found[1 % len(found) :], expected[1 % len(found) :]), "tiles are bit for bit the same"
    assert (found[0] - expected[0]).abs().max() <= 1e-6, "the whole image is averaged in floating point"
    other, _ = tiles(
        NanoVLMConfig.read(json.dumps(config)),
        golden.picture(width, height).transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    )
    assert (other - expected).abs().max() > 1 / 255, "the control"


def test_stock_pixels_of_whole_images_are_nanovlms_within_a_rounding(nanovlm_checkpoint) -> None:
    _, folder = nanovlm_checkpoint((256, 4, True, "whole"))
    exact, stock = NanoVLMProcessor.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert (encode(exact)[1] - encode(stock)[1]).abs().max() <= 2 * OFFSET, "1/255 is 65,793 times as much"


def test_stock_tiles_are_nanovlms_where_one_resize_is_enough(nanovlm_checkpoint) -> None:
    _, folder = nanovlm_checkpoint((256, 4, True, "enlarged"))
    exact, stock = NanoVLMProcessor.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    image = golden.picture(600, 300)  # 512 x 256: whole tiles already
    ours = exact.image_processor([[image]], return_tensors="pt")["pixel_values"][0]
    theirs = stock.image_processor([[image]], return_tensors="pt")["pixel_values"][0]
    assert (ours[1:] - theirs[:-1]).abs().max() <= 2 * OFFSET
    assert (ours[0] - theirs[-1]).abs().max() > 1 / 255, "the whole image is made bilinearly there, bicubically here"


@pytest.mark.parametrize("tiling", ["whole", "enlarged", "fitted"])
def test_a_black_image_is_not_taken_for_padding(tiling, nanovlm_checkpoint) -> None:
    _, folder = nanovlm_checkpoint((256, 4, True, tiling))
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is it blue?"}]}]
    for processor in (NanoVLMProcessor.from_pretrained(folder), AutoProcessor.from_pretrained(folder)):
        text = processor.apply_chat_template(chat)
        batch = processor(text=[text], images=[[Image.new("RGB", (300, 200))]], return_tensors="pt")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert (batch["pixel_values"].to(dtype) != 0).all(), "whatever precision the model runs in"
        with torch.no_grad():
            assert model(**batch).logits.isfinite().all()
        batch["pixel_values"] = torch.zeros_like(batch["pixel_values"])
        with pytest.raises(RuntimeError, match="0 elements"):
            model(**batch)  # the control: nanoVLM's own zeros


def test_rows_with_and_without_images_share_a_batch(nanovlm_checkpoint) -> None:
    _, folder = nanovlm_checkpoint((256, 4, True, "enlarged"))
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    for processor in (NanoVLMProcessor.from_pretrained(folder), AutoProcessor.from_pretrained(folder)):
        texts = [processor.apply_chat_template(chat) for chat in chats()]
        images = [row[0] for row in golden.conversations()]
        together = processor(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt")
        with torch.no_grad():
            every = model(**together).logits
            for row, (text, pictures) in enumerate(zip(texts, images, strict=True)):
                alone = processor(text=[text], images=[pictures] if pictures else None, return_tensors="pt")
                length = alone["input_ids"].shape[1]
                assert (model(**alone).logits[0] - every[row, :length]).abs().max() < 1e-4


def test_images_of_one_tile_are_nanovlms_in_both_processors(nanovlm_checkpoint) -> None:
    _, folder = nanovlm_checkpoint((256, 4, True, "fitted"))
    exact, stock = NanoVLMProcessor.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\na?"}, {"type": "image"}]}]
    pair = {}
    for name, processor in {"exact": exact, "stock": stock}.items():
        text, images = processor.apply_chat_template(chat), [golden.picture(200, 150), golden.picture(256, 30)]
        pair[name] = processor(text=[text], images=[images], return_tensors="pt")
    assert torch.equal(pair["exact"]["input_ids"], pair["stock"]["input_ids"])
    assert (pair["exact"]["pixel_values"] - pair["stock"]["pixel_values"]).abs().max() <= 2 * OFFSET
    tokens = stock.tokenizer.convert_ids_to_tokens(pair["stock"]["input_ids"][0].tolist())
    assert tokens.count("<|global_image|>") == 2 and tokens.count("<|image|>") == 32
    large = stock(text=[stock.apply_chat_template(chat)], images=[[golden.picture(300, 30)] * 2], return_tensors="pt")
    assert large["pixel_values"].shape[1] == 6, "the control: one pixel more than a tile is split"


@pytest.mark.parametrize("tiling", ["enlarged", "fitted"])
def test_the_stock_processor_can_be_told_not_to_split(tiling, nanovlm_checkpoint) -> None:
    """As `lingudistill diagnose` tells it."""
    _, folder = nanovlm_checkpoint((256, 4, True, tiling))
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor.do_image_splitting = False
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "image": golden.picture(600, 90)}, {"type": "text", "text": "a"}],
        }
    ]
    batch = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    tokens = processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    assert tokens[tokens.index("<|global_image|>") :][:18] == ["<|global_image|>", *["<|image|>"] * 16, "a"]
    assert batch["pixel_values"].shape[1] == 1
    assert AutoModelForImageTextToText.from_pretrained(folder)(**batch).logits.isfinite().all()


@pytest.mark.parametrize("tiling", ["enlarged", "fitted"])
def test_a_users_line_breaks_stay(tiling, nanovlm_checkpoint) -> None:
    _, folder = nanovlm_checkpoint((256, 4, True, tiling))
    processor = AutoProcessor.from_pretrained(folder)
    said = [
        {"type": "text", "text": "a\n"},
        {"type": "image"},
        {"type": "text", "text": "\n\nb\n\n"},
        {"type": "image"},
    ]
    text = processor.apply_chat_template([{"role": "user", "content": said}])
    for size in ((64, 64), (600, 64)):
        ids = processor(text=[text], images=[[golden.picture(*size)] * 2], return_tensors="pt")["input_ids"][0]
        tokens = processor.tokenizer.convert_ids_to_tokens(ids.tolist())
        plain = "".join("" if token.startswith(("<|image", "<|global", "<row")) else token for token in tokens)
        assert plain.replace("Ċ", "\n").replace("Ġ", " ") == (
            "<|im_start|>user\n<image: 0>a\n\n\nb\n\n<image: 1><|im_end|>\n".replace("<image: 0>a\n", "a\n<image: 0>")
        )


@pytest.mark.parametrize("tiling", ["whole", "enlarged", "fitted"])
def test_the_chat_template_is_nanovlms_own_for_every_turn(tiling, nanovlm_checkpoint) -> None:
    _, folder = nanovlm_checkpoint((256, 4, True, tiling))
    for processor in (NanoVLMProcessor.from_pretrained(folder), AutoProcessor.from_pretrained(folder)):
        said = processor.apply_chat_template(
            [
                {"role": "system", "content": "be kind"},
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a's?"}]},
                {"role": "assistant", "content": None},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "b "}, {"type": "image"}, {"type": "text", "text": "c"}],
                },
            ],
            add_generation_prompt=True,
        )
        said = said.replace("<whole-image><image>", "<|image|>")
        assert said == (
            "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\n<image: 0><|image|>a's?<|im_end|>\n"
            "<|im_start|>assistant\n<|im_end|>\n<|im_start|>user\nb <image: 1><|image|>c<|im_end|>\n<|im_start|>assistant\n"
        )


def convert(folder: Path, tiling: str, **changes: Any) -> tuple[Any, Any, list[str]]:
    """-> (stock processor, nanoVLM's, notes)"""
    config = {k: v for k, v in golden.config_of(256, 4, True, tiling, **changes).items() if v is not None}
    golden.write_nanovlm(folder / "source", config)
    done = from_nanovlm(str(folder / "source"), str(folder / "converted"))
    return AutoProcessor.from_pretrained(done.folder), NanoVLMProcessor.from_pretrained(done.folder), done.notes


def test_a_checkpoint_older_than_chat_templates_asks_and_answers(tmp_path: Path) -> None:
    stock, exact, notes = convert(tmp_path, "whole", lm_chat_template=None)
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a?"}]},
        {"role": "assistant", "content": "b"},
    ]
    for processor in (stock, exact):
        assert processor.apply_chat_template(chat) == "<|image|>Question: a? Answer:b<|im_end|>"
        assert processor.apply_chat_template(chat[:1], add_generation_prompt=True) == "<|image|>Question: a? Answer:"
    assert any("has no lm_chat_template: prompts are written as 'Question: ... Answer:'" in note for note in notes)


def test_without_a_global_token_the_stock_processor_reads_one_tile(tmp_path: Path) -> None:
    tokens = {"image_token": "<|image|>", **golden.GRID}
    stock, exact, notes = convert(tmp_path, "fitted", vlm_extra_tokens=tokens, lm_vocab_size=320 + len(tokens))
    names = {}
    for name, processor in {"stock": stock, "exact": exact}.items():
        text = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])
        for size in ((200, 100), (500, 100)):
            batch = processor(text=[text], images=[[golden.picture(*size)]], return_tensors="pt")
            ids = processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
            names[name, size] = [token for token in ids if token.startswith("<row")], batch["pixel_values"].shape[1]
    assert names["stock", (200, 100)] == names["exact", (200, 100)] == (["<row_1_col_1>"], 1)
    assert names["exact", (500, 100)] == (["<row_1_col_1>", "<row_1_col_2>"], 2)
    assert names["stock", (500, 100)] == (["<row_1_col_1>"], 1)
    assert any("does not split images" in note for note in notes)


def test_the_order_of_the_extra_tokens_is_the_order_of_their_ids(tmp_path: Path) -> None:
    tokens = {"zebra": "<|z|>", "image_token": "<|image|>", "apple": "<|a|>"}
    stock, exact, _ = convert(tmp_path, "whole", vlm_extra_tokens=tokens, lm_vocab_size=320 + 64)
    for processor in (stock, exact):
        assert processor.tokenizer.convert_tokens_to_ids(list(tokens.values())) == [320, 321, 322]
        assert processor.tokenizer.pad_token == processor.tokenizer.eos_token == "<|im_end|>"
        assert processor.tokenizer.model_max_length == 8192


def test_the_tokenizer_file_is_taken_as_it_is(tmp_path: Path) -> None:
    """SmolLM2's has a rule for digits, and names a class that transformers builds anew without it."""
    content = json.loads((golden.TOKENIZER / "tokenizer.json").read_text())
    rule = {"type": "Digits", "individual_digits": True}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [rule, content["pre_tokenizer"]]}
    base = tmp_path / "base"
    base.mkdir()
    (base / "tokenizer.json").write_text(json.dumps(content))
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "Digits" not in AutoTokenizer.from_pretrained(base).backend_tokenizer.to_str(), (
        "what this is a test against"
    )
    stock, exact, _ = convert(tmp_path, "fitted", lm_tokenizer=str(base))
    for processor in (stock, exact):
        found = json.loads(processor.tokenizer.backend_tokenizer.to_str())
        assert found["pre_tokenizer"] == content["pre_tokenizer"]
        assert (
            processor.tokenizer("the sea 12").input_ids
            == Tokenizer.from_file(str(base / "tokenizer.json")).encode("the sea 12").ids
        )
    (base / "tokenizer_config.json").write_text("{}")
    with pytest.raises(NanoVLMError, match="names no end-of-sequence token"):
        from_nanovlm(str(tmp_path / "source"), str(tmp_path / "out"))


def test_nanovlms_processor_is_for_what_came_from_nanovlm(saved_pair) -> None:
    with pytest.raises(NanoVLMError, match="its config.json has no 'nanovlm'"):
        NanoVLMProcessor.from_pretrained(saved_pair[0])


def test_saved_and_loaded_twice_the_stock_processor_says_the_same(nanovlm_checkpoint, tmp_path: Path) -> None:
    _, folder = nanovlm_checkpoint((256, 4, True, "enlarged"))
    first = AutoProcessor.from_pretrained(folder)
    NanoVLMProcessor.from_pretrained(folder).save_pretrained(tmp_path / "once")
    AutoProcessor.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    (tmp_path / "twice/config.json").write_bytes((folder / "config.json").read_bytes())
    (ids, pixels), (again, same) = encode(first), encode(AutoProcessor.from_pretrained(tmp_path / "twice"))
    assert all(torch.equal(a, b) for a, b in zip(ids, again, strict=True))
    assert np.array_equal(pixels.numpy(), same.numpy())


@pytest.mark.parametrize("tiling", ["whole", "enlarged", "fitted"])
def test_what_is_trained_on_is_what_nanovlm_trains_on(tiling, nanovlm_checkpoint) -> None:
    from hf_lingudistill.conversations import Conversations

    _, folder = nanovlm_checkpoint((256, 4, True, tiling))
    turns = [("user", "what 12?\n"), ("assistant", "the sea"), ("user", "and?"), ("assistant", "no")]
    messages = [{"role": role, "content": content} for role, content in turns]
    for processor in (NanoVLMProcessor.from_pretrained(folder), AutoProcessor.from_pretrained(folder)):
        image = processor.tokenizer.convert_tokens_to_ids("<|image|>")
        conversations = Conversations(processor, image_ids=(image,))
        rendered = conversations.render(
            conversations.read({"images": [golden.picture(600, 90)], "messages": messages}, "row"), as_text=True
        )
        ids = processor(text=[rendered.row["text"]], images=[rendered.row["images"]], return_tensors="pt")[
            "input_ids"
        ][0]
        labels = ids.clone()
        conversations.mask(labels, ids, rendered, "Row 0")
        assert (ids == image).sum() in (16, 16 * 4, 16 * 3), "the control: there are image tokens to leave out"
        # nanoVLM: each answer, its end, and the line break after it
        assert processor.tokenizer.decode(ids[labels != -100]) == "the sea<|im_end|>\nno<|im_end|>\n"
