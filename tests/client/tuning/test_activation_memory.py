"""Activations are computed twice where a step would not fit, and only there; the run is the same."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

import client.tuning.tune as module
from adapters.kinds import attach, declared
from client.objectives.tokens import next_token_loss
from client.tuning.verb import run
from offsite.artefacts.bundle import AdapterSpec
from offsite.text.batches import Example, collate
from offsite.training.devices import free_bytes
from offsite.training.memory import activation_bytes, fits

LORA = {"adapter": "lora", "learning_rate": 0.02}


class Squares(nn.Module):
    """Keeps its input and one product for the backward pass, and a weight that is its own anyway."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16, 16))

    def forward(self, hidden):
        return (hidden @ self.weight).square()


def test_a_storage_counts_once_and_the_model_s_own_weights_do_not() -> None:
    batch = {"input_ids": torch.ones(8, 16)}
    found = activation_bytes(Squares(), batch, lambda model, part: (model(part["input_ids"]).sum(), 1), nullcontext)
    assert found == 2 * 8 * 16 * 4


def test_more_rows_keep_more_and_nothing_is_changed(dropped_package) -> None:
    spec = AdapterSpec(kind="lora", dropout=0.1)
    names = declared(spec, dropped_package.layout, dropped_package.block_tensors())
    attached = attach(dropped_package.load_model(dtype="float32"), spec, dropped_package.layout.blocks, names)
    rows = [Example(row, row) for row in ([5, 6, 7, 8, 9, 4, 3, 2], [9, 8, 7, 6, 5, 4, 3, 2])]
    state = torch.get_rng_state()
    one, two = (
        activation_bytes(attached.model, collate(rows[:num], 0), next_token_loss, nullcontext) for num in (1, 2)
    )
    assert 1.8 * one < two < 2.2 * one
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in attached.model.parameters())


def test_only_a_step_that_does_not_fit_is_computed_twice(
    settings, dropped_package, tmp_path, monkeypatch, capsys
) -> None:
    plain = run(settings(dropped_package.path, output=tmp_path / "plain", **LORA))
    assert "computed twice" not in capsys.readouterr().err
    monkeypatch.setattr(module, "free_bytes", lambda _device: 1000)
    short = run(settings(dropped_package.path, output=tmp_path / "short", **LORA))
    assert "activations of a step would take" in capsys.readouterr().err
    assert short["bundle_digest"] == plain["bundle_digest"]
    run(settings(dropped_package.path, output=tmp_path / "never", gradient_checkpointing=False, **LORA))
    assert "computed twice" not in capsys.readouterr().err


@pytest.mark.parametrize(("num_bytes", "free", "expected"), [(80, 100, True), (81, 100, False), (1 << 60, None, True)])
def test_a_fifth_of_what_is_free_is_left_to_others(num_bytes, free, expected) -> None:
    assert fits(num_bytes, free) is expected


def test_free_memory_is_a_number_here() -> None:
    found = free_bytes(torch.device("cpu"))
    assert found is None or found > 1 << 20
