"""What an earlier version wrote is opened, verified, plugged in, measured and reported by this one."""

from __future__ import annotations

import pytest
from two_parties import TwoParties


@pytest.fixture
def parties(tmp_path, monkeypatch, capsys):
    return TwoParties(tmp_path, monkeypatch, capsys, as_kept=True)


@pytest.mark.parametrize(
    ("party", "artefact", "verb", "key"),
    [("owner", "package", "distill", "package_digest"), ("client", "bundle", "tune", "bundle_digest")],
)
def test_artefacts_are_inspected(parties, party, artefact, verb, key):
    told = parties.run(party, f"inspect {artefact} --tensors")
    assert told["verified"] is True
    assert told["digest"] == parties.figures[verb][key]


@pytest.mark.parametrize("name", ["job", "package"])
def test_sealed_folders_are_opened_and_known(parties, name):
    told = parties.run("client", f"open {name}.sealed --keys keys -o again")
    assert told["admission"] != "new"  # the ledger of that version remembers them
    again, before = parties.client / "again", parties.client / name
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in before.iterdir()
    }


def test_the_registry_goes_on(parties):
    arrivals = parties.run("owner", "registry list --registry registry --keys keys")["bundles"]
    assert [entry["id"] for entry in arrivals] == [parties.figures["id"]]
    assert parties.run("owner", "log verify --registry registry --keys keys")["lines"] > 0
    told = parties.run("owner", "intake bundle.sealed --registry registry --keys keys")
    assert (told["id"], told["again"]) == (parties.figures["id"], True)


def test_the_bundle_is_plugged_in_again(parties):
    words = f"plug-in model {parties.figures['id']} --registry registry --keys keys --package package -o second"
    told = parties.run("owner", words)
    for name in ("bundle_digest", "base_digest", "num_blocks", "placement"):
        assert told[name] == parties.figures["plug"][name]
    assert told["effect"] == pytest.approx(parties.figures["plug"]["effect"], rel=1e-4)
    for name in ("adapter_model.safetensors",):
        assert (parties.owner / "second" / name).read_bytes() == (parties.owner / "adapted" / name).read_bytes()


def test_the_figures_are_the_same(parties):
    told = parties.run(
        "owner",
        f"evaluate model --package package --bundle {parties.figures['id']} --registry registry --keys keys "
        "--data heldout.jsonl --block-tokens 64 -o second",
    )
    for name in ("zero_shot", "emulator_zero_shot", "emulator_tuned", "plugged_in", "capability", "emulator_share"):
        assert told[name] == pytest.approx(parties.figures["evaluate"][name], rel=1e-5), name


def test_the_adapted_folder_is_opened(parties):
    from server.plugging.adapted import load_adapted

    model, tokenizer = load_adapted(parties.owner / "adapted", str(parties.owner / "model"))
    assert type(model).__name__ == "LlamaForCausalLM"
    assert tokenizer.decode(tokenizer("a dose")["input_ids"]) == "a dose"


def test_reports_are_made_and_verified(parties):
    parties.run("owner", "report run results -o second.html")
    assert (parties.owner / "second.html").read_text().startswith("<!doctype html>")
    told = parties.run("client", "report verify privacy --bundle bundle --package package --keys keys")
    assert told["verified"] is True
