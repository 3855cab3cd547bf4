"""What can be known to fail before data and weights are loaded: in one sentence, while nothing has been waited for."""

from __future__ import annotations

import logging
import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints import check_apart, check_output_dir, continues, to_resume, wanted_checkpoint
from ..compatibility import check_compatibility, named_teacher
from ..engines import check_one_device
from .unread import check_unread

if TYPE_CHECKING:
    from ..config import LinguDistillConfig, OnPolicyLinguDistillConfig
    from ..mixtures import DistillMixtureConfig
    from ..options import DistillScriptArguments, StudentArguments

logger = logging.getLogger(__name__)

# Option, the values that need something, the modules of which one must be there, what pip calls it
_NEEDS = (
    ("report_to", r"azure_ml", ("azureml",), "azureml-core"),
    ("report_to", r"codecarbon|comet_ml|clearml|dvclive|mlflow|neptune|swanlab|trackio|wandb", (), ""),
    ("report_to", r"dagshub", ("dagshub",), "dagshub"),
    ("report_to", r"dagshub", ("mlflow",), "mlflow"),
    ("report_to", r"flyte", ("flytekit",), "flytekit"),
    ("report_to", r"tensorboard", ("tensorboard", "tensorboardX"), "tensorboard"),
    ("use_liger_kernel", r"True", ("liger_kernel",), "liger-kernel"),
    ("attn_implementation", r"(paged\|)?flash_attention_2", ("flash_attn", "kernels"), "flash-attn"),
    (
        "attn_implementation",
        r"(paged\|)?flash_attention_3",
        ("flash_attn_interface", "flash_attn_3", "kernels"),
        "kernels",
    ),
    ("attn_implementation", r"(paged\|)?flash_attention_4", ("flash_attn", "kernels"), "kernels"),
    ("attn_implementation", r".+/.+", ("kernels",), "kernels"),
    ("optim", r"adamw_apex_fused", ("apex",), "apex"),
    ("optim", r"apollo.*", ("apollo_torch",), "apollo-torch"),
    ("optim", r"galore.*", ("galore_torch",), "galore-torch"),
    ("optim", r"(ada)?lomo", ("lomo_optim",), "lomo-optim"),
    ("optim", r"grokadamw", ("grokadamw",), "grokadamw"),
    ("optim", r"schedule_free.*", ("schedulefree",), "schedulefree"),
    ("optim", r"stable_adamw", ("optimi",), "torch-optimi"),
    ("optim", r"adamw_torch_[48]bit", ("torchao",), "torchao"),
    ("optim", r"(?!adamw_torch|galore).*(bnb|paged|8bit|lion|ademamix).*", ("bitsandbytes",), "bitsandbytes"),
    ("teacher_quantization", r"nf4|int8", ("bitsandbytes",), "bitsandbytes"),
    ("load_in_4bit", r"True", ("bitsandbytes",), "bitsandbytes"),
    ("load_in_8bit", r"True", ("bitsandbytes",), "bitsandbytes"),
    ("use_peft", r"True", ("peft",), "peft"),
    ("use_vllm", r"True", ("vllm",), "vllm"),
    ("deepspeed", r"(?!None$).*", ("deepspeed",), "deepspeed"),
)


def check_packages(*arguments: Any) -> None:
    """Check that the packages are installed that options ask for.

    Raises:
        ModuleNotFoundError: naming the option and what to install.
    """
    for name, values, modules, package in _NEEDS:
        given = next((getattr(group, name) for group in arguments if hasattr(group, name)), None)
        for value in map(_text, given if isinstance(given, list) else [given]):
            if re.fullmatch(values, value) and not any(map(_is_installed, modules or (value,))):
                raise ModuleNotFoundError(
                    f"{name}={value} needs the package {package or value}, which is not installed: `pip install {package or value}`, "
                    f"or give {name} another value."
                )


def _text(value: Any) -> str:
    return str(getattr(value, "value", value))  # an optimizer is an enum


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # of a module that is in the way in place of a package
        return False


def check_run(
    script_args: DistillScriptArguments,
    config: LinguDistillConfig | OnPolicyLinguDistillConfig,
    student: StudentArguments,
    mixture: DistillMixtureConfig,
) -> None:
    """All that can be checked without data and weights: configs and tokenizers are read, nothing is written.

    Raises:
        ModuleNotFoundError: if a package is missing that an option asks for.
        ValueError: if the run cannot start: no model, no data, no steps, an option that nothing reads, an output_dir in use or of a model, a checkpoint that cannot be
            resumed from, models that do not fit.
    """
    name = student.model_name_or_path
    if not name:
        raise ValueError("No student: pass --student (a VLM's Hub id or folder), or --demo to run the embedded demo.")
    if not (mixture.datasets or script_args.dataset_name):
        raise ValueError(
            "No data: pass --dataset_name (a file, a folder or a Hub id), or list sources under `datasets:` in a recipe."
        )
    check_one_device(config)
    check_unread(script_args, config, student, mixture)
    if script_args.written and "output_dir" not in script_args.written:
        raise ValueError("No output folder: pass --output_dir OUT, a new or an empty folder.")
    packed = [option for option in ("load_in_4bit", "load_in_8bit") if getattr(student, option, False)]
    if script_args.merge_adapter and packed:
        raise ValueError(
            f"merge_adapter=True would round the adapter away, into the few bits that {packed[0]}=True leaves the student's weights: leave "
            "merge_adapter out, and merge into whole weights afterwards (docs/lora.md)."
        )
    if packed and not student.use_peft:
        raise ValueError(
            f"{packed[0]}=True packs the student's weights, which cannot be trained: add --use_peft for an adapter, or leave {packed[0]} out."
        )
    streams = script_args.dataset_streaming or getattr(mixture, "streaming", False)
    if streams and config.max_steps < 0:
        raise ValueError(
            "A stream has no length by which epochs could be counted: pass --max_steps N with --dataset_streaming."
        )
    if config.max_steps < 0 and config.num_train_epochs <= 0:
        raise ValueError(
            f"num_train_epochs must be above 0 (or set max_steps); got {config.num_train_epochs:g}, which trains nothing."
        )
    out, wanted = str(config.output_dir), wanted_checkpoint(config.resume_from_checkpoint)
    check_apart(out, student=name, teacher=config.teacher_model_name_or_path)
    if wanted is not None:
        to_resume(wanted, out)
    if not continues(wanted, out):
        check_output_dir(out, overwrite=config.overwrite_output_dir)
    check_packages(config, student)
    teacher = config.teacher_model_name_or_path or named_teacher(name, trust_remote_code=config.trust_remote_code)
    check_apart(out, teacher=teacher)
    for role, path, revision in (
        ("student", name, student.model_revision),
        ("teacher", teacher, config.teacher_model_revision),
    ):
        if revision not in (None, "main") and path is not None and Path(path).is_dir():
            logger.warning(
                "The %s %s is a folder, and is read as it is: revision %s is of a repository on the Hub.",
                role,
                path,
                revision,
            )
    check_compatibility(
        name,
        teacher,
        trust_remote_code=config.trust_remote_code,
        student_revision=student.model_revision,
        teacher_revision=config.teacher_model_revision,
        kv_sharing=config.kv_sharing,
    ).raise_for_misfit()
