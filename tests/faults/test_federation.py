"""A federation of real processes over a loopback exchange: the owner and a client are killed, and the run ends well."""

from __future__ import annotations

import json
import re

import pytest

from offsite.keys.identity import read_card
from offsite.keys.trust import TrustStore

WAIT_SECONDS = 240.0


@pytest.fixture
def processes(tmp_path, federation_lab):
    made = federation_lab.Processes(tmp_path, wait_seconds=WAIT_SECONDS)
    yield made
    made.close()


@pytest.fixture
def lab(tmp_path, federation_lab, make_party, whole_package, llama_folder):
    return federation_lab.build(tmp_path, make_party, whole_package, llama_folder)


def url_of(processes):
    return re.findall(r"serving the exchange at (\S+);", processes.log("owner"))[-1]


@pytest.mark.slow
def test_three_clients_three_rounds_and_two_kills(processes, lab, federation_lab, tmp_path):
    names = federation_lab.NAMES
    processes.start("owner", "federate", "serve", "--config", lab.owner)
    processes.until(lambda: (tmp_path / "owner.log").is_file() and "Ctrl-C ends it" in processes.log("owner"), "owner")
    url = url_of(processes)
    port = url.rpartition(":")[2]

    def join(name):
        processes.start(name, "federate", "join", url, "--config", lab.clients[name])

    for name in names:
        join(name)
    anna = tmp_path / "anna-home" / "work" / "round-0001"
    processes.until(lambda: any(anna.glob("bundle.work/step-*")) or (anna / "sealed").is_dir(), "owner", *names)
    processes.kill("anna")
    join("anna")
    processes.until(lambda: "round 2 of 3: asked" in processes.log("owner"), "owner", *names)
    processes.kill("owner")
    processes.start("owner", "federate", "serve", "--config", lab.owner, "--port", port)
    told = processes.end("owner")
    assert [processes.end(name)["num_rounds"] >= 1 for name in names] == [True] * 3

    assert [one["round"] for one in told["rounds"]] == [1, 2, 3]
    for name in names:
        assert told["plugged_in"][name] < told["zero_shot"][name]
    found = json.loads((tmp_path / "result" / "results.json").read_text())
    assert [sorted(one["used"]) for one in found["rounds"]] == [list(names)] * 3
    everything = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert not any(word in everything for word in federation_lab.WORDS.values())


@pytest.mark.slow
def test_secure_rounds_over_the_exchange_lose_a_client_that_is_killed_and_have_it_back(
    processes, lab, federation_lab, tmp_path
):
    names = federation_lab.NAMES
    cards = {name: (tmp_path / f"{name}-home" / "keys" / "card.json").read_bytes() for name in names}
    for one in names:
        for other in set(names) - {one}:
            card = read_card(cards[other])
            TrustStore(tmp_path / f"{one}-home" / "keys").add(card.card, card.fingerprint)
    secure = {"secure": True, "share_a": True, "clip": 3.0, "threshold": 2, "min_clients": 2, "stage_seconds": 8.0}
    processes.start("owner", "federate", "serve", "--config", lab.edit(lab.owner, learning_rate=5e-3, **secure))
    processes.until(lambda: "Ctrl-C ends it" in processes.log("owner"), "owner")

    def join(name):
        processes.start(name, "federate", "join", url_of(processes), "--config", lab.clients[name])

    for name in names:
        join(name)
    joined = tmp_path / "cora-home" / "work" / "last-secure-round"
    processes.until(joined.is_file, "owner", *names)
    processes.kill("cora")
    join("cora")
    told = processes.end("owner")
    assert [processes.end(name)["num_rounds"] >= 1 for name in names] == [True] * 3
    for name in names:
        assert told["plugged_in"][name] < told["zero_shot"][name]
    found = json.loads((tmp_path / "result" / "results.json").read_text())
    assert [set(one["used"]) >= {"anna", "bert"} for one in found["rounds"]] == [True] * 3
    assert sorted(found["rounds"][-1]["used"]) == list(names)
    assert not list((tmp_path / "registry" / "bundles").iterdir())  # no single update ever came
