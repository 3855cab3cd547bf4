"""Weights that are loaded: what a checkpoint lacks, or what is not finite in it, is named, wherever the package loads a model."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from hf_lingudistill import OnPolicyLinguDistillTrainer
from hf_lingudistill.cli import main
from hf_lingudistill.compatibility import UnreadableModelError
from hf_lingudistill.labs.blend.weights import Blend, blend_into
from hf_lingudistill.labs.demo.models import load_smollm2
from hf_lingudistill.labs.evaluation.models import load_scored
from hf_lingudistill.teacher import load_teacher_model
from hf_lingudistill.weights import BadWeights, check_finite, fingerprint, load_whole, only_whole

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples/space"))

import checkpoints  # noqa: E402

CONNECTOR = "model.connector.modality_projection.proj.weight"
MLP = "model.layers.1.mlp.{}_proj.weight"
LACKS_ONE = f"lacks {re.escape(CONNECTOR)}, which its config asks for: random numbers would take their place"
LACKS_THREE = f"lacks {re.escape(MLP.format('down'))} and 2 more, which its config asks for"


def without(source: Path, folder: Path, *names: str) -> str:
    """A copy of a saved model that lacks these tensors."""
    return changed(source, folder, lambda tensors: [tensors.pop(name) for name in names])


def changed(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> str:
    """A copy of a saved model with other tensors."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def broken(saved_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A VLM without its connector, an LM without an MLP, and a VLM with one NaN; and the two that are whole."""
    student, teacher = saved_pair
    folder = tmp_path_factory.mktemp("broken")

    def one_nan(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.vision_model.post_layernorm.weight"][3] = torch.nan

    return {
        "vlm": str(student),
        "lm": str(teacher),
        "no connector": without(student, folder / "vlm", CONNECTOR),
        "no mlp": without(teacher, folder / "lm", *(MLP.format(part) for part in ("up", "down", "gate"))),
        "nan": changed(student, folder / "nan", one_nan),
    }


# --------------------------------------------------------------------------------------------------------------------
# Missing
# --------------------------------------------------------------------------------------------------------------------
def _vlm(path: str) -> Any:
    return load_whole(AutoModelForImageTextToText, path)


PLACES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "teacher": ("lm", lambda path: load_teacher_model(path, quantization="none")),
    "teacher, quantised": ("lm", lambda path: load_teacher_model(path, quantization="nf4")),
    "teacher with eyes": ("vlm", lambda path: load_teacher_model(path, quantization="none", sees=True)),
    "evaluation, LM": ("lm", lambda path: load_scored("x", path)),
    "evaluation, VLM": ("vlm", lambda path: load_scored("x", path)),
    "space, LM": ("lm", lambda path: checkpoints.load(path, sees=False)),
    "space, VLM": ("vlm", lambda path: checkpoints.load(path, sees=True)),
    "demo": ("lm", load_smollm2),
    "blend": ("vlm", lambda path: blend_into(tiny.make_vlm(0), path, Blend(0.5, "uniform"))),
}


@pytest.mark.parametrize("place", PLACES)
def test_what_a_checkpoint_lacks_is_named(broken: dict[str, str], place: str) -> None:
    kind, load = PLACES[place]
    path, sentence = (broken["no connector"], LACKS_ONE) if kind == "vlm" else (broken["no mlp"], LACKS_THREE)
    with pytest.raises(ValueError, match=sentence):
        load(path)
    load(broken[kind])  # control: the same call with all weights, of which the head is tied and not in the file


def test_transformers_alone_fills_with_random_numbers(broken: dict[str, str]) -> None:
    """Control: what the check keeps out."""
    filled, whole = (
        AutoModelForImageTextToText.from_pretrained(broken[name]).get_parameter(CONNECTOR)
        for name in ("no connector", "vlm")
    )
    assert torch.isfinite(filled).all() and not torch.equal(filled, whole)


def test_the_text_half_of_a_vlm_lacks_nothing_without_its_eyes(broken: dict[str, str]) -> None:
    load_teacher_model(broken["no connector"], quantization="none")  # no connector is asked for
    with pytest.raises(BadWeights, match=LACKS_ONE):
        load_teacher_model(broken["no connector"], quantization="none", sees=True)


@pytest.mark.parametrize("left", [0, 5, 1000], ids=["empty", "header", "tensors"])
@pytest.mark.parametrize("how", ["directly", "by TRL"])
def test_a_file_that_is_cut_off_is_named_with_its_model(
    saved_pair: tuple[Path, Path], tmp_path: Path, how: str, left: int
) -> None:
    """A download that broke off. safetensors says neither which file nor of which model."""
    folder = tmp_path / "vlm"
    shutil.copytree(saved_pair[0], folder)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    context = only_whole() if how == "by TRL" else nullcontext()
    load = AutoModelForImageTextToText.from_pretrained if how == "by TRL" else _vlm
    with context:
        load(str(folder))  # the control
        file.write_bytes(whole[: -len(whole) // 2] if left == 1000 else whole[:left])
        with pytest.raises(BadWeights, match=rf"{re.escape(str(folder))}.*model\.safetensors"):
            load(str(folder))


@pytest.mark.parametrize("on_policy", [False, True])
def test_a_student_that_trl_loads_by_its_name_is_whole(
    make_trainer: Callable[..., Any], broken: dict[str, str], on_policy: bool
) -> None:
    kind = (OnPolicyLinguDistillTrainer,) if on_policy else ()
    before = PreTrainedModel.__dict__["from_pretrained"]
    with pytest.raises(BadWeights, match=LACKS_ONE):
        make_trainer(*kind, model=broken["no connector"])
    assert PreTrainedModel.__dict__["from_pretrained"] is before  # put back, whatever happened
    make_trainer(*kind, model=broken["vlm"])
    # A model object was loaded by whoever passes it
    make_trainer(*kind, model=AutoModelForImageTextToText.from_pretrained(broken["no connector"]))


def test_others_that_ask_for_the_loading_info_get_it(broken: dict[str, str]) -> None:
    with only_whole():
        model, info = AutoModelForCausalLM.from_pretrained(broken["lm"], output_loading_info=True)
        assert isinstance(model, PreTrainedModel) and not info["missing_keys"]
        assert isinstance(AutoModelForCausalLM.from_pretrained(broken["lm"]), PreTrainedModel)


def test_a_class_that_makes_a_weight_itself_lacks_none(
    broken: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadWeights):
        _vlm(broken["no connector"])
    monkeypatch.setattr(type(tiny.make_vlm(0)), "_keys_to_ignore_on_load_missing", {r"connector"})
    _vlm(broken["no connector"])


def test_no_other_line_loads_weights() -> None:
    """`from_pretrained` of a model stands in one place, and in what users are told to type."""
    call = re.compile(r"\b\w*(?:AutoModel|ForCausalLM|ForConditionalGeneration)\w*\.from_pretrained\(")
    allowed = {"hub/usage.py", "scripts/distill.py"}  # in texts
    found = set()
    for folder in ("hf_lingudistill", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            if call.search(path.read_text(encoding="utf-8")):
                found.add(path.relative_to(ROOT / folder).as_posix())
    assert found <= allowed, found - allowed
    assert call.search("model = AutoModelForCausalLM.from_pretrained(path)")  # control


# --------------------------------------------------------------------------------------------------------------------
# Finite
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_a_single_number_that_is_not_finite_is_found(dtype: torch.dtype, bad: float) -> None:
    weights = {"b": torch.ones(3, 4).to(dtype), "a": torch.full((2, 5), 7.0).to(dtype), "empty": torch.ones(0)}
    check_finite(weights.items(), "x")
    check_finite({"ids": torch.tensor([1, 2])}.items(), "x")
    broken = torch.ones(3, 4)
    broken[1, 2] = torch.nan if dtype == torch.float8_e4m3fn else bad  # that type has no infinity
    with pytest.raises(BadWeights, match=rf"'x' holds weights that are not finite \(.*{str(dtype)[6:]}\): b\. Pass"):
        check_finite({**weights, "b": broken.to(dtype)}.items(), "x")


def test_weights_that_a_dtype_cannot_hold_are_not_finite_in_it(broken: dict[str, str], tmp_path: Path) -> None:
    def large(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.text_model.norm.weight"][0] = 1e6

    path = changed(Path(broken["vlm"]), tmp_path / "large", large)
    load_scored("x", path, dtype=torch.float32)
    with pytest.raises(UnreadableModelError, match=r"x: .* in float16\): model.text_model.norm.weight"):
        load_scored("x", path, dtype=torch.float16)


@pytest.mark.parametrize("kind", ["nan", "no connector"])
@pytest.mark.parametrize("command", ["evaluate", "diagnose", "score-mix", "blend"])
def test_no_command_measures_a_broken_student(
    broken: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, kind: str
) -> None:
    suite, out = tmp_path / "suite.yaml", str(tmp_path / "out")
    suite.write_text("name: s\nfidelity:\n  - {name: a, builtin: instructions, n: 2, max_new_tokens: 2}\n")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "the cat", "completion": " sat on the mat"}\n' * 2)
    pair = ["--teacher", broken["lm"], "--student", broken[kind]]
    given = {
        "evaluate": [*pair, "--suite", str(suite), "--output_dir", out],
        "diagnose": [*pair, "--max_rows", "2", "--output_dir", out],
        "score-mix": [str(rows), *pair, "--output_dir", out],
        "blend": [*pair, "--suite", str(suite), "--output_dir", out, "--after", broken["vlm"], "--keep", "a >= 0"],
    }
    assert main([command, *given[command]]) == 2
    said = capsys.readouterr().err
    assert ("not finite" if kind == "nan" else "lacks") in said and broken[kind] in said
    assert not list(Path(out).rglob("report.*")) and not (Path(out) / "model").exists()


# --------------------------------------------------------------------------------------------------------------------
# Which they are
# --------------------------------------------------------------------------------------------------------------------
def test_a_fingerprint_follows_the_weights(broken: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(broken["vlm"], tmp_path / "copy")
    (tmp_path / "copy/README.md").write_text("no part of what it answers")
    assert fingerprint(tmp_path / "copy") == fingerprint(broken["vlm"]) != fingerprint(broken["nan"])
