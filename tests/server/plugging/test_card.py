"""The card of an adapted folder: what it says, and that it says it in YAML and Markdown that others can read."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import yaml

from offsite.artefacts.bundle import AdapterSpec
from offsite.errors import ConfigError
from server.plugging.card import Card, require_results
from server.plugging.fullmodel import FullModel
from server.plugging.ways import Way

DIGEST = "sha256:" + "a" * 64
PLAIN = {"name": "adapted", "form": "peft", "base": FullModel("example/llama"), "base_digest": DIGEST}


def card(**changes):
    return Card(**{**PLAIN, "adapter": AdapterSpec(kind="lora"), **changes}).text()


def header(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_the_header_names_base_licence_and_library():
    assert header(card(licence="Apache-2.0")) == {
        "license": "apache-2.0",
        "base_model": "example/llama",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["offsite-tuning", "lora"],
    }
    told = header(card(licence="ours: ask | us", form="merged", base=FullModel("llama", "folder")))
    assert (told["license"], told["license_name"], told["library_name"]) == ("other", "ours: ask | us", "transformers")
    assert "base_model" not in told
    assert header(card())["license"] == "other"


def test_what_was_measured_is_told_and_nothing_else():
    assert "moves the logits by | 0.12 of" in card(effect=0.1234, deviation=0.0)
    assert "moves the logits" not in card()
    assert "share of the update | 0.5" in card(way=Way(0.5))
    assert "| plugged in | 0.5 of mlp, spared where public text uses" in card(way=Way.parse("mlp=0.5,spare=2"))
    assert "Figures" not in card()
    rows = {name: SimpleNamespace(perplexity=SimpleNamespace(mean=mean)) for name, mean in ROWS.items()}
    results = SimpleNamespace(rows=rows, data=SimpleNamespace(num_tokens=12345))
    text = card(results=results)
    assert "12,345 tokens" in text
    assert "| zero-shot: the base model | 12.97 |" in text
    assert "| plugged in | 11.02 |" in text


ROWS = {"zero_shot": 12.9711, "emulator_tuned": 25.6, "plugged_in": 11.02}


@pytest.mark.parametrize(
    ("form", "kind", "words", "without"),
    [
        ("peft", "lora", ["PeftModel.from_pretrained(base", "--enable-lora"], []),
        ("peft", "dora", ["PeftModel.from_pretrained(base"], ["vllm"]),
        ("merged", "lora", ['from_pretrained("adapted")', "vllm serve adapted"], ["peft", "--enable-lora"]),
        ("own", "blocks", ["offsite serve adapted --base example/llama"], ["```python"]),
    ],
)
def test_the_use_fits_the_form(form, kind, words, without):
    used = card(form=form, adapter=AdapterSpec(kind=kind)).split("## Use")[1]
    assert all(word in used for word in words)
    assert not any(word in used for word in without)


def test_results_of_something_else_are_refused():
    bundles = {"tuned": SimpleNamespace(digest="sha256:" + "b" * 64)}
    results = SimpleNamespace(base_digest=DIGEST, bundles=bundles, scale=1.0, way="", spare_text="", corrected=False)
    right = {"base_digest": DIGEST, "bundle_digest": "sha256:" + "b" * 64, "way": Way()}
    assert require_results(results, **right) is results
    for change, words in (
        ({"base_digest": "sha256:" + "c" * 64}, "another full model"),
        ({"bundle_digest": "sha256:" + "c" * 64}, "not of this bundle"),
        ({"way": Way(0.5)}, "they are of all of the update, here it is 0.5 of the update"),
        ({"way": Way(mix=0.7)}, "here it is 0.7 of the probabilities"),
        ({"spare_text": "sha256:" + "c" * 64}, "other public text was spared"),
        ({"corrected": True}, "corrected where this is not, or the reverse"),
    ):
        with pytest.raises(ConfigError, match=words):
            require_results(results, **{**right, **change})
