"""Inputs of the measuring commands that were taken at their word: repeats for items, misfits for pairs, flags for none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from scripts import script

from hf_lingudistill.cli import main
from hf_lingudistill.labs.diagnose.prompts import load_prompts
from hf_lingudistill.labs.evaluation import evaluate_models
from hf_lingudistill.labs.evaluation.data import image_items
from hf_lingudistill.labs.evaluation.drawings import COUNT, drawings
from hf_lingudistill.labs.evaluation.suite import FidelityTask, GroundedTask, Suite, VisionTask
from hf_lingudistill.mixtures import DistillMixtureConfig, load_mixture


@pytest.mark.parametrize("n", [64, 100, COUNT])
def test_no_two_drawings_are_alike(n: int) -> None:
    pictures = [drawing.image.tobytes() for drawing in drawings(n, seed=3)]
    assert len(set(pictures)) == len(pictures) == n
    with pytest.raises(
        ValueError, match=rf"Task 'v': there are {COUNT} pictures that differ, not {COUNT + 1}. Lower `n`"
    ):
        image_items(VisionTask(name="v", builtin="drawn_colors", n=COUNT + 1), seed=0)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return tiny.save_pair(tmp_path)


def lm(folder: Path, **settings: Any) -> str:
    tiny.make_lm(1, **settings).save_pretrained(folder)
    tiny.make_tokenizer(extra=False).save_pretrained(folder)
    return str(folder)


def test_a_teacher_that_does_not_fit_measures_no_mixture(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "why?", "completion": "the sea"}) + "\n")
    command = ["score-mix", str(rows), "--student", str(pair[0]), "--output_dir", str(tmp_path / "out")]
    assert main([*command, "--teacher", lm(tmp_path / "lm3", layers=3)]) == 2
    assert "layers" in capsys.readouterr().err
    baseline = script("examples/baselines/interpolate.py")
    tokens = tiny.make_tokenizer(extra=False)
    swapped = json.loads(tokens.backend_tokenizer.to_str())
    words = swapped["model"]["vocab"]
    words["s"], words["t"] = words["t"], words["s"]  # of the same size, other tokens
    (tmp_path / "others").mkdir()
    tiny.make_lm(1).save_pretrained(tmp_path / "others")
    tokens.save_pretrained(tmp_path / "others")
    (tmp_path / "others" / "tokenizer.json").write_text(json.dumps(swapped))
    with pytest.raises(ValueError, match="token"):
        baseline.interpolate(pair[0], tmp_path / "others", 0.5, tmp_path / "mixed")
    baseline.interpolate(pair[0], pair[1], 0.5, tmp_path / "mixed")
    assert main([*command, "--teacher", str(pair[1])]) == 0  # control


def test_flags_of_the_rows_stay_theirs(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    flags = [index % 2 == 0 for index in range(6)]
    rows.write_text(
        "".join(
            json.dumps({"prompt": "why?", "completion": f"the sea {n}", "distill": f}) + "\n"
            for n, f in enumerate(flags)
        )
    )
    plain = tmp_path / "plain.jsonl"
    plain.write_text(json.dumps({"prompt": "why?", "completion": "the sea"}) + "\n")
    out = tmp_path / "out"
    command = ["score-mix", str(rows), str(plain), "--student", str(pair[0]), "--teacher", str(pair[1])]
    assert main([*command, "--output_dir", str(out)]) == 0
    assert "its rows carry flags of their own (3 of 6 true)" in capsys.readouterr().out
    proposed = yaml.safe_load((out / "datasets.yaml").read_text())["datasets"]
    assert ["distill" in entry for entry in proposed] == [False, True]
    mixed = load_mixture(DistillMixtureConfig(datasets=proposed[:1]))["train"]
    assert mixed["distill"] == flags


def test_a_line_is_parted_where_json_lines_part(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    said = "one\u2028two\u0085three"
    file.write_text(json.dumps({"prompt": "a", "completion": said}, ensure_ascii=False) + "\n", encoding="utf-8")
    (prompt,) = [one for one in load_prompts(texts=file).prompts if one.key]
    assert prompt.answer == said


@pytest.mark.parametrize("spelt", ["as given", "otherwise"])
def test_a_reference_that_is_compared_is_known_by_its_folder(
    pair: tuple[Path, Path], tmp_path: Path, spelt: str
) -> None:
    task = GroundedTask(name="g", builtin="easy_vqa_sentences", n=6, swaps=2)
    before = str(pair[0])
    reference = before if spelt == "as given" else str(pair[0] / ".." / pair[0].name)
    heard: list[str] = []
    tiny.make_vlm(2).save_pretrained(tmp_path / "after")
    tiny.make_processor().save_pretrained(tmp_path / "after")
    try:
        report = evaluate_models(
            {"before": before, "after": str(tmp_path / "after")}, Suite(name="s", grounded=(task,)), tmp_path / "out",
            reference=reference, progress=False, say=heard.append,
        )  # fmt: skip
    except ValueError as error:  # of a random tower no token depends on the picture, which is said behind the scores
        assert "exchang" in str(error)
    else:
        assert report["tasks"][0]["notes"]["reference"] == "before"
    assert [line.split(":")[0] for line in heard if "parameters" in line] == ["before", "after"]


def test_a_template_of_a_vlm_that_is_not_there_is_asked_for(pair: tuple[Path, Path], tmp_path: Path) -> None:
    suite = Suite(name="s", fidelity=(FidelityTask(name="fid", builtin="instructions", n=6, template="before"),))
    models = {"original": str(pair[1]), "other": lm(tmp_path / "other")}
    with pytest.raises(
        ValueError, match="Task 'fid' asks the original in the VLM's chat template, and no VLM is given"
    ):
        evaluate_models(models, suite, tmp_path / "out", progress=False, say=lambda _: None)


def test_a_plan_is_of_a_pair_that_fits_and_says_what_its_table_holds(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", "--student", str(pair[0]), "--seq_len", "64", "--image_tokens", "16", "--response_tokens", "16"]
    # As wide, in heads of another size
    assert main([*command, "--teacher", lm(tmp_path / "heads", num_attention_heads=8, num_key_value_heads=4)]) == 2
    assert "in heads of 8, the teacher 2 of 16 in heads of 4" in capsys.readouterr().err
    said = {}
    for name, more in {"vision": [], "none": ["--kv_sharing", "none"], "cpu": ["--device", "cpu"]}.items():
        assert main([*command, "--teacher", str(pair[1]), *more]) == 0
        said[name] = capsys.readouterr().out
    assert "Recorded K/V" in said["vision"] and "Recorded K/V" not in said["none"]
    assert "CUDA" in said["vision"] and "CUDA" not in said["cpu"]
