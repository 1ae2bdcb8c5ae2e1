"""``python -m client.tuning.onerun``: one of several runs, in a process of its own (`client.tuning.sidebyside`).

One line of JSON on standard input says which; the input's end says that whoever started this is gone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

_INTERRUPTED = 130


def main() -> int:
    """Train the run that is asked for. Returns the exit code; an unexpected error propagates (it is a bug)."""
    signal.signal(signal.SIGINT, _end)
    try:
        return _trained(json.loads(sys.stdin.buffer.readline()))
    except KeyboardInterrupt:
        return _INTERRUPTED


def _trained(asked: dict[str, Any]) -> int:
    threading.Thread(target=_watch, daemon=True).start()
    import torch

    from client.tuning.config import TuneConfig
    from client.tuning.verb import train_one
    from offsite.errors import OffsiteError

    torch.set_num_threads(min(torch.get_num_threads(), asked["threads"]))
    try:
        train_one(TuneConfig.model_validate_json(asked["settings"]), asked["run"])
    except OffsiteError as error:
        print(json.dumps({"error": str(error), "hint": error.hint}), flush=True)
        return error.exit_code
    return 0


def _end(_number: int, _frame: FrameType | None) -> None:
    """End at once when asked to stop outside the steps, which have a handler of their own and a checkpoint to write.

    A KeyboardInterrupt is lost where the signal comes while an object is being finalised (Python goes on).
    """
    os._exit(_INTERRUPTED)


def _watch() -> None:
    """This process is gone once its input ends: what it was doing is as after any kill."""
    os.read(0, 1)  # past Python's own buffer, whose lock would still be held when the process ends
    os._exit(_INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
