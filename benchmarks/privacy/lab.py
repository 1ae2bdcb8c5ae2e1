"""Private runs of a tiny model, correct and broken in known ways, and the audit of each by its canaries.

The product refuses to train without noise or without clipping. Broken runs are made of its parts: `PrivateStepper` is
given other constants than the run claims. Everything that is measured is the product's: per-row gradients, noise, score
of rows, bound, gates. Canaries are rows of random tokens, so nothing but training can make one likely.

Shapes: B = canaries, V = vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from client.objectives.tokens import next_token_loss
from client.privacy.dpsgd import Guarantee, PoissonBatches, PrivateStepper
from offsite.artefacts.bundle import AdapterSpec
from offsite.audits.accounting import Mechanism, account, calibrate
from offsite.audits.canaries import CanarySet, CanaryText
from offsite.audits.canaryaudit import CanaryScores, audit_canaries
from offsite.audits.gates import Gate, bundle_gates
from offsite.audits.record import BundleAudit, CanaryAudit, ScanFigures
from offsite.audits.runs import Claim, Run, TextSettings
from offsite.audits.scores import RowScores, score_rows
from offsite.text.batches import Example
from offsite.training.config import LoopConfig
from offsite.training.processes import world

Way = Literal["correct", "no noise", "no clip", "repeated"]
WAYS: tuple[Way, ...] = ("correct", "no noise", "no clip", "repeated")

_DIGEST = "sha256:" + "0" * 64
_NO_CLIP = 1e6
_TINY = 0.01  # of the noise that is claimed


@dataclass(frozen=True)
class Setting:
    """One experiment's public constants.

    Attributes:
        delta: of the claim. At 1/N^1.1 of so few rows, no guesses of so many canaries could show anything.
        units_per_canary: rows of the training text for each canary, in or out; as many times more of a *repeated* run.
        repeats: how often a canary stands in the text of a *repeated* run.
    """

    num_canaries: int = 300
    units_per_canary: float = 0.8
    delta: float = 1e-6
    row_tokens: int = 6
    vocabulary: int = 64
    width: int = 64
    num_blocks: int = 2
    batch_size: int = 128
    steps: int = 60
    learning_rate: float = 0.005
    clip: float = 0.3
    repeats: int = 50


@dataclass(frozen=True)
class Measured:
    """The audit of one run by its canaries, whatever epsilon it claims."""

    way: Way
    seed: int
    num_units: int
    canaries: CanaryAudit

    def gate(self, guarantee: Guarantee) -> Gate:
        """Return the verdict on a run that claims this guarantee."""
        (found,) = [one for one in bundle_gates(_audit(self, guarantee)) if one.name == "epsilon"]
        return found


def num_units(way: Way, setting: Setting) -> int:
    """Return how many rows such a run has: the same, however the coins fall."""
    return round(setting.units_per_canary * setting.num_canaries * (setting.repeats if way == "repeated" else 1))


@lru_cache
def planned(setting: Setting, way: Way, epsilon: float) -> Guarantee:
    """Return what a correct run of so many rows states at that epsilon."""
    rate = setting.batch_size / num_units(way, setting)
    return stated(setting, way, calibrate(epsilon, setting.delta, rate=rate, steps=setting.steps))


@lru_cache
def stated(setting: Setting, way: Way, sigma: float) -> Guarantee:
    """Return what a correct run of so many rows states with that noise multiplier."""
    mechanism = Mechanism(sigma, setting.batch_size / num_units(way, setting), setting.steps)
    spent = account(mechanism, setting.delta)
    return Guarantee(mechanism, setting.clip, setting.batch_size, "example", None, True, spent)


def measure(way: Way, guarantee: Guarantee, seed: int, setting: Setting) -> Measured:
    """Return the audit by its canaries of a run made in this way that claims this guarantee.

    Canaries, coins and model follow from `seed`; which rows are drawn and the noise are the operating system's.
    """
    draw = random.Random(f"{seed}/{way}")
    canaries = [_row(draw, setting) for _ in range(setting.num_canaries)]
    coins = [draw.random() < 0.5 for _ in canaries]
    inside = [row for row, coin in zip(canaries, coins, strict=True) if coin]
    rows = [row for row in inside for _ in range(setting.repeats if way == "repeated" else 1)]
    rows += [_row(draw, setting) for _ in range(num_units(way, setting) - len(rows))]
    model = _model(seed, setting)
    before = _scores(model, canaries)
    _train(model, rows, _as_made(way, guarantee), setting)
    after = _scores(model, canaries)
    found = audit_canaries(
        _set(coins),
        _DIGEST,
        tuned=CanaryScores(after, np.zeros(0), None),
        untuned=CanaryScores(before, np.zeros(0), None),
        delta=guarantee.spent.delta,
    )
    return Measured(way, seed, len(rows), found)


def _as_made(way: Way, claimed: Guarantee) -> Guarantee:
    """Return the constants that the stepper is given: those claimed, or broken ones."""
    sigma, rate, steps = claimed.mechanism
    if way == "no noise":
        return replace(claimed, mechanism=Mechanism(0.0, rate, steps))
    if way == "no clip":
        tiny = _TINY * sigma * claimed.clip / _NO_CLIP
        return replace(claimed, clip=_NO_CLIP, mechanism=Mechanism(tiny, rate, steps))
    return claimed


def _train(model: LlamaForCausalLM, rows: Sequence[Example], guarantee: Guarantee, setting: Setting) -> None:
    model.requires_grad_(False)
    for block in model.model.layers:
        block.requires_grad_(True)
    model.train()
    trainable = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    config = LoopConfig(
        steps=setting.steps, learning_rate=setting.learning_rate, schedule="constant", precision="fp32", warmup_steps=1
    )
    stepper = PrivateStepper(
        model,
        trainable,
        next_token_loss,
        config,
        world(),
        units=[(row,) for row in rows],
        guarantee=guarantee,
        pad_id=0,
        engine="hooks",
        rows_at_once=64,
    )
    batches = PoissonBatches(len(rows), guarantee.mechanism.rate)
    try:
        for step in range(setting.steps):
            stepper.step(step + 1, batches.batch(step))
    finally:
        stepper.clipper.close()
    model.eval()


def _row(draw: random.Random, setting: Setting) -> Example:
    ids = [draw.randrange(3, setting.vocabulary) for _ in range(setting.row_tokens)]
    return Example(ids, ids)


def _model(seed: int, setting: Setting) -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=setting.vocabulary,
                hidden_size=setting.width,
                intermediate_size=2 * setting.width,
                num_hidden_layers=setting.num_blocks,
                num_attention_heads=4,
                max_position_embeddings=64,
                tie_word_embeddings=False,
                initializer_range=0.1,
                pad_token_id=0,
            )
        ).eval()


def _scores(model: LlamaForCausalLM, rows: Sequence[Example]) -> RowScores:
    return score_rows(model, rows, batch_size=128, pad_id=0, limit_tokens=64)


def _set(coins: Sequence[bool]) -> CanarySet:
    """Return a set with these coins; its texts only count, the rows are made of tokens."""
    texts = tuple(CanaryText(text=str(number), included=coin) for number, coin in enumerate(coins))
    return CanarySet(nonce="0" * 64, package_digest=_DIGEST, tokens=64, temperature=1.0, synthetic=texts)


def _audit(found: Measured, guarantee: Guarantee) -> BundleAudit:
    figures: dict[str, Any] = guarantee.figures()
    ledger = {
        "epsilon_total": guarantee.spent.epsilon,
        "delta_total": guarantee.spent.delta,
        "budget": guarantee.spent.epsilon,
    }
    claim = Claim(**figures, **ledger, num_runs=1, num_resumes=0, num_releases=1)
    run = Run(
        bundle_digest=_DIGEST,
        package_digest=_DIGEST,
        base_digest=_DIGEST,
        adapter=AdapterSpec(),
        data_sha256=_DIGEST,
        text=TextSettings(packed=False, block_tokens=64, validation=0.1, audit_share=0.0, seed=0),
        num_records=found.num_units,
        num_tokens=found.num_units,
        steps=guarantee.mechanism.steps,
        batch_size=guarantee.divisor,
        learning_rate=1.0,
        claim=claim,
    )
    scan = ScanFigures(num_bytes=1, num_ngrams_compared=0, found={})
    return BundleAudit(run=run, tokens_per_row=64, membership=(), canaries=found.canaries, scan=scan)
