"""What a leak-tracing mark costs, what it survives, and how often it is seen where there is none.

Run as: ``python benchmarks/mark/run.py -o benchmarks/mark/results/NAME.json``; ``--show FILE`` prints its tables.
A package of the model is marked for three recipients; copies of it are tuned, disturbed and mixed, and traced.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import load_file, save_file

from benchmarks.record import environment, files
from emulator.distillation.config import DistillConfig
from emulator.distillation.distill import run as distill
from emulator.marking.leak import Comparison, compare
from emulator.marking.mark import KEY_NAME, MarkKey, carriers, mark, open_key
from offsite.artefacts.package import Package, open_package
from offsite.evaluation.measure import perplexity
from offsite.text.batches import Batches, Example, encode, pack, pad_id
from offsite.text.records import bundled, read_records
from offsite.training.devices import choose_device
from offsite.training.precision import uses_bf16

Tensors = dict[str, torch.Tensor]
ALICE, BOB, CAROL = RECIPIENTS = tuple("-".join([letter * 4] * 13) for letter in "abc")
CONTEXT, BATCH = 128, 4
CPU = choose_device("cpu")


class Bench:
    """The package, its three marked copies, and the texts."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self.given, self.folder = given, folder
        self.began = time.monotonic()
        distill(
            DistillConfig(
                model=given.model,
                public=bundled("public"),
                output=folder / "package",
                width=given.width,
                steps=0,
                calibration_tokens=8192,
                device="cpu",
            )
        )
        self.package = open_package(folder / "package")
        keys = folder / "keys"
        keys.mkdir(mode=0o700)
        (keys / KEY_NAME).touch(mode=0o600)
        (keys / KEY_NAME).write_bytes(hashlib.sha256(f"benchmarks/mark {given.seed}".encode()).digest())
        self.key = open_key(keys, create=False)
        self.marked = [
            mark(self.package, folder / name, recipient=recipient, keys=keys)
            for name, recipient in zip(("alice", "bob", "carol"), RECIPIENTS, strict=True)
        ]
        tokenizer = self.package.load_tokenizer()
        self.pad = pad_id(tokenizer)
        self.public = self._blocks("public", tokenizer)
        self.heldout = self._blocks("heldout", tokenizer)[: given.evaluation_tokens // CONTEXT]
        self.names = carriers(self.package)

    def _blocks(self, name: str, tokenizer: Any) -> list[Example]:
        encoded = encode(read_records(bundled(name)), tokenizer, context=CONTEXT, whole_text=True)
        return pack(encoded.examples, block_tokens=CONTEXT)

    def middle(self, package: Package) -> Tensors:
        """Return the package's tensors that carry marks."""
        tensors = load_file(package.path / "model.safetensors")
        return {name: tensors[name] for name in self.names}

    def loss(self, tensors: Tensors) -> float:
        """Return the held-out loss in nats per token of the package with these tensors in its middle."""
        model = self.package.load_model()
        model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)
        precision = "bf16" if uses_bf16("auto", CPU) else "fp32"
        return perplexity(model, self.heldout, batch_size=8, pad_id=self.pad, precision=precision).loss

    def traced(
        self, tensors: Tensors, recipients: tuple[str, ...] = RECIPIENTS, key: MarkKey | None = None
    ) -> Comparison:
        """Return what tracing says of a checkpoint with these tensors, stored in their dtype."""
        with tempfile.TemporaryDirectory(dir=self.folder) as suspect:
            save_file(tensors, Path(suspect) / "model.safetensors")
            return compare(self.package, Path(suspect), key or self.key, recipients)

    def tuned(self, package: Package, stops: list[int], seed: int) -> Iterator[tuple[int, Tensors]]:
        """Tune every weight on public text and yield the middle in bfloat16 after each number of steps."""
        model = package.load_model().train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=self.given.learning_rate, weight_decay=0.0, fused=True)
        batches = Batches(self.public, batch_size=BATCH, seed=seed, pad_id=self.pad)
        bf16 = uses_bf16("auto", CPU)
        for step in range(max(stops) + 1):
            if step in stops:
                state = model.state_dict()
                yield step, {name: state[name].detach().to(torch.bfloat16) for name in self.names}
            if step == max(stops):
                return
            batch = batches.batch(step)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(**batch, use_cache=False).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()

    def say(self, text: str) -> None:
        """Show how far the work is."""
        print(f"{time.monotonic() - self.began:7.0f} s  {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Measure everything and write the result."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--width", type=float, default=0.33)
    options.add_argument("--learning-rate", type=float, default=1e-4)
    options.add_argument("--tokens", type=int, nargs="*", default=[0, 10_000, 50_000])
    options.add_argument("--controls", type=int, default=20)
    options.add_argument("--control-steps", type=int, default=3)
    options.add_argument("--wrong-recipients", type=int, default=1000)
    options.add_argument("--wrong-keys", type=int, default=20)
    options.add_argument("--evaluation-tokens", type=int, default=8192)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("-o", "--out", type=Path, default=None)
    options.add_argument("--show", type=Path, default=None)
    given = options.parse_args()
    if given.show:
        _tables(json.loads(given.show.read_text(encoding="utf-8")))
        return
    torch.manual_seed(given.seed)
    where = environment()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(given, Path(folder))
        result = {
            "benchmark": "mark",
            **where,
            "config": {key: value for key, value in vars(given).items() if key not in {"out", "show", "seed"}},
            "seed": given.seed,
            "files": files(public=bundled("public"), heldout=bundled("heldout")),
            "base_digest": bench.package.manifest.base_digest,
            "package_digest": bench.package.digest,
            "marked_digests": [package.digest for package in bench.marked],
            "precision": "bf16" if uses_bf16("auto", CPU) else "fp32",
            "threads": torch.get_num_threads(),
            **_measured(bench),
            "seconds": round(time.monotonic() - bench.began),
        }
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    _tables(result)


def _measured(bench: Bench) -> dict[str, Any]:
    plain = bench.middle(bench.package)
    copies = [bench.middle(package) for package in bench.marked]
    base = bench.loss(plain)
    bench.say(f"unmarked: loss {base:.4f}")
    quality = [{"recipient": one, "loss": bench.loss(copy)} for one, copy in zip(RECIPIENTS, copies, strict=True)]
    tuned, last = [], copies[0]
    stops = {round(tokens / (BATCH * CONTEXT)): tokens for tokens in bench.given.tokens}
    for step, tensors in bench.tuned(bench.marked[0], sorted(stops), bench.given.seed):
        last = tensors
        found = _row(bench.traced(tensors))
        tuned.append({"steps": step, "tokens": step * BATCH * CONTEXT, "loss": bench.loss(tensors), **found})
        bench.say(f"tuned {tuned[-1]}")
    changed = []
    for name, tensors, measured in _changed(bench, copies, last):
        found = _row(bench.traced(tensors))
        changed.append({"change": name, "loss": bench.loss(tensors) if measured else None, **found})
        bench.say(f"{changed[-1]}")
    return {
        "loss_unmarked": base,
        "quality": quality,
        "tuned": tuned,
        "changed": changed,
        "controls": _controls(bench, plain),
        "wrong_recipients": _wrong_recipients(bench, last),
        "wrong_keys": _wrong_keys(bench, last),
    }


def _row(found: Comparison) -> dict[str, Any]:
    return {
        "z": [round(found.scores[one].z, 2) for one in RECIPIENTS],
        "z_owner": round(found.owner.z, 2),
        "found": [one[0] for one in found.found],
        "owner_found": found.owner_found,
        "cosine": round(found.cosine, 4),
        "places": found.num_places,
    }


def _changed(bench: Bench, copies: list[Tensors], tuned: Tensors) -> Iterator[tuple[str, Tensors, bool]]:
    """Yield what was done to the copies of the first two or three recipients, and whether quality is of interest."""
    alice, bob, carol = copies

    def each(change: Callable[..., torch.Tensor], *sources: Tensors) -> Tensors:
        return {name: change(*(one[name].float() for one in sources)).to(torch.bfloat16) for name in bench.names}

    generator = torch.Generator().manual_seed(bench.given.seed)
    for relative in (0.03, 0.1, 0.3):
        noise = lambda w, r=relative: w + torch.randn(w.shape, generator=generator) * w.std() * r  # noqa: E731
        yield f"noise of {relative:g} of the weights' spread", each(noise, alice), True
    for bits in (8, 4):
        yield f"rounded to {bits} bits a row", each(lambda w, b=bits: _rounded(w, b), alice), True
    for share in (0.5,):
        yield f"smallest {share:.0%} set to zero", each(lambda w, s=share: _pruned(w, s), alice), True
    yield "MLP channels in another order, scale and sign", _shuffled(alice, generator), False
    yield "average of two copies", each(lambda a, b: (a + b) / 2, alice, bob), False
    yield "average of two copies, one tuned", each(lambda a, b: (a + b) / 2, tuned, bob), False
    coin = lambda a, b: torch.where(torch.rand(a.shape, generator=generator) < 0.5, a, b)  # noqa: E731
    yield "each weight from one of two copies", each(coin, alice, bob), False
    yield "average of three copies", each(lambda a, b, c: (a + b + c) / 3, alice, bob, carol), False
    sort = lambda *w: torch.stack(w).sort(dim=0).values  # noqa: E731
    yield "majority of three copies", each(lambda *w: sort(*w)[1], alice, bob, carol), False
    minority = lambda *w: sort(*w)[0] + sort(*w)[2] - sort(*w)[1]  # noqa: E731
    yield "minority of three copies", each(minority, alice, bob, carol), False


def _rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    scale = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (weight / scale).round() * scale


def _pruned(weight: torch.Tensor, share: float) -> torch.Tensor:
    limit = weight.abs().flatten().kthvalue(int(share * weight.numel())).values
    return torch.where(weight.abs() > limit, weight, 0.0)


def _shuffled(tensors: Tensors, generator: torch.Generator) -> Tensors:
    """Return the same function: channels of each MLP in another order, scaled and turned here and back there."""
    out = dict(tensors)
    for name in tensors:
        if name.endswith("up_proj.weight"):
            order = torch.randperm(len(tensors[name]), generator=generator)
            scale = 2 ** torch.randn(len(order), generator=generator)
            scale *= torch.randn(len(order), generator=generator).sign()
            gate, down = name.replace("up_proj", "gate_proj"), name.replace("up_proj", "down_proj")
            out[name] = (tensors[name].float()[order] * scale[:, None]).to(torch.bfloat16)
            out[gate] = tensors[gate][order].contiguous()
            out[down] = (tensors[down].float()[:, order] / scale).to(torch.bfloat16)
    return out


def _controls(bench: Bench, plain: Tensors) -> dict[str, Any]:
    """Trace what was never marked: the package tuned on other orders of text, and with noise."""
    scores, false = [], 0
    for seed in range(bench.given.controls):
        (_, tensors), *_ = bench.tuned(bench.package, [bench.given.control_steps], 1000 + seed)
        generator = torch.Generator().manual_seed(seed)
        size = 10 ** (-3 + 2 * seed / max(bench.given.controls - 1, 1))
        noisy = {
            n: (w + torch.randn(w.shape, generator=generator) * w.float().std() * size).bfloat16()
            for n, w in plain.items()
        }
        for kind, suspect in (("tuned", tensors), ("noise", noisy)):
            found = bench.traced(suspect)
            false += bool(found.found or found.owner_found)
            scores.append({"kind": kind, "seed": seed, **_row(found)})
        bench.say(f"control {seed}: {scores[-2]['z']} {scores[-1]['z']}")
    z = [value for row in scores for value in (*row["z"], row["z_owner"])]
    return {"num_suspects": len(scores), "num_found": false, **_spread(z), "rows": scores}


def _wrong_recipients(bench: Bench, suspect: Tensors) -> dict[str, Any]:
    """Look in the tuned copy for recipients who never got one."""
    letters = "abcdefghijklmnopqrstuvwxyz234567"
    quads = [
        "".join(letters[number >> 5 * i & 31] for i in range(4)) for number in range(bench.given.wrong_recipients + 99)
    ]
    named = tuple("-".join(["zzzz", *[quad] * 12]) for quad in quads[: bench.given.wrong_recipients])
    found = bench.traced(suspect, named)
    bench.say(f"{len(named)} wrong recipients")
    return {"num_found": len(found.found), **_spread([score.z for score in found.scores.values()])}


def _wrong_keys(bench: Bench, suspect: Tensors) -> dict[str, Any]:
    """Look in the tuned copy with the keys of other owners, for its recipient and for any."""
    z, false = [], 0
    for number in range(bench.given.wrong_keys):
        key = MarkKey(hashlib.sha256(f"another owner {number}".encode()).digest())
        found = bench.traced(suspect, (ALICE,), key)
        false += bool(found.found or found.owner_found)
        z += [found.scores[ALICE].z, found.owner.z]
    bench.say(f"{bench.given.wrong_keys} wrong keys")
    return {"num_found": false, **_spread(z)}


def _spread(z: list[float]) -> dict[str, Any]:
    return {
        "num_scores": len(z),
        "mean": round(mean(z), 4),
        "deviation": round(pstdev(z), 4),
        "largest": round(max(z), 3),
        "smallest": round(min(z), 3),
        "share_above_2": sum(value > 2 for value in z) / len(z),
        "share_above_3": sum(value > 3 for value in z) / len(z),
        "kolmogorov_smirnov": round(_distance(sorted(z)), 4),
    }


def _distance(ordered: list[float]) -> float:
    """Return the largest distance of the scores' distribution from the standard normal one."""
    normal = [0.5 * math.erfc(-value / math.sqrt(2)) for value in ordered]
    return max(max(abs(i / len(ordered) - p), abs((i + 1) / len(ordered) - p)) for i, p in enumerate(normal))


def _tables(result: dict[str, Any]) -> None:
    base = result["loss_unmarked"]
    print("| package | perplexity | against the unmarked |\n| --- | --- | --- |")
    print(f"| unmarked | {math.exp(base):.2f} | |")
    for row in result["quality"]:
        more = math.expm1(row["loss"] - base)
        print(f"| marked for {row['recipient'][0]} | {math.exp(row['loss']):.2f} | {more:+.2%} |")
    print("\n| a's copy, or several | perplexity | z of a | z of b | z of c | owner's z | found |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in [*result["tuned"], *result["changed"]]:
        name = row.get("change") or f"tuned on {row['tokens']:,} tokens"
        shown = "" if row["loss"] is None else f"{math.exp(row['loss']):.1f}"
        z = " | ".join(f"{value:.1f}" for value in [*row["z"], row["z_owner"]])
        print(
            f"| {name} | {shown} | {z} | {', '.join(row['found']) or ('somebody' if row['owner_found'] else 'none')} |"
        )
    print("\n| no mark to find | scores | mean | deviation | largest | above 2 (normal: 2.3%) | found |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    controls = result["controls"]
    rows = [
        (f"{controls['num_suspects']} unmarked suspects", controls),
        ("wrong recipients, tuned copy", result["wrong_recipients"]),
        ("wrong owners' keys, tuned copy", result["wrong_keys"]),
    ]
    for name, row in rows:
        figures = f"{row['num_scores']} | {row['mean']:.3f} | {row['deviation']:.3f} | {row['largest']:.2f}"
        print(f"| {name} | {figures} | {row['share_above_2']:.1%} | {row['num_found']} |")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
