"""Settings of what is minimised: what they cannot go together with, and what the run's record says of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from client.tuning.config import TuneConfig
from offsite.audits.record import Objective
from offsite.config import build
from offsite.errors import ConfigError

NEEDED = {"package": "package", "data": "notes.txt", "output": "bundle"}
DIGEST = "sha256:" + "3" * 64
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
    assert json.loads(every.model_dump_json()) == {
        "loss": "spin", "spin_beta": 0.1, "anchor_sha256": DIGEST, "anchor_weight": 2.0, "channel_dropout": 0.25,
    }  # fmt: skip
    assert Objective.model_validate_json(every.model_dump_json()) == every
