"""``offsite distill --launch N``: hand the settings to N processes, bring the main one's outcome back.

Each runs ``emulator/distillation/worker.py``. The main one leaves its outcome, figures or error, in a file: standard
output stays free for the verb's single line.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from emulator.distillation.config import DistillConfig
from offsite import errors
from offsite.errors import OffsiteError, RunFailed
from offsite.training.processes import launch

WORKER = "emulator.distillation.worker"


def in_processes(config: DistillConfig) -> dict[str, object]:
    """Run ``offsite distill`` in ``config.launch`` processes and return the main one's figures.

    Raises:
        OffsiteError: the one that the main process raised, or RunFailed when a process was killed.
    """
    with tempfile.TemporaryDirectory(prefix="offsite-distill-") as folder:
        settings, outcome = Path(folder) / "settings.json", Path(folder) / "outcome.json"
        settings.write_text(json.dumps(config.model_dump(mode="json", exclude_unset=True)), encoding="utf-8")
        code = launch(config.launch, [str(settings), str(outcome)], module=WORKER)
        found = json.loads(outcome.read_text(encoding="utf-8")) if outcome.is_file() else {}
    if "error" in found:
        raise _error(**found["error"])
    if code or "figures" not in found:
        raise RunFailed(f"one of {config.launch} processes ended with exit code {code}", hint="add --resume to go on")
    figures: dict[str, object] = found["figures"]
    return figures


def _error(kind: str, message: str, hint: str | None) -> OffsiteError:
    cls = getattr(errors, kind, OffsiteError)
    return cls(message, hint=hint) if isinstance(cls, type) and issubclass(cls, OffsiteError) else RunFailed(message)
