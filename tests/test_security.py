"""Nothing that a model, a dataset, a recipe or a checkpoint holds is run, and nothing of it is written elsewhere.

Each attack leaves a mark if it succeeds; each has a control in which the same attack does.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from transformers import AutoConfig
from transformers.dynamic_module_utils import TIME_OUT_REMOTE_CODE  # noqa: F401  (the module that would ask)

from hf_lingudistill import check_compatibility
from hf_lingudistill.batch import BadRow, decode_image
from hf_lingudistill.cli import main as cli
from hf_lingudistill.labs.evaluation.models import UnreadableModelError, load_scored
from hf_lingudistill.labs.evaluation.run import evaluate_models
from hf_lingudistill.labs.evaluation.suite import load_suite
from hf_lingudistill.mixtures import DistillMixtureConfig, DistillSource, load_mixture, load_source
from hf_lingudistill.scripts.distill import main as distill
from hf_lingudistill.scripts.distill import parse
from hf_lingudistill.teacher import load_teacher_model

MakeTrainer = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[1]
Pair = tuple[Path, Path]


class Marker:
    """A file that an attack makes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def is_there(self) -> bool:
        return self.path.exists()


@pytest.fixture
def marker(tmp_path: Path) -> Marker:
    return Marker(tmp_path / "the attack succeeded")


class _Payload:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.path,))


def poison(marker: Marker) -> bytes:
    return pickle.dumps(_Payload(str(marker.path)))


def test_pickles_are_dangerous(marker: Marker) -> None:
    """The control of the tests below."""
    pickle.loads(poison(marker))
    assert marker.is_there


# --------------------------------------------------------------------------------------------------------------------
# Code from a repository
# --------------------------------------------------------------------------------------------------------------------
EVIL = """
from pathlib import Path
from transformers import PreTrainedConfig, PreTrainedTokenizerFast
Path({path!r}).mkdir(exist_ok=True)
class EvilConfig(PreTrainedConfig):
    model_type = "evil"
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""


def with_code(folder: Path, target: Path, marker: Marker, *, model_type: str | None) -> Path:
    """A copy of a model whose config (and tokenizer) want to run `evil.py`. model_type: None keeps the known one."""
    shutil.copytree(folder, target)
    (target / "evil.py").write_text(EVIL.format(path=str(marker.path)))
    config = json.loads((target / "config.json").read_text())
    config["auto_map"] = {
        name: "evil.EvilConfig" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoModelForImageTextToText")
    }
    config["model_type"] = model_type or config["model_type"]
    (target / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((target / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": [None, "evil.EvilTokenizer"], "AutoProcessor": "evil.EvilTokenizer"}
    (target / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return target


ENTRIES: dict[str, Callable[[Path, Path, Path], Any]] = {
    "check": lambda student, teacher, out: cli(["check", str(student), str(teacher)]),
    "plan": lambda student, teacher, out: cli(["plan", "--student", str(student), "--teacher", str(teacher)]),
    "distill": lambda student, teacher, out: distill(_arguments(student, teacher, out)),
    "evaluate": lambda student, teacher, out: cli(
        ["evaluate", "--original", str(teacher), "--before", str(student), "--suite", "quick"]
        + ["--output_dir", str(out)]
    ),
    "diagnose": lambda student, teacher, out: cli(["diagnose", "--student", str(student), "--teacher", str(teacher)]),
}


def _arguments(student: Path, teacher: Path, out: Path) -> list[str]:
    data = out.parent / "data"
    if not data.exists():
        tiny.make_dataset(4).save_to_disk(data)
    arguments = [
        "--model_name_or_path",
        str(student),
        "--teacher_model_name_or_path",
        str(teacher),
        "--report_to",
        "none",
    ]
    arguments += [
        "--dataset_name",
        str(data),
        "--output_dir",
        str(out),
        "--max_steps",
        "1",
        "--use_cpu",
        "--bf16",
        "false",
    ]
    return [*arguments, "--teacher_quantization", "none", "--per_device_train_batch_size", "2"]


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_no_entry_runs_code_from_a_repository(
    saved_pair: Pair, marker: Marker, tmp_path: Path, entry: str, who: str, capsys: pytest.CaptureFixture[str]
) -> None:
    student, teacher = saved_pair
    evil = with_code(student if who == "student" else teacher, tmp_path / "evil", marker, model_type="evil")
    pair = (evil, teacher) if who == "student" else (student, evil)
    assert ENTRIES[entry](*pair, tmp_path / "out") != 0
    assert not marker.is_there
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "trust_remote_code" in told or "evil" in told, told


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_code_beside_a_known_architecture_is_left_alone(
    saved_pair: Pair, marker: Marker, tmp_path: Path, who: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers has this architecture itself: the run goes on without what the repository offers."""
    student, teacher = saved_pair
    evil = with_code(student if who == "student" else teacher, tmp_path / "evil", marker, model_type=None)
    pair = (evil, teacher) if who == "student" else (student, evil)
    assert distill(_arguments(*pair, tmp_path / "out")) == 0
    assert not marker.is_there


def test_trusted_code_does_run(saved_pair: Pair, marker: Marker, tmp_path: Path) -> None:
    """The control."""
    evil = with_code(saved_pair[0], tmp_path / "evil", marker, model_type="evil")
    config = AutoConfig.from_pretrained(evil, trust_remote_code=True)
    assert marker.is_there and config.model_type == "evil"
    marker.path.rmdir()
    sys.modules.pop(type(config).__module__, None)
    check_compatibility(str(evil), str(saved_pair[1]), trust_remote_code=True)
    assert marker.is_there


def test_a_script_among_data_is_not_run(marker: Marker, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.py").write_text(EVIL.format(path=str(marker.path)))
    with pytest.raises((ValueError, OSError, RuntimeError)):
        load_source(DistillSource(path=str(folder)))
    with pytest.raises((ValueError, OSError, RuntimeError)):
        load_mixture(DistillMixtureConfig(datasets=[{"path": str(folder / "data.py")}]))
    assert not marker.is_there


# --------------------------------------------------------------------------------------------------------------------
# Pickles
# --------------------------------------------------------------------------------------------------------------------
def pickled(folder: Path, target: Path, marker: Marker) -> Path:
    """A copy of a model whose weights are a pickle, and a poisoned one."""
    shutil.copytree(folder, target)
    (target / "model.safetensors").unlink()
    (target / "pytorch_model.bin").write_bytes(poison(marker))
    return target


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("entry", ["distill", "evaluate", "diagnose"])
def test_pickled_weights_are_refused(
    saved_pair: Pair, marker: Marker, tmp_path: Path, entry: str, who: str, capsys: pytest.CaptureFixture[str]
) -> None:
    student, teacher = saved_pair
    evil = pickled(student if who == "student" else teacher, tmp_path / "evil", marker)
    pair = (evil, teacher) if who == "student" else (student, evil)
    assert ENTRIES[entry](*pair, tmp_path / "out") == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "safetensors" in told and not marker.is_there, told


def test_loaders_say_that_safetensors_are_expected(saved_pair: Pair, marker: Marker, tmp_path: Path) -> None:
    evil = pickled(saved_pair[1], tmp_path / "evil", marker)
    with pytest.raises(UnreadableModelError, match="safetensors"):
        load_scored("evil", str(evil))
    with pytest.raises(OSError, match="safetensors"):
        load_teacher_model(
            str(evil), revision=None, init_kwargs={}, quantization="none", dtype=torch.float32, device="cpu"
        )
    assert not marker.is_there


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_poisoned_checkpoint_is_not_unpickled(
    make_trainer: MakeTrainer, marker: Marker, tmp_path: Path, file: str
) -> None:
    """Resuming reads tensors and plain values only; the training arguments are not read at all."""
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    make_trainer(**settings).train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    assert (checkpoint / file).is_file()
    (checkpoint / file).write_bytes(poison(marker))
    resumed = make_trainer(**settings)
    try:
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert file == "training_args.bin"
    except pickle.UnpicklingError as error:
        assert "weights_only" in str(error).lower() or "weights only" in str(error).lower()
    assert not marker.is_there


# --------------------------------------------------------------------------------------------------------------------
# Texts that are read as something else
# --------------------------------------------------------------------------------------------------------------------
def evil_yaml(marker: Marker) -> str:
    return f"!!python/object/apply:os.mkdir [{str(marker.path)!r}]"


def test_yaml_builds_no_objects(marker: Marker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, suite = tmp_path / "recipe.yaml", tmp_path / "suite.yaml"
    recipe.write_text(f"output_dir: {evil_yaml(marker)}\n")
    suite.write_text(f"name: {evil_yaml(marker)}\n")
    assert distill(["--config", str(recipe)]) == 2
    told = capsys.readouterr().err
    assert "not valid YAML" in told and "Traceback" not in told
    with pytest.raises(ValueError, match="YAML"):
        load_suite(str(suite))
    assert not marker.is_there
    yaml.unsafe_load(suite.read_text())  # the control
    assert marker.is_there


def test_recipes_expand_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output_dir: ${SECRET}\nteacher_model_name_or_path: $SECRET\nreport_to: none\n")
    config = parse(["--config", str(recipe)])[1]
    assert config.output_dir == "${SECRET}" and config.teacher_model_name_or_path == "$SECRET"


ESCAPES = (
    "{% for c in ().__class__.__base__.__subclasses__() %}{{ c }}{% endfor %}",
    "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "{{ cycler.__init__.__globals__.os.mkdir(PATH) }}",
)


@pytest.mark.parametrize("template", ESCAPES, ids=["subclasses", "mutation", "globals"])
def test_a_chat_template_runs_in_a_sandbox(make_trainer: MakeTrainer, marker: Marker, template: str) -> None:
    processor = tiny.make_processor()
    processor.chat_template = processor.tokenizer.chat_template = template.replace("PATH", repr(str(marker.path)))
    trainer = make_trainer(processing_class=processor)
    with pytest.raises(BadRow, match="^Row .* cannot be processed .SecurityError"):
        trainer.train()
    assert not marker.is_there


def test_a_row_cannot_make_the_trainer_write(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """Hostile texts in every place that a row has: the files of the run are those of a harmless one."""
    hostile = "../../outside\n---\ntags: [stolen]\n---\n<script>alert(1)</script> {{ 7 * 7 }} ![](http://x/y)"
    rows = tiny.make_rows(4)
    harmless = make_trainer(train_dataset=tiny.make_dataset(4), output_dir=str(tmp_path / "a" / "out"))
    harmless.train()
    harmless.save_model()
    for row in rows:
        row["prompt"][0]["content"] = row["completion"][0]["content"] = hostile
    from datasets import Dataset

    dataset = Dataset.from_list(rows, features=tiny.make_dataset(1).features)
    trainer = make_trainer(train_dataset=dataset, output_dir=str(tmp_path / "b" / "out"))
    trainer.train()
    trainer.save_model()
    files = [sorted(str(p.relative_to(tmp_path / side)) for p in (tmp_path / side).rglob("*")) for side in "ab"]
    assert files[0] == files[1]
    assert "stolen" not in "".join(p.read_text() for p in (tmp_path / "b").rglob("*.md"))


def test_names_in_an_evaluation_are_names(saved_pair: Pair, tmp_path: Path) -> None:
    """They become names of files."""
    student, teacher = map(str, saved_pair)
    for name in ("../evil", "a/b", "", "..", "a\nb", "-rf"):
        with pytest.raises(ValueError, match="A model cannot be named"):
            evaluate_models({"original": teacher, "before": student, name: student}, "quick", tmp_path / "out")
    suite = tmp_path / "suite.yaml"
    for name in ("../evil", "a/b", "..", "a\\\\b"):
        suite.write_text(yaml.safe_dump({"name": "s", "texts": [{"name": name, "builtin": "xsum", "n": 4}]}))
        with pytest.raises(ValueError, match="name"):
            load_suite(str(suite))


@pytest.mark.parametrize("value", ["/etc/passwd", "../../../../etc/passwd", "file:///etc/passwd"])
def test_a_file_that_is_no_image_is_not_quoted(value: str) -> None:
    """A row may name a file, as in any dataset; what is in it does not get into messages."""
    with pytest.raises(BadRow) as caught:
        decode_image(value)
    assert "root:" not in str(caught.value)


@pytest.mark.slow
def test_the_space_reads_no_pickles(saved_pair: Pair, marker: Marker, tmp_path: Path) -> None:
    evil = pickled(saved_pair[0], tmp_path / "evil", marker)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"before": str(evil), "after": str(evil), "original": str(saved_pair[1])}))
    environment = {**os.environ, "LINGUDISTILL_SPACE_CONFIG": str(config)}
    run = subprocess.run(
        [sys.executable, str(ROOT / "examples/space/app.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode != 0 and "safetensors" in run.stderr and not marker.is_there
