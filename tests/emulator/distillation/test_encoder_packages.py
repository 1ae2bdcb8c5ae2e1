"""Packages of encoders: made without training, opened without code, and what would need next tokens is refused."""

from __future__ import annotations

import pytest
import torch
from encoders_lab import saved, separating_tokenizer

from offsite import cli
from offsite.artefacts.package import open_package
from offsite.encoders.outputs import outputs
from offsite.encoders.trunk import is_encoder
from offsite.modelling.load import load_model

FAMILIES = ("bert", "deberta-v2")


@pytest.fixture
def public(tmp_path):
    """Some hundred short sentences that are alike."""
    path = tmp_path / "public.txt"
    organs, beings = ("heart", "liver", "lung", "eye"), ("cats", "dogs", "people")
    path.write_text(
        "\n\n".join(f"The {a} of {b} is known by its {c}." for a in organs for b in beings for c in "abcdefgh")
    )
    return path


def distil(checkpoint, out, public, *words):
    stated = ["--public", str(public), "--block-tokens", "32", "--batch-size", "8", "--device", "cpu"]
    stated += ["--calibration-tokens", "1024"]
    return cli.run(["distill", str(checkpoint), "-o", str(out), "--bottom", "1", "--top", "1", *stated, *words])


def states(model, public):
    """Return what the model makes of lines of the text, padded to one length."""
    tokenizer = separating_tokenizer()
    tokenizer.pad_token_id = model.config.pad_token_id
    batch = tokenizer(public.read_text().split("\n\n")[::7], padding=True, return_tensors="pt")
    with torch.no_grad():
        return outputs(model, batch["input_ids"], batch["attention_mask"])[batch["attention_mask"].bool()]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_client_opens_is_what_was_made(name, tmp_path, public, capsys):
    """Nothing dropped: equal to the bit. Half the channels, refitted: nearer than half the channels as they were."""
    checkpoint = saved(tmp_path / name, name, separating_tokenizer())
    full = states(load_model(str(checkpoint), encoders=True), public)
    ways = {"whole": ("--width", "1"), "narrow": ("--width", "0.5")}
    ways["plain"] = ("--width", "0.5", "--channels", "activation", "--no-refit")
    found = {}
    for way, words in ways.items():
        assert distil(checkpoint, tmp_path / way, public, "--steps", "0", *words) == 0, capsys.readouterr().err
        package = open_package(tmp_path / way)
        model = package.load_model()
        assert is_encoder(model)
        assert package.layout.num_middle == 4
        found[way] = float((states(model, public) - full).norm())
    assert found["whole"] == 0
    assert 0 < found["narrow"] < found["plain"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "--refit-jacobian 1 --elevate 0.1 --steps 4",
            "--refit-jacobian and --elevate would need scores of next tokens",
        ),
        ("--field-text FIELD", "'bert' is an encoder: --field-text would need scores of next tokens"),
        ("--steps 4 --kl-share 0.5", "--kl-share: of an encoder KL is taken at the masked tokens"),
    ],
)
def test_what_needs_next_tokens_is_refused_before_a_weight_is_read(words, told, tmp_path, public, capsys):
    checkpoint = saved(tmp_path / "bert", "bert", separating_tokenizer())
    (checkpoint / "model.safetensors").write_bytes(b"no weights")
    assert distil(checkpoint, tmp_path / "package", public, *words.replace("FIELD", str(public)).split()) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "package").exists()
