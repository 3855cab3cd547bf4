"""Any value in any field of ours: accepted and kept, or refused in a sentence that names the field. Nothing in between."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from hf_lingudistill import LinguDistillConfig
from hf_lingudistill.config import (
    ANCHOR_CHOICES,
    DISTILL_TOKENS_CHOICES,
    KV_SHARING_CHOICES,
    KV_SOURCE_CHOICES,
    OFFLOAD_CHOICES,
    ON_NAN_CHOICES,
    QUANTIZATION_CHOICES,
    SHARDING_CHOICES,
    LocalSFTConfig,
)
from hf_lingudistill.mixtures import DistillMixtureConfig, DistillSource, load_mixture
from hf_lingudistill.scripts.distill import main, parse
from hf_lingudistill.sharing import MODES

OWN = [f.name for f in dataclasses.fields(LinguDistillConfig) if f.name not in LocalSFTConfig.__dataclass_fields__]
CHOICES = {
    "teacher_quantization": QUANTIZATION_CHOICES,
    "teacher_sharding": SHARDING_CHOICES,
    "teacher_offload": OFFLOAD_CHOICES,
    "kv_sharing": KV_SHARING_CHOICES,
    "kv_source": KV_SOURCE_CHOICES,
    "distill_tokens": DISTILL_TOKENS_CHOICES,
    "anchor": ANCHOR_CHOICES,
    "on_nan": ON_NAN_CHOICES,
}
FLAGS = (
    "answers_only",
    "freeze_vision",
    "measure_teacher_quantization",
    "skip_bad_rows",
    "self_check",
    "overwrite_output_dir",
)
FLAGS += ("anchor_cache", "teacher_cache")
NUMBERS = ("blind_weight", "beta", "temperature", "distill_weight", "ce_weight", "distill_margin", "anchor_weight")
NAMES = ("teacher_model_name_or_path", "teacher_model_revision", "cache_dir")
# What an option needs beside it
WITH = {"anchor_cache": {"anchor": "before"}, "teacher_cache": {"kv_sharing": "none"}}


ARRAYS = [np.array([0.5, 1.0]), np.array(["nf4", "prompt"]), torch.tensor(0.5)]  # `==` and `in` ask them for one truth


def is_number(value: Any) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def is_valid(name: str, value: Any) -> bool:
    """The documentation of each field, in code."""
    if name in ("kv_source", "blind_weight", "freeze_vision") and value is None:
        return True
    if name in CHOICES:
        return isinstance(value, str) and value in CHOICES[name]
    if name in FLAGS:
        return isinstance(value, bool)
    if name in NAMES:
        return value is None or (isinstance(value, str | Path) and str(value).strip() != "")
    if name == "teacher_model_init_kwargs":
        try:
            return value is None or isinstance(json.loads(value) if isinstance(value, str) else value, dict)
        except ValueError:
            return False
    if name == "distill_column":
        return isinstance(value, str) and value != ""
    if name == "anchor_cache_k":
        return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31
    if not is_number(value):
        return False
    ranges = {"beta": (0, 1), "anchor_weight": (0, 1), "distill_margin": (-math.inf, math.inf)}
    lowest, highest = ranges.get(name, (0, math.inf))
    if name == "blind_weight":
        return 0 <= value < 1
    return lowest <= value <= highest and (name != "temperature" or value > 0)


anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**9), 10**9),
    st.sampled_from([10**400, -(10**400), 10**5000, Fraction(1, 3), np.float32(0.5), np.int64(1), Path("a")]),
    st.sampled_from(ARRAYS),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from(
        [0, 1, 0.0, 0.5, 1.0, -1, 1e308, "", " ", "none", "0.5", "nan", "True", "prompt", "nf4", "{}", "ünï"]
    ),
    st.sampled_from([choice for choices in CHOICES.values() for choice in choices]),
    st.text(max_size=8),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(min_size=1, max_size=4), st.integers(), max_size=2),
    st.binary(max_size=3),
)


def verdict(**values: Any) -> LinguDistillConfig | str:
    """The config, or why it was refused. Any other exception is the failure that this file looks for."""
    try:
        return LinguDistillConfig(output_dir="out", report_to="none", **values)
    except ValueError as error:
        return str(error)


def judge(name: str, value: Any) -> bool:
    """Whether the value is valid. Fails where the config says otherwise, or says it in other words."""
    valid, found = is_valid(name, value), verdict(**WITH.get(name, {}), **{name: value})
    if valid:
        assert isinstance(found, LinguDistillConfig), f"{value!r} is valid, but: {found}"
        if name == "teacher_model_init_kwargs" and isinstance(value, str):
            value = json.loads(value)
        if name == "kv_source" and value is None:
            value = MODES[found.kv_sharing].source
        if name == "blind_weight" and value is None:
            value = MODES[found.kv_sharing].blind
        kept = getattr(found, name)
        assert kept == (str(value) if isinstance(value, Path) else float(value) if name in NUMBERS else value)
        # what a logger and a record write, and what a recipe gives back
        assert json.loads(found.to_json_string())[name] == kept
        assert yaml.safe_load(yaml.safe_dump({name: found.to_dict()[name]}))[name] == kept
    else:
        assert isinstance(found, str), f"{value!r} is not valid, but was accepted"
        assert name in found and len(found) < 300 and found.endswith("."), found
    return valid


@pytest.mark.parametrize("name", OWN)
def test_every_value_of_every_field_is_kept_or_refused_by_name(name: str) -> None:
    seen = {True: 0, False: 0}

    @given(anything | st.sampled_from(CHOICES[name]) if name in CHOICES else anything)
    @settings(max_examples=150)
    def check(value: Any) -> None:
        seen[judge(name, value)] += 1

    check()
    assert min(seen.values()) > 0  # both kinds were tried


@pytest.mark.parametrize("name", [*NUMBERS, *FLAGS, *NAMES, "distill_column", "teacher_model_init_kwargs"])
def test_a_check_that_is_missing_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the same values, the same judge."""
    monkeypatch.setattr(LinguDistillConfig, "_check_types", lambda self: None)

    @given(anything)
    @settings(max_examples=150, phases=[Phase.generate])
    def check(value: Any) -> None:
        judge(name, value)

    with pytest.raises((Exception, ExceptionGroup)):
        check()


@given(st.sampled_from(OWN), anything)
@settings(max_examples=150)
def test_a_recipe_with_any_value_ends_in_the_same_verdict(
    tmp_path_factory: pytest.TempPathFactory, name: str, value: Any
) -> None:
    """Through YAML, where a text that reads as a number is one. Nothing but a ValueError, or argparse's own exit, comes out."""
    try:
        text = yaml.safe_dump(
            {**WITH.get(name, {}), name: value, "output_dir": "out", "report_to": "none"}, allow_unicode=True
        )
    except (yaml.YAMLError, ValueError):  # an object of Python's, or an integer of more digits than Python prints
        return
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    again = yaml.safe_load(text)[name]
    try:
        config = parse(["--config", str(path)])[1]
    except (ValueError, SystemExit):
        # TRL hands a recipe's values to argparse as texts, which takes more than the constructor: it may not take less
        assert not is_valid(name, again) or again is None or isinstance(again, dict), again
        return
    assert is_valid(name, getattr(config, name))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--betta", "1"], "Unknown option '--betta', did you mean '--beta'?"),
        (["--on_nan", ""], "argument --on_nan/--on-nan: invalid choice: ''"),
        (["--kv_sharing", "some"], "argument --kv_sharing/--kv-sharing: invalid choice: 'some'"),
        (["--beta", "much"], "argument --beta: invalid float value: 'much'"),
        (
            ["--skip_bad_rows", "perhaps"],
            "argument --skip_bad_rows/--skip-bad-rows: Truthy value expected: got perhaps",
        ),
        (["--demo", "huge"], "argument --demo: Truthy value expected: got huge"),
        (["--merge_adapter", "3"], "argument --merge_adapter/--merge-adapter: Truthy value expected: got 3"),
        (["--temperature", "1e400"], "temperature must be a positive number; got inf"),
        (["--beta", "1.5"], "beta must be in [0.0, 1.0]"),
        (["--beta", "nan"], "beta must be"),
        (["--temperature", "0"], "temperature must be a positive number"),
        (["--ce_weight", "-1"], "ce_weight must be"),
        (["--ce_weight", "0", "--distill_weight", "0"], "both 0"),
        (["--distill_column", ""], "distill_column"),
        (["--teacher_model_init_kwargs", "[1]"], "teacher_model_init_kwargs"),
        (["--teacher_offload", "cpu", "--teacher_quantization", "int8"], "teacher_offload"),
        (["--label_smoothing_factor", "0.1"], "label_smoothing_factor"),
        (["--loss_type", "dft"], "loss_type"),
    ],
)
def test_a_bad_flag_is_one_sentence_and_exit_code_2(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code = exit_code(
        "--model_name_or_path", "absent", "--dataset_name", "absent", "--output_dir", str(tmp_path), *arguments
    )
    error = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and part in error[-1] and "Traceback" not in "".join(error)


def exit_code(*arguments: str) -> Any:
    """Of the command: what `main` returns, or argparse's own exit."""
    try:
        return main(list(arguments))
    except SystemExit as stopped:
        return stopped.code


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ({"kv_shearing": "full"}, "unknown key 'kv_shearing', did you mean 'kv_sharing'?"),
        (
            {"kv_sharing": ["full"]},
            "kv_sharing must be one of full, prompt, vision, none, inputs, images; got ['full'].",
        ),
        ({"beta": None}, "beta must be a number; got None."),
        ({"temperature": 10**400}, "temperature must be a number that a float can hold; got 1000000"),
        ({"skip_bad_rows": 2}, "skip_bad_rows must be true or false; got 2."),
        (
            {"teacher_model_name_or_path": [1]},
            "teacher_model_name_or_path must be a name or path, or left out; got [1].",
        ),
        ({"output_dir": 3}, "output_dir must be a name or path, or left out; got 3."),
        ({"dataset_name": 3}, "dataset_name must be a name, or left out; got 3."),
        ({"merge_adapter": 3}, "merge_adapter must be true or false; got 3."),
        ({"demo": 3}, "demo must be true or false; got 3."),
        ({1: 2}, "has a key that is not a text: 1. Quote it, or remove it."),
        ({"datasets": 3}, "datasets: expected a list of sources (`- path: ...`), found 3."),
        ({"streaming": 3}, "streaming: expected true or false, found 3."),
        ({"datasets": [{"path": "a", "fraction": math.nan}]}, "datasets[0].fraction: expected a number, found nan."),
        ({"datasets": [{"path": "a", "split": 3}]}, "datasets[0].split: expected a text, found 3."),
        ({"datasets": [{"path": "a", "frction": 1}]}, "found unknown ['frction']."),
        ([1], "must contain a YAML mapping."),
    ],
    ids=str,
)
def test_a_bad_recipe_is_one_sentence_and_exit_code_2(
    recipe: Any, sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    given = {"model_name_or_path": "absent", "dataset_name": "absent", "output_dir": str(tmp_path / "out")}
    path.write_text(yaml.safe_dump({**given, **recipe} if isinstance(recipe, dict) else recipe))
    assert exit_code("--config", str(path)) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: ") and sentence in error


SOURCE_FIELDS: dict[str, Callable[[Any], bool]] = {
    "name": lambda value: value is None or is_text(value),
    "data_dir": lambda value: value is None or is_text(value),
    "data_files": lambda value: value is None or isinstance(value, str | list | dict),
    "split": lambda value: is_text(value),
    "columns": lambda value: value is None or isinstance(value, list) and all(isinstance(n, str) for n in value),
    "fraction": lambda value: value is None or type(value) in (int, float) and abs(value) <= 1e300,
    "distill": lambda value: value is None or isinstance(value, bool),
}


def is_text(value: Any) -> bool:
    return isinstance(value, str | Path) and str(value).strip() != ""


@pytest.mark.parametrize("name", SOURCE_FIELDS)
def test_every_value_of_every_field_of_a_source_is_kept_or_refused_by_name(name: str) -> None:
    seen = {True: 0, False: 0}

    @given(anything)
    @settings(max_examples=100)
    def check(value: Any) -> None:
        valid = SOURCE_FIELDS[name](value)
        seen[valid] += 1
        try:
            (source,) = DistillMixtureConfig(datasets=[{"path": "some/data", name: value}]).datasets
        except ValueError as refusal:
            assert not valid, value
            assert re.fullmatch(rf"datasets\[0\]\.{name}: expected .+, found .+\.", str(refusal), re.DOTALL)
        else:
            assert valid, f"{value!r} is not valid, but was accepted"
            assert source == DistillSource(path="some/data", **{name: value})

    check()
    assert min(seen.values()) > 0


@given(anything, st.booleans())
@settings(max_examples=60)
def test_test_split_of_any_size_is_made_or_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, size: Any, streaming: bool
) -> None:
    folder = tmp_path_factory.getbasetemp() / "texts"
    if not folder.exists():
        Dataset.from_list([{"text": str(index)} for index in range(4)]).save_to_disk(folder)
    mixture = DistillMixtureConfig(datasets=[{"path": str(folder)}], test_split_size=size, streaming=streaming)
    try:
        parts = load_mixture(mixture)
    except ValueError as refusal:
        assert re.search("test_(split_)?size", str(refusal)), refusal
    else:
        assert set(parts) == ({"train"} if size is None else {"train", "test"})


sources = st.dictionaries(
    st.sampled_from(["path", "name", "split", "fraction", "distill", "columns", "data_files", "data_dir", "pth", ""]),
    anything,
    max_size=4,
)


@given(st.one_of(st.lists(st.one_of(sources, anything), max_size=2), anything))
@settings(max_examples=150)
def test_a_mixture_of_anything_is_refused_in_a_sentence(datasets: Any) -> None:
    """None of these names data that exists."""
    with pytest.raises((ValueError, OSError)) as refusal:
        load_mixture(DistillMixtureConfig(datasets=datasets))
    assert str(refusal.value)


positive = st.floats(0, 1e6, exclude_min=True)


@given(st.fixed_dictionaries({"beta": st.floats(0, 1), "temperature": positive, "ce_weight": positive}))
@settings(max_examples=30)
def test_what_is_accepted_comes_back_from_its_own_dictionary(values: dict[str, Any]) -> None:
    config = LinguDistillConfig(output_dir="out", report_to="none", **values)
    kept = json.loads(json.dumps({name: config.to_dict()[name] for name in OWN}))
    again = LinguDistillConfig(output_dir="out", report_to="none", **kept)
    assert {name: getattr(again, name) for name in OWN} == {name: getattr(config, name) for name in OWN}


def test_a_number_that_yaml_reads_as_a_text_is_a_number(tmp_path: Path) -> None:
    """As `HfArgumentParser.parse_yaml_file` gives it: in YAML, 1e-4 has no point and is a text."""
    from transformers import HfArgumentParser

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output_dir: out\nlearning_rate: 1e-4\nmax_steps: '7'\nbf16: false\n")
    (config,) = HfArgumentParser(LinguDistillConfig).parse_yaml_file(str(recipe))
    assert (config.learning_rate, config.max_steps) == (1e-4, 7)
    assert isinstance(config.learning_rate, float) and isinstance(config.max_steps, int)
    for name, value in (("learning_rate", "fast"), ("max_steps", "1.5"), ("learning_rate", "nan")):
        with pytest.raises(ValueError, match=f"{name} must be a "):
            LinguDistillConfig(output_dir="out", bf16=False, **{name: value})
