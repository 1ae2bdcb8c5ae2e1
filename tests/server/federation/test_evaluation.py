"""The full model with what rounds added: the same as with the adapter plugged in, and afterwards as it was."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch

from adapters.norms import adapted_names, base_tensors
from adapters.updates import combined, dense, lifted, update_of
from offsite.artefacts.owner import owner_record_path, read_owner_record
from offsite.digests import model_digest
from offsite.errors import ArtefactError, ConfigError, NotFinite, WrongNames, WrongShape
from server.federation.evaluation import Watch, better, grown_model, state_digest, write_adapted
from server.federation.results import require_own, results_of
from server.federation.state import SHARED
from server.plugging.adapted import load_adapted, open_adapted
from server.plugging.fit import fit, plugged
from server.registry.verify import adapter_tensors, verify_own


@pytest.fixture
def narrow(narrow_package, make_bundle, tmp_path):
    """A drawn adapter of the package that keeps only some channels: its update and its verified tensors."""

    def make(package=narrow_package, **spec):
        record = read_owner_record(owner_record_path(package.path))
        bundle = make_bundle(tmp_path / "bundle", package, shake=0.05, **spec)
        spec = bundle.manifest.adapter
        tensors = bundle.load_tensors(adapter_tensors(spec, record))
        names = adapted_names(spec, record.layout, record.block_tensors)
        update = update_of(spec, tensors, base_tensors(package, names))
        return update, verify_own("it", bundle.manifest, tensors, record, bundle_digest=bundle.digest), record

    return make


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "lora", "rank": 2, "placement": "all"},
        {"kind": "rslora", "rank": 2, "placement": "all", "targets": "mlp"},
        {"kind": "blocks", "placement": "2+1"},
        {"kind": "bitfit", "placement": "2+2"},
    ],
    ids=lambda spec: spec["kind"],
)
def test_lifted_it_computes_what_the_adapter_plugged_in_does(spec, narrow, full_llama, logits_of):
    update, verified, record = narrow(**spec)
    model = copy.deepcopy(full_llama)
    before, plain = state(model), logits_of(model)
    with grown_model(model, update, record) as grown:
        found = logits_of(grown)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits_of(model), plain)
    with plugged(copy.deepcopy(full_llama), fit(copy.deepcopy(full_llama), verified, record)) as other:
        wanted = logits_of(other)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert float((found - plain).abs().max()) > 1e-2


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_on_every_kept_block_it_lands_on_the_full_models_own(kind, narrow, kept_package, full_llama, logits_of):
    update, verified, record = narrow(kept_package, kind=kind, rank=2, placement="all")
    found = lifted(full_llama, update, record)
    assert {int(name.split(".")[1]) for name in found if name.startswith("middle.")} == {0, 1}
    plain = [block.mlp.up_proj.weight.clone() for block in full_llama.model.layers]
    with grown_model(full_llama, update, record) as grown:
        pairs = zip(grown.model.layers, plain, strict=True)
        changed = {i for i, (block, before) in enumerate(pairs) if not torch.equal(block.mlp.up_proj.weight, before)}
        logits = logits_of(grown)
    with plugged(copy.deepcopy(full_llama), fit(copy.deepcopy(full_llama), verified, record)) as other:
        torch.testing.assert_close(logits, logits_of(other), rtol=1e-4, atol=1e-4)
    assert changed == {0, 1, 2, 5, 6, 7}


def test_channels_that_were_left_out_stay_as_they_are(narrow, full_llama, narrow_channels):
    update, _, record = narrow(kind="lora", rank=2, placement="all", targets="mlp")
    found = lifted(full_llama, update, record)
    for number in range(4):
        rows = set(range(48)) - set(narrow_channels[f"middle.{number}"])
        part = dense(found[f"middle.{number}.mlp.up_proj.weight"])
        assert part.shape == (48, 32)
        assert not part[sorted(rows)].any()
        assert part[list(narrow_channels[f"middle.{number}"])].any()


def test_whatever_happens_the_model_is_as_it_was(narrow, full_llama):
    update, _, record = narrow(kind="lora", rank=2, placement="all")
    model = copy.deepcopy(full_llama)
    before = state(model)
    with pytest.raises(KeyboardInterrupt), grown_model(model, update, record):
        raise KeyboardInterrupt
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    half = copy.deepcopy(full_llama).half()
    before = state(half)
    huge = {name: torch.full_like(dense(part), 1e6) for name, part in update.items()}
    huge = {name: (dense(update[name]) if number == 0 else part) for number, (name, part) in enumerate(huge.items())}
    with pytest.raises(NotFinite), grown_model(half, huge, record):
        pass
    assert all(torch.equal(tensor, before[name]) for name, tensor in half.state_dict().items())


def test_what_is_measured_is_rounded_as_it_is_stored(narrow, full_llama):
    update, _, record = narrow(kind="lora", rank=2, placement="1+1")
    model = copy.deepcopy(full_llama)
    stored = {name: torch.bfloat16 for name, _ in model.named_parameters()}
    with grown_model(model, update, record) as exact:
        wanted = {name: parameter.detach().clone() for name, parameter in exact.named_parameters()}
    with grown_model(model, update, record, stored=stored) as found:
        for name, parameter in found.named_parameters():
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, wanted[name].bfloat16().float())


def test_an_update_of_another_model(narrow, full_llama):
    update, _, record = narrow(kind="lora", rank=2, placement="1+1")
    with pytest.raises(WrongNames, match="has no parameter"):
        lifted(full_llama, {"top.1.mlp.gate.weight": torch.zeros(2, 2)}, record)
    with pytest.raises(WrongNames, match="in no block"):
        lifted(full_llama, {"model.embed_tokens.weight": torch.zeros(259, 32)}, record)
    name = next(iter(update))
    with pytest.raises(WrongShape):
        lifted(full_llama, {name: torch.zeros(3, 3)}, record)


def test_what_is_watched_is_the_state_and_the_model_stays(federated):
    held = federated.folder / "held.jsonl"
    held.write_text(json.dumps({"text": "anna 3 anna and bert"}) + "\n")
    with federated.opened(heldout={"all": str(held)}, block_tokens=16) as federation:
        watch = Watch(federation)
        before = state(watch.model)
        federated.round(federation, 1, size=0.2)
        found = watch(1)
        assert found.keys() == {"all"}
        assert found["all"] != watch.zero_shot["all"]
        assert watch(1) is found
        assert all(torch.equal(tensor, before[name]) for name, tensor in watch.model.state_dict().items())
        whole = dict(federation.states)
        federation.states = {}
        assert watch(2) == {}
        federation.states = whole
        assert watch(3) == found
    assert better({"all": 2.0, "other": 2.0}, {"all": 2.0, "all by anna": 1.0, "other": float("nan")}) == [
        "all",
        "other",
    ]


@pytest.mark.parametrize("name", ["held-out file", "model"])
def test_what_cannot_be_watched(federated, name, tmp_path, save_model, full_llama):
    changes = {"heldout": {"all": "nowhere.jsonl"}}
    if name == "model":
        other = copy.deepcopy(full_llama)
        other.model.layers[0].mlp.up_proj.weight.data += 1
        changes = {"model": str(save_model(other, tmp_path / "other"))}
    with (
        federated.opened(**changes) as federation,
        pytest.raises((ConfigError, ArtefactError), match=r"nowhere|the federation belongs to"),
    ):
        Watch(federation)


def test_the_adapted_model_is_the_base_with_the_sum(federated, full_llama, logits_of):
    with federated.opened() as federation:
        federated.round(federation, 1, size=0.2)
        out = federated.folder / "adapted"
        digest = write_adapted(federation, out)
        manifest = open_adapted(out)
        assert (manifest.merged_digest, manifest.bundle_digest) == (digest, state_digest(federation.states[SHARED]))
        from offsite.modelling.load import load_model

        model = load_model(str(out))
        assert model_digest(model) == digest
        with grown_model(copy.deepcopy(full_llama), federation.states[SHARED], federation.record) as grown:
            torch.testing.assert_close(logits_of(model), logits_of(grown), rtol=1e-5, atol=1e-5)
        with pytest.raises(ConfigError, match="already exists"):
            write_adapted(federation, out)


def test_a_state_s_digest_is_of_what_it_does(narrow):
    update, _, _ = narrow(kind="lora", rank=2, placement="1+1")
    same = {name: dense(part) for name, part in reversed(list(update.items()))}
    assert state_digest(same) == state_digest(update)
    assert state_digest(combined([update], [1.001])) != state_digest(update)
    name = next(iter(update))
    assert state_digest({k: v for k, v in update.items() if k != name}) != state_digest(update)


def test_a_row_s_text_is_told_from_its_client_whatever_they_are_called():
    zero_shot = {"a": 9.0, "a by b": 5.0}
    assert better(zero_shot, {"a": 8.0, "a by b": 6.0}) == ["a by b"]
    assert better(zero_shot, {"a by c by d": 8.0, "a by b by c": 4.0}) == []


def share_by_hand(word, name):
    return word if word == 0.5 else 0.8 * (0.25 if name.startswith("top.") else 1)


@pytest.mark.parametrize("word", [0.5, "attention=0.8,top=0.25"])
def test_a_share_is_of_what_is_measured_and_written_and_rounds_go_on_from_the_whole_sum(
    word, federated, full_llama, logits_of
):
    held = federated.folder / "held.jsonl"
    held.write_text(json.dumps({"text": "anna 3 anna and bert"}) + "\n")
    settings = {"heldout": {"all": str(held)}, "block_tokens": 16}
    with federated.opened(**settings) as federation:
        federated.round(federation, 1, size=0.2)
        whole, sums = Watch(federation)(1), dict(federation.states)
    with federated.opened(**settings, scale=word) as federation:
        assert federation.states.keys() == sums.keys()
        for name, part in sums[SHARED].items():
            torch.testing.assert_close(dense(federation.states[SHARED][name]), dense(part), rtol=0, atol=0)
        scores = Watch(federation)(1)
        out = federated.folder / "adapted"
        write_adapted(federation, out)
        manifest = open_adapted(out)
        assert (str(manifest.plugged), manifest.bundle_digest) == (str(word), state_digest(sums[SHARED]))
        by_hand = {name: dense(part) * share_by_hand(word, name) for name, part in sums[SHARED].items()}
        with grown_model(copy.deepcopy(full_llama), by_hand, federation.record) as grown:
            expected = logits_of(grown)
            torch.testing.assert_close(logits_of(load_adapted(out)[0]), expected, rtol=1e-5, atol=1e-5)
        assert scores["all"] != whole["all"]
        assert results_of(federation, {}, {})["way"] == str(word)
        federation.config.output.mkdir(parents=True, exist_ok=True)
        (federation.config.output / "results.json").write_text(json.dumps({"federation_id": federation.store.id}))
        shutil.copytree(out, federation.config.output / "adapted")
        require_own(federation)
    with federated.opened(**settings) as federation, pytest.raises(ConfigError, match="here it is all of the update"):
        require_own(federation)


def test_a_share_of_what_the_adapter_does_not_change_is_refused_before_the_first_round(federated):
    with (
        pytest.raises(ConfigError, match="--scale: mlp: the adapter changes nothing"),
        federated.opened(scale="mlp=1e-1"),
    ):
        pass
