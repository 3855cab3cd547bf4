"""Checkpoints, resuming, and what is published."""

from __future__ import annotations

from .fault import FIDELITY, RESUMED, TRAINER, Fault

FAULTS = (
    # ---- checkpoints.py, resume.py, trainer.py
    Fault(
        "not-atomic",
        "checkpoints.py",
        "        yield str(staging)\n",
        "        yield run\n",
        "a checkpoint grows in its place",
        ("tests/test_checkpoints.py::test_folder_gets_its_name_when_it_is_whole",),
    ),
    Fault(
        "others-removed",
        "checkpoints.py",
        "own = [path for path in found if is_ours(run, path.name, by=BY)]",
        "own = list(found)",
        "checkpoints of another run are removed",
        ("tests/test_checkpoints.py::test_only_the_runs_own_checkpoints_are_removed",),
    ),
    Fault(
        "best-removed",
        "checkpoints.py",
        "protected = {*own[-1:], *([Path(best)] if best else [])}",
        "protected = {*own[-1:]}",
        "the best checkpoint is removed",
        ("tests/test_checkpoints.py::test_the_best_and_the_newest_stay_whatever_the_limit",),
    ),
    Fault(
        "cut-off-resumed",
        "checkpoints.py",
        'return f"its {file.name} is cut off"',
        "continue",
        "weights that were cut off are resumed from",
        ("tests/test_checkpoints.py::test_incomplete_checkpoint_is_not_resumed_from",),
    ),
    Fault(
        "another-folder",
        "checkpoints.py",
        "Path(wanted).resolve().parent == Path(run).resolve()",
        "bool(wanted)",
        "a run that resumes into another run's folder writes over it",
        ("tests/test_checkpoints.py::test_a_run_that_resumes_into_another_runs_folder_leaves_what_is_there",),
    ),
    Fault(
        "metrics-lost",
        "resume.py",
        '        self._metrics["train"].update(kept["metrics"])\n',
        "",
        "a resumed run logs half of what it measured",
        (RESUMED,),
    ),
    Fault(
        "sums-lost",
        "resume.py",
        '        self.meter.load(kept["meter"])\n',
        "",
        "a resumed run forgets its token sums",
        (RESUMED,),
    ),
    Fault(
        "weights-swapped",
        "trainer.py",
        "            cross_entropy=args.ce_weight,\n            divergence=args.distill_weight,",
        "            cross_entropy=args.distill_weight,\n            divergence=args.ce_weight,",
        "the weights of the two losses are exchanged",
        (f"{TRAINER}::test_weights_temperature_and_margin_mean_what_they_say",),
    ),
    Fault(
        "gate-always-on",
        "trainer.py",
        'margin=args.distill_margin if args.distill_tokens == "confident" else None',
        "margin=args.distill_margin",
        "`distill_tokens='all'` is gated",
        (f"{TRAINER}::test_loss_and_every_gradient_equal_plain_torch",),
    ),
    # ---- hub/run_facts.py, labs/evaluation/fidelity.py
    Fault(
        "token-published",
        "hub/run_facts.py",
        'field.name.startswith(("_", "hub_", "push_to_hub"))',
        'field.name.startswith(("_", "push_to_hub"))',
        "a token gets into the published recipe",
        ("tests/test_card.py::test_a_recipe_holds_what_was_chosen_and_no_token",),
    ),
    Fault(
        "folder-published",
        "hub/run_facts.py",
        'return Path(reference.replace("\\\\", "/")).expanduser().name or "local"',
        "return reference",
        "folders of the machine are published",
        ("tests/test_card.py::test_folders_are_known_by_their_last_part",),
    ),
    Fault(
        "fidelity-kl-direction",
        "labs/evaluation/fidelity.py",
        "kl = (inside.exp() * gap).sum(dim=-1).clamp(min=0)",
        "kl = (log_m[:, :size].exp() * -gap).sum(dim=-1).clamp(min=0)",
        "fidelity is the KL of the other direction",
        (f"{FIDELITY}::test_text_fidelity_is_that_of_a_plain_loop_whatever_the_padding",),
    ),
    Fault(
        "two-ends-of-turn",
        "labs/evaluation/fidelity.py",
        "merged = torch.logaddexp(log_m[:, end], log_m[:, other]) if shared[end] else log_m[:, other].clone()",
        "merged = log_m[:, end].clone()",
        "a model that ends its turns with another token is charged for it",
        (f"{FIDELITY}::test_the_two_ends_of_turn_are_one_event",),
    ),
    Fault(
        "dependence-one-sided",
        "labs/evaluation/fidelity.py",
        ".abs() > threshold).tolist()",
        " > threshold).tolist()",
        "tokens that the caption makes less likely do not count as dependent",
        (f"{FIDELITY}::test_tokens_that_the_caption_moves_are_told_from_the_rest",),
    ),
)
