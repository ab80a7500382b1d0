"""``KPIG_LOG=1``: a line on standard error the first time that an operator takes a path, with the reason."""

import os
import sys
from functools import cache


@cache
def took(operator: str, path: str, why: str) -> None:
    """Say once that ``operator`` runs in ``path``, and why."""
    if os.environ.get("KPIG_LOG") == "1":
        print(f"kpig_fast: {operator} by {path}: {why}", file=sys.stderr, flush=True)
