"""What a federation leaves in its output, and where it will not write."""

from __future__ import annotations

import json

import pytest

from offsite.errors import ConfigError, RunFailed
from server.federation.results import finish, require_output, require_own
from server.federation.serve import running


def test_results_and_the_adapted_model(federated):
    with federated.opened() as federation:
        require_own(federation)
        federated.round(federation, 1)
        federated.round(federation, 2, names=("anna", "bert"))
        told = finish(federation)
        found = json.loads((federated.config.output / "results.json").read_text())
        assert [sorted(one["used"]) for one in found["rounds"]] == [["anna", "bert", "cora"], ["anna", "bert"]]
        assert found["federation_id"] == federation.store.id
        assert told["rounds"] == found["rounds"]
        assert told["clients"] == ["anna", "bert", "cora"]
        assert sorted(path.name for path in federated.config.output.iterdir()) == ["adapted", "results.json"]
        assert finish(federation) == told
    text = (federated.config.output / "results.json").read_text()
    assert str(federated.folder) not in text
    assert federated.key("anna") not in text


def test_an_adapted_model_that_is_not_wanted(make_federated):
    for settings in ({"merge": False}, {"mode": "personal"}):
        federated = make_federated(next(iter(settings)), **settings)
        with federated.opened() as federation:
            federated.round(federation, 1)
            finish(federation)
        assert [path.name for path in federated.config.output.iterdir()] == ["results.json"]


def test_an_output_that_holds_something_else(federated):
    out = federated.config.output
    out.write_text("mine")
    with pytest.raises(ConfigError, match="is not a folder"):
        require_output(federated.config)
    out.unlink()
    out.mkdir()
    require_output(federated.config)
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="holds something else"):
        require_output(federated.config)
    assert (out / "thesis.tex").read_text() == "mine"


def test_what_a_killed_run_left_is_not_in_the_way(federated):
    out = federated.config.output
    (out / ".adapted.0123abcd.partial").mkdir(parents=True)
    (out / ".results.json.0123abcd.partial").write_text("{")
    require_output(federated.config)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("content", ['{"federation_id": "another"}', "{", "[]", None])
def test_another_federation_s_result_stays(federated, content):
    out = federated.config.output
    (out / "adapted").mkdir(parents=True)
    if content is not None:
        (out / "results.json").write_text(content)
    require_output(federated.config)
    with federated.opened() as federation, pytest.raises(ConfigError, match="holds another federation's result"):
        require_own(federation)


def test_an_exchange_that_does_not_start():
    class Process:
        started = should_exit = False

        def run(self, sockets):
            pass

    with pytest.raises(RunFailed, match="does not start"), running(Process(), []):
        pass
