"""The recipes: each is read whole, and each is run for two steps with tiny random models of the classes it names."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny_families
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from scripts import script

from hf_lingudistill.labs.evaluation import load_suite
from hf_lingudistill.labs.plan.known_models import BUILT_IN
from hf_lingudistill.scripts.arguments import parse
from hf_lingudistill.scripts.distill import main as distill

RECIPES = Path(__file__).resolve().parents[1] / "examples/recipes"


writer = script("examples/recipes/write_recipes.py")
PAIRS = {pair.slug: pair for pair in writer.PAIRS}
ALL = [(slug, variant) for slug in PAIRS for variant in writer.VARIANTS]
# One of each family here, in turns full and LoRA; all of them in the slow target
QUICK = [
    ("smolvlm_256m", "lora"),
    ("qwen2_5_vl_3b", "full"),
    ("llava_1_5_7b", "lora"),
    ("internvl3_1b", "full"),
    ("gemma3_4b", "full"),
]


@pytest.fixture(scope="module")
def finevision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mix in FineVision's shape and file names; subsets whose name begins with `text_` have no images."""
    folder = tmp_path_factory.mktemp("finevision")
    image = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)).save(image, "PNG")
    pair = dict.fromkeys(("user", "assistant"), datasets.Value("string"))
    features = datasets.Features({"images": datasets.List(datasets.Image()), "texts": datasets.List(pair)})
    for subset in writer.MIX:
        shown = [] if subset.name.startswith("text_") else [{"bytes": image.getvalue(), "path": None}]
        answer = "the sea is deep, wide and full of salt." if subset.distill else "blue"
        turns = [{"user": "what is it?", "assistant": answer}, {"user": "and?", "assistant": "a red circle"}]
        table = datasets.Dataset.from_list([{"images": shown, "texts": turns}] * 2, features=features)
        (folder / subset.name).mkdir()
        table.to_parquet(folder / subset.name / "train-00000-of-00002.parquet")
        (folder / subset.name / "train-00001-of-00002.parquet").write_bytes(b"never read")
    return folder


@pytest.mark.parametrize(("slug", "variant"), ALL)
def test_a_recipe_is_read_whole(slug: str, variant: str) -> None:
    """No key is unknown, every pin is a commit, and each page says what has not been done."""
    path = RECIPES / slug / f"{variant}.yaml"
    _, config, student, mixture = parse(["--config", str(path)])
    pair = PAIRS[slug]
    assert (student.model_name_or_path, config.teacher_model_name_or_path) == (pair.student, pair.teacher)
    for revision in (student.model_revision, config.teacher_model_revision):
        yours = slug == "gemma3_4b" and revision == student.model_revision
        assert re.fullmatch(r"[0-9a-f]{40}", revision or "") or (yours and revision in (None, "main"))
    assert [source.distill for source in mixture.datasets] == [subset.distill for subset in writer.MIX]
    files = re.compile(r"hf://datasets/HuggingFaceM4/FineVision@[0-9a-f]{40}/\w+/train-00000-of-\*\.parquet")
    assert all(files.fullmatch(source.data_files) for source in mixture.datasets)
    assert student.use_peft == (variant == "lora")
    assert path.read_text().startswith("# NOT RUN AT FULL SIZE")
    assert "**Not run at full size.**" in path.with_name("README.md").read_text().split("\n")[2]
    for name in {pair.plan_student or pair.student, pair.teacher}:
        assert name in BUILT_IN, "the plan would need the Hub"


@pytest.mark.parametrize("slug", PAIRS)
def test_a_page_prints_no_command_that_is_refused(slug: str) -> None:
    """`evaluate` and `score-mix` take no VLM as the original; such a teacher is a base to compare with."""
    pair, page = PAIRS[slug], (RECIPES / slug / "README.md").read_text()
    sees = "vision_config" in BUILT_IN[pair.teacher]
    assert pair.teacher_sees is sees
    taken = [
        line for line in page.splitlines() if line.startswith(("lingudistill evaluate", "lingudistill score-mix"))
    ]
    assert [f"--teacher {pair.teacher}" in line for line in taken] == ([False] if sees else [True] * 3)
    assert not sees or not load_suite("demo").fidelity and "--suite demo --base" in taken[0]


@pytest.mark.parametrize(
    ("slug", "variant"),
    [pytest.param(*recipe, marks=() if recipe in QUICK else pytest.mark.slow) for recipe in ALL],
)
def test_two_steps(
    slug: str, variant: str, finevision: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    pair = PAIRS[slug]
    known = pair.plan_student or pair.student
    student = tiny_families.save_student(known, tmp_path / "student", monkeypatch)
    if pair.teacher == known:  # the VLM before, whose text half teaches
        tiny_families.save_student(known, tmp_path / "teacher", monkeypatch)
    else:
        tiny_families.make_teacher(pair.teacher).save_pretrained(tmp_path / "teacher")
        tiny_families.make_tokenizer(None).save_pretrained(tmp_path / "teacher")
    text = (RECIPES / slug / f"{variant}.yaml").read_text().replace(writer.FINEVISION, str(finevision))
    recipe = yaml.safe_load(text) | {
        "model_name_or_path": str(student),
        "teacher_model_name_or_path": str(tmp_path / "teacher"),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "gradient_accumulation_steps": 2,
        "warmup_steps": 0,
        "learning_rate": 0.01,  # two steps at the recipe's own move less than bf16 can hold
        "skip_bad_rows": False,  # here each row must do
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "teacher_quantization": "none",
        "freeze_vision": variant == "lora",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code = distill(["--config", str(tmp_path / "recipe.yaml")])
    assert code == 0, capfd.readouterr().err[-2000:]
    before, after = (load_file(folder / "model.safetensors") for folder in (student, tmp_path / "out"))
    moved = {name for name in before if not torch.equal(before[name].to(after[name].dtype), after[name])}
    assert before.keys() == after.keys() and moved
    if variant == "lora":
        assert (tmp_path / "out/adapter/adapter_model.safetensors").is_file()
        assert all(re.search(r"(q|k|v|o|gate|up|down)_proj\.weight$", name) for name in moved), sorted(moved)[:5]
    else:
        assert any("embed_tokens" in name for name in moved)
        assert any("vis" in name for name in moved), "no image was seen"  # since its tower is trained here


def test_files_are_as_they_are_written() -> None:
    for path, text in writer.files().items():
        assert path.read_text(encoding="utf-8") == text, (
            f"{path.name} of {path.parent.name} is stale: run `make results`"
        )
