"""Asking the frozen models once, before training, as a mixin for a trainer: what they say is kept, and they leave the memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from torch.utils.data import DataLoader

from .anchor import Before, evaluating
from .bad_rows import ROW_COLUMN
from .cached import LookUp, flat_readings, keys_of, still_rows
from .checkpoints import check_apart
from .engines import sharding_of
from .first_batch import FirstBatch
from .hub.run_facts import public_name
from .identity import config_facts, digest, processor_facts, reading_digest, weights_digest
from .losses import top_k
from .progress import progress_bar
from .queries import QueryPlan
from .row_cache import RowCache
from .step import DistillStep, ask_teacher, own_inputs
from .student_kv import SharedKV
from .teacher import Teacher, head_alone, on_device

if TYPE_CHECKING:
    from trl import SFTTrainer as _Trainer
else:
    _Trainer = object  # at run time a trainer class stands behind the mixin

logger = logging.getLogger(__name__)

LOOKED_AT = 32  # rows of a set that is said to be complete: are they?
MUCH_LOST = 0.05  # of the probability, on average


class CacheMixin(_Trainer):
    """`anchor_cache` and `teacher_cache` of a trainer whose loss is a `DistillStep`. Call `prepare_caches` once its collator plans.

    Attributes:
        anchor_cached, teacher_cached: the caches; None where they were not asked for.
    """

    args: Any
    model: Any
    train_dataset: Any
    processing_class: Any
    data_collator: Any
    step: DistillStep
    teacher: Teacher
    first_batch: FirstBatch
    teacher_name_or_path: str
    teacher_part: str | None
    teacher_arithmetic: str | None
    has_distill_column: bool | None
    decided: dict[str, Any]
    _before_of: Callable[..., Before]
    _teacher_ref: Any
    _compute_dtype: torch.dtype
    _plain_student: Callable[[], Any]
    anchor_cached: RowCache | None = None
    teacher_cached: RowCache | None = None

    def prepare_caches(self) -> None:
        """Ask about all rows that are not in yet; where the teacher needs to answer no more, drop it.

        Raises:
            ValueError: if the data is a stream, the engine splits what must be whole, or a cache is stale.
        """
        args = self.args
        if not (args.anchor_cache or args.teacher_cache):
            return
        if self.data_collator.plan is None:
            raise ValueError(
                "anchor_cache and teacher_cache need every process to read its own batches, and dispatch_batches=True lets one read for all: "
                "leave dispatch_batches out of accelerator_config, or leave the caches out."
            )
        sets = self._sets()
        before = self._whole_before()
        folder = Path(args.cache_dir or Path(args.output_dir) / "caches")
        read = {
            "student": getattr(self._plain_student().config, "_name_or_path", None),
            "teacher": self.teacher_name_or_path,
        }
        check_apart(folder, what="cache_dir", **read)
        process = self.accelerator.process_index
        if args.anchor_cache:
            self.anchor_cached = RowCache(folder / "anchor", "anchor cache", self._of_before(), process=process)
        if args.teacher_cache:
            self.teacher_cached = RowCache(folder / "teacher", "teacher cache", self._of_teacher(), process=process)
        with ExitStack() as alone:
            if self.accelerator.is_main_process:
                for cache in self._caches:
                    alone.enter_context(cache.alone())
                    cache.begin()
            self.accelerator.wait_for_everyone()
            for cache in self._caches:
                cache.check()
                cache.read()
            self.data_collator.answers = keys_of
            reading = reading_digest(self.data_collator, self.processing_class)
            live = [self._fill(name, dataset, before, reading) for name, dataset in sets.items()]
        self.data_collator.answers = LookUp(
            self.anchor_cached, self.teacher_cached, self.decided["kv_source"] == "before", self.step.planner
        )
        self._say()
        if args.teacher_cache and not any(live):
            self._drop_teacher()

    @property
    def _caches(self) -> list[RowCache]:
        return [cache for cache in (self.anchor_cached, self.teacher_cached) if cache is not None]

    def _sets(self) -> dict[str, Dataset]:
        """The training set and every evaluation set, by name."""
        evaluation = self.eval_dataset
        parts = evaluation if isinstance(evaluation, dict) else {} if evaluation is None else {"": evaluation}
        sets = {"train": self.train_dataset, **{f"eval {name}".strip(): part for name, part in parts.items()}}
        for name, dataset in sets.items():
            if not isinstance(dataset, Dataset):
                raise ValueError(
                    f"anchor_cache and teacher_cache go through all rows before training, and the {name} set is a "
                    f"{type(dataset).__name__}: pass a datasets.Dataset (dataset_streaming=False), or leave the caches out."
                )
        return sets

    def _whole_before(self) -> Before | None:
        """The VLM before, which now is the student itself; None where it is not asked."""
        args, sharded = self.args, sharding_of(self.accelerator) is not None
        mode = self.step.sharing
        if args.teacher_cache and self.step.sharded:
            raise ValueError(
                "teacher_cache=True asks a teacher that is whole on every process, and this one is split: set "
                "teacher_sharding='replicate' (once its answers are kept, it takes no memory), or leave teacher_cache out."
            )
        if args.teacher_cache and sharded and mode.reads_student:
            raise ValueError(
                f"teacher_cache=True with kv_sharing={mode.name!r} needs the whole student on every process, and FSDP2 and ZeRO-3 split "
                "it: train under DDP or ZeRO-2, or leave teacher_cache out."
            )
        student, asked_by = self._plain_student(), "anchor" if args.anchor_cache else "kv_source"
        if student.device != self.accelerator.device and (args.anchor_cache or mode.reads_student):
            student.to(self.accelerator.device)  # DeepSpeed places it when it wraps it
        if not (args.anchor_cache or (args.teacher_cache and self.decided["kv_source"] == "before")):
            return None
        return self._before_of(student, asked_by=asked_by, kept=False)

    # ----------------------------------------------------------------------------------------------------------------
    # What the answers depend on
    # ----------------------------------------------------------------------------------------------------------------
    def _of_before(self) -> dict[str, Any]:
        return {**self._student_facts(), "k": self.args.anchor_cache_k, "computed in": str(self._compute_dtype)}

    def _student_facts(self) -> dict[str, Any]:
        """The VLM before, and what makes its images."""
        student = self._plain_student()
        revision = (self.args.model_init_kwargs or {}).get("revision")
        name = str(getattr(student.config, "_name_or_path", "") or "")
        return {
            "VLM before": _named(name, revision, weights_digest(student, adapter_off=self.model is not student)),
            **config_facts("VLM before's config", student.config),
            **processor_facts(self.processing_class),
        }

    def _of_teacher(self) -> dict[str, Any]:
        args, mode, model, vocabulary = self.args, self.step.sharing, self.teacher.model, self.teacher.vocabulary
        weights = weights_digest(model, vocabulary=vocabulary.size)
        facts = {
            "teacher": _named(self.teacher_name_or_path, args.teacher_model_revision, weights),
            **config_facts("teacher's config", model.config),
            "part": self.teacher_part,
            "quantization": args.teacher_quantization,
            "computed in": f"{self.teacher_arithmetic}, {self._compute_dtype}",
            "kv_sharing": mode.name,
            "kv_source": self.decided["kv_source"],
            **({"reads twice": True} if args.blind_weight else {}),
            "vocabulary": digest(vars(vocabulary)),
        }
        if self.decided["kv_source"] == "before":
            facts |= self._student_facts()
        elif mode.sees:
            facts |= processor_facts(self.processing_class)
        elif mode.reads_student:  # of text rows: masks and rotary embedding
            facts |= config_facts("student's text config", self._plain_student().config.get_text_config())
        return facts

    # ----------------------------------------------------------------------------------------------------------------
    # Asking
    # ----------------------------------------------------------------------------------------------------------------
    def _fill(self, name: str, dataset: Dataset, before: Before | None, reading: str | None) -> int:
        """Ask about the rows of a dataset that are not in yet; all are gone through unless they were before, and were read alike
        (`reading_digest`). -> number of rows that need the live teacher."""
        args, accelerator = self.args, self.accelerator
        title = None if reading is None else f"{dataset._fingerprint}, {reading}"
        dataset = self._remove_unused_columns(dataset, description=name)
        wanted = _asked_rows(dataset, args)
        known = [title and cache.counts_of(title) for cache in self._caches]
        if all(known):
            spread = wanted[:: max(1, len(wanted) // LOOKED_AT)]
            if self._go_through(dataset.select(spread), before, desc=None)[1] == 0:
                return sum(counts.get("live", 0) for counts in known if counts)
        mine = dataset.select(wanted[accelerator.process_index :: accelerator.num_processes])
        live, _ = self._go_through(mine, before, desc=f"Asking once, {name} set")
        for cache in self._caches:
            cache.flush()
        live = sum(gather_object([live]))
        if accelerator.is_main_process and title is not None:
            for cache in self._caches:
                cache.mark_complete(title, {"rows": len(wanted), "live": live if cache is self.teacher_cached else 0})
        accelerator.wait_for_everyone()
        for cache in self._caches:
            cache.read()
        if len({tuple(len(cache) for cache in self._caches), *gather_object([tuple(map(len, self._caches))])}) > 1:
            raise ValueError(
                "The processes of this run do not see the same cache_dir: name a folder that all of them share."
            )
        return live

    def _go_through(self, dataset: Dataset, before: Before | None, *, desc: str | None) -> tuple[int, int]:
        """Go through rows, and ask about those that are not in where `desc` names the work; at least one batch is asked about where the
        cost of quantisation is to be measured. -> (number of rows that need the live teacher, of rows that were not in)."""
        args, live, missing = self.args, 0, 0
        loader: Any = DataLoader(
            dataset,
            batch_size=args.per_device_eval_batch_size,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
        )
        if desc is not None:
            loader = progress_bar(loader, desc=desc, disable=not self.accelerator.is_main_process)
        for batch in loader:
            keys, plan = batch.pop("cached"), batch["queries"]
            batch.pop(ROW_COLUMN, None)
            marked = batch["distill"]
            distilled = torch.zeros_like(marked).index_fill(0, plan.loss_rows, True)
            still = still_rows(plan.sharing, plan, stands_still=self.decided["kv_source"] == "before")
            anchored = ~marked & torch.zeros_like(marked).index_fill(0, plan.other_rows, True)
            wants = (
                _missing(self.anchor_cached, keys, anchored),
                _missing(self.teacher_cached, keys, distilled & still),
            )
            live += int((distilled & ~still).sum())
            missing += sum(int(rows.sum()) for rows in wants)
            measuring = self.teacher_cached is not None and not self.first_batch.quantization_measured
            if measuring:
                wants = wants[0] & (desc is not None), distilled & still
            if (desc is not None or measuring) and any(rows.any() for rows in wants):
                self._ask(self._prepare_inputs(batch), plan, keys, *wants, before)
        return live, missing

    @torch.no_grad()
    def _ask(
        self,
        inputs: dict[str, Any],
        plan: QueryPlan,
        keys: list[bytes],
        for_anchor: torch.Tensor,
        for_teacher: torch.Tensor,
        before: Before | None,
    ) -> None:
        """Ask about rows of one batch. for_anchor, for_teacher: (B,) bool, which."""
        mode, device = self.step.sharing, self.accelerator.device
        own = own_inputs({**inputs, "use_cache": False})
        asked = for_anchor[plan.other_rows]
        rows, positions = plan.other_rows[asked], plan.other_positions[asked]
        queries = self.step.planner({**inputs, "distill": for_teacher.to(device)}).to(device)
        reads_before = self.decided["kv_source"] == "before" and bool(for_teacher.any())
        shared = None
        with self.accelerator.autocast():
            if before is not None and (rows.numel() or reads_before):
                hidden, head, recorded = before.look(
                    own, rows.to(device), positions.to(device), mode if reads_before else None
                )
                shared = recorded if reads_before else None
                if self.anchor_cached is not None and rows.numel():
                    kept = top_k(hidden, head, self.args.anchor_cache_k).to("cpu")
                    lost = kept.log_rest.exp()
                    for b, part in _by_row(rows):
                        answer = {
                            "ids": kept.ids[part].int(),
                            "log_p": kept.log_p[part],
                            "log_rest": kept.log_rest[part],
                        }
                        measured = {
                            "tokens": float(part.numel()),
                            "lost": float(lost[part].sum()),
                            "over a tenth": float((lost[part] > 0.1).sum()),
                        }
                        self.anchor_cached.add(keys[b], answer, measured)
            if self.teacher_cached is None or not for_teacher.any():
                return
            if shared is None:
                shared = self._read(own)
            with on_device(self.teacher, device, offload=self.step.offload):
                states = ask_teacher(mode, self.teacher.model, shared, queries)
                self.first_batch.answered(shared, queries, states)
            states = states.to("cpu")
            for b, part in _by_row(queries.loss_rows.to("cpu")):
                found = flat_readings(states[part], once=not plan.has_image[b])
                self.teacher_cached.add(keys[b], {"states": found}, {"tokens": float(part.numel())})

    def _read(self, own: dict[str, Any]) -> SharedKV:
        """What a teacher finds of the student: on text rows, masks and positions."""
        mode, student = self.step.sharing, self.step.student
        if not mode.reads_student:
            return SharedKV(keep_kv=False, inputs=own)
        with evaluating(student), mode.recording(student) as shared:
            student.base_model(**own)
        return shared

    # ----------------------------------------------------------------------------------------------------------------
    # Afterwards
    # ----------------------------------------------------------------------------------------------------------------
    def cache_facts(self, cache: RowCache | None) -> dict[str, Any] | None:
        """What a run's record says of a cache; None without one."""
        if cache is None:
            return None
        tokens = cache.measured.get("tokens", 0.0)
        facts: dict[str, Any] = {"rows": len(cache), "tokens": int(tokens), "mib": round(cache.nbytes / 2**20, 2)}
        if cache is self.anchor_cached:
            facts |= {
                "k": self.args.anchor_cache_k,
                "lost": cache.measured.get("lost", 0.0) / tokens if tokens else 0.0,
            }
        return facts

    def _say(self) -> None:
        for cache in self._caches:
            facts = self.cache_facts(cache) or {}
            logger.info(
                "The %s in %r: %d rows, %d tokens, %.1f MiB",
                cache.title,
                str(cache.folder),
                facts["rows"],
                facts["tokens"],
                facts["mib"],
            )
            if "k" not in facts:
                continue
            over = cache.measured.get("over a tenth", 0.0) / max(facts["tokens"], 1)
            logger.info(
                "Outside of the %d most likely tokens lies %.3f %% of the VLM before's probability (more than a tenth at %.2f %% of the "
                "tokens): the gradient in the logits is off by at most twice that",
                facts["k"],
                100 * facts["lost"],
                100 * over,
            )
            if facts["lost"] > MUCH_LOST:
                logger.warning(
                    "anchor_cache_k=%d leaves out %.0f %% of the VLM before's probability: raise it, or leave anchor_cache out.",
                    facts["k"],
                    100 * facts["lost"],
                )

    def _drop_teacher(self) -> None:
        whole = self.teacher.footprint
        self.teacher = head_alone(self.teacher, self.accelerator.device, offload=self.step.offload)
        self.step.teacher = self.first_batch.teacher = self.teacher
        self.step.offload = self.first_batch.offload = False
        self._teacher_ref = self.teacher_name_or_path
        clear_device_cache(garbage_collection=True)
        logger.info(
            "No row needs the live teacher: %.1f MiB of it are left, its head, of %.1f",
            self.teacher.footprint / 2**20,
            whole / 2**20,
        )


def _named(name: str, revision: str | None, weights: str) -> str:
    where = (public_name(name) if name else "in memory") + (f" at {revision}" if revision else "")
    return f"{where}, weights {weights}"


def _asked_rows(dataset: Dataset, args: Any) -> list[int]:
    """Rows that some cache is about: those with the same mark stand together, so that no model runs for a few of a batch."""
    if args.distill_column not in dataset.column_names:
        return list(range(len(dataset))) if args.teacher_cache else []
    flags = dataset.with_format(None)[args.distill_column]
    unmarked = [row for row, flag in enumerate(flags) if not flag] if args.anchor_cache else []
    return unmarked + ([row for row, flag in enumerate(flags) if flag] if args.teacher_cache else [])


def _missing(cache: RowCache | None, keys: list[bytes], asked: torch.Tensor) -> torch.Tensor:
    """(B,) bool: rows that are asked about and not in."""
    if cache is None:
        return torch.zeros_like(asked)
    return torch.tensor([bool(ask) and key not in cache for key, ask in zip(keys, asked.tolist(), strict=True)])


def _by_row(rows: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """(P,) batch rows -> each of them, with the indices of its positions."""
    return [(int(b), (rows == b).nonzero().flatten()) for b in rows.unique()]
