"""What a classifier of images is worth in a vision encoder when it was tuned on the encoder's emulator.

Run as: ``python benchmarks/vision/run.py --config benchmarks/vision/digits.yaml --data FOLDER --work FOLDER --out JSON
--model FOLDER``. The rows are made here, into FOLDER of ``--data``: scikit-learn's digits, split at random, and pieces
of its two photographs as public images. What is done then is what ``benchmarks/classify/run.py`` does with texts.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.classify.run import Bench, table
from benchmarks.record import arguments, environment, files, write

ROLES = ("public", "train", "heldout")


def main() -> None:
    """Do what is not done, write the results and print the table."""
    given, plan, only = arguments(__doc__, only="packages to work on, by comma")
    wanted = [name for name in plan["packages"] if name != "whole" and (not only or name in only)]
    given.data.mkdir(parents=True, exist_ok=True)
    write_rows(given.data, plan)
    model = Path(plan["model"])
    plan["model"] = str(resized(model, given.work / f"model-{plan['pixels']}", plan["pixels"]))
    plan["tuning"]["block_tokens"] = 64  # of text; images are what they are
    bench = Bench({**plan, **{role: f"{role}.jsonl.gz" for role in ROLES}}, given.data, given.work)
    found = {name: bench.package(name) for name in wanted}
    result = {
        "benchmark": "vision", **environment(), "config": {**plan, "model": model.name},
        "data": files(**{role: given.data / f"{role}.jsonl.gz" for role in ROLES}),
        "labels": list(bench.labels), "packages": found, "seconds": bench.seconds(),
    }  # fmt: skip
    write(given.out, result)
    print(table(found))


def write_rows(folder: Path, plan: dict[str, Any]) -> None:
    """The three files of rows stand in the folder; the digits are shuffled by a fixed seed, and each is on one side."""
    import numpy
    from sklearn.datasets import load_digits, load_sample_images

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype("uint8")
    order = random.Random(0).sample(range(len(pixels)), len(pixels))
    rows = [{"image": encoded(pixels[number]), "label": str(digits.target[number])} for number in order]
    known, train, heldout = set[str](), list[dict[str, str]](), list[dict[str, str]]()
    for row in rows:
        if row["image"] in known:
            continue
        known.add(row["image"])
        side = train if len(train) < plan["num_train"] else heldout
        side.append(row)
    draw = random.Random(0)
    photographs = load_sample_images().images
    public = []
    for number in range(plan["num_public"]):
        whole, size = photographs[number % 2], draw.randrange(80, 240)
        top, left = (draw.randrange(whole.shape[axis] - size) for axis in (0, 1))
        public.append({"image": encoded(numpy.ascontiguousarray(whole[top : top + size, left : left + size]))})
    for role, found in zip(ROLES, (public, train, heldout[: plan["num_heldout"]]), strict=True):
        content = "".join(json.dumps(row) + "\n" for row in found).encode()
        (folder / f"{role}.jsonl.gz").write_bytes(gzip.compress(content, mtime=0))


def encoded(pixels: Any) -> str:
    """Return an image as base64 of a PNG."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def resized(model: Path, folder: Path, pixels: int) -> Path:
    """Return a folder of the model that reads images of so many pixels a side."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to((model / name).resolve())
    stated = json.loads((model / "preprocessor_config.json").read_text())
    stated |= {"size": {"shortest_edge": pixels}, "crop_size": {"height": pixels, "width": pixels}}
    (folder / "preprocessor_config.json").write_text(json.dumps(stated, indent=1) + "\n")
    return folder


if __name__ == "__main__":
    main()
