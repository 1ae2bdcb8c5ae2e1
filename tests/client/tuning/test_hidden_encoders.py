"""Below an adapter on the top of an encoder nothing is computed twice, and its head says the same."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from checkpoints_lab import distill
from encoders_lab import saved, separating_tokenizer

from client.tuning.hidden import kept_states
from client.tuning.tune import attach_to_package
from offsite.artefacts.bundle import AdapterSpec, Head
from offsite.artefacts.package import open_package
from offsite.evaluation.heads import head_scores
from offsite.text.batches import Example, collate

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.mark.parametrize(("changes", "is_kept"), [(STILL, True), ({}, False)])
def test_states_are_kept_where_they_are_a_function_of_the_row(changes, is_kept, tmp_path):
    """With dropout they are not, and every pass computes them."""
    checkpoint = saved(tmp_path / "bert", "bert", separating_tokenizer(), **changes)
    assert distill(checkpoint, tmp_path / "package") == 0
    head = Head(task="classify", labels=("a", "b"), hidden=32, encoder="bert")
    spec = AdapterSpec(kind="lora", placement="0+1", rank=2, head=head)
    attached = attach_to_package(open_package(tmp_path / "package"), spec, device=torch.device("cpu"))
    for parameter in attached.trainable.values():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    attached.model.eval()
    rows = [Example(list(range(1, length)), list(range(1, length))) for length in (7, 12, 9)]
    batch = {key: one for key, one in collate(rows, 0).items() if key != "labels"}
    with torch.no_grad():
        plain = head_scores(attached.model, batch, pad_id=0)
        settings = {"folder": tmp_path / "states", "limit_bytes": 2**20, "binding": {}, "autocast": nullcontext}
        with kept_states(attached, rows, pad_id=0, **settings) as kept:
            assert (kept is not None) == is_kept
            again = head_scores(attached.model, batch, pad_id=0)
    assert torch.equal(again, plain) != is_kept  # rounded to bfloat16 where kept
    torch.testing.assert_close(again, plain, atol=0.05, rtol=0.05)
