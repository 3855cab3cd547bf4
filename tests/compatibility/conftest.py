"""What every test of a pair needs."""

from __future__ import annotations

import pytest
from pairs import VOCAB, Tokenizers
from tokenizers_for_tests import word_tokenizer


@pytest.fixture(scope="session")
def tokenizers() -> Tokenizers:
    """A pair as the parameters of `check_compatibility`: the student's has the image token on top."""
    return {
        "student_tokenizer": word_tokenizer(VOCAB, extra=("<image>",)),
        "teacher_tokenizer": word_tokenizer(VOCAB),
    }
