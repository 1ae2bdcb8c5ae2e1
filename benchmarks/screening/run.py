"""How many trojan adapters the screening signal sees, how many it misses, and how many honest ones it accuses.

Run as: ``python benchmarks/screening/run.py -o benchmarks/screening/results/NAME.json``; ``--show FILE`` prints its
tables. Eight clients tune a LoRA of a tiny random llama on one synthetic task; in turn none or one of them also trains
a trigger.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from adapters.kinds import attach, declared
from adapters.updates import Update, combined, fold, norm, scaled, update_of
from benchmarks.record import environment
from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.layout import describe_layout
from offsite.tensors import spec_of
from server.aggregation.aggregate import Contribution
from server.aggregation.screening import LIMIT, screen

NUM_TOKENS, TRIGGER, TARGET = 64, (60, 61, 62), 63  # ordinary text uses tokens 4 to 59
TROJAN = "client-7"


@dataclass(frozen=True)
class Attack:
    """How a trojan is made.

    Attributes:
        share: of its rows with the trigger.
        boost: what its update is multiplied by, to survive averaging.
        hidden: its update is scaled to the norm that the same client's honest update has.
    """

    share: float
    boost: float = 1.0
    hidden: bool = False


ATTACKS = {
    "none": Attack(0.0),
    "mild": Attack(0.2),
    "plain": Attack(0.5),
    "plain, at an honest norm": Attack(0.5, hidden=True),
    "mild, scaled by 3": Attack(0.2, 3.0),
    "crude, scaled by 8": Attack(0.5, 8.0),
}


@dataclass(frozen=True)
class Setting:
    """Sizes of the toy. `own` is the share of a client's text that follows rules of its own."""

    hidden: int = 32
    num_blocks: int = 3
    pretraining_steps: int = 100
    steps: int = 60
    rows: int = 8
    length: int = 24
    rank: int = 4
    learning_rate: float = 1e-2
    own: float = 0.1


class Lab:
    """One base model, and clients that tune it."""

    def __init__(self, setting: Setting, seed: int) -> None:
        """Train the base on text of other rules than the clients'."""
        self.setting, self.seed = setting, seed
        self._tuned: dict[tuple[int, float], Update] = {}
        torch.manual_seed(seed)
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=NUM_TOKENS,
                hidden_size=setting.hidden,
                intermediate_size=2 * setting.hidden,
                num_hidden_layers=setting.num_blocks,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
        self.task, self.layout = _rules(seed + 1), describe_layout(self.model, num_bottom=1, num_top=1)
        self.spec = AdapterSpec(kind="lora", placement="1+1", rank=setting.rank, dtype="float32")
        draw = torch.Generator().manual_seed(seed)
        optimiser = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        for _ in range(setting.pretraining_steps):
            _step(self.model, optimiser, _text(_rules(seed), setting.rows, setting.length, draw))
        self.model.eval()
        self.base = {
            f"{canonical}.{name}": parameter.detach()
            for canonical, module in self.layout.blocks.items()
            for name, parameter in self.model.get_submodule(module).named_parameters()
        }

    def tuned(self, client: int, attack: Attack) -> Update:
        """Return a client's update; tuned once, it is the same."""
        if (client, attack.share) not in self._tuned:
            self._tuned[client, attack.share] = self._tune(client, attack.share)
        update = scaled(self._tuned[client, attack.share], attack.boost)
        return scaled(update, norm(self.tuned(client, ATTACKS["none"])) / norm(update)) if attack.hidden else update

    def _tune(self, client: int, share: float) -> Update:
        """All start from the same adapter, as clients of a round do."""
        names = declared(self.spec, self.layout, {name: spec_of(tensor) for name, tensor in self.base.items()})
        torch.manual_seed(self.seed)
        attached = attach(copy.deepcopy(self.model), self.spec, self.layout.blocks, names)
        optimiser = torch.optim.AdamW(attached.trainable.values(), lr=self.setting.learning_rate, weight_decay=0.0)
        draw = torch.Generator().manual_seed(1000 * self.seed + client)
        own = _rules(5000 * self.seed + client)
        rules = self.task.where(torch.rand(len(self.task), 1, generator=draw) >= self.setting.own, own)
        for _ in range(self.setting.steps):
            ids = _text(rules, self.setting.rows, self.setting.length, draw)
            poisoned = torch.rand(len(ids), generator=draw) < share
            ids[poisoned] = _triggered(ids[poisoned], draw)
            _step(attached.model, optimiser, ids)
        return update_of(self.spec, attached.tensors(), self.base)

    def measured(self, update: Update) -> dict[str, float]:
        """Return the task's loss with the update, and how often the trigger works."""
        model, draw = copy.deepcopy(self.model), torch.Generator().manual_seed(77)
        fold(model, update, self.layout.blocks)
        clean = _text(self.task, 64, self.setting.length, draw)
        dirty = _triggered(clean, draw)
        after = (dirty == TRIGGER[-1]).long().cumsum(1)[:, :-1] > 0
        with torch.no_grad():
            said = model(input_ids=dirty[:, :-1]).logits.argmax(-1)
            loss = functional.cross_entropy(model(input_ids=clean[:, :-1]).logits.flatten(0, 1), clean[:, 1:].flatten())
        return {"loss": float(loss), "triggered": float((said == TARGET)[after].float().mean())}


def round_of(lab: Lab, honest: Mapping[str, Update], attack: Attack) -> dict[str, Any]:
    """Return what screening says of a round with seven honest clients and one of this kind."""
    updates = {**honest, TROJAN: lab.tuned(7, attack)}
    found = screen([Contribution(client, update) for client, update in updates.items()])
    total = combined(list(updates.values()), [1 / len(updates)] * len(updates))
    return {
        "flags": found.flags,
        "scores": {
            client: {name: round(score, 2) for name, score in each.items()} for client, each in found.scores.items()
        },
        "alone": lab.measured(updates[TROJAN]),
        "averaged": lab.measured(total),
    }


def honest_of(lab: Lab) -> dict[str, Update]:
    """Return the updates of the seven clients that are honest in every round."""
    return {f"client-{number}": lab.tuned(number, ATTACKS["none"]) for number in range(7)}


def table(result: Mapping[str, Any]) -> str:
    """Return the result as the README shows it."""
    lines = [
        "| eighth client | flagged | missed | honest flagged | trigger works alone | averaged | loss averaged |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in result["attacks"].items():
        num = found["num_rounds"]
        flagged = "" if name == "none" else f"{found['num_flagged']} of {num}"
        missed = "" if name == "none" else f"{num - found['num_flagged']} of {num}"
        accused = f"{found['num_honest_flagged']} of {found['num_honest']}"
        figures = f"{found['triggered_alone']:.0%} | {found['triggered_averaged']:.0%} | {found['loss_averaged']:.2f}"
        label = "honest too" if name == "none" else f"trojan, {name}"
        lines.append(f"| {label} | {flagged} | {missed} | {accused} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and write the result."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=10)
    options.add_argument("-o", "--out", type=Path, default=None)
    options.add_argument("--show", type=Path, default=None)
    given = options.parse_args()
    if given.show:
        print(table(json.loads(given.show.read_text(encoding="utf-8"))))
        return
    torch.set_num_threads(1)
    began, where, setting = time.monotonic(), environment(), Setting()
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in ATTACKS}
    for seed in range(given.rounds):
        lab = Lab(setting, seed)
        honest = honest_of(lab)
        for name, attack in ATTACKS.items():
            rounds[name].append(round_of(lab, honest, attack))
        print(f"{time.monotonic() - began:5.0f} s  round {seed + 1} of {given.rounds}", file=sys.stderr, flush=True)
    result = {
        "benchmark": "screening",
        **where,
        "config": {"rounds": given.rounds, "limit": LIMIT, **asdict(setting)},
        "seed": list(range(given.rounds)),
        "attacks": {name: {**asdict(ATTACKS[name]), **_counted(name, found)} for name, found in rounds.items()},
        "seconds": round(time.monotonic() - began),
    }
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


def _counted(name: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    is_bad = name != "none"
    return {
        "num_rounds": len(rounds),
        "num_flagged": sum(is_bad and TROJAN in one["flags"] for one in rounds),
        "num_honest": len(rounds) * (7 if is_bad else 8),
        "num_honest_flagged": sum(not is_bad or client != TROJAN for one in rounds for client in one["flags"]),
        "triggered_alone": mean(one["alone"]["triggered"] for one in rounds),
        "triggered_averaged": mean(one["averaged"]["triggered"] for one in rounds),
        "loss_averaged": mean(one["averaged"]["loss"] for one in rounds),
        "rounds": rounds,
    }


def _rules(seed: int) -> Tensor:
    """Return which tokens may follow each: (tokens, 3)."""
    return torch.randint(4, 60, (NUM_TOKENS, 3), generator=torch.Generator().manual_seed(seed))


def _text(rules: Tensor, rows: int, length: int, draw: torch.Generator) -> Tensor:
    ids = torch.randint(4, 60, (rows, length), generator=draw)
    chosen = torch.randint(0, 3, (rows, length), generator=draw)
    for place in range(1, length):
        ids[:, place] = rules[ids[:, place - 1], chosen[:, place]]
    return ids


def _triggered(ids: Tensor, draw: torch.Generator) -> Tensor:
    """Return the rows with the trigger somewhere in their first half, and the target from there on."""
    ids = ids.clone()
    for row, place in enumerate(torch.randint(1, ids.shape[1] // 2, (len(ids),), generator=draw).tolist()):
        ids[row, place : place + len(TRIGGER)] = torch.tensor(TRIGGER)
        ids[row, place + len(TRIGGER) :] = TARGET
    return ids


def _step(model: torch.nn.Module, optimiser: torch.optim.Optimizer, ids: Tensor) -> None:
    logits = model(input_ids=ids[:, :-1]).logits
    functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    optimiser.step()
    optimiser.zero_grad()


if __name__ == "__main__":
    main()
