"""`LinguDistillConfig`: what it refuses and how it says so, its edges, and its way through TRL's parser."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from trl import SFTConfig, TrlParser

from hf_lingudistill import config as config_module
from hf_lingudistill.config import (
    DISTILL_TOKENS_CHOICES,
    KV_SHARING_CHOICES,
    QUANTIZATION_CHOICES,
    LinguDistillConfig,
    LocalSFTConfig,
)
from hf_lingudistill.machine import Machine

OWN_FIELDS = [
    field
    for field in dataclasses.fields(LinguDistillConfig)
    if field.name not in {inherited.name for inherited in dataclasses.fields(LocalSFTConfig)}
]


@pytest.fixture
def make(tmp_path: Path) -> Any:
    def config(**values: Any) -> LinguDistillConfig:
        return LinguDistillConfig(output_dir=str(tmp_path / "run"), report_to="none", **values)

    return config


@pytest.fixture
def parse(tmp_path: Path) -> Any:
    def config(*flags: str) -> LinguDistillConfig:
        parser = TrlParser((LinguDistillConfig,))
        (parsed,) = parser.parse_args_and_config(
            ["--output_dir", str(tmp_path / "run"), "--report_to", "none", *flags]
        )
        return parsed

    return config


# --------------------------------------------------------------------------------------------------------------------
# Values
# --------------------------------------------------------------------------------------------------------------------
BETA_MESSAGE = "beta must be in [0.0, 1.0] (0 = KL(teacher || student), 1 = KL(student || teacher)); got {}."

INVALID = [
    ({"teacher_sharding": "split"}, "teacher_sharding must be one of auto, replicate, shard; got 'split'."),
    ({"teacher_offload": "disk"}, "teacher_offload must be one of none, cpu; got 'disk'."),
    ({"teacher_quantization": "fp8"}, "teacher_quantization must be one of nf4, int8, none; got 'fp8'."),
    ({"kv_sharing": "text"}, "kv_sharing must be one of full, prompt, vision, none, inputs, images; got 'text'."),
    ({"distill_tokens": "some"}, "distill_tokens must be one of all, confident; got 'some'."),
    ({"beta": -0.1}, BETA_MESSAGE.format(-0.1)),
    ({"beta": 1.1}, BETA_MESSAGE.format(1.1)),
    ({"beta": math.nan}, BETA_MESSAGE.format("nan")),
    ({"temperature": 0.0}, "temperature must be a positive number; got 0.0."),
    ({"temperature": -1.0}, "temperature must be a positive number; got -1.0."),
    ({"temperature": math.inf}, "temperature must be a positive number; got inf."),
    ({"temperature": math.nan}, "temperature must be a positive number; got nan."),
    ({"distill_weight": -1.0}, "distill_weight must be a number of at least 0; got -1.0."),
    ({"distill_weight": math.inf}, "distill_weight must be a number of at least 0; got inf."),
    ({"ce_weight": -0.5}, "ce_weight must be a number of at least 0; got -0.5."),
    ({"ce_weight": math.nan}, "ce_weight must be a number of at least 0; got nan."),
    (
        {"distill_weight": 0.0, "ce_weight": 0.0},
        "distill_weight and ce_weight are both 0: distilled tokens would have no loss. Set at least one above 0.",
    ),
    ({"distill_margin": math.inf}, "distill_margin must be a finite number of nats; got inf."),
    ({"distill_margin": math.nan}, "distill_margin must be a finite number of nats; got nan."),
    # Of transformers, which looks at them when the models are loaded, or never
    ({"max_steps": 1.5}, "max_steps must be a whole number; got 1.5."),
    ({"seed": True}, "seed must be a whole number; got True."),
    ({"learning_rate": math.nan}, "learning_rate must be a finite number; got nan."),
    ({"learning_rate": -1e-5}, "learning_rate must be at least 0; got -1e-05."),
    ({"num_train_epochs": math.inf}, "num_train_epochs must be a finite number; got inf."),
    ({"weight_decay": [0.1]}, "weight_decay must be a number; got [0.1]."),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1; got 0."),
    ({"per_device_eval_batch_size": -4}, "per_device_eval_batch_size must be at least 1; got -4."),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1; got 0."),
    ({"dataloader_num_workers": 0.5}, "dataloader_num_workers must be a whole number; got 0.5."),
    ({"distill_column": ""}, "distill_column must name a dataset column; got ''."),
    (
        {"loss_type": "dft"},
        "loss_type must be 'nll' for distillation; got 'dft'. Use trl.SFTTrainer for other losses.",
    ),
    (
        {"label_smoothing_factor": 0.1},
        "label_smoothing_factor must be 0 for distillation (the teacher smooths the labels); got 0.1.",
    ),
]


@pytest.mark.parametrize(("values", "message"), INVALID, ids=[str(values) for values, _ in INVALID])
def test_an_invalid_value_is_refused_with_its_range_and_what_was_given(
    make: Any, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as refusal:
        make(**values)
    assert str(refusal.value) == message


EDGES = [
    *({"teacher_quantization": choice} for choice in QUANTIZATION_CHOICES),
    *({"kv_sharing": choice} for choice in KV_SHARING_CHOICES),
    *({"distill_tokens": choice} for choice in DISTILL_TOKENS_CHOICES),
    {"beta": 0.0},
    {"beta": 1.0},
    {"beta": 1},
    {"temperature": 1e-6},
    {"temperature": 100.0},
    {"max_grad_norm": math.inf},  # measured, and never clipped
    {"learning_rate": 0.0, "max_steps": 1, "num_train_epochs": 2, "gradient_accumulation_steps": 1},
    {"distill_weight": 0.0, "ce_weight": 1e-6},
    {"distill_weight": 1e-6, "ce_weight": 0.0},
    {"distill_margin": -3.0},
    {"distill_margin": 0.0},
    {"distill_column": "is_text"},
]


@pytest.mark.parametrize("values", EDGES, ids=str)
def test_a_value_at_the_edge_of_its_range_is_kept(make: Any, values: dict[str, Any]) -> None:
    config = make(**values)
    assert {name: getattr(config, name) for name in values} == values


def test_the_defaults_are_valid_and_leave_sft_as_it_is(make: Any, tmp_path: Path) -> None:
    machine = {"use_cpu": True, "bf16": False}
    config, sft = make(**machine), SFTConfig(output_dir=str(tmp_path / "run"), report_to="none", **machine)
    differ = {
        field.name: (getattr(config, field.name), getattr(sft, field.name))
        for field in dataclasses.fields(SFTConfig)
        if getattr(config, field.name) != getattr(sft, field.name)
    }
    assert differ == {"max_length": (4096, 1024)}
    # SmolVLM's settings: a square picture becomes 4 x 4 tiles and the whole, of 64 tokens each
    tiles = Idefics3ImageProcessorPil(size={"longest_edge": 2048}, max_image_size={"longest_edge": 512})
    picture = tiles(Image.new("RGB", (640, 640)), return_tensors="pt")["pixel_values"]
    assert sft.max_length < 64 * picture.shape[1] < config.max_length


def test_a_check_of_sft_config_still_holds(make: Any) -> None:
    with pytest.raises(ValueError, match="requires non-zero --logging_steps"):
        make(logging_steps=0)
    make(logging_steps=1)  # control


@pytest.mark.parametrize("supported", [True, False])
def test_without_an_accelerator_bf16_follows_the_cpu(
    make: Any, monkeypatch: pytest.MonkeyPatch, supported: bool
) -> None:
    """TRL's default alone, bf16 on, is refused there."""
    here = Machine(bf16=supported, avx512=True, threads=1, gpus=0, mps=False)
    monkeypatch.setattr(config_module, "machine", lambda use_cpu=False: here)
    config = make()
    assert config.use_cpu and config.bf16 is supported
    assert make(bf16=not supported).bf16 is not supported  # control: what the user says stands


# --------------------------------------------------------------------------------------------------------------------
# Flags and YAML
# --------------------------------------------------------------------------------------------------------------------
EVERY_OWN_FIELD = {
    "teacher_model_name_or_path": "some/lm",
    "teacher_model_revision": "v1",
    "teacher_model_init_kwargs": {"a": 1, "b": [2, "c"]},
    "teacher_quantization": "none",
    "teacher_sharding": "replicate",
    "teacher_offload": "cpu",
    "measure_teacher_quantization": True,
    "kv_sharing": "inputs",
    "kv_source": "student",
    "blind_weight": 0.25,
    "beta": 0.3,
    "temperature": 2.0,
    "distill_weight": 0.5,
    "ce_weight": 0.25,
    "distill_column": "is_text",
    "distill_tokens": "confident",
    "distill_margin": -0.5,
    "freeze_vision": True,
    "skip_bad_rows": True,
    "answers_only": False,
    "self_check": False,
    "anchor": "before",
    "anchor_weight": 0.25,
    "anchor_cache": True,
    "anchor_cache_k": 8,
    "teacher_cache": True,
    "cache_dir": "kept",
    "on_nan": "skip",
    "overwrite_output_dir": True,
}


def own_values(config: LinguDistillConfig) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in OWN_FIELDS}


def test_the_table_above_holds_every_own_field_at_another_value_than_its_default(make: Any) -> None:
    """Control of the round trips below: a field that is forgotten, or left at its default, would pass unseen."""
    assert set(EVERY_OWN_FIELD) == {field.name for field in OWN_FIELDS}
    assert all(value != own_values(make())[name] for name, value in EVERY_OWN_FIELD.items())


def test_flags_reach_every_field(parse: Any) -> None:
    flags = []
    for name, value in EVERY_OWN_FIELD.items():
        flags += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    assert own_values(parse(*flags)) == EVERY_OWN_FIELD


@pytest.mark.parametrize("written", [["--self_check", "off"], ["--self_check=OFF"], ["--self-check", "off"]], ids=str)
def test_a_switch_is_on_or_off_too(written: list[str]) -> None:
    from hf_lingudistill.scripts.arguments import parse as parse_all

    pair = ["--student", "VLM", "--teacher", "LM", "--output_dir", "out", "--bf16", "off", "--use_cpu", "on"]
    _, config, *_ = parse_all([*pair, *written])
    assert config.self_check is False and config.bf16 is False and config.use_cpu is True
    _, config, *_ = parse_all([*pair, "--self_check", "on", "--run_name", "off"])  # what is no switch keeps its word
    assert config.self_check is True and config.run_name == "off"
    with pytest.raises(ValueError, match="got maybe"):
        parse_all([*pair, "--self_check", "maybe"])


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="needs DeepSpeed not to be there")
@pytest.mark.parametrize("how", ["flag", "recipe"])
def test_deepspeed_that_is_not_there_is_named_before_its_config_is_read(how: str, tmp_path: Path) -> None:
    from hf_lingudistill.scripts.arguments import parse as parse_all

    (tmp_path / "zero.json").write_text("{}")
    (tmp_path / "recipe.yaml").write_text(f"deepspeed: {tmp_path / 'zero.json'}\n")
    pair = ["--student", "VLM", "--teacher", "LM", "--output_dir", "out", "--bf16", "false", "--use_cpu"]
    more = {
        "flag": ["--deepspeed", str(tmp_path / "zero.json")],
        "recipe": ["--config", str(tmp_path / "recipe.yaml")],
    }
    with pytest.raises(
        ImportError, match="needs the package deepspeed, which is not installed: `pip install deepspeed`"
    ):
        parse_all([*pair, *more[how]])


def test_a_boolean_flag_needs_no_value(parse: Any) -> None:
    config = parse("--skip_bad_rows", "--overwrite_output_dir", "--measure_teacher_quantization")
    assert config.skip_bad_rows and config.overwrite_output_dir and config.measure_teacher_quantization
    assert not parse().skip_bad_rows


def test_init_kwargs_are_read_as_json(parse: Any) -> None:
    assert parse("--teacher_model_init_kwargs", '{"a": 1}').teacher_model_init_kwargs == {"a": 1}
    assert parse().teacher_model_init_kwargs is None


def test_init_kwargs_that_are_no_mapping_are_refused(make: Any) -> None:
    """They would be dropped in silence further on."""
    with pytest.raises(ValueError, match="teacher_model_init_kwargs"):
        make(teacher_model_init_kwargs="attn_implementation=eager")


def test_yaml_reaches_every_field_and_flags_win_over_it(parse: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**EVERY_OWN_FIELD, "learning_rate": 0.125}))
    config = parse("--config", str(recipe))
    assert own_values(config) == EVERY_OWN_FIELD
    assert config.learning_rate == 0.125
    config = parse("--config", str(recipe), "--kv_sharing", "vision", "--beta", "0.75")
    assert own_values(config) == {**EVERY_OWN_FIELD, "kv_sharing": "vision", "beta": 0.75}


def test_an_invalid_value_in_yaml_is_refused(parse: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"kv_sharing": "text"}))
    with pytest.raises(
        ValueError, match="kv_sharing must be one of full, prompt, vision, none, inputs, images; got 'text'"
    ):
        parse("--config", str(recipe))


def test_an_unknown_key_in_yaml_is_refused(parse: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"kv_shearing": "full"}))
    with pytest.raises(ValueError, match="kv_shearing"):
        parse("--config", str(recipe))


def test_a_flag_outside_its_choices_is_refused_by_the_parser(parse: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--kv_sharing", "text")
    assert (
        "invalid choice: 'text' (choose from 'full', 'prompt', 'vision', 'none', 'inputs', 'images')"
        in capsys.readouterr().err
    )


def test_a_saved_config_comes_back(make: Any) -> None:
    config = make(**EVERY_OWN_FIELD)
    saved = json.loads(config.to_json_string())
    assert {name: saved[name] for name in EVERY_OWN_FIELD} == EVERY_OWN_FIELD


# --------------------------------------------------------------------------------------------------------------------
# Documentation
# --------------------------------------------------------------------------------------------------------------------
DOCUMENTED = dict(
    re.findall(r"^        (\w+) \(`\w+`, (.+)\):$", LinguDistillConfig.__doc__ or "", flags=re.MULTILINE)
)


def test_every_own_field_has_help_and_a_place_in_the_docstring() -> None:
    for field in OWN_FIELDS:
        assert len(field.metadata.get("help", "")) > 20, field.name
        assert field.name in DOCUMENTED
        default = DOCUMENTED[field.name]
        if field.default is None:
            assert default == "*optional*", field.name
        else:
            shown = f'"{field.default}"' if isinstance(field.default, str) else str(field.default)
            assert default == f"defaults to `{shown}`", field.name


def test_the_docstring_names_no_field_that_does_not_exist() -> None:
    assert set(DOCUMENTED) == {field.name for field in OWN_FIELDS}


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("teacher_quantization", QUANTIZATION_CHOICES),
        ("kv_sharing", KV_SHARING_CHOICES),
        ("distill_tokens", DISTILL_TOKENS_CHOICES),
    ],
)
def test_the_parser_offers_the_choices_that_the_config_accepts(name: str, choices: tuple[str, ...]) -> None:
    (field,) = (field for field in OWN_FIELDS if field.name == name)
    assert tuple(field.metadata["choices"]) == choices
    assert all(choice in field.metadata["help"] for choice in choices)
