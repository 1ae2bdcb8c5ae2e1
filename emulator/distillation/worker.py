"""One of the processes of ``offsite distill --launch N``: run the verb, and leave the main one's outcome in a file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from emulator.distillation.config import DistillConfig
from emulator.distillation.distill import run
from offsite.config import build
from offsite.errors import OffsiteError


def main(arguments: list[str]) -> int:
    """Run the verb as one of several processes. Returns the exit code; the main process writes the outcome."""
    settings, outcome = map(Path, arguments)
    try:
        found: dict[str, object] = {"figures": run(build(DistillConfig, file=settings))}
        code = 0
    except OffsiteError as error:
        found = {"error": {"kind": type(error).__name__, "message": str(error), "hint": error.hint}}
        code = error.exit_code
    if os.environ.get("RANK") == "0":
        outcome.write_text(json.dumps(found), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
