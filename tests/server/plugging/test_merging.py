"""Merged checkpoints that are written a weight at a time: against the whole model in memory, and broken off."""

import hashlib
import json
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from offsite.artefacts.owner import owner_record_path, read_owner_record
from offsite.errors import ConfigError
from offsite.modelling.load import load_model
from server.evaluation.candidates import read_own
from server.plugging import merging
from server.plugging.adapted import load_adapted
from server.plugging.fit import fit, plug
from server.plugging.plug import merge
from server.plugging.shares import taken
from server.plugging.ways import Way

SMALL = {"vocab_size": 259, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {**SMALL, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
SHAPES = {
    "llama": WIDE,
    "gpt2": {**SMALL, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 64, "n_inner": 96},
    "mixtral": {**WIDE, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4},
}


@pytest.fixture(scope="module")
def sides(tmp_path_factory, make_package, letters_tokenizer):
    """Per architecture: the folder of a checkpoint in bfloat16 and in shards, and a package of it."""
    made = {}

    def get(architecture):
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture)
            torch.manual_seed(2)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **SHAPES[architecture]))
            model.to(torch.bfloat16).save_pretrained(folder / "base", max_shard_size="100KB")
            letters_tokenizer.save_pretrained(folder / "base")
            assert len(list((folder / "base").glob("*.safetensors"))) > 2
            full = load_model(str(folder / "base"))
            package = make_package(folder / "package", model=full, kept=(0, 2, 3), ends=(1, 1))
            made[architecture] = folder / "base", package
        return made[architecture]

    return get


def digests(folder, names):
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


@pytest.fixture
def small_pages(monkeypatch):
    """Tensors of one page are let go of, too."""
    monkeypatch.setattr("offsite.mapped.LEAST_BYTES", 4096)


@pytest.mark.parametrize(
    ("architecture", "kind", "scale"),
    [
        ("llama", "lora", "1"),
        ("llama", "dora", "1"),
        ("llama", "bitfit", "0.5"),
        ("llama", "blocks", "0.5"),
        ("gpt2", "rslora", "attention=0.5,mlp=0.25"),
        ("mixtral", "lora", "1"),
    ],
)
def test_it_writes_the_bytes_that_the_whole_model_in_memory_gives(
    plug_in, sides, make_bundle, small_pages, monkeypatch, tmp_path, architecture, kind, scale
):
    full, package = sides(architecture)
    bundle = make_bundle(tmp_path / "bundle", package, kind=kind, placement="1+1")
    monkeypatch.setattr(merging, "SHARD_SIZE", "150KB")
    plug_in(full, bundle, tmp_path / "adapted", package=package.path, merge=True, scale=scale)
    record = read_owner_record(owner_record_path(package.path))
    model = load_model(str(full))
    adapter = taken(model, fit(model, read_own(bundle, record), record), Way.parse(scale), ())
    merge(plug(model, adapter)).save_pretrained(tmp_path / "whole", max_shard_size="150KB")
    names = [path.name for path in (tmp_path / "whole").iterdir()]
    assert len([name for name in names if name.endswith(".safetensors")]) > 1
    assert digests(tmp_path / "adapted", names) == digests(tmp_path / "whole", names)
    stated = json.loads((tmp_path / "adapted" / "offsite.json").read_text())["files"]
    assert set(stated) == {path.name for path in (tmp_path / "adapted").iterdir()} - {"offsite.json"}


@pytest.mark.parametrize("merged", [False, True])
def test_a_missing_shard_is_told_before_the_bundle_is_read(plug_in, sides, make_bundle, monkeypatch, tmp_path, merged):
    full, package = sides("llama")
    bundle = make_bundle(tmp_path / "bundle", package, kind="lora", placement="1+1")
    for path in full.iterdir():
        (tmp_path / "base" / path.name).parent.mkdir(exist_ok=True)
        (tmp_path / "base" / path.name).write_bytes(path.read_bytes())
    sorted((tmp_path / "base").glob("*.safetensors"))[-1].unlink()
    monkeypatch.setattr("server.plugging.plug.read_registered", lambda *_: pytest.fail("the bundle was read"))
    with pytest.raises(ConfigError, match=r"lacks 1 of its .* weight files") as caught:
        plug_in(tmp_path / "base", bundle, tmp_path / "adapted", package=package.path, merge=merged)
    assert caught.value.hint
    assert not (tmp_path / "adapted").exists()


def test_merged_weights_of_a_run_that_failed_are_gone_and_the_next_succeeds(
    plug_in, sides, make_bundle, monkeypatch, tmp_path
):
    full, package = sides("llama")
    bundle = make_bundle(tmp_path / "bundle", package, kind="lora", placement="1+1")
    out = tmp_path / "out"
    out.mkdir()
    seen = []

    spill = merging._spill

    def stop(path, parameters):
        spill(path, parameters)
        seen.extend(out.rglob("*.safetensors"))
        if len(seen) > 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(merging, "_spill", stop)
        with pytest.raises(KeyboardInterrupt):
            plug_in(full, bundle, out / "adapted", package=package.path, merge=True)
    assert seen
    assert not list(out.iterdir())
    assert plug_in(full, bundle, out / "adapted", package=package.path, merge=True)["merged"]


@pytest.mark.slow
def test_killed_at_random_points_it_leaves_nothing_half_written(sides, make_bundle, shelve, tmp_path):
    full, package = sides("llama")
    bundle = make_bundle(tmp_path / "bundle", package, kind="lora", placement="1+1")
    named = shelve(bundle.path, package.path, tmp_path / "shelf")
    words = ["plug-in", str(full), named["id"], "--registry", str(named["registry"]), "--keys", str(named["keys"])]
    out = tmp_path / "out"
    command = [sys.executable, "-m", "offsite", *words, "--merge", "-o", str(out / "adapted")]
    draw, kills = random.Random(15), 0
    while kills < 4:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and not list(out.glob(".adapted*")) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.6))
        process.kill()
        killed = process.wait() == -signal.SIGKILL
        if not killed:  # it was done before
            break
        kills += 1
        assert not (out / "adapted").exists() or load_adapted(out / "adapted")
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert kills
    assert found.returncode == 0 or "already exists" in found.stderr, found.stderr[-500:]
    assert [path.name for path in out.iterdir() if not path.name.endswith(".base.json")] == ["adapted"]
    model, _ = load_adapted(out / "adapted")
    assert model.dtype == torch.bfloat16
