"""The Dockerfile says what the project says elsewhere, and its images run nothing as root."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def stages(text: str = TEXT) -> dict[str, tuple[str, list[str]]]:
    """{stage: (base image, instructions)}; continued lines are joined."""
    found: dict[str, tuple[str, list[str]]] = {}
    current = ""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if match := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            current = match[2]
            found[current] = (match[1], [])
        else:
            found[current][1].append(" ".join(line.split()))
    return found


def of_make(variable: str) -> str:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return re.search(rf"^{variable} [:?]= (.+)$", text, re.MULTILINE)[1]  # type: ignore[index]


def test_there_is_a_cpu_and_a_gpu_image_and_the_gpu_one_is_the_default() -> None:
    assert list(stages()) == ["wheel", "cpu", "gpu"]
    assert stages()["gpu"][0].startswith("nvidia/cuda:") and "-runtime-" in stages()["gpu"][0]


@pytest.mark.parametrize("stage", ["wheel", "cpu", "gpu"])
def test_bases_are_pinned(stage: str) -> None:
    assert re.search(r":\d+\.\d+\.\d+", stages()[stage][0])


@pytest.mark.parametrize("stage", ["cpu", "gpu"])
def test_an_image_runs_the_command_as_a_user_without_privileges(stage: str) -> None:
    instructions = stages()[stage][1]
    users = [line.removeprefix("USER ") for line in instructions if line.startswith("USER ")]
    assert users == ["10001"]
    assert instructions.index("USER 10001") > max(i for i, line in enumerate(instructions) if line.startswith("RUN "))
    assert 'ENTRYPOINT ["lingudistill"]' in instructions
    assert any("--uid 10001" in line for line in instructions)


@pytest.mark.parametrize("stage", ["cpu", "gpu"])
def test_versions_are_those_of_the_makefile(stage: str) -> None:
    arguments = dict(re.findall(r'ARG (\w+)="(.*)"', "\n".join(stages()[stage][1])))
    assert arguments == {"TORCH": of_make("TORCH"), "EXTRAS": "", "DEMO_DATA": of_make("DEMO_DATA")}


def test_a_root_image_would_be_found() -> None:
    """The control."""
    assert not [line for line in stages(TEXT.replace("USER 10001\n", ""))["gpu"][1] if line.startswith("USER ")]


def test_the_build_context_is_what_the_wheel_needs() -> None:
    """`.dockerignore` leaves out all but these; the package's data among them."""
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(kept) == ["LICENSE", "README.md", "hf_lingudistill", "pyproject.toml"]
    assert all((ROOT / name).exists() for name in kept)


@pytest.mark.slow
def test_the_wheel_of_the_build_context_runs_elsewhere(tmp_path: Path) -> None:
    """The image's steps without Docker: a wheel from the context alone, unpacked away from the sources, answers with its data."""
    context = tmp_path / "context"
    context.mkdir()
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, context)
    shutil.copytree(
        ROOT / "hf_lingudistill", context / "hf_lingudistill", ignore=shutil.ignore_patterns("__pycache__")
    )
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path / "wheels"),
        str(context),
    ]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheels").glob("hf_lingudistill-*.whl")
    site = tmp_path / "site"
    shutil.unpack_archive(wheel, site, "zip")
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import hf_lingudistill; assert 'site' in hf_lingudistill.__file__;"
        "from hf_lingudistill.labs.demo import recipe; assert recipe().is_file() and recipe().with_name('story.yaml').is_file();"
        "from hf_lingudistill.labs.evaluation.suite import load_suite; load_suite('quick'), load_suite('paper');"
        "from hf_lingudistill.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    plan = ["plan", "--student", "HuggingFaceTB/SmolVLM-256M-Instruct", "--gpu_memory", "24"]
    run = subprocess.run([sys.executable, "-c", code, str(site), *plan], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "GiB" in run.stdout
