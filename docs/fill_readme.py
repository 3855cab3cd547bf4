"""Fill the figures of the README, the docs and the recipe from result files and from the code, so that no number is typed.

    python docs/fill_readme.py            # rewrite them: a part of `make results`
    python docs/fill_readme.py --check    # exit 1 if one is stale

Blocks look like `<!-- results:NAME -->` ... `<!-- /results -->`; NAME is a function of a module in filled/.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from filled import arms, costs, findings, package, plans  # noqa: E402
from filled.files import RECIPE, ROOT  # noqa: E402

FILLED = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), RECIPE / "README.md")
MODULES = (package, costs, plans, arms, findings)


def fill(text: str) -> str:
    """A text with every block rendered anew.

    Raises:
        KeyError: see `block`.
    """
    pattern = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- /results -->)", re.DOTALL)
    return pattern.sub(lambda match: match[1] + block(match[2]) + "\n" + match[3], text)


def block(name: str) -> str:
    """The text of a block. Raises KeyError if no module of filled/ has a function of its name."""
    for module in MODULES:
        if name in vars(module):
            return str(vars(module)[name]())
    raise KeyError(f"No function {name!r} in docs/filled/: a block needs one of its name.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = 0
    for path in FILLED:
        text = path.read_text(encoding="utf-8")
        filled = fill(text)
        if args.check and filled != text:
            print(f"{path.relative_to(ROOT)} is stale: run `make results`.", file=sys.stderr)
            stale = 1
        elif not args.check:
            path.write_text(filled, encoding="utf-8")
    return stale


if __name__ == "__main__":
    sys.exit(main())
