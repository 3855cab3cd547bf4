"""Choosing the teacher, and loading it where the run's options and its engine say, as a mixin for a trainer."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from transformers import AutoProcessor, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ._internals import drop_copied_forward, keep_image_dtype
from .adapter import check_adapter_name, with_targets
from .anchor import adapter_off
from .compatibility import CompatibilityReport, check_compatibility, guess_teacher
from .config import JOINING
from .engines import check_one_device, is_teacher_sharded, shard_teacher, sharding_of
from .first_batch import FirstBatch
from .image_check import image_check
from .options import shown
from .quantization import choose_kernels
from .replay import packs_rows
from .self_check import document_check, head_check, self_check, text_ids
from .sharing import sharing
from .step import DistillStep
from .teacher import Teacher, load_teacher_model, on_device, prepare_teacher, vocabulary_of

if TYPE_CHECKING:
    from trl import SFTTrainer as _Trainer
else:
    _Trainer = object  # at run time a trainer class stands behind the mixin

logger = logging.getLogger(__name__)


def chat_template_at(path: str | None) -> str | None:
    """The template that `chat_template_path` names: a jinja file, or the tokenizer of a folder or Hub id."""
    if path is None:
        return None
    if Path(path).is_file():
        return Path(path).read_text(encoding="utf-8")
    template = AutoTokenizer.from_pretrained(path).chat_template
    return template if isinstance(template, str) else None


class TeacherMixin(_Trainer):
    """The frozen LM of a trainer: chosen, loaded or taken as it is, quantised, sharded, offloaded, checked against the student.

    Relies on the names below, which the trainer sets before it asks for the teacher. `before_init` goes before its `__init__`.
    """

    args: Any
    model: Any
    processing_class: Any
    compatibility: CompatibilityReport
    teacher_name_or_path: str
    teacher: Teacher
    first_batch: FirstBatch
    step: DistillStep
    came_adapted: bool  # the student was given with an adapter
    data_collator: Any
    _teacher_ref: str | PreTrainedModel
    _teacher_processing: Any
    _compute_dtype: torch.dtype

    def before_init(
        self,
        model: Any,
        teacher_model: str | PreTrainedModel | None,
        teacher_tokenizer: PreTrainedTokenizerBase | None,
        args: Any,
        kwargs: dict[str, Any],
    ) -> None:
        """What goes before a trainer class's `__init__`, with its arguments: the options are checked, the teacher is chosen, weights come from
        safetensors alone, and the adapter in kwargs names its layers.

        Raises:
            ValueError: see `DistillChecks.check`, `check_one_device`, `choose_teacher`.
        """
        args.check()
        check_one_device(args, model)
        self.choose_teacher(model, teacher_model, teacher_tokenizer, args, kwargs)
        if isinstance(model, str):
            args.model_init_kwargs = {"use_safetensors": True, **as_dict(args.model_init_kwargs)}
        kwargs["peft_config"] = self.adapter_of(model, args, kwargs.get("peft_config"))

    def choose_teacher(
        self,
        model: str | PreTrainedModel | Any,
        teacher_model: str | PreTrainedModel | None,
        teacher_tokenizer: PreTrainedTokenizerBase | None,
        args: Any,
        kwargs: Mapping[str, Any],
    ) -> None:
        """Who teaches, and does it fit? Configs and tokenizers only, before any weight is loaded.

        Args:
            model, teacher_model, teacher_tokenizer, args, kwargs: the trainer's arguments.

        Raises:
            ValueError: if no teacher is named, or student and teacher do not fit, or the adapter's type is not supported.
        """
        self.came_adapted = isinstance(model, torch.nn.Module) and is_peft_model(model)
        given: Any = model
        _check_kinds(
            model, teacher_model, given.active_peft_config if self.came_adapted else kwargs.get("peft_config")
        )
        if self.came_adapted:
            check_adapter_name(given, args)
        teacher = _named_or_guessed(model, teacher_model, args)
        plain = given.get_base_model() if self.came_adapted else model
        for one in (plain, teacher):
            if isinstance(one, torch.nn.Module):
                drop_copied_forward(one)
        if not isinstance(teacher, str) and _share_weights(teacher, plain):
            raise ValueError(
                "teacher_model is the student itself, or made of its weights, which training would change with it: pass the folder or Hub id "
                "that it was loaded from, or another copy."
            )
        self._teacher_ref, self._teacher_processing = teacher, teacher_tokenizer
        self.teacher_name_or_path = teacher if isinstance(teacher, str) else _reference(teacher)
        processing_class, template = kwargs.get("processing_class"), getattr(args, "chat_template_path", None)
        if template and not Path(template).is_file() and isinstance(processing_class, ProcessorMixin | None):
            raise ValueError(
                f"chat_template_path must be a file .jinja, since the student's processor takes none from another model; got {shown(template)}."
            )
        self.compatibility = check_compatibility(
            model,
            teacher,
            student_tokenizer=getattr(processing_class, "tokenizer", processing_class),
            teacher_tokenizer=teacher_tokenizer,
            trust_remote_code=args.trust_remote_code,
            student_revision=as_dict(args.model_init_kwargs).get("revision") if isinstance(model, str) else None,
            teacher_revision=args.teacher_model_revision,
            kv_sharing=args.kv_sharing,
            student_chat_template=chat_template_at(template),
        )
        self.compatibility.raise_for_misfit()
        if (
            self.teacher_name_or_path
            and _same(self.teacher_name_or_path, _reference(model))
            and not sharing(args.kv_sharing).sees
        ):
            logger.warning(
                "Student and teacher are the same model, %s: what it has forgotten, its text half cannot teach. Pass the LM that it was built "
                "from as the teacher.", self.teacher_name_or_path,
            )  # fmt: skip

    @staticmethod
    def adapter_of(student: Any, args: Any, peft_config: Any) -> Any:
        """The adapter's configuration; one that names no layers, and has no default in PEFT, with those of the text decoder."""
        revision = as_dict(args.model_init_kwargs).get("revision")
        return with_targets(peft_config, student, revision=revision, trust_remote_code=args.trust_remote_code)

    @property
    def teacher_part(self) -> str | None:
        """Of a teacher that is a VLM, what teaches: its "text half" or the "whole". None of an LM."""
        if not self.compatibility.teacher_is_vlm:
            return None
        return "whole" if sharing(self.args.kv_sharing).sees else "text half"

    @property
    def teacher_title(self) -> str:
        """The teacher as the log and the summary name it."""
        part = {None: "", "text half": ", a VLM, its text half", "whole": ", a VLM, whole"}[self.teacher_part]
        return (self.teacher_name_or_path or "in memory") + part

    def _is_teacher_sharded(self) -> bool:
        args, reference = self.args, self._teacher_ref
        if sharing(args.kv_sharing).sees and sharding_of(self.accelerator) is not None:
            raise ValueError(
                f"kv_sharing={args.kv_sharing!r} runs the teacher with its vision tower on every process, which FSDP2 and ZeRO-3 are not "
                "told how to split: train under DDP or ZeRO-2, or choose another kv_sharing."
            )
        quantised = args.teacher_quantization != "none" if isinstance(reference, str) else is_quantised(reference)
        return is_teacher_sharded(args.teacher_sharding, quantised=quantised, sharding=sharding_of(self.accelerator))

    def _make_teacher(self, student: PreTrainedModel, *, shard: bool, offload: bool) -> Teacher:
        """Load the teacher (or take the object) and put it where `teacher_sharding` and `teacher_offload` say."""
        reference, device = self._teacher_ref, self.accelerator.device
        # Pieces are cut on the CPU: the whole teacher may not fit a device
        where = torch.device("cpu") if shard else device
        if isinstance(reference, str):
            lm = self._load_teacher(self.args.teacher_quantization, where)
        else:
            choose_kernels(reference)
            lm = reference if is_quantised(reference) else reference.to(where)  # type: ignore[arg-type]
        teacher = prepare_teacher(lm, vocabulary_of(student, self.compatibility), exact_vocab=shard or offload)
        if shard:
            return shard_teacher(teacher, self.accelerator, offload=offload)
        with on_device(teacher, device, offload=offload):  # leaving it parks the teacher
            return teacher

    def _check_pair(self, student: PreTrainedModel) -> None:
        """Refuse a pair whose shared keys and values would mean something else to the teacher, or that would see different images:
        see `self_check.py`, `image_check.py`."""
        mode = self.step.sharing
        if (
            sharding_of(self.accelerator) is not None
            and not mode.sees
            and (not mode.reads_student or self.step.weights.blind)
        ):
            packs_rows(self.teacher.model, self.accelerator.device)  # tried by all processes at once
        if not self.args.self_check:
            return
        if any(getattr(self.args, name, False) for name in JOINING) and sharding_of(self.accelerator) is None:
            document_check(student, self.data_collator.inner)
        if not (mode.reads_student or mode.sees):
            return
        if sharding_of(self.accelerator) is not None:
            logger.info("Self-check left out: student and teacher lie in pieces on all processes.")
            return
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        ids = text_ids(tokenizer, self.teacher.vocabulary).to(student.device)
        # Not by PEFT's own `disable_adapter`, which thaws all of it afterwards
        plain = adapter_off(self.model) if is_peft_model(self.model) else nullcontext()
        with on_device(self.teacher, ids.device, offload=self.step.offload), plain, self.accelerator.autocast():
            if not mode.sees:
                self_check(student, self.teacher.model, ids)
                return
            head_check("teacher", self.teacher.model, ids)
            head_check("student", student, ids)
            self._check_images()

    def _check_images(self) -> None:
        ours, theirs, name = self.processing_class, self._teacher_processing, self.teacher_name_or_path
        if not hasattr(ours, "image_processor"):
            logger.info("Image check left out: the run has no processor, and so no images.")
            return
        if not hasattr(theirs, "image_processor") and name:
            theirs = AutoProcessor.from_pretrained(
                name, revision=self.args.teacher_model_revision, trust_remote_code=self.args.trust_remote_code
            )
        image_check(ours, theirs, self.teacher.model, self.accelerator.device)

    def _load_teacher(self, quantization: str, device: torch.device) -> PreTrainedModel:
        args = self.args
        model = load_teacher_model(
            self.teacher_name_or_path,
            revision=args.teacher_model_revision,
            init_kwargs=as_dict(args.teacher_model_init_kwargs),
            quantization=quantization,
            dtype=self._compute_dtype,
            device=device,
            trust_remote_code=args.trust_remote_code,
            sees=sharing(args.kv_sharing).sees,
        )
        keep_image_dtype(model)
        return model

    def _whole_teacher(self) -> Teacher:
        """The teacher without quantisation, beside the other one."""
        return prepare_teacher(self._load_teacher("none", self.accelerator.device), self.teacher.vocabulary)

    @property
    def teacher_ce_unshared(self) -> float | None:
        """The teacher's cross-entropy in nats per token without sharing, on the first batch with text-only rows."""
        return self.first_batch.ce_unshared


def _check_kinds(model: Any, teacher_model: Any, adapter: Any) -> None:
    """Raise TypeError for what is no model, ValueError for an adapter that no teacher can follow."""
    for role, what in (("model", model), ("teacher_model", teacher_model)):
        if not isinstance(what, str | torch.nn.Module) and (role, what) != ("teacher_model", None):
            raise TypeError(f"{role} must be a model, or the text of a folder or Hub id; got {shown(what)}.")
    if getattr(adapter, "is_prompt_learning", False):
        raise ValueError(
            f"{type(adapter).__name__} puts virtual tokens before the text, which the teacher cannot read: use LoRA "
            "or full fine-tuning."
        )


def _named_or_guessed(model: Any, teacher_model: Any, args: Any) -> Any:
    """The teacher as it was given, or the name that the student's config or card has of it."""
    teacher = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
    if teacher is None:
        teacher = guess_teacher(_reference(model))
        if teacher is None:
            raise ValueError(
                "teacher_model_name_or_path is not set, and the student's config and card do not name its LM. Pass the LM "
                "that the VLM was built from or, where there was none, the VLM that it was tuned from."
            )
        logger.warning("Teacher guessed from the student's config or card: %s", teacher)
    teacher = getattr(teacher, "_orig_mod", teacher)  # of torch.compile: the teacher's parts run, not its forward
    whole: Any = teacher.get_base_model() if not isinstance(teacher, str) and is_peft_model(teacher) else teacher
    return whole  # its adapter stays in its layers


def as_dict(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {}


def is_quantised(model: PreTrainedModel) -> bool:
    return getattr(model, "hf_quantizer", None) is not None


def _reference(model: Any) -> str:
    """The name or path that a model was loaded from (empty if it was built in memory)."""
    return model if isinstance(model, str) else str(getattr(model.config, "_name_or_path", "") or "")


def _same(teacher: str, student: str) -> bool:
    """Whether two names are of one folder or repository."""
    if os.path.isdir(teacher) and os.path.isdir(student):
        return os.path.samefile(teacher, student)
    return teacher == student


def _share_weights(teacher: Any, student: Any) -> bool:
    """Whether a teacher is the student or holds some of its parameters: a teacher is frozen, and they would be with it."""
    if isinstance(student, str):
        return False
    own = {place for weight in student.parameters() if (place := _place(weight)) is not None}
    return any(_place(weight) in own for weight in teacher.parameters())


def _place(weight: torch.Tensor) -> int | None:
    """Where a weight's numbers lie in memory; None where there are none yet."""
    if weight.is_meta or weight.numel() == 0:
        return None
    return int(weight.untyped_storage().data_ptr()) or None
