"""`blend`: between two VLMs of one build, the weights that keep what is asked and have the most language."""

from .condition import Condition, parse_condition
from .run import blend
from .weights import SHARES, Blend, NotBlendable

__all__ = ["SHARES", "Blend", "Condition", "NotBlendable", "blend", "parse_condition"]
