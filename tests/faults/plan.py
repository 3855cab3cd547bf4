"""Which positions the teacher is asked at, and what it may read there."""

from __future__ import annotations

from .fault import PLAN, READING, Fault

FAULTS = (
    # ---- queries.py
    Fault(
        "label-off-by-one",
        "queries.py",
        "loss[:, :-1] = readable[:, :-1] & (",
        "loss[:, 1:] = readable[:, 1:] & (",
        "a token is scored at its own position",
        (READING,),
    ),
    Fault(
        "padding-read",
        "queries.py",
        "readable = vocabulary.readable(input_ids) & attended",
        "readable = vocabulary.readable(input_ids)",
        "padding is read as text",
        (f"{PLAN}::test_padding_is_neither_own_nor_loss_nor_queried",),
    ),
    Fault(
        "flag-not-planned",
        "queries.py",
        "loss &= distill.bool().to(loss.device)[:, None]",
        "loss &= (distill.bool() | True).to(loss.device)[:, None]",
        "rows that are not marked are distilled",
        (f"{PLAN}::test_rows_that_are_not_distilled_cost_nothing",),
    ),
    Fault(
        "own-too-short",
        "queries.py",
        "& (where <= last)",
        "& (where < last)",
        "the last query reads the student where it has keys of its own",
        (READING,),
    ),
    Fault(
        "alias-forgotten",
        "queries.py",
        "known = torch.where(ids == ours, theirs, known)",
        "known = torch.where(ids == ours, 0, known)",
        "the student's end of turn is token 0 to the teacher",
        (f"{PLAN}::test_an_end_of_turn_under_another_name_is_read_and_scored",),
    ),
    Fault(
        "alias-scored-twice",
        "queries.py",
        "known &= ids != theirs",
        "known &= ids >= 0",
        "two labels share the teacher's probability of ending a turn",
        (f"{PLAN}::test_an_end_of_turn_under_another_name_is_read_and_scored",),
    ),
    Fault(
        "stale-plan",
        "queries.py",
        "same &= (labels[self.label_rows, self.label_positions + 1] != -100).all()",
        "same &= (labels[self.label_rows, self.label_positions] != 0).any() | True",
        "a batch that changed after its plan is trained on",
        (f"{PLAN}::test_a_batch_that_changed_after_its_plan_is_refused",),
    ),
    Fault(
        "packed-rows-mixed",
        "queries.py",
        "device=input_ids.device) - begins[row_of]",
        "device=input_ids.device) - begins.flip(0)[row_of]",
        "queries of packed rows come back in each other's place",
        (f"{PLAN}::test_packing_is_undone_by_unpacking",),
    ),
    Fault(
        "padding-is-an-image",
        "queries.py",
        "text_only = ~(attended & ~readable).any(dim=1)",
        "text_only = readable.all(dim=1)",
        "padded rows of text count as rows with an image",
        (f"{PLAN}::test_padded_text_is_text",),
    ),
    # ---- sharing/
    Fault(
        "prompt-inverted",
        "sharing/base.py",
        "return readable & labelled",
        "return readable & ~labelled",
        "`prompt` shares the answer in place of the prompt",
        (READING,),
    ),
    Fault(
        "full-is-vision",
        "sharing/base.py",
        "return readable & False",
        "return readable & True",
        "`full` shares images alone",
        (READING,),
    ),
    Fault(
        "inputs-reads-placeholders",
        "sharing/inputs.py",
        "embeds = embeds.where(plan.readable[:, None], theirs)",
        "embeds = embeds.where(plan.readable[:, None] | True, theirs)",
        "`inputs` reads the teacher's own embedding at image tokens",
        ("tests/test_sharing_inputs.py",),
    ),
    # ---- cost.py
    Fault(
        "tiles-as-one",
        "labs/plan/cost.py",
        "min(patches, model.tile_patches or patches)",
        "patches",
        "a vision tower's attention is counted over all tiles as one sequence",
        ("tests/test_plan.py::test_the_work_of_a_tower_is_that_of_its_tiles",),
    ),
)
