"""Faults in what is made of that which a caller gives: rows, readers, models, options."""

from __future__ import annotations

from .fault import FEATURES, Fault

ROWS = "tests/test_rows_as_given.py"
LIFE = "tests/test_lifecycle.py"

FAULTS = (
    Fault(
        "template-given-the-usual",
        "conversations.py",
        "self._takes = usual if self._writes(usual) or not self._writes(other) else other",
        "self._takes = usual",
        "a chat template of parts writes empty turns of texts",
        (f"{ROWS}::test_a_template_is_given_what_it_reads",),
    ),
    Fault(
        "part-numbers-ignored",
        "places.py",
        "images = _in_named_order(places, images)",
        "pass",
        "images stand in other places than their parts number",
        (f"{ROWS}::test_images_stand_where_the_parts_number_them",),
    ),
    Fault(
        "users-turn-as-answer",
        "row_checks.py",
        'if kind == "completion" and asking:',
        "if False:",
        "a user's turn in a completion is trained on",
        (f"{ROWS}::test_a_completion_is_the_assistants",),
    ),
    Fault(
        "reader-passed-over",
        "data_mixin.py",
        "dataset, formatting_func = formatted(dataset, formatting_func, dataset_name, args), None",
        "pass",
        "a formatting_func beside a conversation is not called",
        (f"{ROWS}::test_a_formatting_function_says_what_is_trained_on",),
    ),
    Fault(
        "answer-without-its-lead",
        "labs/evaluation/models.py",
        "whole = self.ids(asked + self.answer_lead + text)",
        "whole = self.ids(asked + text)",
        "answers are scored without the space that SmolVLM's template writes",
        ("tests/test_answer_lead.py::test_each_measure_scores_the_row_that_training_has",),
    ),
    Fault(
        "log-of-the-models-mode",
        "step_mixin.py",
        'of_training = "loss" in logs or "total_flos" in logs',
        "of_training = self.model.training",
        "the training's log behind an evaluation is the evaluation's",
        (f"{FEATURES}::test_an_evaluation_takes_nothing_of_the_trainings_log",),
    ),
    Fault(
        "under-a-trained-adapter",
        "anchor.py",
        "if adapted and _says_something(model):",
        "if False:",
        "of a PEFT model that was trained, the VLM before is the model under its adapter",
        (f"{LIFE}::test_an_adapter_that_is_trained_already_is_of_the_vlm_before",),
    ),
    Fault(
        "other-rows-resumed",
        "same_run.py",
        "        *_rows_per_step(trainer, facts),\n",
        "",
        "a run is resumed with other rows per step, and leaves some out",
        (f"{LIFE}::test_a_run_goes_on_with_the_optimizer_and_the_rows_that_it_had",),
    ),
    Fault(
        "step-counted-twice",
        "resume.py",
        "if self._step_at_work == self.state.global_step and self._before_step is not None:",
        "if False:",
        "a checkpoint within a step holds that step's sums, and the run that resumes adds them again",
        (
            f"{LIFE}::test_a_checkpoint_in_the_middle_of_a_step_counts_nothing_twice",
            "tests/test_finite.py::test_what_a_stop_leaves_counts_nothing_of_the_step_that_was_dropped",
        ),
    ),
    Fault(
        "copys-forward-is-the-originals",
        "_internals.py",
        "        del model.forward\n",
        "        pass\n",
        "a copy of a model that TRL has trained answers as the original",
        (f"{LIFE}::test_a_copy_of_a_model_that_was_trained_is_a_model_of_its_own",),
    ),
)
