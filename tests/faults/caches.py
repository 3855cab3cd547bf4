"""Answers that are computed once: what a row is known by, what is kept, what is taken for another's."""

from __future__ import annotations

from .fault import Fault

CACHES = "tests/test_caches.py"

FAULTS = (
    # ---- top_k.py
    Fault(
        "rest-left-out",
        "top_k.py",
        "    value += torch.where(rest > 0, rest * (kept.log_rest - q_rest.log()), 0.0)\n",
        "",
        "the tokens outside of the k count as nothing",
        (f"{CACHES}::test_k_tokens_and_the_rest_as_one_event_and_what_is_missing",),
    ),
    Fault(
        "rest-not-pulled",
        "top_k.py",
        "outside.mul_((1 - rest / q_rest)[:, None])",
        "outside.mul_((1 - rest / q_rest)[:, None] * 0)",
        "the tokens outside of the k have no gradient",
        (f"{CACHES}::test_k_tokens_and_the_rest_as_one_event_and_what_is_missing",),
    ),
    # ---- row_cache.py
    Fault(
        "row-without-pixels",
        "row_cache.py",
        "        found.update(image.tobytes())\n",
        "",
        "rows that differ in their pictures alone are taken for one",
        (f"{CACHES}::test_a_row_is_known_by_what_it_holds_wherever_it_stands",),
    ),
    Fault(
        "weights-by-name",
        "identity.py",
        '            found.update(tensor.to("cpu").contiguous().flatten().view(torch.uint8).numpy().data)\n',
        "",
        "a tuned model is taken for the one that it was",
        ("tests/test_identity.py::test_weights_are_known_by_every_bit",),
    ),
    Fault(
        "half-a-key",
        "row_cache.py",
        "if self._index[1][at] == second:",
        "if at >= 0:",
        "rows that share half of a key are taken for one",
        (f"{CACHES}::test_two_rows_of_one_half_key_are_two_rows",),
    ),
    Fault(
        "stale-cache-taken",
        "row_cache.py",
        "            if ours != theirs:\n",
        "            if ours != theirs and False:\n",
        "the answers of another model, or of other settings, are trained on",
        (f"{CACHES}::test_a_stale_cache_is_refused_in_a_sentence[k]",),
    ),
    # ---- cached.py
    Fault(
        "kept-where-live",
        "cached.py",
        "kept = still[plan.loss_rows]",
        "kept = still[plan.label_rows][: plan.num_loss] | True",
        "rows that the teacher is asked about live are looked for among those that were kept",
        (f"{CACHES}::test_a_teacher_that_reads_nothing_that_moves_is_asked_once[vision]",),
    ),
    Fault(
        "one-reading-for-two",
        "cache_mixin.py",
        '**({"reads twice": True} if args.blind_weight else {}),',
        "",
        "a cache of one reading is taken for one of two",
        ("tests/test_blind.py::test_cached_answers_are_both_readings",),
    ),
)
