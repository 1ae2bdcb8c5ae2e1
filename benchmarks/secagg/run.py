"""What a round of secure aggregation costs a client and the owner, in CPU time and bytes, with a tenth dropping out.

Run as: ``python benchmarks/secagg/run.py -o benchmarks/secagg/results/NAME.json``; ``--show FILE`` prints its tables.
One process plays every part, one after another; each call of a client and of the owner is timed by itself.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from benchmarks.record import environment
from client.federation.secagg import ClientRound
from offsite.keys.identity import Identity, generate
from offsite.secagg.fixedpoint import TensorShape
from offsite.secagg.terms import Terms, make_terms
from offsite.strictjson import write_compact
from server.aggregation.secagg import ServerRound

STEPS = ("advertise", "share", "mask", "confirm", "reveal")
LIMIT = 1.0


def main() -> None:
    """Measure every size and write the result."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--clients", type=int, nargs="*", default=[4, 16, 64])
    options.add_argument("--numbers", type=int, nargs="*", default=[115_000, 1_000_000])
    options.add_argument("--bits", type=int, default=32)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("-o", "--out", type=Path, default=None)
    options.add_argument("--show", type=Path, default=None)
    given = options.parse_args()
    if given.show:
        _tables(json.loads(given.show.read_text()))
        return
    torch.set_num_threads(1)
    record = environment()
    record["versions"]["cryptography"] = version("cryptography")
    began = time.monotonic()
    parties = [generate(f"client {number}", days=1) for number in range(max(given.clients))]
    rounds = []
    for num_clients in given.clients:
        for num_numbers in given.numbers:
            rounds.append(_round(parties[:num_clients], num_numbers, given))
            print(f"{time.monotonic() - began:6.0f} s  {num_clients} clients, {num_numbers:,} numbers", file=sys.stderr)
    result = {
        **record,
        "config": {"clients": given.clients, "numbers": given.numbers, "bits": given.bits, "limit": LIMIT},
        "seed": given.seed,
        "cpu_count": os.cpu_count(),
        "load_average": list(os.getloadavg()),
        "seconds": round(time.monotonic() - began, 1),
        "rounds": rounds,
    }
    text = json.dumps(result, indent=1)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text + "\n")
    _tables(result)
    print(json.dumps({"out": str(given.out) if given.out else None, "seconds": result["seconds"]}))


def _round(parties: list[Identity], num_numbers: int, given: argparse.Namespace) -> dict[str, Any]:
    """Run one round; a tenth of the clients, at least one, answer no more once they have shared their secrets."""
    num, num_lost = len(parties), math.ceil(len(parties) / 10)
    cards = {party.public.fingerprint: party.public for party in parties}
    terms = make_terms(
        federation="benchmark",
        round=1,
        members=list(cards),
        threshold=2 * num // 3 + 1,
        limit=LIMIT,
        bits=given.bits,
        shapes=[TensorShape(name="update", shape=(num_numbers,))],
    )
    clients = {party.public.fingerprint: ClientRound(terms, party, cards, last_round=0) for party in parties}
    owner, lost = ServerRound(terms, cards), set(terms.members[:num_lost])
    generator = torch.Generator().manual_seed(given.seed)
    expected = torch.zeros(num_numbers, dtype=torch.float64)
    inbox = dict.fromkeys(terms.members, b"")
    stages = {}
    for step in STEPS:
        seconds, sent, received, taken = [], [], [], []
        for name, raw in inbox.items():
            if step == "mask" and name in lost:
                continue
            words: tuple[Any, ...] = (raw,) if step != "advertise" else ()
            if step == "mask":
                update = torch.randn(num_numbers, generator=generator).clamp(-4, 4) * LIMIT / 4
                expected += update
                words = (raw, {"update": update})
            reply = _timed(seconds, getattr(clients[name], step), *words)
            _timed(taken, owner.take, reply)
            sent.append(len(reply))
            received.append(len(raw))
        closing: list[float] = []
        inbox = _timed(closing, owner.close)
        stages[step] = _figures(seconds, sent, received, sum(taken) + closing[0])
    _check(owner, expected, terms)
    return {
        "num_clients": num,
        "num_lost": num_lost,
        "threshold": terms.threshold,
        "num_numbers": num_numbers,
        "terms_bytes": len(write_compact(terms)),
        "plain_float32_bytes": 4 * num_numbers,
        "largest_error": float((owner.total().tensors["update"] - expected).abs().max()),
        "error_bound": (num - num_lost) * terms.encoding.step / 2,
        "stages": stages,
        "client": {
            key: round(sum(stage["client"][key] for stage in stages.values()), 4) for key in stages["mask"]["client"]
        },
        "owner_cpu_seconds": round(sum(stage["owner_cpu_seconds"] for stage in stages.values()), 4),
    }


def _timed(seconds: list[float], call: Callable[..., Any], *words: Any) -> Any:
    began = time.process_time()
    found = call(*words)
    seconds.append(time.process_time() - began)
    return found


def _figures(seconds: list[float], sent: list[int], received: list[int], owner: float) -> dict[str, Any]:
    return {
        "client": {
            "cpu_seconds_median": round(median(seconds), 4),
            "cpu_seconds_most": round(max(seconds), 4),
            "sent_bytes": max(sent),
            "received_bytes": max(received),
        },
        "num_answers": len(seconds),
        "owner_cpu_seconds": round(owner, 4),
    }


def _check(owner: ServerRound, expected: torch.Tensor, terms: Terms) -> None:
    """A benchmark of a wrong sum would be worth nothing."""
    total = owner.total()
    bound = len(total.contributors) * terms.encoding.step / 2 + 1e-12
    if not np.all(np.abs(total.tensors["update"].numpy() - expected.numpy()) <= bound):
        raise SystemExit("the sum is wrong")


def _tables(result: dict[str, Any]) -> None:
    print("| clients (lost) | threshold | numbers | client CPU s | owner CPU s | client sends | client receives |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in result["rounds"]:
        client = row["client"]
        more = client["sent_bytes"] / row["plain_float32_bytes"]
        print(
            f"| {row['num_clients']} ({row['num_lost']}) | {row['threshold']} | {row['num_numbers']:,} "
            f"| {client['cpu_seconds_median']:.3f} | {row['owner_cpu_seconds']:.2f} "
            f"| {client['sent_bytes'] / 1e6:.3f} MB ({more:.2f} x float32) | {client['received_bytes'] / 1e6:.3f} MB |"
        )
    print("\n| clients | numbers | " + " | ".join(f"{step}: client, owner" for step in STEPS) + " |")
    print("| --- | --- |" + " --- |" * len(STEPS))
    for row in result["rounds"]:
        cells = [
            f"{stage['client']['cpu_seconds_median']:.3f}, {stage['owner_cpu_seconds']:.3f}"
            for stage in (row["stages"][step] for step in STEPS)
        ]
        print(f"| {row['num_clients']} | {row['num_numbers']:,} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
