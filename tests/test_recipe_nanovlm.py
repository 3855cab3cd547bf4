"""The recipe of the paper's pair: its own YAML, tiny random models of the same classes, rows in FineVision's shape."""

from __future__ import annotations

import io
from pathlib import Path
from types import ModuleType

import datasets
import nanovlm_golden as golden
import pytest
import yaml
from datasets import load_from_disk
from safetensors.torch import load_file
from scripts import script
from tiny import make_lm, make_tokenizer

from hf_lingudistill.scripts.distill import main as distill

RECIPES = Path(__file__).resolve().parents[1] / "examples/recipes"
RECIPE = yaml.safe_load((RECIPES / "nanovlm_460m.yaml").read_text())


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    return script("examples/recipes/nanovlm_460m.py")


def write_finevision(folder: Path, rows: int = 4) -> Path:
    """A dataset with FineVision's subsets and columns; those whose name begins with `text_` have no images."""
    image = io.BytesIO()
    golden.picture(90, 60).save(image, "PNG")
    configs = []
    for source in RECIPE["datasets"]:
        name = Path(source["path"]).name
        shown = [] if name.startswith("text_") else [{"bytes": image.getvalue(), "path": None}]
        turns = [
            {"user": "what <image>shape is it?", "assistant": "a small red circle"},
            {"user": "and?", "assistant": " "},
            {"user": "tell me about the sea", "assistant": "the sea is deep, wide and full of salt."},
        ]
        table = datasets.Dataset.from_list(
            [{"images": shown, "texts": turns, "source": name} for _ in range(rows)],
            features=datasets.Features(
                {
                    "images": datasets.List(datasets.Image()),
                    "texts": datasets.List({"user": datasets.Value("string"), "assistant": datasets.Value("string")}),
                    "source": datasets.Value("string"),
                }
            ),
        )
        (folder / name).mkdir(parents=True)
        table.to_parquet(folder / name / "train-0.parquet")
        configs.append({"config_name": name, "data_files": [{"split": "train", "path": f"{name}/*"}]})
    (folder / "README.md").write_text("---\n" + yaml.safe_dump({"configs": configs}) + "---\n")
    return folder


def test_two_steps_of_the_recipe(prepare, nanovlm_checkpoint, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    source, _ = nanovlm_checkpoint((256, 4, True, "enlarged"))
    finevision = write_finevision(tmp_path / "finevision")
    command = ["--student", str(source), "--finevision", str(finevision), "--rows", "3"]
    assert prepare.main(command) == 0
    rows = load_from_disk(RECIPE["datasets"][0]["path"])
    assert len(rows) == 3 and [len(row["images"]) for row in rows] == [1, 1, 1]
    assert [turn["content"] for turn in rows[0]["messages"]] == [
        "what shape is it?",
        "a small red circle",
        "tell me about the sea",
        "the sea is deep, wide and full of salt.",
    ]
    capsys.readouterr()
    assert prepare.main(command) == 0
    assert capsys.readouterr().out.count(": there\n") == len(RECIPE["datasets"]) + 1, "what is there is left"

    shape = dict(
        hidden_size=32, intermediate_size=48, rope_parameters={"rope_type": "default", "rope_theta": 100000.0}
    )
    make_lm(1, vocab_size=golden.BASE_VOCABULARY, **shape).save_pretrained(tmp_path / "lm")
    make_tokenizer(extra=False).save_pretrained(tmp_path / "lm")
    recipe = ["--config", str(RECIPES / "nanovlm_460m.yaml"), "--teacher_model_name_or_path", str(tmp_path / "lm")]
    here = [
        "--max_steps",
        "2",
        "--use_cpu",
        "true",
        "--bf16",
        "false",
        "--report_to",
        "none",
        "--teacher_quantization",
        "none",
    ]
    less = ["--gradient_accumulation_steps", "1", "--warmup_steps", "0", "--skip_bad_rows", "false"]
    assert distill([*recipe, *here, *less]) == 0
    before = load_file(tmp_path / RECIPE["model_name_or_path"] / "model.safetensors")
    after = load_file(tmp_path / RECIPE["output_dir"] / "model.safetensors")
    assert before.keys() == after.keys() and any(not after[name].equal(before[name]) for name in before)


def test_the_recipe_says_that_it_has_not_run() -> None:
    for name in ("nanovlm_460m.yaml", "nanovlm_460m.md"):
        assert (
            "not run at full size"
            in (RECIPES / name).read_text().split("\n")[0 if name.endswith("yaml") else 2].lower()
        )
    flags = [source["distill"] for source in RECIPE["datasets"]]
    assert flags.count(True) == flags.count(False) == 6
