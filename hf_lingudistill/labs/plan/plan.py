"""The plan of a set-up, and the smallest set-up that fits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from ...sharing import MODES
from .cost import FLOPS, step_cost, step_seconds
from .facts import ModelFacts
from .memory import Lines, cached_bytes, kv_bytes, moments_of, teacher_bytes
from .setup import ENGINES, QUANTIZATIONS, SPLITTING, Engine, PlanError, Setup

GIB = 2**30
# Not in any tensor, and not measured by us: CUDA's context, cuBLAS and NCCL; and what an allocator loses between blocks
CONTEXT_BYTES = 1 * GIB
ALLOCATOR_SHARE = 0.95


@dataclass(frozen=True)
class Plan:
    """A set-up and what it takes.

    moment: when memory peaks. lines: bytes by name at that moment. teacher: bytes of the whole teacher by quantisation.
    recorded_kv: bytes of one copy of the student's K/V. cached: bytes per label on disk of answers that are computed once. saved: bytes at
    the peak that they save on the device. moments: bytes in all by moment. cost: of a step over SFT. seconds: of a step, see
    `step_seconds`.
    """

    student: ModelFacts
    teacher_name: str
    setup: Setup
    moment: str
    lines: Lines
    moments: Lines
    teacher: Lines
    recorded_kv: int
    cached: int
    saved: int
    cost: float
    seconds: float | None

    @property
    def peak(self) -> int:
        """Bytes of tensors on a device at the peak."""
        return sum(self.lines.values())

    @property
    def needed(self) -> float:
        """Bytes a device must have: the peak, what the allocator loses, and CUDA's own."""
        return self.peak / ALLOCATOR_SHARE + (0 if self.setup.device == "cpu" else CONTEXT_BYTES)

    @property
    def fits(self) -> bool:
        return self.needed <= self.setup.gpu_memory * GIB

    @property
    def sampling_kv(self) -> int:
        """Bytes of K/V while the student samples the answers of an update, all at once."""
        return self.recorded_kv * self.setup.accumulation

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values (JSON); sizes in bytes."""
        return {
            "student": self.student.name,
            "teacher": self.teacher_name,
            "student_parameters": self.student.parameters,
            "setup": asdict(self.setup),
            "fits": self.fits,
            "needed": round(self.needed),
            "peak": self.peak,
            "peak_moment": self.moment,
            "lines": self.lines,
            "moments": self.moments,
            "teacher_by_quantization": self.teacher,
            "recorded_kv": self.recorded_kv,
            **({"cached_bytes_per_label": self.cached, "saved_by_caches": self.saved} if self.cached else {}),
            **({"sampling_kv": self.sampling_kv} if self.setup.on_policy else {}),
            "step_cost_over_sft": self.cost,
            "step_seconds": self.seconds,
        }

    def __str__(self) -> str:
        setup = self.setup
        precision = setup.dtype + ("" if setup.mixed_precision == "no" else f" under {setup.mixed_precision}")
        method = f"LoRA of rank {setup.lora_rank}" if setup.lora_rank else "full fine-tuning"
        text = [
            f"Student: {self.student.name} ({self.student.parameters / 1e6:,.0f}M parameters)",
            f"Teacher: {self.teacher_name} ({setup.teacher_quantization}), kv_sharing={setup.kv_sharing}",
            f"{method}, {precision}, {setup.optimizer}; {setup.engine} on {setup.gpus} x {setup.gpu_memory:g} GiB; "
            f"{setup.batch} x {setup.seq_len} tokens per device ({setup.image_tokens} image, {setup.response_tokens} response)",
            "",
            f"Per device, at the peak, which is {self.moment}:",
            *(f"  {name:<20}{size / GIB:9.2f} GiB" for name, size in self.lines.items() if size),
            f"  {'tensors':<20}{self.peak / GIB:9.2f} GiB",
            f"  {'needed':<20}{self.needed / GIB:9.2f} GiB, with the allocator's loss"
            + ("" if setup.device == "cpu" else " and CUDA's own"),
            "",
            "Teacher: " + ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in self.teacher.items()) + ", whole",
            *(
                [f"Recorded K/V: {self.recorded_kv / GIB:.2f} GiB, dropped before the backward pass"]
                if MODES[setup.kv_sharing].records_kv and not setup.teacher_is_gone
                else []
            ),
            *(
                [
                    f"Asked once, before training: {self.saved / GIB:.2f} GiB less at the peak; on disk {self.cached:,} bytes per label"
                    + (
                        ""
                        if setup.teacher_is_gone or not setup.teacher_cache
                        else "; rows with images still ask the teacher"
                    )
                ]
                if self.cached
                else []
            ),
            f"A step costs {self.cost:.3f} of an SFT step (operations)"
            + (
                ""
                if self.seconds is None
                else f", {self.seconds:.2f} s at {FLOPS / 1e12:.0f} TFLOP/s (40 % of an H100)"
            ),
            *(
                [
                    f"Sampling holds {self.sampling_kv / GIB:.2f} GiB of keys and values ({setup.batch * setup.accumulation} answers at once)"
                    + (", and the whole student on each device" if setup.splits else "")
                    + "; its seconds are not counted"
                ]
                if setup.on_policy
                else []
            ),
            f"It {'fits' if self.fits else 'does not fit'} in memory.",
        ]
        return "\n".join(text)


def _as_loaded(teacher: ModelFacts, setup: Setup) -> ModelFacts:
    """Of a VLM as teacher, its text half; all of it where it gets the images."""
    if not MODES[setup.kv_sharing].sees:
        return replace(teacher, parameters=teacher.parameters - teacher.beside, vision=None, beside=0)
    if teacher.vision is None:
        raise PlanError(
            f"kv_sharing={setup.kv_sharing!r} gives the teacher the images themselves, and {teacher.name!r} is a text-only LM: pass a VLM."
        )
    return teacher


def make_plan(student: ModelFacts, teacher: ModelFacts, setup: Setup) -> Plan:
    """The plan of one set-up.

    Raises:
        PlanError: if student and teacher differ in layers or K/V heads, so that nothing could be shared; with `images`, if the teacher
            is no VLM.
    """
    teacher = _as_loaded(teacher, setup)
    ours, theirs = (
        (of.text.layers, of.text.kv_width, of.text.heads_width // of.text.heads) for of in (student, teacher)
    )
    if ours != theirs and not MODES[setup.kv_sharing].sees:
        raise PlanError(
            f"The student's language model has {ours[0]} layers with K/V of width {ours[1]} in heads of {ours[2]}, the teacher {theirs[0]} of "
            f"{theirs[1]} in heads of {theirs[2]}: pass the LM that the student was built from."
        )
    moments = dict(moments_of(student, teacher, setup))
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    live = moments_of(student, teacher, replace(setup, anchor_cache=False, teacher_cache=False))
    peak = max(sum(lines.values()) for _, lines in live)
    return Plan(
        student=student,
        teacher_name=teacher.name,
        setup=setup,
        moment=moment,
        lines=moments[moment],
        moments={name: sum(lines.values()) for name, lines in moments.items()},
        teacher={q: teacher_bytes(teacher, q, setup.compute_bytes, student.vocab) for q in QUANTIZATIONS},
        recorded_kv=kv_bytes(student, setup),
        cached=cached_bytes(student, teacher, setup),
        saved=peak - sum(moments[moment].values()),
        cost=step_cost(student, teacher, setup),
        seconds=step_seconds(student, teacher, setup),
    )


def smallest_plan(
    student: ModelFacts,
    teacher: ModelFacts,
    setup: Setup,
    gpu_counts: Iterable[int] = (1, 2, 4, 8, 16, 32, 64),
    engines: Iterable[Engine] = ENGINES,
) -> Plan | None:
    """The fewest devices that fit, and among the engines that do so on that many, the simplest. None if nothing fits.

    Where the engine cuts weights, an unquantised teacher, which can be cut, is tried after the quantised one, which cannot.
    """
    for gpus in gpu_counts:
        for engine in engines:
            if (engine == "single") != (gpus == 1) or (MODES[setup.kv_sharing].sees and engine in SPLITTING):
                continue
            here = replace(setup, engine=engine, gpus=gpus)
            tried = (here, replace(here, teacher_quantization="none")) if engine in SPLITTING else (here,)
            for candidate in tried:
                plan = make_plan(student, teacher, candidate)
                if plan.fits:
                    return plan
    return None
