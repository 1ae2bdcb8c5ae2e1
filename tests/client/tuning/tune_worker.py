"""``offsite tune`` as one of several processes that writes down how it holds the model; see `test_kill.py`.

Usage, under torchrun: python tune_worker.py FACTS_FOLDER WORD...
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import client.tuning.tune as module
from offsite import cli

SEEN: dict[str, object] = {}


def seeing(model, batch):
    if not SEEN:
        parameters = dict(model.named_parameters())
        held = {name: getattr(p, "to_local", lambda p=p: p)().numel() for name, p in parameters.items()}
        SEEN["types"] = sorted({type(p.data).__name__ for p in parameters.values()})
        SEEN["share"] = sum(held.values()) / sum(p.numel() for p in parameters.values())
        SEEN["trained_share"] = sum(held[n] for n, p in parameters.items() if p.requires_grad) / sum(
            p.numel() for p in parameters.values() if p.requires_grad
        )
        SEEN["rows"] = len(batch["input_ids"])
    return loss(model, batch)


if __name__ == "__main__":
    loss, module.next_token_loss = module.next_token_loss, seeing
    code = cli.run(sys.argv[2:])
    (Path(sys.argv[1]) / f"facts-{os.environ['RANK']}.json").write_text(json.dumps(SEEN))
    sys.exit(code)
