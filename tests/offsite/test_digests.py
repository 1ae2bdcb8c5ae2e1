from __future__ import annotations

import hashlib
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from offsite.digests import DIGEST_PATTERN, model_digest, sha256_bytes, sha256_file, tensors_digest


def test_file_and_bytes_agree_with_hashlib(tmp_path):
    data = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(data)
    assert sha256_file(tmp_path / "file") == sha256_bytes(data) == "sha256:" + hashlib.sha256(data).hexdigest()
    assert re.fullmatch(DIGEST_PATTERN, sha256_bytes(b""))


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    found = {"b.weight": torch.randn(3, 4), "a": torch.arange(5), "empty": torch.empty(0, 3)}
    return {**found, "flag": torch.tensor(True), "half": torch.randn(2, 2).to(torch.bfloat16)}


def test_order_and_memory_layout_do_not_count(tensors):
    other = dict(reversed(tensors.items()))
    other["b.weight"] = tensors["b.weight"].T.contiguous().T
    assert not other["b.weight"].is_contiguous()
    assert tensors_digest(other) == tensors_digest(tensors)


@pytest.mark.parametrize("changed", ["value", "name", "dtype", "shape", "missing", "sign of zero"])
def test_everything_else_counts(tensors, changed):
    before = tensors_digest(tensors)
    weight = tensors.pop("b.weight")
    if changed == "sign of zero":
        before = tensors_digest({**tensors, "b.weight": torch.zeros(2)})
    variants = {
        "value": {"b.weight": weight + 1e-6},
        "name": {"b.weights": weight},
        "dtype": {"b.weight": weight.view(torch.int32)},
        "shape": {"b.weight": weight.reshape(4, 3)},
        "missing": {},
        "sign of zero": {"b.weight": -torch.zeros(2)},
    }
    assert tensors_digest({**tensors, **variants[changed]}) != before


def test_two_equal_tensors_are_not_one():
    one = torch.ones(2)
    assert tensors_digest({"a": one, "b": one.clone()}) != tensors_digest({"a": one, "b": one})


def test_a_model_has_one_digest_before_and_after_saving(full_llama, tmp_path):
    full_llama.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model_digest(again) == model_digest(full_llama)
    with torch.no_grad():
        again.model.layers[5].mlp.up_proj.weight[0, 0] += 1e-3
    assert model_digest(again) != model_digest(full_llama)
