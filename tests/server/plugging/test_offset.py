"""The logit offset: the formula over three models, with and without a cache, and what may not be moved by it."""

from __future__ import annotations

import copy
import math
import shutil

import pytest
import torch
from transformers import LlamaForCausalLM

from offsite.artefacts.owner import owner_record_path, read_owner_record
from offsite.digests import model_digest
from offsite.errors import ArtefactError, ConfigError, PolicyError, WrongBinding
from offsite.evaluation.measure import perplexity
from offsite.modelling import head
from offsite.modelling.steps import Steps, cache_is_right
from offsite.text.batches import Example
from server.evaluation.candidates import read_own
from server.plugging.fit import plugged
from server.plugging.mixing import mixture
from server.plugging.offset import (
    Offset,
    load_offset,
    moved,
    offset_by,
    on_emulator,
    open_offset,
    require_same_tokens,
    stay_offset,
)
from server.registry.registry import Registry

IDS = [5, 30, 7, 200, 11, 90, 42, 17]


@pytest.fixture(scope="module")
def other_llama(full_llama):
    """A full model that no package was made of: other weights, more blocks."""
    torch.manual_seed(5)
    config = copy.deepcopy(full_llama.config)
    config.num_hidden_layers = 9
    config.layer_types = None
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
    return model


@pytest.fixture
def offset_of(dropped_package, make_bundle, tmp_path):
    def make(kind, beta=0.5, emulator=None):
        bundle = make_bundle(tmp_path / kind, dropped_package, kind=kind, shake=0.3)
        verified = read_own(bundle, read_owner_record(owner_record_path(dropped_package.path)))
        return Offset(emulator or dropped_package.load_model(), on_emulator(dropped_package, verified), beta)

    return make


def scores(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()


def by_hand(model, offset, ids=IDS):
    """Three models, one after another."""
    full, untuned = scores(model, ids), scores(offset.emulator, ids)
    with plugged(offset.emulator, offset.adapter) as one:
        return full + offset.beta * (scores(one, ids) - untuned)


def test_the_formula():
    full, tuned, untuned = torch.tensor([[1.0, 2.0, -30.0], [0.0, 9.0, 4.0], [0.5, 9.5, 2.0]])[:, None]
    torch.testing.assert_close(moved(full, tuned, untuned, 0.5), torch.tensor([[0.75, 1.75, -29.0]]))
    assert moved(full.bfloat16(), tuned, untuned, 0.5).dtype == torch.float32
    hidden = torch.tensor([-math.inf, 1.0, 2.0])
    assert moved(full[0], hidden, hidden, 2.0).tolist() == full[0].tolist()


@pytest.mark.parametrize("kind", ["lora", "blocks"])
def test_another_full_model_is_moved_with_and_without_a_cache_and_both_are_themselves_afterwards(
    kind, other_llama, offset_of, capsys
):
    offset = offset_of(kind, 0.7)
    before = [model_digest(model) for model in (other_llama, offset.emulator)]
    expected = by_hand(other_llama, offset)
    assert not torch.allclose(expected, scores(other_llama), atol=1e-2)
    with offset_by(other_llama, offset) as one:
        torch.testing.assert_close(scores(one), expected, rtol=0, atol=1e-4)
        assert cache_is_right(one, batch_size=2)
        steps = Steps(one, torch.tensor([IDS[:3]]), cached=True)
        found = [steps.logits()[0].double()]
        for token in IDS[3:]:
            steps.add(torch.tensor([token]))
            found.append(steps.logits()[0].double())
    torch.testing.assert_close(torch.stack(found), expected[2:], rtol=0, atol=1e-4)
    assert [model_digest(model) for model in (other_llama, offset.emulator)] == before
    assert not {"forward", "before_head"} & vars(other_llama).keys()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("way", ["offset", "mix"])
def test_perplexity_is_that_of_all_passes_and_holds_a_few_positions_at_a_time(way, other_llama, offset_of, monkeypatch):
    offset = offset_of("lora")
    largest = []
    monkeypatch.setattr(head, "_ELEMENTS_AT_ONCE", 1)
    monkeypatch.setattr(head, "_FEWEST_ROWS", 3)
    monkeypatch.setattr(
        head, "wide", lambda one, real=head.wide: largest.append(len(one)) or real(one)
    )  # every chunk of scores passes it
    rows = [Example(IDS, IDS), Example(IDS[::-1], IDS[::-1])]
    if way == "offset":
        expected = [by_hand(other_llama, offset, row.input_ids) for row in rows]
        with offset_by(other_llama, offset) as one:
            found = perplexity(one, rows, batch_size=2, pad_id=0)
    else:
        expected = []
        for row in rows:
            with plugged(offset.emulator, offset.adapter) as one:
                on = scores(one, row.input_ids)
            expected.append(mixture(scores(offset.emulator, row.input_ids), on, 0.5).double())
        with plugged(offset.emulator, offset.adapter, mix=0.5) as one:
            found = perplexity(one, rows, batch_size=2, pad_id=0)
    chosen = [
        torch.log_softmax(one, -1)[:-1].gather(1, torch.tensor(row.input_ids[1:])[:, None])
        for one, row in zip(expected, rows, strict=True)
    ]
    assert found.loss == pytest.approx(-float(torch.cat(chosen).mean()), rel=1e-5)
    assert max(largest) <= 3


def test_a_model_that_stays_moved_may_be_cast_and_has_no_loss(other_llama, offset_of):
    offset = offset_of("blocks")
    model, expected = copy.deepcopy(other_llama), by_hand(other_llama, offset)
    stay_offset(model, offset)
    torch.testing.assert_close(scores(model.double()), expected, rtol=0, atol=1e-3)
    assert {parameter.dtype for parameter in offset.emulator.parameters()} == {torch.float64}
    with pytest.raises(ConfigError, match="no loss"):
        model(input_ids=torch.tensor([IDS]), labels=torch.tensor([IDS]))


def test_other_tokens_are_refused_before_any_weights_are_read(
    dropped_package, full_llama, llama_folder, letters_tokenizer, tmp_path
):
    def folder(name, **config):
        found = shutil.copytree(llama_folder, tmp_path / name)
        (found / "model.safetensors").unlink()
        changed = copy.deepcopy(full_llama.config)
        changed.update(config)
        changed.save_pretrained(found)
        return found

    require_same_tokens(str(folder("same")), dropped_package)
    with pytest.raises(ConfigError, match="llama with 300 tokens, the emulator llama with 259"):
        require_same_tokens(str(folder("wider", vocab_size=300)), dropped_package)
    text = folder("mistral")
    config = (text / "config.json").read_text()
    (text / "config.json").write_text(config.replace('"model_type": "llama"', '"model_type": "mistral"'))
    with pytest.raises(ConfigError, match="mistral with 259"):
        require_same_tokens(str(text), dropped_package)
    swapped = folder("swapped")
    stored = (swapped / "tokenizer.json").read_text()
    (swapped / "tokenizer.json").write_text(
        stored.replace('"!": 3,', '"!": 4,', 1).replace('"\\"": 4,', '"\\"": 3,', 1)
    )
    with pytest.raises(ConfigError, match="another tokenizer"):
        require_same_tokens(str(swapped), dropped_package)


def test_a_bundle_is_opened_as_plug_in_opens_it(
    shelve, make_bundle, dropped_package, whole_package, llama_folder, full_llama, tmp_path
):
    bundle = make_bundle(tmp_path / "bundle", dropped_package, kind="lora")
    named = shelve(bundle.path, dropped_package.path, tmp_path / "shelf")
    with Registry.open(named["registry"], named["keys"]) as registry:
        package, verified = open_offset(str(llama_folder), dropped_package.path, named["id"], registry)
        assert (package.digest, verified.bundle_digest) == (dropped_package.digest, bundle.digest)
        offset = load_offset(package, verified, full_llama, 0.5)
        model, expected = copy.deepcopy(full_llama), by_hand(full_llama, offset)
        with offset_by(model, offset) as one:
            torch.testing.assert_close(scores(one), expected, rtol=0, atol=1e-4)
        with pytest.raises(WrongBinding, match="was tuned on package"):
            open_offset(str(llama_folder), whole_package.path, named["id"], registry)
        with pytest.raises(ConfigError):
            open_offset(str(llama_folder), dropped_package.path, "0" * 12, registry)
        kept = registry.bundle_folder(named["id"]) / "adapter.safetensors"
        raw = bytearray(kept.read_bytes())
        raw[-1] ^= 1
        kept.chmod(0o600)
        kept.write_bytes(raw)
        with pytest.raises(ArtefactError):
            open_offset(str(llama_folder), dropped_package.path, named["id"], registry)
        registry.refuse(named["id"])
        with pytest.raises(ArtefactError, match="refused"):
            open_offset(str(llama_folder), dropped_package.path, named["id"], registry)
    waiting = shelve(bundle.path, dropped_package.path, tmp_path / "waiting", state="verified")
    with (
        Registry.open(waiting["registry"], waiting["keys"]) as registry,
        pytest.raises(PolicyError, match="not accepted"),
    ):
        open_offset(str(llama_folder), dropped_package.path, waiting["id"], registry)
