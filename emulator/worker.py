"""One verb in several processes: hand the settings over, run the verb in each, bring the outcome back.

The main process of the launched ones leaves its outcome, figures or error, in a file for the one that launched it:
standard output stays free for the verb's single line.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from emulator.config import DistillConfig
from offsite import errors
from offsite.config import build
from offsite.errors import OffsiteError, RunFailed


def in_processes(config: DistillConfig) -> dict[str, object]:
    """Run ``offsite distill`` in ``config.launch`` processes and return the main one's figures.

    Raises:
        OffsiteError: the one that the main process raised, or RunFailed when a process was killed.
    """
    from offsite.processes import launch

    with tempfile.TemporaryDirectory(prefix="offsite-distill-") as folder:
        settings, outcome = Path(folder) / "settings.json", Path(folder) / "outcome.json"
        settings.write_text(json.dumps(config.model_dump(mode="json", exclude_unset=True)), encoding="utf-8")
        code = launch(config.launch, [str(settings), str(outcome)], module="emulator.worker")
        found = json.loads(outcome.read_text(encoding="utf-8")) if outcome.is_file() else {}
    if "error" in found:
        raise _error(**found["error"])
    if code or "figures" not in found:
        raise RunFailed(f"one of {config.launch} processes ended with exit code {code}", hint="add --resume to go on")
    figures: dict[str, object] = found["figures"]
    return figures


def main(arguments: list[str]) -> int:
    """Run the verb as one of several processes. Returns the exit code; the main process writes the outcome."""
    settings, outcome = map(Path, arguments)
    try:
        from emulator.distill import run

        found: dict[str, object] = {"figures": run(build(DistillConfig, file=settings))}
        code = 0
    except OffsiteError as error:
        found = {"error": {"kind": type(error).__name__, "message": str(error), "hint": error.hint}}
        code = error.exit_code
    if os.environ.get("RANK") == "0":
        outcome.write_text(json.dumps(found), encoding="utf-8")
    return code


def _error(kind: str, message: str, hint: str | None) -> OffsiteError:
    cls = getattr(errors, kind, OffsiteError)
    return cls(message, hint=hint) if isinstance(cls, type) and issubclass(cls, OffsiteError) else RunFailed(message)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
