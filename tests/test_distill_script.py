"""`lingudistill distill` and examples/distill.py: what is refused, in which words, and what is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_lingudistill.scripts.distill import main, parse


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A folder of the user's with the names that the demo writes."""
    for name in ("original", "before", "after"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "model.safetensors").write_text(name)
    (tmp_path / "models" / "report.json").write_text("mine")
    return tmp_path / "models"


def held(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("flags", [[], ["--max_steps", "1"], ["--output_dir", "models"]])
def test_without_a_model_nothing_starts_and_nothing_is_touched(
    precious: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(precious.parent)
    before = held(precious.parent)
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: No student: pass ") and "--demo" in error
    assert held(precious.parent) == before


@pytest.mark.parametrize("flags", [["--demo"], ["--demo", "real"], ["--demo=tiny"]])
def test_the_demo_refuses_a_folder_that_it_did_not_make(
    precious: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = held(precious)
    assert main([*flags, "--output_dir", str(precious)]) == 2
    assert f"error: {str(precious)!r} holds 'after' and was not made by this command" in capsys.readouterr().err
    assert held(precious) == before


def test_the_recipe_of_the_demo_is_that_of_the_flag_and_not_of_a_word_elsewhere() -> None:
    tiny, real = parse(["--demo"])[1].max_steps, parse(["--demo", "real"])[1].max_steps
    assert tiny != real
    for flags in (
        ["--demo", "tiny", "--run_name", "real"],
        ["--run_name", "real", "--demo"],
        ["--demo=tiny", "--seed=1"],
    ):
        script, config, *_ = parse(flags)
        assert (script.demo, config.max_steps) == ("tiny", tiny)
    script, config, *_ = parse(["--run_name", "tiny", "--demo=real"])
    assert (script.demo, config.max_steps) == ("real", real)


def test_the_demo_takes_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--demo", "--model_name_or_path", "some/vlm"]) == 2
    assert "--demo makes its own models" in capsys.readouterr().err
