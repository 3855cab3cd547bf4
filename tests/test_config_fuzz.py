"""Any value in any field of ours: accepted and kept, or refused in a sentence that names the field. Nothing in between."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import SFTConfig

from hf_lingudistill import LinguDistillConfig
from hf_lingudistill.config import (
    DISTILL_TOKENS_CHOICES,
    KV_SHARING_CHOICES,
    OFFLOAD_CHOICES,
    ON_NAN_CHOICES,
    QUANTIZATION_CHOICES,
    SHARDING_CHOICES,
)
from hf_lingudistill.data import DistillMixtureConfig, load_mixture
from hf_lingudistill.scripts.distill import main, parse

OWN = [f.name for f in dataclasses.fields(LinguDistillConfig) if f.name not in SFTConfig.__dataclass_fields__]
CHOICES = {
    "teacher_quantization": QUANTIZATION_CHOICES,
    "teacher_sharding": SHARDING_CHOICES,
    "teacher_offload": OFFLOAD_CHOICES,
    "kv_sharing": KV_SHARING_CHOICES,
    "distill_tokens": DISTILL_TOKENS_CHOICES,
    "on_nan": ON_NAN_CHOICES,
}
FLAGS = ("measure_teacher_quantization", "skip_bad_rows", "overwrite_output_dir")
NAMES = ("teacher_model_name_or_path", "teacher_model_revision")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_valid(name: str, value: Any) -> bool:
    """The documentation of each field, in code."""
    if name in CHOICES:
        return isinstance(value, str) and value in CHOICES[name]
    if name in FLAGS:
        return isinstance(value, bool)
    if name in NAMES:
        return value is None or (isinstance(value, str) and value.strip() != "")
    if name == "teacher_model_init_kwargs":
        try:
            value = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            return False
        return isinstance(value, dict) or (value is None)
    if name == "distill_column":
        return isinstance(value, str) and value != ""
    if not is_number(value):
        return False
    lowest, highest = {"beta": (0, 1), "distill_margin": (-math.inf, math.inf)}.get(name, (0, math.inf))
    return lowest <= value <= highest and (name != "temperature" or value > 0)


anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**9), 10**9),
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


@pytest.mark.parametrize("name", OWN)
def test_every_value_of_every_field_is_kept_or_refused_by_name(name: str) -> None:
    seen = {True: 0, False: 0}

    @given(anything)
    @settings(max_examples=150)
    def check(value: Any) -> None:
        valid, found = is_valid(name, value), verdict(**{name: value})
        seen[valid] += 1
        if valid:
            assert isinstance(found, LinguDistillConfig), f"{value!r} is valid, but: {found}"
            kept = json.loads(value) if name == "teacher_model_init_kwargs" and isinstance(value, str) else value
            assert getattr(found, name) == kept
        else:
            assert isinstance(found, str), f"{value!r} is not valid, but was accepted"
            assert name in found and len(found) < 300 and found.endswith("."), found

    check()
    assert min(seen.values()) > 0  # both kinds were tried


@given(st.sampled_from(OWN), anything)
@settings(max_examples=150)
def test_a_recipe_with_any_value_ends_in_the_same_verdict(
    tmp_path_factory: pytest.TempPathFactory, name: str, value: Any
) -> None:
    """Through YAML, where a text that reads as a number is one. Nothing but a ValueError, or argparse's own exit, comes out."""
    try:
        text = yaml.safe_dump({name: value, "output_dir": "out", "report_to": "none"}, allow_unicode=True)
    except yaml.YAMLError:
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
    code = main(
        ["--model_name_or_path", "absent", "--dataset_name", "absent", "--output_dir", str(tmp_path), *arguments]
    )
    error = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and part in error[-1] and "Traceback" not in "".join(error)


@pytest.mark.parametrize(
    "arguments", [["--kv_sharing", "some"], ["--on_nan", "ignore"], ["--beta", "much"], ["--betta", "1"]]
)
def test_what_argparse_refuses_ends_with_code_2_too(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises((SystemExit, ValueError)) as stopped:
        parse(["--model_name_or_path", "absent", "--output_dir", str(tmp_path), *arguments])
    assert isinstance(stopped.value, ValueError) or stopped.value.code == 2


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
