"""nanoVLM checkpoints as transformers models: logits, round trips, refusals, and a training step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import nanovlm_golden as golden
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from hf_lingudistill.cli import main
from hf_lingudistill.compatibility import check_compatibility, guess_teacher
from hf_lingudistill.labs.nanovlm import NanoVLMError, NanoVLMProcessor, from_nanovlm, to_nanovlm

SMALL = (256, 4, True, "fitted")


def pixels_of(folder: Path) -> torch.Tensor:
    """(3, tiles, 3, tile, tile): nanoVLM's own, of the goldens' conversations."""
    processor = NanoVLMProcessor.from_pretrained(folder)
    images = [row[0] for row in golden.conversations()]
    return processor.image_processor(images, return_tensors="pt")["pixel_values"]


@torch.no_grad()
def logits(model: Any, pixels: torch.Tensor, ids: list[torch.Tensor], side: str) -> torch.Tensor:
    rows = golden.padded(ids, side, 2)
    mask = golden.padded([torch.ones_like(row) for row in ids], side, 0)
    return golden.sample(
        model(input_ids=rows, attention_mask=mask, pixel_values=pixels).logits, list(map(len, ids)), side
    )


@pytest.mark.parametrize("case", golden.CASES, ids=golden.name_of)
def test_logits_are_those_of_nanovlms_own_code(case, nanovlm_checkpoint, nanovlm_goldens) -> None:
    _, folder = nanovlm_checkpoint(case)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    ids = [nanovlm_goldens[f"{golden.name_of(case)}/ids/{row}"].long() for row in range(3)]
    pixels = pixels_of(folder)
    for side in ("left", "right"):
        expected = nanovlm_goldens[f"{golden.name_of(case)}/logits/{side}"]
        found = logits(model, pixels, ids, side)
        assert (found - expected).abs().max() <= 1e-4, side
        assert expected.std() > 3, "logits of a real model's size"
    # The controls: what sees other pixels, or another order of tiles, or other positions of patches, is found out.
    assert (logits(model, pixels.flip(-1), ids, side) - expected).abs().max() > 0.1
    table = model.model.vision_model.embeddings.position_embedding.weight
    table.data = table.data.flip(0)
    assert (logits(model, pixels, ids, side) - expected).abs().max() > 0.1


def test_a_converted_folder_loads_without_this_package(nanovlm_checkpoint) -> None:
    _, folder = nanovlm_checkpoint(SMALL)
    script = (
        "import sys; sys.modules['hf_lingudistill'] = None\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        "from PIL import Image\n"
        f"model = AutoModelForImageTextToText.from_pretrained({str(folder)!r}, trust_remote_code=False)\n"
        f"processor = AutoProcessor.from_pretrained({str(folder)!r}, trust_remote_code=False)\n"
        "chat = [{'role': 'user', 'content': [{'type': 'image', 'image': Image.new('RGB', (90, 40))}, {'type': 'text', 'text': 'a'}]}]\n"
        "inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors='pt')\n"
        "print(model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] - inputs['input_ids'].shape[1])\n"
        "assert 'hf_lingudistill.cli' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) in (1, 2)
    assert not list(folder.glob("*.py")), "no code in a checkpoint"
    assert "auto_map" not in (folder / "config.json").read_text()


@pytest.mark.parametrize("tied", [True, False])
def test_a_round_trip_gives_every_tensor_back(tied, nanovlm_checkpoint, tmp_path: Path) -> None:
    source, folder = nanovlm_checkpoint((256, 4, tied, "fitted"))
    to_nanovlm(str(folder), str(tmp_path / "back"))
    with (
        safe_open(source / "model.safetensors", "pt") as there,
        safe_open(tmp_path / "back/model.safetensors", "pt") as here,
    ):
        assert set(here.keys()) == set(there.keys())
        assert all(torch.equal(here.get_tensor(name), there.get_tensor(name)) for name in there.keys())
        assert (here.metadata() or {}) == (there.metadata() or {}), (
            "the tied name is in the metadata, as safetensors puts it"
        )
    assert (tmp_path / "back/config.json").read_bytes() == (source / "config.json").read_bytes()

    from_nanovlm(str(tmp_path / "back"), str(tmp_path / "again"))
    first, second = load_file(folder / "model.safetensors"), load_file(tmp_path / "again/model.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "processor_config.json",
        "chat_template.jinja",
    ):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_a_tied_pair_may_be_stored_under_either_name(nanovlm_checkpoint, tmp_path: Path) -> None:
    golden.write_nanovlm(tmp_path / "source", golden.config_of(*SMALL), keep_embedding=True)
    tensors = load_file(tmp_path / "source/model.safetensors")
    tensors["decoder.token_embedding.weight"] = golden.tensors_of(golden.config_of(*SMALL))["decoder.head.weight"]
    save_file(tensors, tmp_path / "source/model.safetensors")
    from_nanovlm(str(tmp_path / "source"), str(tmp_path / "converted"))
    found, expected = (
        load_file(tmp_path / "converted/model.safetensors"),
        load_file(nanovlm_checkpoint(SMALL)[1] / "model.safetensors"),
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "cls": ({"vit_cls_flag": True}, "vit_cls_flag is true"),
    "tokens": ({"lm_use_tokens": True}, "lm_use_tokens is true"),
    "attention scaling": ({"lm_attn_scaling": 1.2}, "lm_attn_scaling is 1.2"),
    "longer context": ({"lm_rope_factor": 4.0}, "lm_rope_factor: a rotary embedding for longer contexts"),
    "unknown": ({"lm_window": 512}, "does not know: lm_window"),
    "missing": ({"lm_rms_eps": None}, "lacks lm_rms_eps"),
    "first release": ({"vlm_extra_tokens": None}, "no vlm_extra_tokens"),
    "type": ({"lm_n_heads": "4"}, "lm_n_heads in config.json must be of type int, found '4'"),
    "flag as number": ({"lm_tie_weights": 1}, "lm_tie_weights in config.json must be of type bool"),
    "number as flag": ({"lm_n_heads": True}, "lm_n_heads in config.json must be of type int"),
    "zero": ({"lm_n_blocks": 0}, "lm_n_blocks in config.json must be at least 1"),
    "image tokens": ({"mp_image_token_length": 63}, "mp_image_token_length is 63, but 16 x 16 patches"),
    "shuffle": ({"mp_pixel_shuffle_factor": 3}, "must divide the 16 patches per side"),
    "patches": ({"vit_img_size": 304, "max_img_size": 608, "mp_image_token_length": None}, "19 patches per side"),
    "tiles": ({"max_img_size": 300}, "max_img_size (300) must be a multiple of vit_img_size (256)"),
    "no rows": ({"vlm_extra_tokens": {"image_token": "<|image|>"}}, "expected '<row_1_col_1>'"),
    "no image token": ({"vlm_extra_tokens": {"boi_token": "<|boi|>"}}, "names no image_token"),
    "too few rows": ({"lm_vocab_size": 321}, "make 386 tokens, but the model has 321"),
    "tokenizer": ({"lm_tokenizer": "/nowhere/at/all"}, "Pass --tokenizer"),
    "transformers": ({"model_type": "idefics3"}, "pass --reverse"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_converted_is_refused_by_name(what, tmp_path: Path, capsys) -> None:
    changes, message = REFUSED[what]
    config = golden.config_of(*SMALL)
    golden.write_nanovlm(tmp_path / "source", config)
    changed = {name: value for name, value in (config | changes).items() if value is not None}
    if what == "patches":
        changed["mp_pixel_shuffle_factor"] = 1
    (tmp_path / "source/config.json").write_text(json.dumps(changed))
    assert main(["convert-nanovlm", str(tmp_path / "source"), str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_the_weights_must_be_those_that_the_config_asks_for(tmp_path: Path) -> None:
    config = golden.config_of(*SMALL)
    source = golden.write_nanovlm(tmp_path / "source", config)
    good = load_file(source / "model.safetensors")

    def refused(tensors: dict[str, torch.Tensor], message: str) -> None:
        save_file(tensors, source / "model.safetensors")
        with pytest.raises(NanoVLMError, match=message):
            from_nanovlm(str(source), str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()

    refused({name: t for name, t in good.items() if name != "MP.proj.weight"}, "lacks MP.proj.weight")
    refused(good | {"MP.proj.bias": torch.zeros(4)}, "holds MP.proj.bias")
    refused(good | {"decoder.norm.weight": torch.ones(5)}, "does not fit config.json")
    refused(good | {"decoder.rotary_embd.inv_freq": torch.ones(4) / 3}, "does not hold the frequencies of lm_re_base")
    refused(
        good | {"decoder.token_embedding.weight": good["decoder.head.weight"] * 2}, "decoder.head.weight .* differ"
    )
    whole = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(NanoVLMError, match="not a whole safetensors file"):
        from_nanovlm(str(source), str(tmp_path / "out"))
    (source / "model.safetensors").unlink()
    torch.save(good, source / "pytorch_model.bin")
    with pytest.raises(NanoVLMError, match=r"no model.safetensors.*pickles .* are not loaded"):
        from_nanovlm(str(source), str(tmp_path / "out"))
    save_file(good, source / "model.safetensors")
    assert from_nanovlm(str(source), str(tmp_path / "out")).parameters > 0, "the control: whole again, it is converted"


@pytest.mark.parametrize("reverse", [False, True])
def test_nothing_is_overwritten(reverse, nanovlm_checkpoint, tmp_path: Path, capsys) -> None:
    source = nanovlm_checkpoint(SMALL)[1 if reverse else 0]
    flags = ["--reverse"] if reverse else []
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        assert main(["convert-nanovlm", str(source), str(tmp_path / name), *flags]) == 2
        assert "Nothing is overwritten" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert main(["convert-nanovlm", str(source), str(tmp_path / "empty"), *flags]) == 0
    assert (tmp_path / "empty/model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"], "no working folder is left"


def test_only_what_came_from_nanovlm_goes_back(saved_pair, nanovlm_checkpoint, tmp_path: Path, capsys) -> None:
    assert main(["convert-nanovlm", "--reverse", str(saved_pair[0]), str(tmp_path / "out")]) == 2
    assert "does not come from nanoVLM" in capsys.readouterr().err
    assert main(["convert-nanovlm", "--reverse", "--tokenizer", "x", "a", "b"]) == 2
    with pytest.raises(NanoVLMError, match="neither a folder nor a Hub id"):
        from_nanovlm(str(tmp_path / "nowhere"), str(tmp_path / "out"))
    model = AutoModelForImageTextToText.from_pretrained(nanovlm_checkpoint(SMALL)[1])
    model.resize_token_embeddings(400)
    model.save_pretrained(tmp_path / "resized")
    with pytest.raises(NanoVLMError, match="the vocabulary was resized"):
        to_nanovlm(str(tmp_path / "resized"), str(tmp_path / "out"))


@pytest.mark.parametrize("inputs", ["stock", "nanovlm"])
def test_the_papers_pair_trains_a_step_and_goes_back(inputs, nanovlm_checkpoint, tmp_path: Path) -> None:
    from tiny import make_dataset, make_lm, make_tokenizer

    from hf_lingudistill import LinguDistillConfig, LinguDistillTrainer

    source, folder = nanovlm_checkpoint(SMALL)
    shape = dict(
        hidden_size=32, intermediate_size=48, rope_parameters={"rope_type": "default", "rope_theta": 100000.0}
    )
    make_lm(1, vocab_size=golden.BASE_VOCABULARY, **shape).save_pretrained(tmp_path / "teacher")
    make_tokenizer(extra=False).save_pretrained(tmp_path / "teacher")
    report = check_compatibility(str(folder), str(tmp_path / "teacher"))
    assert report.fits, report
    assert guess_teacher(str(folder)) == "HuggingFaceTB/SmolLM2-360M-Instruct"

    trainer = LinguDistillTrainer(
        model=str(folder),
        teacher_model=str(tmp_path / "teacher"),
        processing_class=NanoVLMProcessor.from_pretrained(folder) if inputs == "nanovlm" else None,
        args=LinguDistillConfig(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=4,
            max_steps=1,
            learning_rate=1e-2,
            max_length=None,
            teacher_quantization="none",
            report_to="none",
            use_cpu=True,
            save_strategy="no",
            bf16=False,
        ),
        train_dataset=make_dataset(4),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    trainer.end()
    stock = {name: (folder / name).read_bytes() for name in ("processor_config.json", "chat_template.jinja")}
    assert all((tmp_path / "trained" / name).read_bytes() == content for name, content in stock.items())
    to_nanovlm(str(tmp_path / "trained"), str(tmp_path / "back"))
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "decoder.blocks.1.mlp.down_proj.weight" in moved and "decoder.rotary_embd.inv_freq" not in moved
