"""Levels, bits and products of encoded tensors, each against an oracle worked out here."""

from __future__ import annotations

import math

import pytest
import torch

from offsite.artefacts.encodings import BITS, Encoding, decode, levels, pack_codes, unpack_codes
from offsite.errors import BadSchema, NotFinite, WrongShape
from offsite.tensors import TensorSpec

# QLoRA, arXiv:2305.14314, appendix E, to the digits that its rounded offset is good for.
NF4 = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]


def test_nf4_is_the_papers():
    assert levels("nf4") == pytest.approx(NF4, abs=2e-6)


def test_nf3_is_made_of_quantiles_of_the_normal():
    """By bisection of the error function: no library's quantile."""

    def quantile(p: float) -> float:
        low, high = -9.0, 9.0
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if (1 + math.erf(middle / math.sqrt(2))) / 2 < p else (low, middle)
        return low

    top = 1 - (1 / 16 + 1 / 14) / 2
    upper = [quantile(top - (top - 0.5) * i / 4) for i in range(4)]
    lower = [-quantile(top - (top - 0.5) * i / 3) for i in range(3)]
    wanted = [value / upper[0] for value in (*lower, 0.0, *reversed(upper))]
    assert levels("nf3") == pytest.approx(wanted, abs=1e-7)
    assert sorted(levels("nf3")) == list(levels("nf3"))


@pytest.mark.parametrize(("packing", "num"), [("int8", 255), ("int4", 15)])
def test_integers_are_symmetric(packing, num):
    first, *rest = levels(packing)
    assert math.isnan(first)
    assert rest == [float(i) for i in range(-(num // 2), num // 2 + 1)]


@pytest.mark.parametrize("packing", list(BITS))
@pytest.mark.parametrize("num", [1, 2, 7, 8, 9, 24, 25])
def test_codes_are_a_run_of_bits_from_the_lowest_on(packing, num):
    bits = BITS[packing]
    codes = torch.randint(2**bits, (num,), generator=torch.Generator().manual_seed(num), dtype=torch.uint8)
    packed = pack_codes(codes, packing)
    wanted = sum(code << (bits * i) for i, code in enumerate(codes.tolist()))
    assert bytes(packed.tolist()) == wanted.to_bytes(-(-num * bits // 8), "little")
    assert torch.equal(unpack_codes(packed, num, packing), codes)


def test_packed_by_hand():
    """Three rows of 33 columns, groups of 32: the second scale of a row is for its last entry alone."""
    encoding = Encoding(kind="int4", group=32)
    codes = torch.full((3, 33), 9, dtype=torch.uint8)  # one step up
    codes[1, 32] = 15  # seven steps up
    scales = torch.tensor([[1.0, 2.0], [0.5, 0.25], [0.0, 4.0]], dtype=torch.bfloat16)
    spec = TensorSpec(shape=(3, 33), dtype="float32")
    found = decode("w", spec, encoding, {"codes": pack_codes(codes, "int4"), "scales": scales})
    wanted = torch.tensor([[1.0] * 32 + [2.0], [0.5] * 32 + [1.75], [0.0] * 32 + [4.0]])
    assert torch.equal(found, wanted)
    turned = decode(
        "w",
        TensorSpec(shape=(33, 3), dtype="float16"),
        Encoding(kind="int4", group=32, turned=True),
        {"codes": pack_codes(codes, "int4"), "scales": scales},
    )
    assert torch.equal(turned, wanted.T.half())


def test_low_rank_is_a_product_of_each_matrix_of_a_stack():
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(2, 5, 3, generator=generator).bfloat16()
    right = torch.randn(2, 3, 4, generator=generator).bfloat16()
    spec = TensorSpec(shape=(2, 5, 4), dtype="float32")
    encoding = Encoding(kind="low-rank", rank=3)
    assert {key: one.shape for key, one in encoding.parts("w", spec).items()} == {
        "left": (2, 5, 3),
        "right": (2, 3, 4),
    }
    found = decode("w", spec, encoding, {"left": left, "right": right})
    torch.testing.assert_close(found, torch.einsum("eor,eri->eoi", left.float(), right.float()))


@pytest.mark.parametrize(
    "stated",
    [
        {"kind": "nf2", "group": 64},
        {"kind": "nf4"},
        {"kind": "nf4", "group": 48},
        {"kind": "nf4", "group": 64, "rank": 3},
        {"kind": "nf4", "group": 64, "factors": "nf4"},
        {"kind": "low-rank"},
        {"kind": "low-rank", "rank": -1},
        {"kind": "low-rank", "rank": 3, "group": 64},
        {"kind": "low-rank", "rank": 3, "factors": "nf4"},
        {"kind": "low-rank", "rank": 3, "code": "import os"},
    ],
)
def test_what_an_encoding_may_not_state(stated):
    with pytest.raises(ValueError, match=r"Input|group|rank|Extra"):
        Encoding.model_validate(stated)


@pytest.mark.parametrize(
    ("spec", "stated", "error"),
    [
        ({"shape": (8, 6), "dtype": "float32"}, {"kind": "low-rank", "rank": 7}, WrongShape),
        ({"shape": (8,), "dtype": "float32"}, {"kind": "low-rank", "rank": 1}, WrongShape),
        ({"shape": (2, 2, 8, 6), "dtype": "float32"}, {"kind": "nf4", "group": 64}, WrongShape),
        ({"shape": (-8, 6), "dtype": "float32"}, {"kind": "nf4", "group": 64}, WrongShape),
        ({"shape": (8, 6), "dtype": "int64"}, {"kind": "nf4", "group": 64}, BadSchema),
        ({"shape": (8, 6), "dtype": "object"}, {"kind": "nf4", "group": 64}, BadSchema),
    ],
)
def test_what_cannot_be_encoded(spec, stated, error):
    with pytest.raises(error):
        Encoding.model_validate(stated).parts("w", TensorSpec(**spec))


def _nf3():
    codes = torch.zeros(4, 10, dtype=torch.uint8)
    return {"codes": pack_codes(codes, "nf3"), "scales": torch.ones(4, 1, dtype=torch.bfloat16)}


def _int8():
    return {"codes": torch.full((40,), 128, dtype=torch.uint8), "scales": torch.ones(4, 1, dtype=torch.bfloat16)}


def _factors():
    return {"left": torch.ones(4, 2, dtype=torch.bfloat16), "right": torch.ones(2, 10, dtype=torch.bfloat16)}


def _set(parts, key, index, value):
    parts[key].view(-1)[index] = value
    return parts


@pytest.mark.parametrize(
    ("encoding", "parts", "error", "words"),
    [
        (Encoding(kind="nf3", group=64), _set(_nf3(), "scales", 1, math.inf), NotFinite, "scales"),
        (Encoding(kind="nf3", group=64), _set(_nf3(), "scales", 1, -1.0), BadSchema, "negative"),
        (Encoding(kind="nf3", group=64), _set(_nf3(), "scales", slice(0, 4), 1e-39), BadSchema, "subnormal"),
        (Encoding(kind="nf3", group=64), _set(_nf3(), "codes", -1, 255), None, ""),  # 40 codes fill 15 bytes
        (Encoding(kind="int8", group=64), _set(_int8(), "codes", 3, 0), BadSchema, "codes hold one that int8"),
        (Encoding(kind="low-rank", rank=2), _set(_factors(), "left", 0, math.nan), NotFinite, "left"),
        (
            Encoding(kind="low-rank", rank=2),
            {"left": torch.full((4, 2), 1e30).bfloat16(), "right": torch.full((2, 10), 1e30).bfloat16()},
            NotFinite,
            "holds NaN or infinity",
        ),
        (
            Encoding(kind="low-rank", rank=2),
            {"left": torch.full((4, 2), 1e-20).bfloat16(), "right": torch.full((2, 10), 1e-20).bfloat16()},
            BadSchema,
            "subnormal",
        ),
    ],
)
def test_what_is_refused_while_decoding(encoding, parts, error, words):
    spec = TensorSpec(shape=(4, 10), dtype="float32")
    if error is None:
        assert torch.isfinite(decode("w", spec, encoding, parts)).all()
        return
    with pytest.raises(error, match=words):
        decode("w", spec, encoding, parts)


def test_bits_after_the_last_code_are_zero():
    spec = TensorSpec(shape=(3, 3), dtype="float32")
    parts = {"codes": pack_codes(torch.zeros(9, dtype=torch.uint8), "nf3"), "scales": torch.ones(3, 1).bfloat16()}
    assert decode("w", spec, Encoding(kind="nf3", group=64), parts).eq(-1).all()
    parts["codes"][-1] |= 128
    with pytest.raises(BadSchema, match="after the last code"):
        decode("w", spec, Encoding(kind="nf3", group=64), parts)


def test_a_value_beyond_the_declared_dtype_is_refused():
    parts = {"left": torch.full((4, 2), 1e4).bfloat16(), "right": torch.full((2, 10), 1e4).bfloat16()}
    encoding = Encoding(kind="low-rank", rank=2)
    assert decode("w", TensorSpec(shape=(4, 10), dtype="float32"), encoding, parts).isfinite().all()
    with pytest.raises(NotFinite):
        decode("w", TensorSpec(shape=(4, 10), dtype="float16"), encoding, parts)
