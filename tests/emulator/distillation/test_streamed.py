"""Packages without training, made block by block: against the whole model in memory, broken off, and refused."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import emulator.distillation.distill as verb
from emulator.compression.activations import forward, on_device
from emulator.compression.finished import FinishedBlocks
from emulator.compression.passage import Passage
from emulator.distillation.config import DistillConfig
from offsite.config import build
from offsite.errors import ConfigError

METHODS = {
    "width": {"width": "0.4", "wider": "2:0.7"},
    "activation": {"channels": "activation", "refit": "false", "pack": "int8"},
    "influence": {"method": "drop", "blocks": "2", "choice": "influence"},
    "crash": {"method": "drop", "blocks": "2", "choice": "crash"},
    "low-rank": {"method": "low-rank", "pack": "nf4"},
    "packed": {"method": "packed", "pack": "nf3"},
    "keep-all": {"method": "keep-all"},
}
ENDS = {"bottom": "1", "top": "1"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny, tokenizer):
    """Checkpoints of a llama in bfloat16 and a gpt2, in shards."""
    made = {}
    for name, dtype in (("llama", torch.bfloat16), ("gpt2", torch.float32)):
        made[name] = tmp_path_factory.mktemp("models") / name
        tiny(name).to(dtype).save_pretrained(made[name], max_shard_size="40KB")
        tokenizer.save_pretrained(made[name])
        assert len(list(made[name].glob("*.safetensors"))) > 1
    return made


def settings(model: Path, text: Path, out: Path, **changes: object) -> DistillConfig:
    flags = {"model": str(model), "public": str(text), "output": str(out), "steps": "0", "device": "cpu", **ENDS}
    flags |= {"batch_size": "4", "block_tokens": "16", "calibration_tokens": "256", "precision": "fp32", **changes}
    return build(DistillConfig, flags=flags)


def written(out: Path) -> dict[str, str]:
    """Digests of the package's files and of its owner's record."""
    files = [*sorted(out.iterdir()), out.with_name(out.name + ".owner.json")]
    return {path.name.replace(out.name, ""): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@torch.no_grad()
def through_the_whole_model(self, block, watch):
    for batch in self._batches:
        here = on_device(batch, self._model.device)
        with watch(here):
            forward(self._model, here)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_it_is_what_the_whole_model_in_memory_gives(folders, public_file, tmp_path, monkeypatch, architecture, method):
    changes = {**METHODS[method]}
    monkeypatch.setattr("emulator.compression.passage.CARRIED_LIMIT_BYTES", 4096)
    verb.run(settings(folders[architecture], public_file, tmp_path / "streamed", **changes))
    monkeypatch.setattr(verb, "_is_streamed", lambda *_: False)
    monkeypatch.setattr(Passage, "run", through_the_whole_model)
    verb.run(settings(folders[architecture], public_file, tmp_path / "whole", **changes))
    assert written(tmp_path / "streamed") == written(tmp_path / "whole")
    assert not list(tmp_path.glob("*.work"))


@pytest.mark.parametrize(
    ("method", "keep"), [("width", "keep"), ("low-rank", "keep_tensors"), ("packed", "keep_tensors")]
)
def test_broken_after_a_block_it_goes_on_there_with_the_same_bytes(
    folders, public_file, tmp_path, monkeypatch, method, keep
):
    verb.run(settings(folders["llama"], public_file, tmp_path / "whole", **METHODS[method]))
    kept, original = [], getattr(FinishedBlocks, keep)

    def stopping(self, number, *more):
        found = original(self, number, *more)
        kept.append(number)
        if len(kept) == 2:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(FinishedBlocks, keep, stopping)
    config = settings(folders["llama"], public_file, tmp_path / "package", resume="true", **METHODS[method])
    with pytest.raises(KeyboardInterrupt):
        verb.run(config)
    assert not (tmp_path / "package").exists()
    verb.run(config)
    packed_again = [0, 1, 2, 3] if method == "low-rank" else []  # its factors are packed behind it
    assert kept == [0, 1, 2, 3, *packed_again]
    assert written(tmp_path / "package") == written(tmp_path / "whole")


def test_a_checkpoint_that_lacks_a_shard_is_refused_before_any_work(folders, public_file, tmp_path):
    model = shutil.copytree(folders["llama"], tmp_path / "model")
    gone = sorted(model.glob("*.safetensors"))[1]
    gone.unlink()
    num = len(list(model.glob("*.safetensors"))) + 1
    with pytest.raises(ConfigError, match=f"lacks 1 of its {num} weight files, such as '{gone.name}'") as caught:
        verb.run(settings(model, public_file, tmp_path / "package"))
    assert "copy or download" in str(caught.value.hint)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../x.safetensors"}}))
    with pytest.raises(ConfigError, match="does not say which files"):
        verb.run(settings(model, public_file, tmp_path / "package"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
@pytest.mark.parametrize("draw", range(3))
def test_killed_at_any_moment_it_ends_with_the_same_bytes(folders, public_file, tmp_path, draw):
    options = {**METHODS["width"], **({"pack": "nf4"} if draw else {})}
    began = time.monotonic()
    words = [sys.executable, "-m", "offsite", "distill", str(folders["llama"]), "--public", str(public_file)]
    for name, value in {"steps": "0", "device": "cpu", **ENDS, "batch_size": "4", "block_tokens": "16"}.items():
        words += [f"--{name.replace('_', '-')}", value]
    words += ["--calibration-tokens", "256", "--precision", "fp32", "--resume"]
    for name, value in options.items():
        words += [f"--{name}", value]
    subprocess.run([*words, "-o", str(tmp_path / "whole")], check=True, capture_output=True)
    lasts = time.monotonic() - began
    chance = random.Random(draw)
    for _ in range(3):
        process = subprocess.Popen([*words, "-o", str(tmp_path / "package")], stderr=subprocess.DEVNULL)
        time.sleep(lasts * chance.uniform(0.4, 0.95))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
        if (tmp_path / "package").exists():  # it was done before
            break
    else:
        subprocess.run([*words, "-o", str(tmp_path / "package")], check=True, capture_output=True)
    assert written(tmp_path / "package") == written(tmp_path / "whole")
