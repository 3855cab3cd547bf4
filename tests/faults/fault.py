"""A planted fault, and the tests that are named often."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """file: below the package. before: text that it holds once. after: what it is exchanged for. why: what is wrong then. tests:
    files or node ids, one of which must fail."""

    name: str
    file: str
    before: str
    after: str
    why: str
    tests: tuple[str, ...]


PLAN = "tests/test_query_plan.py"
LOSSES = "tests/test_losses.py"
FAMILIES = "tests/test_families.py"
TRAINER = "tests/test_trainer.py"
FEATURES = "tests/test_trainer_features.py"
DATA = "tests/test_data.py"
FORMATS = "tests/test_formats.py"
FIDELITY = "tests/test_evaluation_fidelity.py"
READING = f"{PLAN}::test_plan_matches_a_token_by_token_reading"
FULL_LENGTH = f"{FAMILIES}::test_another_teacher_equals_a_full_length_pass"
DEFINITION = f"{LOSSES}::test_loss_and_gradients_match_the_definition"
SETTINGS = f"{LOSSES}::test_bias_scale_softcap_and_temperature_are_read"
ANCHOR = "tests/test_anchor.py"
VLM_TEACHER = "tests/test_vlm_teacher.py"
RESUMED = "tests/test_checkpoints.py::test_log_between_whose_entries_a_checkpoint_fell_is_that_of_the_whole_run"
