"""Command-line scripts, also reachable as `lingudistill <name>`."""
