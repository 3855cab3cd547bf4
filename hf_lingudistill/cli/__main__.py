"""`python -m hf_lingudistill.cli` is the `lingudistill` command."""

from . import main

raise SystemExit(main())
