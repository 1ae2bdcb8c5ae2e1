"""Settings of ``tune``: every contradiction is told, and told at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters.rates import LEARNING_RATES
from client.tuning.config import TuneConfig
from offsite.artefacts.bundle import DISCLOSABLE, AdapterSpec
from offsite.artefacts.job import Job
from offsite.config import build
from offsite.errors import ConfigError

NEEDED = {"package": "package", "data": "notes.txt", "output": "bundle"}


def made(**changes: object) -> TuneConfig:
    return build(TuneConfig, flags={**NEEDED, **changes})


def refused(**changes: object) -> str:
    with pytest.raises(ConfigError) as caught:
        made(**changes)
    assert "\n" not in str(caught.value)
    assert caught.value.hint == "offsite tune --help lists every setting"
    return str(caught.value)


def test_only_package_data_and_output_must_be_given():
    config = made()
    assert (config.package, config.data, config.output) == (Path("package"), (Path("notes.txt"),), Path("bundle"))
    assert (config.adapter, config.placement, config.disclose, config.resume) == ("blocks", "2+2", (), False)
    for name in NEEDED:
        with pytest.raises(ConfigError, match=f"{name.upper()}|--{name}"):
            build(TuneConfig, flags={key: value for key, value in NEEDED.items() if key != name})


@pytest.mark.parametrize("kind", list(LEARNING_RATES))
def test_each_kind_has_a_rate_of_its_own_and_takes_another(kind):
    assert made(adapter=kind).rate() == LEARNING_RATES[kind]
    assert made(adapter=kind, learning_rate="0.25").rate() == 0.25
    sampled = made(adapter=kind, objective="rloo", rules={"exact": 1.0})
    assert sampled.rate() == pytest.approx(LEARNING_RATES[kind] / 20)
    assert sampled.advised(Job(**JOB, learning_rate=0.004)) is sampled
    assert made(adapter=kind).spec().kind == kind


def test_the_spec_is_what_the_settings_say():
    words = {"adapter": "dora", "placement": "1+0", "targets": "mlp", "rank": "3", "alpha": "6", "dropout": "0.5"}
    spec = made(**words, adapter_dtype="float32").spec()
    stated = {"kind": "dora", "placement": "1+0", "targets": "mlp", "rank": 3, "alpha": 6.0, "dropout": 0.5}
    assert spec.model_dump() == {**stated, "dtype": "float32"}


@pytest.mark.parametrize(
    "name", ["learning_rate", "weight_decay", "clip_norm", "alpha", "dropout", "epochs", "validation"]
)
@pytest.mark.parametrize("value", ["inf", "nan", "-inf"])
def test_a_number_that_is_none_is_refused(name, value):
    assert f"--{name.replace('_', '-')}: expected a" in refused(**{name: value})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"placement": "2x2"}, "--placement"),
        ({"placement": "0+0"}, "--placement 0+0: no block is left to train"),
        ({"adapter": "nope"}, "--adapter: no kind 'nope', expected one of blocks"),
        ({"adapter": "No Kind", "learning_rate": "1"}, "--adapter No Kind"),
        ({"accumulate": "5"}, "--accumulate 5: a batch of 4 cannot be cut into 5"),
        (
            {"accumulate": "3", "launch": "2"},
            "--accumulate 3 in each of 2 processes: a batch of 4 cannot be cut into 6",
        ),
        ({"launch": "5"}, "in each of 5 processes: a batch of 4"),
        ({"validation": "0"}, "--validation"),
        ({"validation": "1"}, "--validation"),
        ({"block_tokens": "1"}, "--block-tokens"),
        ({"seed": "-1"}, "--seed"),
        ({"steps": "0"}, "--steps"),
        ({"rank": "0"}, "--rank"),
        ({"rank": "8.5"}, "--rank"),
        ({"dropout": "1"}, "--dropout"),
        ({"targets": "embeddings"}, "--targets"),
        ({"adapter_dtype": "float16"}, "--adapter-dtype"),
        ({"on_long": "ignore"}, "--on-long"),
        ({"fields": "prompt"}, "--fields"),
        ({"disclose": "steps,hostname"}, "--disclose: 'hostname' is not one of num_records"),
        ({"disclose": "tokens_per_second"}, "--disclose: 'tokens_per_second'"),
        ({"patience": "3", "round": "round"}, "--patience: a federation's round takes the steps"),
        ({"patience": "3", "dp": "epsilon=8"}, "--patience: when a run ends would depend on private text"),
    ],
)
def test_contradictions(changes, told):
    assert told in refused(**changes)


def test_all_contradictions_are_told_at_once():
    told = refused(disclose="host,user", adapter="nope", accumulate="9")
    assert [part in told for part in ("'host'", "'user'", "'nope'", "--accumulate 9")] == [True] * 4


def test_what_may_be_disclosed_is_a_short_list():
    assert made(disclose=",".join(DISCLOSABLE)).disclose == DISCLOSABLE
    assert set(DISCLOSABLE) == {"num_records", "num_tokens", "steps", "validation_loss"}


def test_fields_from_the_command_line():
    assert made(fields="prompt=question,completion=answer").fields == {"prompt": "question", "completion": "answer"}


JOB = {
    "job_id": "0" * 32,
    "owner": "-".join(["aaaa"] * 13),
    "client": "-".join(["bbbb"] * 13),
    "package_digest": "sha256:" + "0" * 64,
    "base_digest": "sha256:" + "1" * 64,
    "adapter": AdapterSpec(kind="lora"),
    "created": 0,
    "expires": 1,
}


@pytest.mark.parametrize(
    ("changes", "rate"),
    [
        ({}, 0.004),
        ({"learning_rate": "0.02"}, 0.02),
        ({"dp": "epsilon=8"}, LEARNING_RATES["lora"]),
        ({"round": "round"}, 0.004),
    ],
)
def test_a_jobs_rate_is_advice(changes, rate):
    config = made(adapter="lora", **changes)
    assert config.advised(Job(**JOB, learning_rate=0.004)).rate() == rate
    assert config.advised(Job(**JOB)) is config
