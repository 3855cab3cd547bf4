"""`python -m hf_lingudistill` is the command `lingudistill`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
