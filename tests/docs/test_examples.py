"""The examples run as they stand, on a tiny random model: two companies, by hand and over HTTP.

Flower's simulation needs Ray, so that of its example only what is ours is held: who a simulated node is, and its app.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forked import offsite_script
from transformers import LlamaConfig, LlamaForCausalLM

EXAMPLES = Path(__file__).parent.parent.parent / "examples" / "two-companies"
SIMULATION = EXAMPLES.parent / "flower-simulation"


@pytest.fixture
def small(tmp_path: Path, letters_tokenizer) -> dict[str, str]:
    """What the scripts read from the environment: a tiny model, short texts, few steps."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=259, max_position_embeddings=64, **sizes, **special))
    model.save_pretrained(tmp_path / "model")
    letters_tokenizer.save_pretrained(tmp_path / "model")
    for name in ("public", "private"):
        rows = [f"{name} case {number}: rest and water for {number % 9} days" for number in range(60)]
        (tmp_path / f"{name}.txt").write_text("\n\n".join(rows) + "\n")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    return {
        "MODEL": str(tmp_path / "model"),
        "PUBLIC": str(tmp_path / "public.txt"),
        "PRIVATE": str(tmp_path / "private.txt"),
        "DISTILL": "--width 0.5 --steps 0 --block-tokens 32 --calibration-tokens 512 --evaluation-tokens 128",
        "TUNE": "--steps 2 --block-tokens 32",
        "WHERE": str(tmp_path / "both"),
        "PORT": str(port),
    }


@pytest.fixture(scope="module")
def scripts() -> Iterator[Path]:
    with offsite_script() as folder:
        yield folder


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("way", ["by-hand", "over-http"])
def test_two_companies(way: str, small: dict[str, str], scripts: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([str(scripts), str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **small}
    done = subprocess.run(
        ["bash", str(EXAMPLES / f"{way}.sh")],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    owner, client = tmp_path / "both" / "owner", tmp_path / "both" / "client"
    assert (owner / "adapted" / "adapter_model.safetensors").is_file()
    assert not {"private.txt", "bundle"} & {path.name for path in owner.iterdir()}
    assert not {"registry", "package.owner.json"} & {path.name for path in client.iterdir()}
    secret = (owner / "passphrase").read_text().strip()
    assert secret not in done.stdout + done.stderr


def simulation_module(name: str):
    spec = importlib.util.spec_from_file_location(f"example_{name}", SIMULATION / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_simulated_node_answers_as_its_own_client(tmp_path: Path, monkeypatch) -> None:
    from flwr.app import Context, RecordDict

    import client.federation.flower

    monkeypatch.setattr(client.federation.flower, "app", lambda message, context: context.node_config["client"])
    (tmp_path / "nodes.json").write_text(json.dumps(["anna.json", "bert.json"]))
    answers = [
        simulation_module("simulated").app(
            "a message",
            Context(
                run_id=1,
                node_id=7 + number,
                node_config={"partition-id": number, "num-partitions": 2},
                state=RecordDict(),
                run_config={"nodes": str(tmp_path / "nodes.json")},
            ),
        )
        for number in (1, 0)
    ]
    assert answers == ["bert.json", "anna.json"]


def test_the_simulations_app_names_what_is_there() -> None:
    app = tomllib.loads((SIMULATION / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    module, _, name = app["components"]["serverapp"].partition(":")
    assert hasattr(importlib.import_module(module), name)
    assert app["components"]["clientapp"] == "simulated:app"
    assert set(app["config"]) == {"federation", "nodes"}  # a run's configuration may name no other key
    assert "run_simulation" not in "".join(path.read_text() for path in SIMULATION.glob("*.py"))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_simulations_superlink_is_there_meanwhile_and_gone_afterwards(tmp_path: Path) -> None:
    simulate = simulation_module("simulate")
    with simulate.superlink(tmp_path / "home") as env:
        assert env["FLWR_TELEMETRY_ENABLED"] == "0"
        settings = tomllib.loads((tmp_path / "home" / "config.toml").read_text())["superlink"]["simulation"]
        host, _, port = settings["address"].partition(":")
        assert host == "127.0.0.1"
        listed = subprocess.run(
            [simulate.program("flwr"), "ls", "simulation"], env=env, capture_output=True, text=True, check=False
        )
        assert listed.returncode == 0, listed.stdout + listed.stderr
    with socket.socket() as probe:
        assert probe.connect_ex((host, int(port))) != 0
