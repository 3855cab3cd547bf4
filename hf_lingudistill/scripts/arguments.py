"""Flags and recipes -> dataclasses, and the help. Nothing is loaded here but, for whoever trains, TRL's configuration."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from trl import TrlParser

from ..exit_codes import SUMMARY
from ..options import DistillOptions, DistillScriptArguments, StudentArguments, aliases, shown
from ..sentences import at_home, did_you_mean
from ..yaml_text import read_yaml

if TYPE_CHECKING:
    from ..config import LinguDistillConfig, OnPolicyLinguDistillConfig
    from ..mixtures import DistillMixtureConfig

    Config = LinguDistillConfig | OnPolicyLinguDistillConfig
    Parsed = tuple[DistillScriptArguments, Config, StudentArguments, DistillMixtureConfig]

USAGE = """lingudistill distill --student VLM [--teacher LM] --dataset_name DATA --output_dir OUT [options]
       lingudistill distill --config RECIPE.yaml [options]
       lingudistill distill --demo [--output_dir OUT]"""


class _Parser(TrlParser):
    """Whose errors are sentences. argparse would print the names of all options first, some hundred lines."""

    def error(self, message: str) -> Any:
        raise ValueError(message)


class OptionHelp(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling for each option, and no `(default: None)`."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if "-" not in name.removeprefix("--")]
        return f"{', '.join(names)} {self._value(action)}".rstrip()

    def _value(self, action: argparse.Action) -> str:
        if action.nargs == 0:
            return ""
        if action.const is True:
            return "[true|false]"
        return self._format_args(action, action.dest.rpartition("_")[2].upper())

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def help_text() -> str:
    """The options of distillation, TRL's left out."""
    parser = TrlParser(
        (),
        prog="lingudistill distill",
        usage=USAGE,
        description="Distil a VLM's original language model back into it. Every option can be set in the YAML of --config; a flag wins "
        "over a line there.",
        epilog="All options of TRL's SFTConfig (--on_policy: DistillationConfig), ModelConfig and ScriptArguments are taken too "
        f"(--max_steps, --use_peft, ...): --help_all lists them. {SUMMARY}",
        formatter_class=OptionHelp,
        add_help=False,
    )
    run = parser.add_argument_group("The run")
    (student,) = (option for option in dataclasses.fields(StudentArguments) if option.name == "model_name_or_path")
    run.add_argument("--student", "--model_name_or_path", metavar="VLM", help=student.metadata["help"])
    run.add_argument("--output_dir", metavar="OUT", help="Where the distilled VLM is saved: a new or an empty folder.")
    run.add_argument(
        "--config", metavar="RECIPE", help="A YAML of options; its `datasets:` lists a mixture's sources."
    )
    run.add_argument("--help_all", action="store_true", help="List TRL's options too.")
    for group in (DistillOptions, DistillScriptArguments):
        parser._add_dataclass_arguments(group)  # type: ignore[arg-type]
    return str(negated(parser).format_help())


def negated(parser: TrlParser) -> TrlParser:
    """The same parser; the help of each `--no_OPTION` says what it does. HfArgumentParser repeats that of OPTION, which says the opposite."""
    for action in parser._actions:
        name = next((name for name in action.option_strings if name.startswith("--no_")), None)
        if name is not None and action.nargs == 0:
            action.help, action.default = f"Set --{name.removeprefix('--no_')} to false.", argparse.SUPPRESS
    return parser


def read_recipe(path: str | Path, known: set[str]) -> dict[str, Any]:
    """The options in a YAML file, by the names of their fields.

    known: the names of all fields.

    Raises:
        ValueError: naming the file, if it cannot be read or holds what is no option.
    """
    try:
        found = read_yaml(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"The recipe {str(path)!r} does not exist.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The recipe {str(path)!r} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"The recipe {str(path)!r} is not valid YAML: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"The recipe {str(path)!r} must contain a YAML mapping.")
    other_names = aliases(DistillOptions, StudentArguments)
    recipe: dict[str, Any] = {}
    for key, value in at_home(found).items():
        if not isinstance(key, str):
            raise ValueError(
                f"The recipe {str(path)!r} has a key that is not a text: {shown(key)}. Quote it, or remove it."
            )
        name = other_names.get(key, key)
        if name not in known | {"env"}:
            near = did_you_mean(key, known | set(other_names))
            raise ValueError(f"The recipe {str(path)!r} has an unknown key {key!r}{near or '.'}")
        if name in recipe:
            raise ValueError(f"The recipe {str(path)!r} gives {name} under two names, {key!r} the second: keep one.")
        recipe[name] = value
    return recipe


def parse(argv: Sequence[str]) -> Parsed:
    """Flags, and the recipe of `--config` -> dataclasses. With `--demo`, the demo's recipe stands behind both.

    Raises:
        SystemExit: after `--help` or `--help_all` has been printed.
        ValueError: for what is no option or not a value of it.
    """
    argv = at_home(list(argv))
    if {"-h", "--help"} & set(argv):
        print(help_text(), end="")
        raise SystemExit(0)
    from ..config import LinguDistillConfig, OnPolicyLinguDistillConfig

    known, known_on_policy = (_names(_groups(config)) for config in (LinguDistillConfig, OnPolicyLinguDistillConfig))
    # Those that decide which recipe is read, and as whose
    first = _Parser((), add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.add_argument("--demo", nargs="?", const="true")
    first.add_argument("--on_policy", nargs="?", const="true")
    early, rest = first.parse_known_args(argv)
    recipe = {} if early.config is None else read_recipe(early.config, known | known_on_policy)
    # What else may be written is refused below, where all options are read
    on_policy = _is_true(early.on_policy, recipe.get("on_policy"))
    if _is_true(early.demo, recipe.get("demo")):
        if on_policy:
            raise ValueError("--demo trains on given answers: drop --on_policy, or name models and data of your own.")
        from ..labs.demo import recipe as recipe_of_demo

        recipe = {**read_recipe(recipe_of_demo(), known), **recipe}
    if other := sorted(set(recipe) - {"env"} - (known_on_policy if on_policy else known)):
        why = "on-policy, which has no such option" if on_policy else "on given answers: it belongs to on_policy: true"
        raise ValueError(f"The recipe {early.config!r} has the key {other[0]!r} and trains {why}.")
    groups = _groups(OnPolicyLinguDistillConfig if on_policy else LinguDistillConfig)
    parser = _Parser(groups, prog="lingudistill distill", usage=USAGE, allow_abbrev=False)  # type: ignore[arg-type]
    if "--help_all" in argv:
        negated(parser).print_help()
        raise SystemExit(0)
    for name in ("demo", "on_policy"):
        if getattr(early, name) is not None:
            rest += [f"--{name}", getattr(early, name)]
    for name, value in _variables(recipe.pop("env", {}), early.config).items():
        os.environ[name] = value
    parser.set_defaults_with_config(**recipe)
    rest = with_on_and_off(parser, rest)
    asked, unknown = parser.parse_known_args(rest)
    if unknown:
        options = {
            name for action in parser._actions for name in action.option_strings if "-" not in name.removeprefix("--")
        }
        what = unknown[0].split("=")[0]
        if what.startswith("-"):
            raise ValueError(
                f"Unknown option {what!r}{did_you_mean(what.replace('-', '_').replace('__', '--', 1), options) or '.'}"
            )
        raise ValueError(f"{shown(what)} belongs to no option: expected --OPTION VALUE. `--help` lists them.")
    from .preflight import check_packages

    # Its config is read where the options become an object: before `check_run`
    check_packages(argparse.Namespace(deepspeed=asked.deepspeed))
    parsed: Parsed = parser.parse_args_into_dataclasses(args=rest, look_for_args_file=False)  # type: ignore[assignment]
    vars(parsed[0])["written"] = frozenset(set(recipe) | _written(parser, rest))
    return parsed


def _written(parser: argparse.ArgumentParser, words: Sequence[str]) -> set[str]:
    """The fields whose options stand among the words of a command line."""
    options = {name: action.dest for action in parser._actions for name in action.option_strings}
    return {options[name] for word in words if (name := word.partition("=")[0]) in options}


def with_on_and_off(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """The same words, `on` and `off` after a switch as `true` and `false`, as YAML reads them."""
    kinds = {action: getattr(action.type, "__name__", "") for action in parser._actions}
    switches = {name for action, kind in kinds.items() if kind == "string_to_bool" for name in action.option_strings}
    values = {"on": "true", "off": "false"}
    words: list[str] = []
    for word in argv:
        name, _, value = word.partition("=")
        if name in switches and value.lower() in values:
            word = f"{name}={values[value.lower()]}"
        elif words and words[-1] in switches:
            word = values.get(word.lower(), word)
        words.append(word)
    return words


def _groups(config: type) -> tuple[type, ...]:
    from ..mixtures import DistillMixtureConfig

    return DistillScriptArguments, config, StudentArguments, DistillMixtureConfig


def _names(groups: Sequence[type]) -> set[str]:
    return {option.name for group in groups for option in dataclasses.fields(group) if option.init}


def _is_true(flag: str | None, of_recipe: Any) -> bool:
    """Whether a switch is on: by its flag, else by its line in the recipe."""
    return of_recipe is True if flag is None else flag.lower() in ("true", "yes", "t", "y", "1", "on")


def _variables(given: Any, path: str | None) -> dict[str, str]:
    """The environment variables that a recipe sets (`env:`)."""
    if not isinstance(given, dict):
        raise ValueError(f"The recipe {str(path)!r}: env must be a mapping, VARIABLE: value; got {shown(given)}.")
    return {str(name): str(value) for name, value in given.items()}
