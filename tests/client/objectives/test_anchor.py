"""The anchor: a divergence worked out here from two models, its gradient, and public text as rows."""

from __future__ import annotations

import pytest
import torch

from adapters.kinds import attach, declared
from client.objectives.anchor import Anchor, public_batches
from offsite.artefacts.bundle import AdapterSpec
from offsite.errors import ConfigError

IDS = torch.tensor([[5, 17, 200, 3, 44, 90], [9, 8, 77, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])


def attached_to(package, kind):
    spec = AdapterSpec(kind=kind, placement="1+1", rank=2, dtype="float32", dropout=0.5 if kind == "lora" else 0.0)
    names = declared(spec, package.layout, package.block_tensors())
    return attach(package.load_model(), spec, package.layout.blocks, names)


def moved(attached, scale):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in attached.trainable.values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return attached


def by_hand(untuned, tuned):
    """Sum of p (log p - log q), by probabilities in float64, a row and a position at a time."""
    total = 0.0
    for ids, mask in zip(IDS, MASK, strict=True):
        length = int(mask.sum())
        p, q = (model(input_ids=ids[None, :length]).logits[0].double().softmax(-1) for model in (untuned, tuned))
        for position in range(length):
            total = total + (p[position] * (p[position] / q[position]).log()).sum()
    return total


@pytest.mark.parametrize("kind", ["lora", "dora", "blocks", "bitfit"])
def test_it_is_the_divergence_from_the_package_as_it_came(dropped_package, kind):
    untuned = dropped_package.load_model().eval()
    attached = attached_to(dropped_package, kind)
    anchor = Anchor(attached)
    attached.model.train()
    at_first = anchor.divergence(attached.model, IDS, MASK)
    assert float(at_first.detach()) == pytest.approx(0, abs=1e-5)
    at_first.backward()
    gradients = [parameter.grad for parameter in attached.trainable.values() if parameter.grad is not None]
    assert all(float(gradient.norm()) < 1e-4 for gradient in gradients)

    moved(attached, 0.05)
    found = anchor.divergence(attached.model, IDS, MASK)
    assert attached.model.training
    attached.model.eval()
    expected = by_hand(untuned, attached.model)
    assert float(expected.detach()) > 0.01
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)

    wanted = torch.autograd.grad(expected, list(attached.trainable.values()))
    for parameter in attached.trainable.values():
        parameter.grad = None
    found.backward()
    for parameter, gradient in zip(attached.trainable.values(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient.float(), rtol=2e-3, atol=1e-5)


def test_public_text_is_short_rows_filled_across_documents(letters_tokenizer, tmp_path):
    path = tmp_path / "web.txt"
    path.write_text("\n\n".join(f"what stands on page {number} is public" for number in range(40)))
    given = {"batch_size": 3, "num_known": 259, "seed": 5}
    batches = public_batches(path, letters_tokenizer, block_tokens=200, **given)
    assert batches.batch(0)["input_ids"].shape == (3, 128)
    assert public_batches(path, letters_tokenizer, block_tokens=32, **given).batch(4)["input_ids"].shape == (3, 32)
    assert torch.equal(batches.batch(7)["input_ids"], batches.batch(7)["input_ids"])
    with pytest.raises(ConfigError, match=r"--anchor: the package's tokenizer gives token \d+, its model knows 20"):
        public_batches(path, letters_tokenizer, block_tokens=32, **{**given, "num_known": 20})
