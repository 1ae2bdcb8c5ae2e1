from __future__ import annotations

import torch
from torch import nn

from offsite.modelling.dtypes import finer, kept_in_float32, main_dtype, stored_in

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


class Routed(nn.Module):
    """What an architecture says of itself."""

    _keep_in_fp32_modules = ["norm"]
    _keep_in_fp32_modules_strict = {"gate.*.bias"}


def test_the_main_dtype_is_that_of_most_numbers():
    assert main_dtype([(F32, 10), (F32, 10), (BF16, 30), (torch.int64, 10**6)]) is BF16
    assert main_dtype([(torch.int64, 5)]) is F32
    assert main_dtype([]) is F32


def test_what_an_architecture_keeps_depends_on_the_half():
    names = ["a.gate.score.bias", "a.norm.weight", "a.linear.weight"]
    assert kept_in_float32(Routed(), names, BF16) == {"a.gate.score.bias"}
    assert kept_in_float32(Routed(), names, F16) == {"a.gate.score.bias", "a.norm.weight"}
    assert kept_in_float32(Routed(), names, F32) == set()
    assert kept_in_float32(nn.Linear(1, 1), names, F16) == set()


def test_what_stays_finer():
    stored = {"w": (BF16, 100), "gate.x.bias": (BF16, 1), "b": (F32, 2), "d": (F64, 2), "n": (torch.int64, 9)}
    assert finer(Routed(), stored, BF16) == {"gate.x.bias": F32, "b": F32, "d": F64}
    assert finer(Routed(), stored, F32) == {"d": F64}
    assert finer(Routed(), {**stored, "w": (F32, 100)}, BF16) == {"gate.x.bias": F32, "d": F64}


def test_what_is_stored_is_what_would_be_saved():
    module = nn.BatchNorm1d(3)
    module.register_buffer("derived", torch.zeros(2), persistent=False)
    assert set(stored_in(module)) == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert stored_in(module)["weight"] == (F32, 3)
