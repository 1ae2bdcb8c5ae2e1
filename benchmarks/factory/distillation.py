"""How fast an emulator is distilled, with the full model run at every step and with what it gives kept, side by side.

    python benchmarks/factory/distillation.py --width 0.33 -o benchmarks/factory/results/NAME.json

A model of SmolLM2-135M's shape with random weights is distilled three times from the same start on the same text, for
the same steps: as before (*computed*), with the frozen bottom computed once for both models (*bottom*), and with what
the full model gives kept from the first epoch on (*kept*). Random weights are good for speed and for nothing else.
``--show FILE ...`` prints a table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.record import environment, write

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
ENDS = 2
WAYS = ("computed", "bottom", "kept")


def text_of(given: argparse.Namespace) -> Any:
    """Return random public text: rows of the same length, and one batch of it to choose channels on."""
    import torch

    from emulator.distillation.public import PublicText
    from offsite.text.batches import Batches, Example, collate

    drawn = torch.randint(SHAPE["vocab_size"], (given.rows, given.tokens), generator=torch.Generator().manual_seed(0))
    rows = [Example(row, row) for row in drawn.tolist()]
    batches = Batches(rows, batch_size=given.batch_size, seed=0, pad_id=0)
    return PublicText(batches, [collate(rows[:1], 0)], [batches.batch(0)], "sha256:random")


def distilled(way: str, given: argparse.Namespace, full: Any, plan: Any, text: Any, work: Path) -> dict[str, Any]:
    """Distil a fresh emulator in that way; return seconds, processor seconds and loss of every step."""
    from dataclasses import replace

    from emulator.compression.compress import Recipe, compress
    from emulator.distillation.imitation import distill
    from emulator.distillation.objective import Pair, Weights
    from offsite.training.config import LoopConfig

    if given.blocks:
        compressed = compress(full, plan, "drop", Recipe(blocks=given.blocks))
    else:
        recipe = Recipe(width=given.width, channels="activation", refit=False, calibration=text.calibration)
        compressed = compress(full, plan, "width", recipe)
    began: list[tuple[float, float]] = []
    chosen, batch = text.train.chosen, text.train.batch

    class Watched:
        num_steps_per_epoch = text.train.num_steps_per_epoch

        def chosen(self, step: int) -> Any:
            return chosen(step)

        def batch(self, step: int) -> Any:
            if work.exists():
                began.append((time.monotonic(), time.process_time()))
            return batch(step)

    share = Pair.share_bottom
    if way == "computed":
        Pair.share_bottom = lambda *_: False  # type: ignore[method-assign,assignment]
    try:
        watched = replace(text, train=Watched())
        loop = LoopConfig(steps=given.steps, learning_rate=1e-3, precision="fp32", checkpoint_every=given.steps)
        limit = 8 << 30 if way == "kept" else 0
        binding = {"full model": "random"}
        distill(full, compressed, plan, watched, loop, weights=Weights(), work=work, binding=binding, cache_bytes=limit)
    finally:
        Pair.share_bottom = share  # type: ignore[method-assign]
    log = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    kept = sum(file.stat().st_size for file in (work / "hidden").glob("*"))
    both = [(later[0] - one[0], later[1] - one[1]) for one, later in pairwise(began)]
    return {
        "seconds": [round(one, 3) for one, _ in both],  # of every step but the last, which is measured as well
        "processor_seconds": [round(one, 3) for _, one in both],
        "losses": [record["loss"] for record in log],
        "kept_bytes": kept,
    }


def speeds(found: dict[str, Any], given: argparse.Namespace, per_epoch: int) -> dict[str, float]:
    """Return tokens per processor second of the first epoch and of the others."""
    tokens = given.batch_size * given.tokens

    def speed(seconds: Sequence[float]) -> float:
        return round(tokens * len(seconds) / sum(seconds), 1)

    seconds = found["processor_seconds"]
    return {"first_epoch": speed(seconds[:per_epoch]), "later_epochs": speed(seconds[per_epoch:])}


def show(paths: Sequence[Path]) -> None:
    """Print the results as a table of a README."""
    print("| emulator | way | first epoch | later epochs | over *computed* | last loss | kept on disk |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for path in paths:
        one = json.loads(path.read_text(encoding="utf-8"))
        plain = one["ways"]["computed"]["tokens_per_processor_second"]
        for way, found in one["ways"].items():
            speed = found["tokens_per_processor_second"]
            ratios = [speed[name] / plain[name] for name in ("first_epoch", "later_epochs")]
            figures = [f"{speed['first_epoch']:,.0f}", f"{speed['later_epochs']:,.0f}"]
            figures += [" and ".join(f"{ratio:.2f}" for ratio in ratios), f"{found['losses'][-1]:.5f}"]
            figures += [f"{found['kept_bytes'] / 1e6:,.0f} MB"]
            print(f"| {one['config']['emulator']} | {way} | " + " | ".join(figures) + " |")


def main() -> None:
    """Measure one run and write the result."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--width", type=float, default=0.33)
    options.add_argument("--blocks", type=int, default=0, help="method drop instead, with so many blocks of the middle")
    options.add_argument("--rows", type=int, default=8)
    options.add_argument("--tokens", type=int, default=128)
    options.add_argument("--batch-size", type=int, default=4)
    options.add_argument("--epochs", type=int, default=3)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("-o", "--out", type=Path)
    options.add_argument("--show", type=Path, nargs="*")
    given = options.parse_args()
    if given.show:
        show(given.show)
        return
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from offsite.modelling.split import make_plan

    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    full = LlamaForCausalLM(LlamaConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2, **SHAPE)).eval()
    plan = make_plan(full, num_bottom=ENDS, num_top=ENDS)
    text = text_of(given)
    per_epoch = text.train.num_steps_per_epoch
    given.steps = given.epochs * per_epoch + 1
    ways: dict[str, Any] = {}
    folder = Path(tempfile.mkdtemp())
    try:
        for way in WAYS:
            found = distilled(way, given, full, plan, text, folder / way)
            ways[way] = {**found, "tokens_per_processor_second": speeds(found, given, per_epoch)}
            print(f"{way}: {ways[way]['tokens_per_processor_second']}", file=sys.stderr)
    finally:
        shutil.rmtree(folder)
    emulator = f"drop, {given.blocks} blocks" if given.blocks else f"width {given.width:g}"
    config = {"emulator": emulator, "shape": SHAPE, "ends": ENDS, "rows": given.rows, "tokens": given.tokens}
    config |= {"batch_size": given.batch_size, "steps": given.steps, "threads": given.threads}
    result = {"benchmark": "factory/distillation", **environment(), "config": config, "seed": 0, "ways": ways}
    if given.out:
        write(given.out, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
