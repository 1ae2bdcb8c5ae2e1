"""A whole federation in one process: tiny models, real keys, seals, registry and Flower loop."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from offsite.config import build
from offsite.errors import ConfigError, RunFailed
from offsite.faults import ROUND_POINTS, set_hook
from server.federation.simulation import prepared, run
from server.federation.simulationconfig import SimulateConfig


@pytest.fixture(autouse=True)
def cheap_keys(monkeypatch):
    monkeypatch.setattr("offsite.keys.files.SCRYPT_COST", 2**4)


def written(folder):
    """Write three clients' private text, each of its own words, and the owner's held-out text of all of them."""
    words = {"anna": "red apple", "bert": "blue berry", "cora": "green grape"}
    found = {}
    for name, word in words.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{word} {number % 7} {word}"}) + "\n" for number in range(40)))
        found[name] = str(path)
    held = folder / "held.jsonl"
    held.write_text("".join(json.dumps({"text": f"{word} 3 {word}"}) + "\n" for word in words.values()))
    return found, str(held)


def settings_in(folder, texts, package, model):
    """Return a maker of the settings of a federation of three in a folder, for changes."""
    clients, held = texts
    made = {
        "package": str(package.path),
        "model": str(model),
        "output": str(folder / "result"),
        "work": str(folder / "work"),
        "clients": clients,
        "heldout": {"all": held},
        "rounds": 2,
        "steps": 6,
        "learning_rate": 5e-3,
        "placement": "1+1",
        "lora_rank": 2,
        "adapter_dtype": "float32",
        "block_tokens": 32,
        "max_relative_frobenius": 10.0,
        "max_relative_spectral": 10.0,
        "tune": {"batch_size": 8, "block_tokens": 32, "validation": 0.1, "precision": "fp32"},
    }

    def settings(**changes):
        return build(SimulateConfig, flags={**made, **changes})

    return settings


@pytest.fixture
def texts(tmp_path):
    return written(tmp_path)


@pytest.fixture
def settings(tmp_path, texts, whole_package, llama_folder):
    """The settings of a federation of three on the whole tiny model, for changes."""
    return settings_in(tmp_path, texts, whole_package, llama_folder)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, whole_package, llama_folder):
    """A run from end to end: what it told, its settings for changes, and its folder, which stays as it is."""
    folder = tmp_path_factory.mktemp("unbroken")
    settings = settings_in(folder, written(folder), whole_package, llama_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("offsite.keys.files.SCRYPT_COST", 2**4)
        return SimpleNamespace(told=run(settings()), settings=settings, folder=folder)


def test_shared(unbroken):
    assert unbroken.told["plugged_in"]["all"] < unbroken.told["zero_shot"]["all"]
    found = json.loads((unbroken.folder / "result" / "results.json").read_text())
    assert [sorted(one["used"]) for one in found["rounds"]] == [["anna", "bert", "cora"]] * 2
    assert (unbroken.folder / "result" / "adapted" / "model.safetensors").is_file()


def test_personal_adapters_are_each_client_s_own(settings, tmp_path):
    told = run(settings(mode="personal"))
    assert set(told["plugged_in"]) == {"all by anna", "all by bert", "all by cora"}
    assert len(set(told["plugged_in"].values())) == 3
    assert not (tmp_path / "result" / "adapted").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": "blocks", "learning_rate": 1e-3},
        {"adapter": "bitfit", "placement": "2+2"},
        {"adapter": "rslora", "share_a": True, "proximal": 0.1},
        {"rank": 3, "rule": "median", "min_clients": 3},
    ],
    ids=["blocks", "bitfit", "shared A, proximal", "rank, median"],
)
def test_every_kind_gets_better(settings, changes):
    told = run(settings(**changes))
    assert told["plugged_in"]["all"] < told["zero_shot"]["all"]


def test_a_run_that_is_done_is_not_done_again(unbroken, capsys):
    capsys.readouterr()
    assert run(unbroken.settings()) == unbroken.told
    assert "tuning" not in capsys.readouterr().err


def test_other_settings_are_another_run(unbroken):
    with pytest.raises(ConfigError, match="begun with other settings: steps differ"):
        run(unbroken.settings(steps=7))


@pytest.mark.parametrize("point", [point for point in ROUND_POINTS if point != "round-sealed"])  # that is a client's
@pytest.mark.parametrize("time", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_broken_off_anywhere_it_goes_on_to_the_same_end(settings, unbroken, point, time):
    reached = []

    def stop(found):
        if found == point and len(reached) < time:
            reached.append(found)
            if len(reached) == time:
                raise KeyboardInterrupt

    set_hook(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(settings())
    finally:
        set_hook(None)
    assert run(settings())["plugged_in"] == unbroken.told["plugged_in"]


def test_a_client_that_fails_is_left_out_with_a_reason(settings, tmp_path):
    made = settings()
    with broken(made, break_client="bert"):
        told = run(made)
    found = json.loads((tmp_path / "result" / "results.json").read_text())
    assert [set(one["left_out"]) for one in found["rounds"]] == [{"bert"}] * 2
    assert all("DataError" in one["left_out"]["bert"] for one in found["rounds"])
    assert told["plugged_in"]["all"] < told["zero_shot"]["all"]


def test_too_few_answers_stop_the_round_and_change_nothing(settings, tmp_path):
    made = settings(min_clients=3)
    with broken(made, break_client="bert"), pytest.raises(RunFailed, match="2 sound answer"):
        run(made)
    assert not (tmp_path / "result").exists()
    told = run(made)  # bert's file is mended: the round is asked once more, the others' bundles stand
    assert told["plugged_in"]["all"] < told["zero_shot"]["all"]


@pytest.mark.parametrize("tune", [{"steps": 5}, {"batch_sice": 5}, {"canaries": "folder"}])
def test_a_client_s_settings_that_do_not_fit_are_told_on_its_side(settings, tune, capsys):
    with pytest.raises(RunFailed, match="0 sound answer"):
        run(settings(tune=tune))
    assert f"offsite: error: tune.{next(iter(tune))}: " in capsys.readouterr().err


@contextmanager
def broken(made, *, break_client):
    """A client's file holds what no text is, until the block ends."""
    path = Path(made.clients[break_client])
    sound = path.read_bytes()
    path.write_bytes(b'{"text": 1}\n')
    try:
        yield
    finally:
        path.write_bytes(sound)


def test_a_share_of_the_clients_is_drawn(settings, tmp_path):
    run(settings(fraction=0.67, rounds=3))
    found = json.loads((tmp_path / "result" / "results.json").read_text())
    assert [len(one["used"]) for one in found["rounds"]] == [2, 2, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_clients": 4}, "3 client"),
        ({"rule": "krum", "num_byzantine": 1}, "krum"),
        ({"rule": "median", "mode": "personal"}, "personal"),
        ({"adapter": "blocks", "share_a": True}, "share-a"),
        ({"adapter": "bitfit", "adapter_dtype": "bfloat16"}, "bitfit in bfloat16: weights that are rounded"),
        ({"clients": {"anna": "nowhere.txt", "bert": "nowhere.txt"}}, "no file of client"),
    ],
)
def test_settings_that_do_not_fit(settings, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run(settings(**changes))
    assert not (tmp_path / "result").exists()
    assert not (tmp_path / "work").exists()


def test_central_privacy(settings, tmp_path):
    told = run(settings(noise_multiplier=0.5, clip=0.5, delta=0.01, share_a=True, rounds=1))
    found = json.loads((tmp_path / "result" / "results.json").read_text())
    assert found["rounds"][0]["figures"]["epsilon"] > 1
    assert told["zero_shot"]["all"] != told["plugged_in"]["all"]


def test_central_privacy_without_a_shared_factor_is_dense(settings, tmp_path):
    run(settings(noise_multiplier=0.5, clip=0.5, delta=0.01, rounds=1, fraction=0.5, min_clients=1))
    found = json.loads((tmp_path / "result" / "results.json").read_text())
    assert found["rounds"][0]["figures"]["rate"] == 0.5


@pytest.mark.slow
def test_the_emulator_is_realigned_on_the_way(settings, tmp_path, narrow_package, texts):
    made = settings(
        package=str(narrow_package.path), realign_every=1, realign_steps=3, public=texts[1], rounds=2, placement="all"
    )
    told = run(made)
    assert told["plugged_in"]["all"] < told["zero_shot"]["all"]
    rounds = [path for path in (tmp_path / "work" / "registry" / "rounds").iterdir() if path.is_dir()]
    stated = [json.loads((path / "offsite.json").read_text()) for path in rounds]
    assert {one["round"]: bool(one["emulator"]) for one in stated if one["task"] == "train" and one["emulator"]} == {
        2: True
    }


@pytest.mark.parametrize("kind", ["lora", pytest.param("blocks", marks=pytest.mark.slow)])
def test_a_secure_round_learns_the_sum_alone(settings, tmp_path, kind):
    made = settings(secure=True, share_a=kind == "lora", adapter=kind, clip=3.0, learning_rate=5e-3)
    told = run(made)
    assert told["plugged_in"]["all"] < told["zero_shot"]["all"]
    found = json.loads((tmp_path / "result" / "results.json").read_text())
    assert [len(one["used"]) for one in found["rounds"]] == [3, 3]
    assert [one["norms"] for one in found["rounds"]] == [{}, {}]
    assert not list((tmp_path / "work" / "registry" / "bundles").iterdir())
    assert not list((tmp_path / "work" / "clients").glob("*/work/round-*/sealed"))


def test_a_client_that_drops_out_of_a_secure_round_is_left_out(settings, tmp_path):
    made = settings(secure=True, share_a=True, rounds=1, clip=3.0, threshold=2)
    with broken(made, break_client="bert"):
        run(made)
    found = json.loads((tmp_path / "result" / "results.json").read_text())
    assert sorted(found["rounds"][0]["used"]) == ["anna", "cora"]
    assert "DataError" in found["rounds"][0]["left_out"]["bert"]


@pytest.mark.parametrize(
    "changes", [{"tune": {"batch_size": 4}}, {"lora_rank": 3}, {"adapter": "rslora"}, {"clients": "others"}]
)
def test_a_work_folder_keeps_to_what_it_was_made_with(settings, texts, tmp_path, changes):
    prepared(settings())
    if "clients" in changes:
        (tmp_path / "other.jsonl").write_text('{"text": "a"}\n')
        changes = {"clients": {**texts[0], "bert": str(tmp_path / "other.jsonl")}}
    with pytest.raises(ConfigError, match="was set up with other settings"):
        prepared(settings(**changes))


@pytest.mark.parametrize("step", ["create_job", "seal_run", "open_run", "staged_file"])
def test_making_ready_goes_on_where_it_broke_off(settings, step, monkeypatch):
    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"server.federation.simulation.{step}", stop)
        with pytest.raises(KeyboardInterrupt):
            prepared(settings())
    config, made = prepared(settings())
    assert (len(config.jobs), sorted(made)) == (3, ["anna", "bert", "cora"])
    assert prepared(settings()) == (config, made)


def test_a_private_round_of_nobody_is_noise_alone(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("server.federation.federation.drawn", lambda clients, rate: ())
    told = run(settings(noise_multiplier=0.5, clip=0.5, delta=0.01, rounds=1, fraction=0.5, min_clients=1))
    found = json.loads((tmp_path / "result" / "results.json").read_text())
    assert found["rounds"][0]["used"] == []
    assert told["plugged_in"]["all"] != told["zero_shot"]["all"]


def test_noise_on_factors_that_updates_would_not_keep_is_refused(settings, tmp_path):
    with pytest.raises(ConfigError, match="have no factors B to put noise on"):
        run(settings(noise_multiplier=0.5, delta=0.01, share_a=True, lora_rank=17, targets="attention"))
