"""YAML that a user wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hf_lingudistill.labs.evaluation import load_suite
from hf_lingudistill.labs.score_mix.run import read_sources
from hf_lingudistill.yaml_text import read_yaml


@pytest.mark.parametrize(
    "text",
    ["a: 1\nb: 2\na: 3", "x:\n  - {a: 1, 'a': 2}", "a: &one {b: 1, b: 2}\nc: *one"],
    ids=["of the file", "in a list", "behind an anchor"],
)
def test_a_key_that_stands_twice_is_refused(text: str) -> None:
    with pytest.raises(
        yaml.YAMLError, match=r"^the key '[ab]' stands twice, in lines 1 and [13]: keep one.$|lines 2 and 2"
    ):
        read_yaml(text)
    assert yaml.safe_load(text)  # control: the last wins there


@pytest.mark.parametrize(
    "text",
    [
        "a: {x: 1}\nb: {x: 1}\nc: [{x: 1}, {x: 2}]",
        "1: a\n'1': b\ntrue: c",
        "base: &base {x: 1, y: 2}\nmore: &more {<<: *base, x: 3}\nall: {<<: *more, y: 4}\nboth: {<<: [*base, *more], x: 5}",
        "",
    ],
)
def test_all_other_yaml_is_read_as_ever(text: str) -> None:
    assert read_yaml(text) == yaml.safe_load(text)
    with pytest.raises(yaml.YAMLError):
        read_yaml("!!python/object/apply:os.getcwd []")  # safe as well


def test_whatever_a_user_gives_in_yaml_is_read_so(tmp_path: Path) -> None:
    """Recipes: tests/test_distill_script.py."""
    (tmp_path / "twice.yaml").write_text("seed: 1\ndatasets: [{path: a}]\nseed: 2\n")
    for read in (load_suite, lambda path: read_sources([path])):
        with pytest.raises(ValueError, match="twice.yaml.* the key 'seed' stands twice, in lines 1 and 3: keep one."):
            read(str(tmp_path / "twice.yaml"))
