"""YAML that a user wrote: a key that stands twice is an error, where PyYAML takes the last without a word."""

from __future__ import annotations

from typing import Any

import yaml


def read_yaml(text: str) -> Any:
    """`yaml.safe_load`, but for keys that stand twice.

    Raises:
        yaml.YAMLError: for text that is no YAML, or a mapping that has a key twice.
    """
    return yaml.load(text, _Loader)  # a safe loader


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> Any:
        """Before `<<` merges what a mapping may well have twice."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line, name = key.start_mark.line + 1, (key.tag, key.value)
            if name in lines:
                raise yaml.YAMLError(
                    f"the key {key.value!r} stands twice, in lines {lines[name]} and {line}: keep one."
                )
            lines[name] = line
        return node
