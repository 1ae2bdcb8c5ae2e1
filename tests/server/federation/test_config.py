"""Settings of a federation: contradictions are told at once, and what may not change is fixed."""

from __future__ import annotations

import pytest

from offsite.config import build
from offsite.errors import ConfigError
from server.federation.config import FederateServeConfig, FederationConfig
from server.federation.simulationconfig import SimulateConfig

GIVEN = {"registry": "registry", "package": "package", "model": "model", "output": "out"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "personal", "rule": "median"}, "--mode personal: nothing is put together"),
        ({"mode": "personal", "rank": 2}, "--mode personal"),
        ({"mode": "personal", "server_learning_rate": 2.0}, "--mode personal"),
        ({"mode": "personal", "max_norm": 1.0}, "--mode personal"),
        ({"mode": "personal", "noise_multiplier": 1.0}, "--mode personal"),
        ({"noise_multiplier": 1.0, "rule": "krum"}, "--noise-multiplier: central privacy clips"),
        ({"noise_multiplier": 1.0, "max_norm": 1.0}, "--noise-multiplier"),
        ({"noise_multiplier": 1.0, "rank": 1}, "--noise-multiplier"),
        ({"realign_every": 1}, "--realign-every: needs --public"),
        ({"secure": True, "rule": "median"}, "--secure"),
        ({"secure": True, "mode": "personal"}, "--secure"),
        ({"rule": "best"}, "--rule"),
        ({"rounds": 0}, "--rounds"),
        ({"steps": 1_000_001}, "--steps"),
        ({"fraction": 0.0}, "--fraction"),
        ({"fraction": 1.1}, "--fraction"),
        ({"min_clients": 0}, "--min-clients"),
        ({"trim": 0.5}, "--trim"),
        ({"proximal": -1.0}, "--proximal"),
        ({"noise_multiplier": 0.1}, "--noise-multiplier"),
        ({"delta": 1.0}, "--delta"),
        ({"learning_rate": 0.0}, "--learning-rate"),
        ({"name": "../x"}, "--name"),
        ({"weights": "num-examples"}, "unknown setting 'weights'"),
    ],
)
def test_contradictions(changes, message):
    with pytest.raises(ConfigError, match=message):
        build(FederationConfig, flags=GIVEN, overrides=[f"{key}={value}" for key, value in changes.items()])


def test_all_at_once():
    with pytest.raises(ConfigError) as caught:
        build(FederationConfig, flags={**GIVEN, "mode": "personal", "rule": "median", "noise_multiplier": 1.0})
    assert all(part in str(caught.value) for part in ("--mode personal", "--noise-multiplier"))
    with pytest.raises(ConfigError) as caught:
        build(FederationConfig, flags={"rounds": 0, "fraction": 2.0})
    named = ("--registry is missing", "--package is missing", "--rounds", "--fraction")
    assert all(part in str(caught.value) for part in named)


def test_what_is_fixed_is_json_and_names_no_path():
    found = build(FederationConfig, flags=GIVEN).fixed()
    assert found["rounds"] == 3
    assert not {"registry", "package", "output", "keys", "heldout", "name", "merge", "deadline_seconds"} & found.keys()
    for name in (
        "mode",
        "steps",
        "proximal",
        "rule",
        "rank",
        "share_a",
        "noise_multiplier",
        "clip",
        "delta",
        "fraction",
    ):
        assert name in found


def test_a_simulation_makes_its_own_keys_registry_and_jobs():
    assert not {"registry", "keys", "passphrase_file", "jobs"} & SimulateConfig.model_fields.keys()
    given = {**GIVEN, "work": "work", "clients": {"a": "a.txt", "b": "b.txt"}, "min_clients": 3}
    given.pop("registry")
    with pytest.raises(ConfigError, match=r"--clients: 2 client\(s\), --min-clients 3"):
        build(SimulateConfig, flags=given)


def test_serving_has_the_exchange_s_settings_too():
    found = build(FederateServeConfig, flags={**GIVEN, "outbox": "outbox"})
    assert {"outbox", "port", "linger_seconds", "rounds"} <= set(type(found).model_fields)
