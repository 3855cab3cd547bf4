"""Nothing of the user's is replaced or removed: the rule itself, and every place in the product that writes or removes."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hf_lingudistill import folders, locks
from hf_lingudistill.checkpoints import check_output_dir
from hf_lingudistill.folders import MARKER, STAGING, NotOurs, check, claim, forget, is_ours, record, remove, replacing

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("before", "report.json")


def write(folder: Path, text: str, by: str = "demo") -> None:
    """What a command does that makes a model's folder and a report."""
    with replacing(folder, *NAMES, by=by) as made:
        (made / "before" / "deep").mkdir(parents=True)
        (made / "before" / "deep" / "model").write_text(text)
        (made / "report.json").write_text(text)
        (made / "scratch").mkdir()


def content(folder: Path) -> dict[str, str]:
    """Every file of a folder but the list of what is ours."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def test_what_was_made_takes_its_place_and_a_rerun_replaces_it(tmp_path: Path) -> None:
    write(tmp_path / "out", "1")
    write(tmp_path / "out", "2")
    assert content(tmp_path / "out") == {"before/deep/model": "2", "report.json": "2"}
    assert sorted(os.listdir(tmp_path / "out")) == [MARKER, "before", "report.json"]


def test_what_a_rerun_no_longer_makes_is_removed_with_the_rest(tmp_path: Path) -> None:
    write(tmp_path, "1")
    with replacing(tmp_path, *NAMES, by="demo") as made:
        (made / "report.json").write_text("2")
    assert content(tmp_path) == {"report.json": "2"}


def test_after_an_error_everything_is_as_it_was(tmp_path: Path) -> None:
    write(tmp_path, "1")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path, *NAMES, by="demo") as made:
        (made / "report.json").write_text("half")
        raise KeyboardInterrupt
    assert content(tmp_path) == {"before/deep/model": "1", "report.json": "1"} and not (tmp_path / STAGING).exists()
    write(tmp_path, "2")  # and they are still ours


MEDDLE = {
    "a file of the user's own": lambda out: (out / "report.json").write_text("mine"),
    "a file added to a folder": lambda out: (out / "before" / "notes.txt").write_text("mine"),
    "a model trained over": lambda out: (out / "before" / "deep" / "model").write_text("mine"),
    "another file of the same size": lambda out: os.utime(out / "before" / "deep" / "model", ns=(1, 1)),
    "a link in place of the folder": lambda out: (
        shutil.move(out / "before", out.parent / "elsewhere"),
        (out / "before").symlink_to(out.parent / "elsewhere"),
    ),
    "a link in the folder": lambda out: (out / "before" / "link").symlink_to(out.parent),
    "no list": lambda out: (out / MARKER).unlink(),
    "a list that cannot be read": lambda out: (out / MARKER).write_text("{"),
    "a list of another shape": lambda out: (out / MARKER).write_text('{"files": [1]}'),
}


@pytest.mark.parametrize("how", MEDDLE)
def test_what_is_not_ours_any_more_is_refused_and_stays(tmp_path: Path, how: str) -> None:
    out = tmp_path / "out"
    write(out, "1")
    MEDDLE[how](out)
    held = content(tmp_path)
    with pytest.raises(
        NotOurs, match="is in the way: this command did not write it, or it has changed since. Move it"
    ):
        write(out, "2")
    assert content(tmp_path) == held


def test_another_commands_files_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "1")
    with pytest.raises(NotOurs, match="report.json"), replacing(tmp_path, "report.json", by="evaluate"):
        raise AssertionError("entered")
    with replacing(tmp_path, "other.json", by="evaluate") as made:
        (made / "other.json").write_text("3")
    write(tmp_path, "2")
    assert content(tmp_path)["other.json"] == "3"


def test_what_comes_into_the_way_meanwhile_is_kept_and_so_is_what_was_made(tmp_path: Path) -> None:
    with pytest.raises(NotOurs, match=f"What was made is in '{tmp_path / STAGING}'"):
        with replacing(tmp_path, "report.json", by="demo") as made:
            (made / "report.json").write_text("ours")
            (tmp_path / "report.json").write_text("mine")
    assert content(tmp_path) == {"report.json": "mine", f"{STAGING}/report.json": "ours"}


def test_a_run_killed_while_files_are_moved_leaves_nothing_that_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "1")
    moved: list[Path] = []

    def rename(path: Path, target: Path) -> None:
        if moved:
            raise SystemExit  # the second of two
        moved.append(path)
        os.rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(SystemExit):
            write(tmp_path, "2")
    assert len(moved) == 1
    write(tmp_path, "3")
    assert content(tmp_path) == {"before/deep/model": "3", "report.json": "3"}


SWEEP = """
import sys
from pathlib import Path
from hf_lingudistill.folders import replacing
root, name = Path(sys.argv[1]), sys.argv[2]
with replacing(root, name, by="sweep") as made:
    (made / name).mkdir()
    (made / name / "model").write_text(name)
    print(made.name, flush=True)
    sys.stdin.readline()  # until it is told to go on, or killed
"""


@pytest.fixture
def sweep() -> Iterator[Callable[[Path, str], subprocess.Popen[str]]]:
    """Starts a process that writes to a folder, and waits before its end."""
    running: list[subprocess.Popen[str]] = []

    def start(root: Path, name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SWEEP, str(root), name]
        pipe = subprocess.PIPE
        running.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


@pytest.mark.skipif(os.name == "nt", reason="folders cannot be locked")
def test_two_processes_write_to_one_folder_at_a_time(
    tmp_path: Path, sweep: Callable[[Path, str], subprocess.Popen[str]]
) -> None:
    """As two sweeps into `outputs/` do. A third is killed: what it left is cleared, and nobody else's."""
    names = ("one", "two", "killed")
    processes = {name: sweep(tmp_path, name) for name in names}
    stagings = {  # after whatever imports print
        name: next(line.strip() for line in process.stdout or [] if line.startswith(STAGING))
        for name, process in processes.items()
    }
    assert sorted(stagings.values()) == [STAGING, f"{STAGING}-2", f"{STAGING}-3"]
    processes["killed"].kill()
    processes["killed"].wait()
    for name in ("two", "one"):
        processes[name].communicate("\n")
        assert processes[name].returncode == 0
    assert content(tmp_path) == {
        "one/model": "one", "two/model": "two", f"{stagings['killed']}/killed/model": "killed"
    }  # fmt: skip
    assert is_ours(tmp_path, "one", by="sweep") and is_ours(tmp_path, "two", by="sweep")
    with replacing(tmp_path, "a", by="sweep"), replacing(tmp_path, "b", by="sweep"):
        with replacing(tmp_path, "c", by="sweep"):
            pass
    assert content(tmp_path) == {"one/model": "one", "two/model": "two"}


@pytest.mark.parametrize("how", ["files", "nothing"])
def test_where_folders_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """On network file systems and Windows files are; where nothing is, what a killed process left stays, and is nobody's to remove."""
    monkeypatch.setattr(locks, "fcntl", None)
    if how == "nothing":
        monkeypatch.setattr(locks.FileLock, "acquire", lambda *_, **__: (_ for _ in ()).throw(NotImplementedError()))
    left = tmp_path / STAGING
    left.mkdir()
    (left / MARKER).touch()
    (left / "left").touch()  # by one that was killed
    write(tmp_path, "1")
    with replacing(tmp_path, "other", by="demo") as outer:  # a second run while a first is at it
        (outer / "other").write_text("outer")
        write(tmp_path, "2")
    expected = {"before/deep/model": "2", "report.json": "2", "other": "outer"}
    found = content(tmp_path)
    assert found.pop(".lingudistill.lock", None) == ("" if how == "files" else None)
    assert found == (expected if how == "files" else expected | {f"{STAGING}/left": ""})


def test_whose_work_was_removed_while_it_was_made_removes_nothing(tmp_path: Path) -> None:
    write(tmp_path, "1")
    with pytest.raises(NotOurs, match="was removed while it was written to: nothing was replaced"):
        with replacing(tmp_path, *NAMES, by="demo") as made:
            shutil.rmtree(made)
    assert content(tmp_path) == {"before/deep/model": "1", "report.json": "1"}


@pytest.mark.parametrize("at", range(1, 5))
@pytest.mark.parametrize("how", ["killed", "refused"])
def test_what_is_replaced_is_there_until_the_new_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, how: str
) -> None:
    """However far it comes: everything is new, or everything is as it was, at once or with the next run."""
    write(tmp_path, "1")
    renames: list[Path] = []

    def rename(path: Path, target: Path) -> None:
        renames.append(path)
        if len(renames) == at:
            raise SystemExit if how == "killed" else PermissionError(13, "Permission denied", str(path))
        os.rename(path, target)

    error: type[BaseException] = SystemExit if how == "killed" else NotOurs
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(error) as raised:
            write(tmp_path, "2")
    assert len(renames) >= at
    if how == "refused":
        assert "cannot be written (Permission denied): everything is as it was, and what was made is in" in str(
            raised.value
        )
    folders.clear_left(tmp_path)
    held = {name: text for name, text in content(tmp_path).items() if not name.startswith(STAGING)}
    assert held == {"before/deep/model": "1", "report.json": "1"}
    assert how == "killed" or f"{STAGING}/report.json" in content(tmp_path), "what was made is the user's"
    write(tmp_path, "3")
    held = {name: text for name, text in content(tmp_path).items() if not name.startswith(STAGING)}
    assert held == {"before/deep/model": "3", "report.json": "3"}


def test_a_full_disk_leaves_everything_as_it_was_and_what_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "1")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(folders, "write_whole", full)
        with pytest.raises(
            NotOurs, match="No space left on device.: everything is as it was, and what was made is in"
        ):
            write(tmp_path, "2")
    assert content(tmp_path)["report.json"] == "1" and content(tmp_path)[f"{STAGING}/report.json"] == "2"
    write(tmp_path, "3")
    assert content(tmp_path)["report.json"] == "3" and content(tmp_path)[f"{STAGING}/report.json"] == "2"


def test_a_run_killed_before_its_list_is_written_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever that is, the next runs write on."""
    plain = folders.write_whole
    for at in range(1, 6):
        out, calls = tmp_path / str(at), []
        write(out, "1")

        def killed(path: Path, text: str, at: int = at, calls: list[Path] = calls) -> None:
            calls.append(path)
            if len(calls) == at:
                raise SystemExit
            plain(path, text)

        with monkeypatch.context() as patch:
            patch.setattr(folders, "write_whole", killed)
            try:
                write(out, "2")
            except SystemExit:
                assert len(calls) == at
        for text in ("3", "4"):
            write(out, text)
            assert content(out) == {"before/deep/model": text, "report.json": text}
    assert len(calls) < at, "the last was not killed"


def test_a_link_stays_one_when_a_file_is_written_whole(tmp_path: Path) -> None:
    (tmp_path / "card.md").write_text("old")
    (tmp_path / "README.md").symlink_to(tmp_path / "card.md")
    folders.write_whole(tmp_path / "README.md", "new")
    assert (tmp_path / "README.md").is_symlink() and (tmp_path / "card.md").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["README.md", "card.md"]


def test_a_first_run_that_was_killed_is_started_again(tmp_path: Path) -> None:
    (tmp_path / STAGING).mkdir()
    (tmp_path / STAGING / MARKER).touch()
    (tmp_path / STAGING / "half").touch()
    (tmp_path / f"{MARKER}.123.tmp").touch()
    claim(tmp_path, by="demo")
    write(tmp_path, "1")
    assert content(tmp_path).keys() - {f"{MARKER}.123.tmp"} == {"before/deep/model", "report.json"}
    (tmp_path / "out" / STAGING).mkdir(parents=True)  # control: a folder of that name that is not ours
    with pytest.raises(NotOurs, match="was not made by this command"):
        claim(tmp_path / "out", by="demo")


def test_what_was_killed_while_it_was_cleared_is_ours_to_clear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(SystemExit()))
        with pytest.raises(SystemExit):
            write(tmp_path, "1")  # its scratch folder is to be cleared at the end
    assert (tmp_path / STAGING / "scratch").is_dir()
    write(tmp_path, "2")
    assert content(tmp_path) == {"before/deep/model": "2", "report.json": "2"} and not (tmp_path / STAGING).exists()


def test_a_folder_is_removed_where_the_disk_is_too_full_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "weights").write_text("2")
    record(tmp_path, "checkpoint-2", by="distill")
    plain = Path.mkdir

    def full(path: Path, *args: object, **kwargs: object) -> None:
        if path.name.startswith(STAGING):
            raise OSError(28, "No space left on device")
        plain(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", full)
    remove(tmp_path, "checkpoint-2", by="distill")
    assert content(tmp_path) == {} and not is_ours(tmp_path, "checkpoint-2", by="distill")


def test_a_folder_is_removed_at_once_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "weights").write_text("2")
    record(tmp_path, "checkpoint-2", by="distill")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(SystemExit()))
        with pytest.raises(SystemExit):
            remove(tmp_path, "checkpoint-2", by="distill")
    assert not (tmp_path / "checkpoint-2").exists() and (tmp_path / STAGING).is_dir()
    folders.clear_left(tmp_path)
    assert content(tmp_path) == {}


def test_a_folder_is_claimed_only_where_nothing_is_or_where_the_same_command_wrote(tmp_path: Path) -> None:
    claim(tmp_path / "new", by="demo")
    claim(tmp_path, by="demo")
    assert os.listdir(tmp_path) == []
    write(tmp_path / "out", "1")
    (tmp_path / "out" / "notes.txt").touch()
    claim(tmp_path / "out", by="demo")
    with pytest.raises(NotOurs, match="holds '.*' and was not made by this command"):
        claim(tmp_path / "out", by="evaluate")
    with pytest.raises(NotOurs, match="holds 'out' and was not made by this command"):
        claim(tmp_path, by="demo")
    with pytest.raises(NotOurs, match="is a file, expected a folder"):
        claim(tmp_path / "out" / "notes.txt", by="demo")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_only_bears_the_name_of_ours_is_left(tmp_path: Path, kind: str) -> None:
    mine = tmp_path / STAGING
    if kind == "folder":
        mine.mkdir()
    (mine / "mine" if kind == "folder" else mine).write_text("precious")
    write(tmp_path, "1")
    name = f"{STAGING}/mine" if kind == "folder" else STAGING
    assert content(tmp_path) == {name: "precious", "before/deep/model": "1", "report.json": "1"}


def test_what_was_recorded_may_be_removed_until_it_changes_or_is_forgotten(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
        record(tmp_path, name, by="distill")
    (tmp_path / "b" / "file").write_text("changed")
    assert [is_ours(tmp_path, name, by="distill") for name in ("a", "b", "c", "absent")] == [True, False, True, False]
    remove(tmp_path, "a", by="distill")
    with pytest.raises(NotOurs):
        remove(tmp_path, "b", by="distill")
    forget(tmp_path, by="distill")
    with pytest.raises(NotOurs):
        remove(tmp_path, "c", by="distill")
    assert content(tmp_path) == {"b/file": "changed", "c/file": "c"} and not (tmp_path / MARKER).exists()
    check(tmp_path, "a", by="distill")


# --------------------------------------------------------------------------------------------------------------------
# Every place that writes or removes
# --------------------------------------------------------------------------------------------------------------------
PRODUCT = ("hf_lingudistill", "examples", "docs", "benchmarks", "model_cards")
# Calls that remove, replace or write over something on the disk, by the name of the function or method
REMOVES = {"rmtree", "unlink", "rmdir", "removedirs", "rename", "renames", "rotate_checkpoints"}
WRITES = {
    "write_text",
    "write_bytes",
    "save_pretrained",
    "save_model",
    "save_to_disk",
    "savefig",
    "save_file",
    "savez",
}
WRITES |= {
    "copyfile",
    "copytree",
    "copy2",
    "symlink_to",
    "hardlink_to",
    "to_json",
    "to_csv",
    "to_parquet",
    "save_to_json",
}
AS_FUNCTION_OF = {
    "os": {"remove", "replace"},
    "shutil": {"copy", "move"},
    "torch": {"save"},
    "np": {"save"},
    "json": {"dump"},
    "yaml": {"dump"},
}
SAVED = {"card.save", "draw(name).save"}  # of `.save`, a name that many things have

OURS = "what `folders` has found to be ours"
BESIDE = "in a folder of its own that `replacing` or `staged` puts into place"
RUN = "a run's own output_dir, which `check_output_dir` has found free, or the user has said may be overwritten"
CALLER = "the folder that the Python caller names, as with transformers' own save_pretrained"
NAMED = "a file that is named on the command line to be written"
REPOSITORY = "a generated file of this repository, which git keeps"
STAGE = "a stage's folder under outputs/, of a stage that is not done"
# A recipe writes to its own folder under outputs/ and to its results, which git keeps; what it removes needs a reason here
RECIPES = "examples/recipes/"
SCRATCH = "a temporary folder made for this"

# (file, function) -> why it may
ALLOWED = {
    ("hf_lingudistill/folders.py", "_take_their_places"): BESIDE,
    ("hf_lingudistill/folders.py", "_undo"): "back to its place, where nothing is",
    ("hf_lingudistill/folders.py", "_left_to_the_user"): "the mark that a folder is ours, and an empty folder in it",
    ("hf_lingudistill/folders.py", "forget"): "the list itself",
    ("hf_lingudistill/folders.py", "remove"): OURS,
    ("hf_lingudistill/folders.py", "_own_staging"): "an empty folder that it has just made",
    ("hf_lingudistill/folders.py", "_release"): "a lock's file",
    ("hf_lingudistill/folders.py", "clear_staging"): OURS,
    (
        "hf_lingudistill/folders.py",
        "write_whole",
    ): "for its callers: the list, a staging folder's mark, a run's card and record",
    ("hf_lingudistill/checkpoints.py", "_put_back"): "a checkpoint that was put aside, to its place, where nothing is",
    ("hf_lingudistill/checkpoints.py", "_make_staging"): "the mark of a staging folder that it has just made",
    ("hf_lingudistill/checkpoints.py", "start_afresh"): "to a name that is free",
    ("hf_lingudistill/checkpoints.py", "set_aside_other_kind"): "to a name that is free",
    ("hf_lingudistill/checkpoints.py", "_move"): BESIDE,
    ("hf_lingudistill/checkpoints.py", "write_measured"): BESIDE,
    ("hf_lingudistill/checkpoints.py", "keep_edits"): "a copy under a name that is free",
    ("hf_lingudistill/resume.py", "_save_checkpoint"): BESIDE,
    ("hf_lingudistill/hub/mixin.py", "save_model"): CALLER,
    ("hf_lingudistill/hub/mixin.py", "push_to_hub"): RUN,
    ("hf_lingudistill/scripts/distill.py", "save"): RUN,
    (
        "hf_lingudistill/labs/evaluation/cache.py",
        "_rewrite",
    ): "a cache whose first line says that it is one, or a new file",
    ("hf_lingudistill/labs/evaluation/cache.py", "add"): "a cache whose first line says that it is one, or a new file",
    ("hf_lingudistill/labs/evaluation/report.py", "write_report"): BESIDE,
    ("hf_lingudistill/labs/evaluation/plots.py", "_save"): BESIDE,
    ("hf_lingudistill/labs/diagnose/report.py", "write_report"): BESIDE,
    ("hf_lingudistill/labs/diagnose/plot.py", "plot_drift"): BESIDE,
    ("hf_lingudistill/labs/score_mix/report.py", "write_report"): BESIDE,
    ("hf_lingudistill/labs/score_mix/report.py", "_plot"): BESIDE,
    ("hf_lingudistill/labs/blend/report.py", "write_front"): BESIDE,
    ("hf_lingudistill/labs/blend/report.py", "_plot"): BESIDE,
    ("hf_lingudistill/labs/blend/run.py", "_save"): BESIDE,
    ("hf_lingudistill/labs/demo_report.py", "write_report"): BESIDE,
    ("hf_lingudistill/labs/demo_report.py", "plot"): BESIDE,
    ("hf_lingudistill/labs/demo/run.py", "all"): BESIDE,
    ("hf_lingudistill/labs/demo/run.py", "_distil"): BESIDE,
    ("hf_lingudistill/labs/demo/run.py", "_prompts"): BESIDE,
    ("hf_lingudistill/row_cache.py", "_write"): "a folder of the cache, new, before it is put in its place",
    ("hf_lingudistill/row_cache.py", "flush"): "a part of the cache, under a name that no part has",
    ("hf_lingudistill/labs/demo/models.py", "teach_to_see"): BESIDE,
    ("hf_lingudistill/labs/nanovlm/convert.py", "from_nanovlm"): BESIDE,
    ("hf_lingudistill/labs/nanovlm/convert.py", "to_nanovlm"): BESIDE,
    ("hf_lingudistill/labs/nanovlm/convert.py", "_new_folder"): "to a place where nothing is, or an empty folder",
    ("hf_lingudistill/labs/nanovlm/inputs.py", "save_pretrained"): CALLER,
    ("hf_lingudistill/labs/world/align.py", "_save"): "the alignment's own checkpoint, which its caller names",
    ("hf_lingudistill/labs/world/art.py", "fetch_art"): "to a place where nothing is",
    ("examples/baselines/interpolate.py", "interpolate"): BESIDE,
    ("examples/baselines/text_replay.py", "main"): RUN,
    ("examples/recipes/five_artists/lms.py", "_from_parts"): "a file put together in a folder of this call's own",
    ("examples/recipes/five_artists/reproduce.py", "arms"): "a model that this very call has trained and measured",
    ("examples/recipes/five_artists/kept.py", "write_json"): "a result of the recipe, written beside its place",
    ("examples/recipes/five_artists/stages.py", "_aligned"): STAGE,
    ("examples/recipes/five_artists/stages.py", "_see"): STAGE,
    ("examples/space/pictures.py", "draw_all"): SCRATCH,
    ("docs/figures/draw_step.py", "main"): REPOSITORY,
    ("docs/figures/shoot_space.py", "space"): SCRATCH,
    ("docs/fill_readme.py", "main"): REPOSITORY,
    ("benchmarks/gpu.py", "main"): NAMED,
    ("benchmarks/gpu.py", "replan"): NAMED,
    ("benchmarks/plan_check.py", "make_models"): SCRATCH,
    ("benchmarks/plan_check.py", "end"): "a switch of the kernel's",
    ("benchmarks/plan_check.py", "measure"): "a switch of the kernel's",
    ("benchmarks/harness.py", "write_result"): NAMED,
    ("benchmarks/step_cost.py", "make_models"): SCRATCH,
    ("benchmarks/teacher_memory.py", "main"): SCRATCH,
    ("model_cards/render.py", "main"): "cards that end with the note that they were rendered",
}


def sites(root: Path = ROOT) -> Iterator[tuple[str, str, str]]:
    """(file, function, call) of every call in the product that may remove or write over something."""
    for folder in PRODUCT:
        for path in sorted((root / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for function, call in _calls(tree, "<module>"):
                if _is_site(call):
                    yield path.relative_to(root).as_posix(), function, ast.unparse(call.func)


def _calls(node: ast.AST, function: str) -> Iterator[tuple[str, ast.Call]]:
    for child in ast.iter_child_nodes(node):
        inside = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
        if isinstance(child, ast.Call):
            yield function, child
        yield from _calls(child, inside)


def _is_site(call: ast.Call) -> bool:
    text = ast.unparse(call.func)
    name = text.rpartition(".")[2]
    if name == "open":
        modes = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
        return any(
            isinstance(m, ast.Constant)
            and isinstance(m.value, str)
            and set(m.value) & set("wax+")
            and len(m.value) < 4
            for m in modes
        )
    owner = text.rpartition(".")[0]
    if name in AS_FUNCTION_OF.get(owner, ()) or text in SAVED:
        return True
    if name == "replace":  # Path.replace has one argument, str.replace two
        return len(call.args) == 1 and not call.keywords and owner not in ("dataclasses",)
    return name in REMOVES | WRITES


def test_every_place_that_writes_or_removes_has_a_reason() -> None:
    found: dict[tuple[str, str], list[str]] = {}
    for file, function, call in sites():
        if not (file.startswith(RECIPES) and call.rpartition(".")[2] in WRITES):
            found.setdefault((file, function), []).append(call)
    new = {site: calls for site, calls in found.items() if site not in ALLOWED}
    assert not new, f"Write through folders.replacing, or give a reason in ALLOWED: {new}"
    gone = sorted(set(ALLOWED) - set(found))
    assert not gone, f"No longer there: {gone}"


@pytest.mark.parametrize(
    "line",
    [
        "shutil.rmtree(out)",
        "Path(out).unlink()",
        "os.remove(out)",
        "os.replace(a, b)",
        "path.replace(b)",
        "path.write_text('x')",
        "open(out, 'w')",
        "out.open(mode='ab')",
        "model.save_pretrained(out)",
        "figure.savefig(out)",
        "torch.save(x, out)",
    ],
)
def test_a_new_place_is_found(tmp_path: Path, line: str) -> None:
    """The control: each kind of call, in a function of its own; reading and text are none."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "new.py").write_text(f"class A:\n    def f(self):\n        {line}\n")
    assert [(file, function) for file, function, _ in sites(tmp_path)] == [("docs/new.py", "f")]
    (tmp_path / "docs" / "new.py").write_text(
        "open(a)\nopen(a, 'rb')\nt.replace('a', 'b')\nreplace(x, a=1)\np.read_text()\n"
    )
    assert list(sites(tmp_path)) == []


@pytest.mark.parametrize("made", [True, False])
def test_a_folder_that_may_not_be_written_to_is_named_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: bool
) -> None:
    folder = tmp_path / "shared" / "out"
    (folder if made else folder.parent).mkdir(parents=True)
    closed = folder if made else folder.parent
    check(folder, "report.json", by="evaluate")
    check_output_dir(folder)
    access = os.access  # root may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed and access(path, mode))
    with pytest.raises(NotOurs, match=f"may not write to '{closed}'"):
        check(folder, "report.json", by="evaluate")
    with pytest.raises(NotOurs, match="may not write"):
        claim(folder, by="demo")
    for overwrite in (True, False):
        with pytest.raises(ValueError, match="cannot be written"):
            check_output_dir(folder, overwrite=overwrite)
