"""The `lingudistill` command: what it prints, its exit codes, and what it does not load."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers_for_tests import PARTS_TEMPLATE, TEXT_TEMPLATE, word_tokenizer
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from hf_lingudistill import cli
from hf_lingudistill._version import __version__
from hf_lingudistill.cli import main
from hf_lingudistill.cli.command import Command
from hf_lingudistill.labs.evaluation.suite import load_suite
from hf_lingudistill.scripts.arguments import read_recipe
from hf_lingudistill.sentences import at_home

VOCAB = 48
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `vlm`, `lm` (its LM), `short` (another LM), `named` (a VLM whose card names `lm`): no weights "
    "anywhere."""
    root = tmp_path_factory.mktemp("models")
    vision = CLIPVisionConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    text = LlamaConfig(**SIZES, num_hidden_layers=3, vocab_size=VOCAB + 1)
    for name in ("vlm", "named"):
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=VOCAB).save_pretrained(root / name)
        word_tokenizer(VOCAB, extra=("<image>",), chat_template=PARTS_TEMPLATE).save_pretrained(root / name)
    for name, layers in (("lm", 3), ("short", 2)):
        LlamaConfig(**SIZES, num_hidden_layers=layers, vocab_size=VOCAB).save_pretrained(root / name)
        word_tokenizer(VOCAB, chat_template=TEXT_TEMPLATE).save_pretrained(root / name)
    (root / "named" / "README.md").write_text(f"---\nbase_model:\n- {root / 'lm'}\n---\n")
    return root


def run(models: Path, *arguments: str, student: str = "vlm", teacher: str | None = "lm") -> int:
    paths = [str(models / name) for name in (student, teacher) if name is not None]
    return main(["check", *paths, *arguments])


def test_a_pair_that_fits_exits_with_0(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(models) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"Student: {models / 'vlm'}"[:60])
    assert out.endswith("Fits, with 1 note.\n")
    assert err == ""


def test_a_pair_that_does_not_fit_exits_with_1(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(models, teacher="short") == 1
    out, _ = capsys.readouterr()
    assert "Teacher has 2 layers, the student's language model has 3: KV sharing pairs layers one to one." in out
    assert "Fix: Use the LM that the student was built from." in out


def test_a_swapped_pair_exits_with_1(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(models, student="lm", teacher="vlm") == 1
    assert "The student and teacher look swapped: " in capsys.readouterr().out


def test_json_is_all_that_stdout_holds(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(models, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["fits"], report["shared_vocab_size"], report["teacher_guessed"]) == (True, VOCAB, False)

    assert run(models, "--json", teacher="short") == 1
    assert json.loads(capsys.readouterr().out)["fits"] is False

    assert run(models, "--json", student="named", teacher=None) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["teacher_guessed"] is True
    assert str(models / "lm") in err


def test_the_guessed_teacher_is_printed(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(models, student="named", teacher=None) == 0
    assert capsys.readouterr().out.startswith(f"Teacher named by the student's config or card: {models / 'lm'}\n")


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (
            "nowhere",
            "lm",
            "The student '{}/nowhere' does not exist. Pass a folder that holds a config.json, or a Hub id.",
        ),
        (
            "vlm",
            "nowhere",
            "The teacher '{}/nowhere' does not exist. Pass a folder that holds a config.json, or a Hub id.",
        ),
        (
            "nowhere",
            None,
            "The student '{}/nowhere' does not exist. Pass a folder that holds a config.json, or a Hub id.",
        ),
        (
            "vlm",
            None,
            "The config and card of '{}/vlm' name no language model. Pass the LM that it was built from as --teacher, "
            "or, where there was none, the VLM that it was tuned from.",
        ),
    ],
)
def test_bad_input_exits_with_2_and_one_sentence(
    student: str, teacher: str | None, message: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(models, student=student, teacher=teacher) == 2
    out, err = capsys.readouterr()
    assert err == f"lingudistill: {message.format(models)}\n"
    assert out == ""


def test_a_repository_out_of_reach_exits_with_2(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "nobody/nothing", str(models / "lm")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(
        "lingudistill: There is no folder 'nobody/nothing' here, and as a repository it cannot be read. The config of the student 'nobody/nothing' cannot be read: "
    )
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [[], ["frobnicate"], ["check", "--nope"], ["plan"], ["plan", "--student", "a", "b"]]
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        main(arguments)
    assert leave.value.code == 2
    assert "usage: lingudistill" in capsys.readouterr().err


def test_the_pair_is_named_by_flags_as_well(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student, teacher = str(models / "vlm"), str(models / "lm")
    outputs = []
    for arguments in (
        [student, teacher],
        ["--student", student, "--teacher", teacher],
        [student, "--teacher", teacher],
    ):
        assert main(["check", *arguments]) == 0
        outputs.append(capsys.readouterr().out)
    assert len(set(outputs)) == 1
    assert main(["check"]) == 2
    assert "No student: pass --student VLM" in capsys.readouterr().err
    for twice in (["a", "b", "c"], ["a", "--student", "b"], ["a", "b", "--teacher", "c"]):
        assert main(["check", *twice]) == 2
        assert "Name the pair as `check VLM LM`" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["check", "distill", "evaluate", "diagnose", "score-mix", "blend", "plan", "publish"]
)
def test_every_command_names_the_pair_in_the_same_way(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert leave.value.code == 0 and "--student" in text and "--teacher" in text


@pytest.mark.parametrize("words", [["plan", "--help"], ["distill", "--help"], ["distill", "--help_all"]])
def test_the_help_of_a_negated_switch_says_what_it_does(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """HfArgumentParser gives `--no_OPTION` the help of OPTION, which says the opposite."""
    with pytest.raises(SystemExit):
        main(words)
    text = capsys.readouterr().out
    flat = " ".join(text.split())
    negated = set(re.findall(r"^ +--no_(\w+)", text, flags=re.MULTILINE))
    assert negated and all(f"Set --{name} to false." in flat for name in negated)
    assert flat.count("Compute activations again in the backward pass.") == (words[0] == "plan")


@pytest.mark.parametrize("command", ["check", "diagnose", "plan"])
def test_a_folder_that_is_no_model_is_said_to_be_none(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    assert main([command, "--student", str(tmp_path / "docs")]) == 2
    assert f"The student folder {str(tmp_path / 'docs')!r} holds no config.json." in capsys.readouterr().err


def test_ctrl_c_is_a_sentence_and_exit_code_130(
    models: Path, ctrl_c: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hf_lingudistill.compatibility.check_compatibility", ctrl_c)
    assert run(models) == 130
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("lingudistill: interrupted; the same command begins again")
    monkeypatch.undo()
    assert run(models) == 0  # the control


def test_a_tilde_is_the_home_folder_wherever_it_stands(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell writes it out in words of its own alone: not in quotes, behind `=`, or in a file."""
    monkeypatch.setenv("HOME", str(models))
    assert main(["check", "--student=~/vlm", "--teacher", "~/lm"]) == 0
    home = str(models)
    told = {
        "~/a": f"{home}/a",
        "--student=~/a": f"--student={home}/a",
        "{rows: ~/a}": "{rows: ~/a}",
        "a~/b": "a~/b",
        "~": "~",
        "~b": "~b",
        "-x=~/a": "-x=~/a",
        "--say=a ~/b": "--say=a ~/b",
    }
    assert {text: at_home(text) for text in told} == told
    assert at_home({"a": ["~/b", 3, None, {"c": "~/d"}]}) == {"a": [f"{home}/b", 3, None, {"c": f"{home}/d"}]}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output_dir: ~/out\ndatasets:\n  - {path: ~/rows}\n")
    found = read_recipe(recipe, {"output_dir", "datasets"})
    assert found["output_dir"] == f"{home}/out" and found["datasets"] == [{"path": f"{home}/rows"}]
    suite = tmp_path / "suite.yaml"
    suite.write_text("texts:\n  - {name: t, path: ~/rows, column: text}\n")
    assert load_suite(str(suite)).texts[0].path == f"{home}/rows"


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        main(["--version"])
    assert leave.value.code == 0
    assert capsys.readouterr().out == f"hf_lingudistill {__version__}\n"


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert "check" in out
    assert "distill" in out


def test_every_command_is_a_module_of_its_name() -> None:
    folder = Path(cli.__file__).parent
    modules = {path.stem for path in folder.glob("*.py") if "\nCOMMAND = " in path.read_text(encoding="utf-8")}
    assert {command.name.replace("-", "_") for command in cli.COMMANDS} == modules
    assert {
        command.run.__module__.rpartition(".")[2] for command in cli.COMMANDS if isinstance(command, Command)
    } < modules


@pytest.mark.parametrize(
    "arguments",
    [[], ["--config", "recipe.yaml", "--beta", "0.5"], ["--help"], ["--version"], ["check"], ["--", "x"]],
)
def test_distill_gets_its_arguments_untouched(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[list[str]] = []

    def distill(argv: Sequence[str]) -> int:
        received.append(list(argv))
        return 3

    module = types.ModuleType("hf_lingudistill.scripts.distill")
    module.main = distill  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert main(["distill", *arguments]) == 3
    assert received == [arguments]


def test_an_older_transformers_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Before 5.23 there is no processor that a converted nanoVLM loads with."""
    for name in [name for name in sys.modules if name.startswith("hf_lingudistill.labs.nanovlm")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers.models.granite_docling.processing_granite_docling", None)
    monkeypatch.setattr("transformers.__version__", "5.17.0")
    assert main(["convert-nanovlm", "SRC", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert "came with 5.23; transformers 5.17.0 is installed. Run: pip install 'transformers>=5.23'" in error
    assert not (tmp_path / "new").exists()


def loaded_after(*arguments: str) -> tuple[int, set[str]]:
    """Exit code and loaded modules of a fresh interpreter that runs the command."""
    code = (
        "import json, sys\nfrom hf_lingudistill.cli import main\ncode = main(sys.argv[1:])\n"
        "print('\\n' + json.dumps([code, list(sys.modules)]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert result.returncode == 0, result.stderr
    exit_code, modules = json.loads(result.stdout.splitlines()[-1])
    return exit_code, set(modules)


def test_the_check_loads_neither_models_nor_the_training_stack(models: Path) -> None:
    code, modules = loaded_after("check", str(models / "vlm"), str(models / "lm"))
    assert code == 0
    assert "hf_lingudistill.compatibility" in modules  # control: the check did run in there
    models_loaded = {name for name in modules if name.startswith("transformers.models.") and ".modeling_" in name}
    assert models_loaded - {"transformers.models.auto.modeling_auto"} == set()  # the table of names, no model
    assert modules.isdisjoint({"trl", "peft", "datasets", "bitsandbytes", "hf_lingudistill.trainer"})


def test_a_path_that_does_not_exist_is_told_before_anything_is_loaded(models: Path) -> None:
    code, modules = loaded_after("check", str(models / "nowhere"), str(models / "lm"))
    assert code == 2
    assert modules.isdisjoint({"torch", "transformers"})


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["evaluate", "--student", "VLM", "--teachr", "LM"],
            "unrecognized arguments: --teachr, did you mean '--teacher'?",
        ),
        (["check", "--studnt=VLM"], "unrecognized arguments: --studnt, did you mean '--student'?"),
        (["plan", "--studnt", "VLM"], "unrecognized arguments: --studnt, did you mean '--student'?"),
        (["publish", "OUT", "--repo", "ORG/NAME"], "unrecognized arguments: --repo, did you mean '--repo_id'?"),
        (["diagnose", "--student", "VLM", "--nothing-like-it"], "unrecognized arguments: --nothing-like-it\n"),
    ],
)
def test_an_unknown_option_is_named_with_the_one_that_may_be_meant(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before what is missing: that is often the same option."""
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2 and expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--load_in_4bit", "true"],
            "load_in_4bit=True packs the student's weights, which cannot be trained: add --use_peft",
        ),
        (["--dataset_streaming", "true"], "pass --max_steps N with --dataset_streaming"),
    ],
)
def test_what_cannot_train_is_refused_before_models_are_loaded(
    saved_pair: tuple[Path, Path],
    tmp_path: Path,
    options: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel.from_pretrained", loaded)
    student, teacher = map(str, saved_pair)
    command = ["distill", "--student", student, "--teacher", teacher, "--dataset_name", "nowhere"]
    assert main([*command, "--output_dir", str(tmp_path / "out"), "--report_to", "none", *options]) == 2
    assert expected in capsys.readouterr().err
