"""An adapter that names no layers goes to the text decoder, and what the page on LoRA shows runs as it stands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

from hf_lingudistill import OnPolicyLinguDistillTrainer
from hf_lingudistill.adapter import with_targets
from hf_lingudistill.cli import main

Pair = tuple[Path, Path]
MakeTrainer = Callable[..., Any]
PAGE = Path(__file__).resolve().parents[1] / "docs" / "lora.md"
LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def adapted(model: Any) -> set[str]:
    """The modules that carry an adapter, by their paths in the plain model."""
    names = (name.partition(".lora_A.") for name, _ in model.named_parameters())
    return {name.removeprefix("base_model.model.") for name, found, _ in names if found}


def linear_layers_of_the_decoder(model: Any) -> set[str]:
    decoder = model.get_decoder()
    (place,) = [name for name, module in model.named_modules() if module is decoder]
    return {f"{place}.{name}" for name, module in decoder.named_modules() if isinstance(module, torch.nn.Linear)}


def test_the_command_of_the_page_runs_as_it_stands(saved_pair: Pair, tmp_path: Path) -> None:
    (command,) = re.findall(r"```bash\nlingudistill (distill .*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    arguments = shlex.split(command.replace("\\\n", " "))
    tiny.make_dataset(4).save_to_disk(tmp_path / "data")
    own = {"--student": saved_pair[0], "--teacher": saved_pair[1], "--dataset_name": tmp_path / "data"}
    for flag, value in {**own, "--output_dir": tmp_path / "out"}.items():
        arguments[arguments.index(flag) + 1] = str(value)
    assert {"--use_peft", "--merge_adapter"} <= set(arguments) and "--lora_target_modules" not in arguments
    quiet = ("--report_to", "none", "--bf16", "false", "--teacher_quantization", "none", "--max_steps", "2")
    assert main([*arguments, *quiet, "--learning_rate", "0.05", "--save_strategy", "no"]) == 0
    before, after = (AutoModelForImageTextToText.from_pretrained(path) for path in (saved_pair[0], tmp_path / "out"))
    old = dict(before.named_parameters())
    moved = {name.removesuffix(".weight") for name, p in after.named_parameters() if not torch.equal(p, old[name])}
    assert moved == linear_layers_of_the_decoder(before)  # all of them, and nothing of the tower


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("by", ["name", "object"])
def test_both_trainers_name_the_layers_of_the_text_decoder(
    make_trainer: MakeTrainer, saved_pair: Pair, on_policy: bool, by: str, caplog: pytest.LogCaptureFixture
) -> None:
    given: dict[str, Any] = {"trainer_class": OnPolicyLinguDistillTrainer} if on_policy else {}
    given["model"] = str(saved_pair[0]) if by == "name" else tiny.make_vlm(0)
    mine = LoraConfig(r=2)
    trainer = make_trainer(**given, peft_config=mine)
    plain = tiny.make_vlm(0)
    assert adapted(trainer.model) == linear_layers_of_the_decoder(plain)
    assert "it goes to the linear layers of the text decoder (model.text_model: down_proj, gate_proj" in caplog.text
    assert mine.target_modules is None  # the caller's own is left as it was
    with pytest.raises(ValueError, match="Please specify `target_modules`"):  # the control: what PEFT says
        get_peft_model(plain, LoraConfig(r=2))


def test_layers_that_are_named_stay(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.make_vlm(0)
    for chosen in (
        {"target_modules": ["q_proj"]},
        {"target_modules": "all-linear"},
        {"target_parameters": ["experts.gate_up_proj"]},
    ):
        config = LoraConfig(r=2, **chosen)
        assert with_targets(config, model) is config
    assert with_targets(None, model) is None and not caplog.records
    assert with_targets(LoraConfig(r=2), model).target_modules is not None  # the control


def test_a_default_of_peft_stays() -> None:
    lm = tiny.make_lm(1)
    config = LoraConfig(r=2)
    assert lm.config.model_type == "llama" and with_targets(config, lm) is config
    assert {name.rpartition(".")[2] for name in adapted(get_peft_model(lm, config))} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_is_not_merged_into_an_embedding_that_is_the_head(
    tmp_path: Path, tied: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The head would be changed with it: the saved model would be another than the one that was trained."""
    student, teacher = tiny.save_pair(tmp_path, tie_word_embeddings=tied)
    tiny.make_dataset(4).save_to_disk(tmp_path / "data")
    command = [
        "distill",
        "--student",
        str(student),
        "--teacher",
        str(teacher),
        "--dataset_name",
        str(tmp_path / "data"),
    ]
    command += ["--output_dir", str(tmp_path / "out"), "--use_peft", "--merge_adapter", "true", "--report_to", "none"]
    command += ["--bf16", "false", "--teacher_quantization", "none", "--max_steps", "1", "--save_strategy", "no"]
    command += ["--kv_source", "student"]
    targets = ["--lora_target_modules", "q_proj", "embed_tokens"]
    assert main([*command, *targets]) == (2 if tied else 0)
    if tied:
        assert "merge_adapter=True cannot merge an adapter of the input embeddings here" in capsys.readouterr().err
        assert not (tmp_path / "out" / "model.safetensors").exists()
        assert main([*command, "--lora_target_modules", "q_proj"]) == 0  # control
