"""Rows: read, brought into one shape, collated, mixed."""

from __future__ import annotations

from .fault import DATA, FAMILIES, FEATURES, FORMATS, Fault

FAULTS = (
    # ---- rgb.py, images.py, batch.py, conversations.py, turns.py, formats.py, mixtures.py
    Fault(
        "exif-ignored",
        "rgb.py",
        "image = ImageOps.exif_transpose(image)",
        "image = image.copy()",
        "photographs lie on their side",
        (f"{DATA}::test_exif_rotation_is_applied",),
    ),
    Fault(
        "transparent-on-black",
        "rgb.py",
        'PILImage.new("RGBA", image.size, (255, 255, 255, 255))',
        'PILImage.new("RGBA", image.size, (0, 0, 0, 255))',
        "what is transparent becomes black",
        (f"{FORMATS}::test_pixels_are_those_of_plain_sft",),
    ),
    Fault(
        "url-safe-base64",
        "images.py",
        '.translate(str.maketrans("-_", "+/"))',
        "",
        "URL-safe base64 is not read",
        (f"{FORMATS}::test_an_image_may_be_stored_in_many_ways",),
    ),
    Fault(
        "flags-ignored",
        "batch.py",
        "distill = torch.tensor([flag_of(row, self.distill_column) for row in rows])",
        "distill = torch.tensor([flag_of(row, self.distill_column) or True for row in rows])",
        "every row is distilled whatever its flag",
        (f"{DATA}::test_the_batch_carries_the_flag_of_each_row",),
    ),
    Fault(
        "image-cut",
        "batch.py",
        "if image >= limit:",
        "if image > limit:",
        "truncation takes the last token of an image",
        (f"{DATA}::test_the_length_that_is_told_is_enough_and_one_less_is_not",),
    ),
    Fault(
        "answer-seen",
        "batch.py",
        '((batch["labels"] != -100).cumsum(dim=1) > 0).long()',
        '((batch["labels"] != -100).cumsum(dim=1) > 99).long()',
        "a prefix LM sees the answer that it is to predict",
        (f"{FAMILIES}::test_the_collator_keeps_answers_from_being_seen_before_they_are_predicted",),
    ),
    Fault(
        "user-labelled",
        "conversations.py",
        "labels[~torch.tensor(trained, dtype=torch.bool)] = -100",
        "labels[~torch.tensor(trained, dtype=torch.bool)] += 0",
        "the user's turns are trained on",
        (f"{FEATURES}::test_conversations_are_trained_where_the_config_says",),
    ),
    Fault(
        "prompt-labelled",
        "conversations.py",
        '"labels": [-100] * start + ids[start:]}',
        '"labels": list(ids)}',
        "prompts of rows of mixed types are trained on",
        (f"{FORMATS}::test_a_text_prompt_with_an_answer_in_turns_is_labelled_after_the_prompt",),
    ),
    Fault(
        "roles-mixed",
        "turns.py",
        '"gpt": "assistant",',
        '"gpt": "user",',
        "ShareGPT's answers are taken for questions",
        (f"{FORMATS}::test_a_conversation_in_any_form_is_the_same_batch",),
    ),
    Fault(
        "images-out-of-order",
        "formats.py",
        'images = [part["image"] if "image" in part else next(rest) for part in places]',
        "images = [*own, *rest]",
        "images of turns and of the column change places",
        (f"{FORMATS}::test_images_stand_in_the_order_of_their_places",),
    ),
    Fault(
        "source-flag-lost",
        "mixtures.py",
        "row[distill_column] if own_flag else flag is not False",
        "row[distill_column] if own_flag else True",
        "a source that is not to be distilled is",
        (f"{DATA}::test_every_row_gets_the_flag_of_its_source",),
    ),
    Fault(
        "fraction-of-the-largest",
        "mixtures.py",
        "total = min(len(part) / weight",
        "total = max(len(part) / weight",
        "shares of a mixture are not those asked for",
        (f"{DATA}::test_fractions_mean_what_they_mean_in_trl",),
    ),
)
