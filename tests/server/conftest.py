"""What the server's tests share: a model's scores on fixed tokens, and plugging in of what was accepted."""

from __future__ import annotations

import secrets

import pytest
import torch
from speakers import bytes_tokenizer, parrot, spread_llama  # noqa: F401 - fixtures


def _checkpoint_logits(model):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 250, (2, 12), generator=generator)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


@pytest.fixture(scope="session")
def logits_of():
    """Logits of a model on fixed tokens that are not those of plug-in's own probe."""
    return _checkpoint_logits


@pytest.fixture
def plug_in(shelve, tmp_path):
    """Run the verb on a bundle that was accepted; `package` is where its job says it is."""
    from server.plugging.config import PlugConfig
    from server.plugging.plug import run

    def put_in(model, bundle, out, *, package, **settings):
        named = shelve(bundle.path, package, tmp_path / f"shelf-{secrets.token_hex(4)}")
        return run(PlugConfig(model=str(model), output=out, **named, **settings))

    return put_in
