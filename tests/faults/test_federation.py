"""A federation of real processes over a loopback exchange: the owner and a client are killed, and the run ends well."""

from __future__ import annotations

import json
import re

import pytest

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

    assert told["rounds"] == 3 or len(told["rounds"]) == 3
    for name in names:
        assert told["plugged_in"][name] < told["zero_shot"][name]
    found = json.loads((tmp_path / "result" / "results.json").read_text())
    assert [sorted(one["used"]) for one in found["rounds"]] == [list(names)] * 3
    everything = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert not any(word in everything for word in federation_lab.WORDS.values())
