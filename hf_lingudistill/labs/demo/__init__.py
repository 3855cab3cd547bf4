"""The embedded demo: a language model, a VLM made from it, and the data for both, all made on the spot from what pip installs.

`text` and `vqa` read the data, `models` makes the models, `measure` scores them. Nothing here needs the Hub.
"""

from __future__ import annotations

from .run import recipe, run_demo

__all__ = ["recipe", "run_demo"]
