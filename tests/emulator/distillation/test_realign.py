"""Realigning an emulator with the model that a federation's rounds have made."""

from __future__ import annotations

import json

import pytest
import torch

from adapters.norms import adapted_names
from adapters.updates import LowRank, dense, from_tensors, to_tensors
from emulator.distillation.realign import run
from emulator.distillation.realignconfig import RealignConfig
from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.round import EMULATOR_FILE, ROUND_FORMAT, RoundManifest, open_round, write_round
from offsite.errors import ConfigError, WrongBinding
from offsite.tensors import read_header, read_tensors


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    path = tmp_path_factory.mktemp("public") / "text.txt"
    path.write_text("\n\n".join(f"the number {number} is {number * number % 97} here" for number in range(200)))
    return path


@pytest.fixture
def make_round(tmp_path, narrow_package):
    """A round whose earlier ones moved the ends by a good deal."""
    spec = AdapterSpec(kind="lora", placement="2+2", rank=2)

    def make(package=narrow_package, *, emulator=None, out="round"):
        names = adapted_names(spec, package.layout, package.block_tensors())
        generator = torch.Generator().manual_seed(1)
        update = {}
        for name in names:
            rows, columns = package.block_tensors()[name].shape
            a, b = (torch.randn(size, generator=generator) for size in ((2, columns), (rows, 2)))
            update[name] = LowRank(a, 0.05 * b)
        manifest = RoundManifest(
            format=ROUND_FORMAT, federation_id="0" * 32, round=2, num_rounds=3, package_digest=package.digest,
            base_digest=package.manifest.base_digest, adapter=spec, steps=5,
        )  # fmt: skip
        return write_round(tmp_path / out, manifest, update=to_tensors(update), emulator=emulator)

    return make


def settings(tmp_path, package, round_, llama_folder, public, **changes):
    given = {"steps": 12, "learning_rate": 3e-3, "block_tokens": 32, "batch_size": 8, "evaluation_tokens": 512}
    return RealignConfig(
        package=package.path, round=round_.path, model=str(llama_folder), public=public, output=tmp_path / "out",
        precision="fp32", device="cpu", **{**given, **changes},
    )  # fmt: skip


def test_what_came_no_nearer_is_not_sent(tmp_path, narrow_package, make_round, llama_folder, public, capsys):
    told = run(settings(tmp_path, narrow_package, make_round(), llama_folder, public, steps=2, learning_rate=0.5))
    assert told["kl_after"] >= told["kl_before"]
    assert told["is_better"] is False
    assert not (tmp_path / "out" / EMULATOR_FILE).exists()
    assert json.loads((tmp_path / "out" / "figures.json").read_text())["is_better"] is False
    assert "the emulator stays as it was" in capsys.readouterr().err


def test_the_emulator_comes_nearer(tmp_path, narrow_package, make_round, llama_folder, public):
    told = run(settings(tmp_path, narrow_package, make_round(), llama_folder, public))
    assert told["kl_after"] < told["kl_before"]
    path = tmp_path / "out" / EMULATOR_FILE
    found = from_tensors("it", read_tensors(path, read_header(path)), narrow_package.block_tensors())
    assert all(name.startswith("middle.") for name in found)
    assert any(bool(dense(part).abs().max() > 0) for part in found.values())
    assert json.loads((tmp_path / "out" / "figures.json").read_text())["kl_after"] == told["kl_after"]
    assert not (tmp_path / "out.work").exists()


def test_it_goes_on_from_an_earlier_one(tmp_path, narrow_package, make_round, llama_folder, public):
    first = run(settings(tmp_path, narrow_package, make_round(), llama_folder, public))
    path = tmp_path / "out" / EMULATOR_FILE
    round_ = make_round(emulator=read_tensors(path, read_header(path)), out="second")
    assert open_round(round_.path).digest == round_.digest
    config = settings(tmp_path, narrow_package, round_, llama_folder, public).model_copy(
        update={"output": tmp_path / "again"}
    )
    assert run(config)["kl_before"] == pytest.approx(first["kl_after"], rel=1e-3)


def test_a_rank_is_kept_and_its_error_told(tmp_path, narrow_package, make_round, llama_folder, public):
    told = run(settings(tmp_path, narrow_package, make_round(), llama_folder, public, rank=1, steps=4))
    assert 0 < told["truncation_error"] < 1
    assert all(
        min(spec.shape) == 1 for spec in read_header(tmp_path / "out" / EMULATOR_FILE).values() if len(spec.shape) == 2
    )


def test_what_does_not_belong_together(tmp_path, narrow_package, dropped_package, whole_package, make_round,
                                       llama_folder, public, save_model, full_llama):  # fmt: skip
    with pytest.raises(WrongBinding, match="do not belong together"):
        run(settings(tmp_path, dropped_package, make_round(), llama_folder, public))
    with pytest.raises(ConfigError, match="nothing to realign"):
        run(settings(tmp_path, whole_package, make_round(whole_package, out="whole"), llama_folder, public))
    other = save_model(type(full_llama)(full_llama.config), tmp_path / "other")
    with pytest.raises(WrongBinding, match="not the model"):
        run(settings(tmp_path, narrow_package, make_round(out="third"), other, public))
    assert not (tmp_path / "out").exists()
