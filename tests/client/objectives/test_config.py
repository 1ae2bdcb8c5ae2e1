"""Settings of what is minimised: what they cannot go together with, and what the run's record says of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from client.tuning.config import TuneConfig
from offsite.audits.runs import Objective
from offsite.config import build
from offsite.errors import ConfigError

NEEDED = {"package": "package", "data": "notes.txt", "output": "bundle"}
DIGEST = "sha256:" + "3" * 64
RLOO = {"objective": "rloo", "rules": "exact=1"}
DP = {"dp": "noise_multiplier=1.0"}


def made(**changes: object) -> TuneConfig:
    return build(TuneConfig, flags={**NEEDED, **changes})


def refused(**changes: object) -> str:
    with pytest.raises(ConfigError) as caught:
        made(**changes)
    assert "\n" not in str(caught.value)
    assert caught.value.hint == "offsite tune --help lists every setting"
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"objective": "ppo"}, "--objective"),
        ({"channel_dropout": "1"}, "--channel-dropout"),
        ({"channel_dropout": "-0.1"}, "--channel-dropout"),
        ({"anchor": "web.txt", "anchor_weight": "0"}, "--anchor-weight"),
        ({"anchor_weight": "2"}, "--anchor-weight: there is no --anchor"),
        ({"spin_beta": "0.5"}, "--spin-beta: is of --objective spin"),
        ({"objective": "spin", "spin_beta": "0"}, "--spin-beta"),
        ({"dpo_beta": "0.5"}, "--dpo-beta: is of --objective dpo"),
        ({"objective": "spin", "dpo_loss": "ipo"}, "--dpo-loss: is of --objective dpo"),
        ({"objective": "dpo", "spin_beta": "0.5"}, "--spin-beta: is of --objective spin"),
        ({"objective": "dpo", "dpo_label_smoothing": "0.5"}, "--dpo-label-smoothing"),
        ({"objective": "dpo", "dpo_loss": "ipo", "dpo_label_smoothing": "0.1"}, "is of --dpo-loss sigmoid"),
        ({"objective": "dpo", "pack": "true"}, "--pack: --objective dpo compares answers"),
        ({"objective": "dpo", **DP}, "--objective dpo: --dp has no clipped gradient of pairs"),
        ({"objective": "dpo", "launch": "2"}, "--launch: --objective dpo is tuned in one process"),
        ({"objective": "dpo", "round": "round"}, "--objective: a federation's round says what its members learn by"),
        ({"objective": "dpo", "canaries": "canaries"}, "--canaries: --objective dpo learns from pairs"),
        ({"objective": "rloo"}, "--rules: --objective rloo needs to know what is rewarded"),
        ({"rules": "exact=1"}, "--rules: is of --objective rloo"),
        ({"objective": "reward", "reward": "reward"}, "--reward: is of --objective rloo"),
        ({**RLOO, "reward_weight": "2"}, "--reward-weight: there is no --reward"),
        ({"objective": "rloo", "reward": "reward", "reward_weight": "0"}, "--reward-weight"),
        ({"kl_limit": "3"}, "--kl-limit: is of --objective rloo"),
        ({"objective": "dpo", "temperature": "2"}, "--temperature: is of --objective rloo"),
        ({**RLOO, "rules": "exact=0"}, "--rules.exact: expected more than 0"),
        ({**RLOO, "rules": "code=x.py"}, "code"),
        ({**RLOO, "rules": "words_weight=1"}, "--rules: nothing is rewarded"),
        ({**RLOO, "rules": "exact=1,words_weight=1"}, "--rules words_weight: there is no rule words"),
        ({**RLOO, "rules": "min_words=3,max_words=2"}, "--rules: min_words 3 is above max_words 2"),
        ({**RLOO, "rloo_samples": "1"}, "--rloo-samples"),
        ({**RLOO, "temperature": "0"}, "--temperature"),
        ({**RLOO, "pack": "true"}, "--pack: --objective rloo reads prompts"),
        ({**RLOO, "runs": "2"}, "--runs: --objective rloo has no mean of several runs"),
        ({**RLOO, "launch": "2"}, "--launch: --objective rloo is tuned in one process"),
        ({**RLOO, "canaries": "canaries"}, "--canaries: --objective rloo learns from answers of its own"),
        ({**RLOO, "anchor": "web.txt"}, "--anchor: --objective rloo has its own leash"),
        ({**RLOO, "channel_dropout": "0.1"}, "--channel-dropout: --objective rloo samples from the whole emulator"),
        ({**RLOO, "round": "round"}, "--rules: a federation's round says what its members learn by"),
        ({**RLOO, **DP}, "--objective rloo: --dp has no clipped gradient of sampled answers"),
        ({"objective": "spin", "pack": "true"}, "--pack: --objective spin compares answers"),
        ({"objective": "spin", **DP}, "--objective spin: --dp has no clipped gradient of pairs"),
        ({"anchor": "web.txt", **DP}, "--anchor: --dp trains with nothing beside the clipped gradients"),
        ({"channel_dropout": "0.5", **DP}, "--channel-dropout: --dp draws from no seed"),
        ({"objective": "spin", "launch": "2"}, "--launch: --objective spin is tuned in one process"),
        ({"anchor": "web.txt", "launch": "2"}, "--launch: --anchor is tuned in one process"),
        ({"objective": "dft", "round": "round"}, "--objective: a federation's round says what its members learn by"),
        ({"objective": "spin", "round": "round"}, "--objective: a federation's round says"),
        ({"anchor": "web.txt", "round": "round"}, "--anchor: a federation's round says"),
        ({"channel_dropout": "0.5", "round": "round"}, "--channel-dropout: a federation's round says"),
    ],
)
def test_contradictions(changes, told):
    assert told in refused(**changes)


def test_what_goes_together():
    assert made(objective="dft", **DP).objective == "dft"
    assert made(objective="dft", launch="2", channel_dropout="0.5").channel_dropout == 0.5
    assert made(objective="dft", anchor="web.txt", anchor_weight="0.25").anchor == Path("web.txt")
    assert made(round="round", objective="next-token").is_usual()
    assert (made().packed, made(objective="dft").packed, made(objective="spin").packed) == (True, True, False)


def test_a_record_says_only_what_was_used():
    assert made().stated(None) is None
    stated = made(objective="dft").stated(None)
    assert stated == Objective(loss="dft")
    assert stated.model_dump() == {"loss": "dft"}
    every = made(objective="spin", anchor="web.txt", anchor_weight="2", channel_dropout="0.25").stated(DIGEST)
    dpo = made(objective="dpo", dpo_loss="ipo", dpo_beta="0.5").stated(None)
    assert dpo.model_dump() == {"loss": "dpo", "dpo_beta": 0.5, "dpo_loss": "ipo"}
    assert made(objective="dpo", dpo_label_smoothing="0.1").stated(None).dpo_label_smoothing == 0.1
    assert not made(objective="dpo").packed
    rewarded = made(objective="rloo", rules="max_words=9,exact=2", kl_limit="7").stated(None)
    assert rewarded.model_dump(mode="json")["rloo"] == {
        "beta": 0.05, "num_samples": 4, "max_new_tokens": 64, "temperature": 1.0, "kl_limit": 7.0,
        "entropy_floor": 0.01, "rules": ["exact", "words"],
    }  # fmt: skip
    assert Objective.model_validate_json(rewarded.model_dump_json()) == rewarded
    assert not made(**RLOO).packed
    assert json.loads(every.model_dump_json()) == {
        "loss": "spin", "spin_beta": 0.1, "anchor_sha256": DIGEST, "anchor_weight": 2.0, "channel_dropout": 0.25,
    }  # fmt: skip
    assert Objective.model_validate_json(every.model_dump_json()) == every
