"""Shares by kind of module and by part of the model, against weights moved by hand."""

from __future__ import annotations

import pytest
import torch

from adapters.updates import dense, update_of
from offsite.artefacts.owner import owner_record_path, read_owner_record
from offsite.errors import ConfigError
from offsite.modelling.load import load_model
from server.evaluation.candidates import read_own
from server.plugging.fit import fit, plug
from server.plugging.plug import merge
from server.plugging.shares import require_way, shared, shared_update, shares
from server.plugging.ways import Way

WAY = Way.parse("attention=0.5,mlp=0.75,top=0.4")


def share_by_hand(path):
    """Llama's own names: blocks 0 and 1 are the bottom, 6 and 7 the top."""
    share = 0.75 if ".mlp." in path else 0.5
    return share * (0.4 if int(path.split(".")[2]) >= 6 else 1)


@pytest.mark.parametrize("kind", ["lora", "rslora", "blocks", "bitfit"])
def test_every_weight_goes_its_own_share_of_the_way(kind, dropped_package, make_bundle, llama_folder, logits_of,
                                                    tmp_path):  # fmt: skip
    bundle = make_bundle(tmp_path / "bundle", dropped_package, kind=kind)
    record = read_owner_record(owner_record_path(dropped_package.path))
    verified = read_own(bundle, record)
    model = load_model(str(llama_folder), dtype="float32")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole = fit(model, verified, record)
    after = merge(plug(load_model(str(llama_folder), dtype="float32"), whole)).state_dict()
    moved = {
        name: value + (share_by_hand(name) if ".layers." in name else 1) * (after[name] - value)
        for name, value in before.items()
    }
    way = Way.parse("attention=0.5,top=0.4") if kind == "bitfit" else WAY  # llama has no vector in its MLP
    found = shared(model, whole, way)
    assert found.spec == whole.spec
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.float32}
    state = merge(plug(model, found)).state_dict()
    assert any(not torch.allclose(moved[name], before[name], atol=1e-4) for name in moved)
    for name, value in moved.items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=1e-5)


def test_of_lora_the_factors_b_change_and_a_share_of_all_stays_in_alpha(dropped_package, full_llama, make_bundle,
                                                                        tmp_path):  # fmt: skip
    bundle = make_bundle(tmp_path / "bundle", dropped_package, kind="lora", dtype="bfloat16")
    record = read_owner_record(owner_record_path(dropped_package.path))
    whole = fit(full_llama, read_own(bundle, record), record)
    found = shared(full_llama, whole, Way.parse("mlp=0.5"))
    for name, tensor in whole.tensors.items():
        if name.endswith("lora_B") and ".mlp." in name:
            assert torch.equal(found.tensors[name], tensor.float() / 2)
        else:
            assert found.tensors[name] is tensor
    half = shared(full_llama, whole, Way(0.5))
    assert half.spec.alpha == whole.spec.alpha / 2
    assert half.tensors is whole.tensors
    assert shared(full_llama, whole, Way(mix=0.5)) is whole


@pytest.mark.parametrize(("word", "told"), [("middle=0.5", "middle"), ("mlp=0.5", "mlp")])
def test_a_share_that_names_nothing_is_refused(word, told, dropped_package, full_llama, make_bundle, tmp_path):
    bundle = make_bundle(tmp_path / "bundle", dropped_package, kind="lora", targets="attention")
    record = read_owner_record(owner_record_path(dropped_package.path))
    whole = fit(full_llama, read_own(bundle, record), record)
    with pytest.raises(ConfigError, match=f"--scale: {told}: the adapter changes nothing there"):
        shared(full_llama, whole, Way.parse(word))


@pytest.mark.parametrize("word", ["mlp=0.5", "0.5", "spare=1"])
def test_dora_takes_no_part_of_a_way_but_the_mixing(word, dropped_package, make_bundle, tmp_path):
    spec = make_bundle(tmp_path / "bundle", dropped_package, kind="dora").manifest.adapter
    with pytest.raises(ConfigError, match="a dora adapter is plugged in whole or not"):
        require_way(spec, Way.parse(word))
    require_way(spec, Way(mix=0.5))


def test_a_sum_of_many_updates_takes_the_same_shares(dropped_package, full_llama, make_bundle, tmp_path):
    bundle = make_bundle(tmp_path / "bundle", dropped_package, kind="lora")
    record = read_owner_record(owner_record_path(dropped_package.path))
    verified = read_own(bundle, record)
    names = {name.rpartition(".")[0] for name in verified.tensors}
    state = full_llama.state_dict()
    base = {f"{name}.weight": state[f"{record.sites['.'.join(name.split('.')[:2])]}.{name.split('.', 2)[2]}.weight"]
            for name in names}  # fmt: skip
    update = update_of(verified.spec, verified.tensors, base)
    found = shared_update(full_llama, update, record.sites, WAY)
    share_of = shares(full_llama, record.sites, list(update), WAY)
    assert {round(share, 9) for share in share_of.values()} == {0.5, 0.75, 0.2, 0.3}
    for name, part in update.items():
        torch.testing.assert_close(dense(found[name]), share_of[name] * dense(part), rtol=1e-5, atol=1e-8)
    half = shared_update(full_llama, update, record.sites, Way(0.5))
    torch.testing.assert_close(dense(half[name]), dense(part) / 2)
    assert shared_update(full_llama, update, record.sites, Way()) is update
