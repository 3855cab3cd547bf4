"""Options that nobody would read, because another one is not set: refused, since whoever gives an option expects it to do something."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ..options import StudentArguments, shown

if TYPE_CHECKING:
    from ..config import LinguDistillConfig, OnPolicyLinguDistillConfig
    from ..mixtures import DistillMixtureConfig
    from ..options import DistillScriptArguments

    Config = LinguDistillConfig | OnPolicyLinguDistillConfig

_ADAPTER = [option.name for option in dataclasses.fields(StudentArguments) if option.name.startswith("lora_")]
_ADAPTER += ["use_rslora", "use_dora", "merge_adapter"]
_FOUR_BITS = ["bnb_4bit_quant_type", "bnb_4bit_quant_storage", "use_bnb_nested_quant"]
# What `datasets:` has in place of the options that describe a single dataset
_OF_ONE_DATASET = {
    "dataset_name": "list it under `datasets:`",
    "dataset_config": "give its source a `name:`",
    "dataset_train_split": "give its source a `split:`",
    "dataset_test_split": "set `test_split_size:`",
    "dataset_streaming": "set `streaming: true`",
    "image_folder": "give a source that is a file a `data_dir:`",
}
_OF_A_MIXTURE = {"streaming": "pass --dataset_streaming true", "test_split_size": "pass --dataset_test_split"}


def check_unread(
    script_args: DistillScriptArguments, config: Config, student: StudentArguments, mixture: DistillMixtureConfig
) -> None:
    """Check that every option that was given is read. One that has its default value counts as not given, but for an adapter's: whoever writes
    `--lora_r 16` wants one.

    Raises:
        ValueError: naming the option, what keeps it from being read, and what to do.
    """
    given = _given(script_args, config, student, mixture)
    for name in script_args.written & {*_ADAPTER}:
        value = getattr(student, name, None)
        if value not in (None, False):
            given[name] = value
    for name, why, instead in _unread(script_args, config, student, mixture):
        if name in given:
            raise ValueError(f"{name}={shown(given[name])} has no effect {why}: {instead}, or leave {name} out.")


def check_demo(script_args: DistillScriptArguments, student: StudentArguments, mixture: DistillMixtureConfig) -> None:
    """Check that nothing is given about a student and data where the demo makes its own.

    Raises:
        ValueError: naming the option.
    """
    given = _given(script_args, student, mixture)
    given.pop("demo")
    for name, value in given.items():
        raise ValueError(
            f"--demo makes its own models and data, and {name}={shown(value)} has no effect there: drop one of the two."
        )


def _given(*groups: Any) -> dict[str, Any]:
    """{name: value} of the options that do not have their default."""
    return {
        option.name: value
        for group in groups
        for option in dataclasses.fields(group)
        if option.init and (value := getattr(group, option.name)) != _default(option)
    }


def _default(option: dataclasses.Field[Any]) -> Any:
    return option.default if option.default_factory is dataclasses.MISSING else option.default_factory()


def _unread(
    script_args: DistillScriptArguments, config: Config, student: StudentArguments, mixture: DistillMixtureConfig
) -> list[tuple[str, str, str]]:
    """Options that are not read here: name, why not, and what to set to have it read."""
    found = []
    if not student.use_peft:
        found += [(name, "without use_peft", "pass --use_peft true") for name in _ADAPTER]
    if not student.load_in_4bit:
        found += [(name, "without load_in_4bit", "pass --load_in_4bit true") for name in _FOUR_BITS]
    if mixture.datasets:
        found += [(name, "beside `datasets:`", instead) for name, instead in _OF_ONE_DATASET.items()]
    else:
        found += [(name, "without `datasets:`", instead) for name, instead in _OF_A_MIXTURE.items()]
    if config.eval_strategy == "no":
        found.append(("dataset_test_split", "with eval_strategy='no'", "pass --eval_strategy epoch"))
        held_out = "with eval_strategy='no' but to keep rows from the training"
        found.append(("test_split_size", held_out, "pass --eval_strategy epoch"))
    if script_args.on_policy:  # whose config refuses what follows whatever else is set
        return found
    if config.distill_tokens != "confident":
        tokens = f"with distill_tokens={config.distill_tokens!r}"
        found.append(("distill_margin", tokens, "pass --distill_tokens confident"))
    if config.anchor == "none":
        found.append(("anchor_weight", "without anchor", "pass --anchor before"))
    if not config.anchor_cache:
        found.append(("anchor_cache_k", "without anchor_cache", "pass --anchor_cache true"))
    if not (config.anchor_cache or config.teacher_cache):
        found.append(("cache_dir", "without anchor_cache or teacher_cache", "set one of them to true"))
    return found
