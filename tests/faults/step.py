"""The step, and those who look on: meter, NaN watch, first batch."""

from __future__ import annotations

from .fault import FEATURES, TRAINER, Fault

FAULTS = (
    # ---- step.py
    Fault(
        "labels-not-shifted",
        "step.py",
        'labels = inputs["labels"][rows, positions + 1]',
        'labels = inputs["labels"][rows, positions]',
        "a position is trained to repeat its token",
        (f"{TRAINER}::test_batch_without_marked_rows_is_trained_as_by_sft",),
    ),
    Fault(
        "released-too-late",
        "step.py",
        "        shared.release()\n",
        "",
        "keys and values live as long as the logits",
        (f"{TRAINER}::test_recorded_keys_and_values_are_freed_before_the_divergence",),
    ),
    Fault(
        "lost-mark",
        "step.py",
        'marked=inputs["distill"][plan.loss_rows]',
        "marked=None",
        "a row that lost its mark after the plan is distilled",
        (f"{TRAINER}::test_a_plan_of_the_collator_gives_the_step_that_the_batch_gives",),
    ),
    # ---- meter.py
    Fault(
        "sums-not-reduced",
        "meter.py",
        'self.accelerator.reduce(total, reduction="sum").tolist()',
        "total.tolist()",
        "the log is that of one process",
        ("tests/test_meter.py",),
    ),
    Fault(
        "eval-not-reduced",
        "meter.py",
        'self.accelerator.reduce(self._eval[:2].clone(), reduction="sum").tolist()',
        "self._eval[:2].tolist()",
        "the best checkpoint is chosen by one process's rows",
        ("tests/test_meter.py",),
    ),
    Fault(
        "step-not-accepted",
        "meter.py",
        "        self._train += self._step\n",
        "",
        "steps leave nothing in the log",
        (f"{TRAINER}::test_metrics_are_token_means_over_micro_batches_of_unequal_size",),
    ),
    Fault(
        "skipped-step-counted",
        "meter.py",
        '        """The step under way was skipped."""\n        self._step.zero_()',
        '        """The step under way was skipped."""',
        "a skipped step stays in the metrics",
        ("tests/test_finite.py::test_skipped_step_is_as_if_it_had_not_been",),
    ),
    Fault(
        "student-ce-of-all",
        "meter.py",
        "ce[asked].sum(),",
        "ce.sum(),",
        "student and teacher are compared on different tokens",
        (f"{TRAINER}::test_metrics_are_token_means_over_micro_batches_of_unequal_size",),
    ),
    # ---- finite.py
    Fault(
        "teacher-nan-ignored",
        "finite.py",
        "            flags[1] += batch.teacher.any()\n",
        "",
        "a teacher of NaN is not found",
        ("tests/test_finite.py::test_teacher_that_returns_nan_is_found",),
    ),
    Fault(
        "gradient-not-judged",
        "finite.py",
        "flags[2] += ~torch.isfinite(",
        "flags[2] += torch.isnan(",
        "an infinite gradient reaches the weights",
        ("tests/test_finite.py::test_gradient_that_is_not_finite_under_a_finite_loss_is_found",),
    ),
    Fault(
        "scaler-copes-forever",
        "finite.py",
        "scaler.get_scale() >= 1.0",
        "scaler.get_scale() >= 0.0",
        "a loss scale that has collapsed is waited for",
        ("tests/test_finite.py::test_overflow_is_left_to_a_scaler_that_can_still_go_down",),
    ),
    Fault(
        "skipped-gradient-kept",
        "finite.py",
        "        trainer.optimizer.zero_grad(\n            set_to_none=True\n        )",
        "        id(\n            trainer\n        )",
        "a skipped step's gradient reaches the optimizer",
        ("tests/test_finite.py::test_skipped_step_leaves_weights_and_moments_alone",),
    ),
    # ---- first_batch.py
    Fault(
        "comparison-inverted",
        "first_batch.py",
        "if shared_ce > self.ce_unshared + 0.5:",
        "if shared_ce < self.ce_unshared - 0.5:",
        "the warning comes where sharing helps",
        (f"{FEATURES}::test_student_whose_keys_make_its_teacher_worse_warns",),
    ),
    Fault(
        "kl-direction",
        "first_batch.py",
        "            teacher_hidden, self.teacher.head, self.mode.teacher_pass(whole.model, shared, plan), whole.head\n",
        "            self.mode.teacher_pass(whole.model, shared, plan), whole.head, teacher_hidden, self.teacher.head\n",
        "the cost of quantisation is the KL of the other direction",
        ("tests/test_first_batch.py",),
    ),
)
