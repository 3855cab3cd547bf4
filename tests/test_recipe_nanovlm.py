"""The recipe of the paper's pair: its own YAML, tiny random models of the same classes, rows in FineVision's shape."""

from __future__ import annotations

import io
import re
from pathlib import Path

import datasets
import nanovlm_golden as golden
import yaml
from safetensors.torch import load_file
from tiny import make_lm, make_tokenizer

from hf_lingudistill.cli import main as lingudistill
from hf_lingudistill.scripts.distill import main as distill

RECIPES = Path(__file__).resolve().parents[1] / "examples/recipes"
RECIPE = yaml.safe_load((RECIPES / "nanovlm_460m.yaml").read_text())


HUB = "hf://datasets/HuggingFaceM4/FineVision@"


def write_finevision(folder: Path) -> None:
    """FineVision's subsets, columns and file names; subsets whose name begins with `text_` have no images."""
    image = io.BytesIO()
    golden.picture(90, 60).save(image, "PNG")
    pair = {"user": datasets.Value("string"), "assistant": datasets.Value("string")}
    columns = {
        "images": datasets.List(datasets.Image()),
        "texts": datasets.List(pair),
        "source": datasets.Value("string"),
    }
    for source in RECIPE["datasets"]:
        name = source["data_files"].split("/")[-2]
        shown = [] if name.startswith("text_") else [{"bytes": image.getvalue(), "path": None}]
        turns = [
            {"user": "what shape is it?", "assistant": "a small red circle"},
            {"user": "tell me about the sea", "assistant": "the sea is deep, wide and full of salt."},
        ]
        rows = datasets.Dataset.from_list(
            [{"images": shown, "texts": turns, "source": name}] * 2, features=datasets.Features(columns)
        )
        (folder / name).mkdir(parents=True)
        rows.to_parquet(folder / name / "train-00000-of-00002.parquet")


def test_two_steps_of_the_recipe(nanovlm_checkpoint, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    source, _ = nanovlm_checkpoint((256, 4, True, "enlarged"))
    assert lingudistill(["convert-nanovlm", str(source), RECIPE["model_name_or_path"]]) == 0
    write_finevision(tmp_path / "finevision")
    text = (RECIPES / "nanovlm_460m.yaml").read_text()
    assert text.count(HUB) == len(RECIPE["datasets"]) == 12
    (tmp_path / "recipe.yaml").write_text(re.sub(rf"{HUB}\w+", str(tmp_path / "finevision"), text))

    shape = dict(
        hidden_size=32, intermediate_size=48, rope_parameters={"rope_type": "default", "rope_theta": 100000.0}
    )
    make_lm(1, vocab_size=golden.BASE_VOCABULARY, **shape).save_pretrained(tmp_path / "lm")
    make_tokenizer(extra=False).save_pretrained(tmp_path / "lm")
    recipe = ["--config", "recipe.yaml", "--teacher_model_name_or_path", str(tmp_path / "lm")]
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
