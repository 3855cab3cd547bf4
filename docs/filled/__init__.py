"""The blocks that `docs/fill_readme.py` fills: one function each, from a result file or the code."""
