from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offsite.errors import ConfigError, NormTooLarge, PolicyError, RunFailed, WrongNames, WrongShape
from offsite.secagg.fixedpoint import BITS, Encoding, TensorShape, count_numbers, decode_tensors, encode_tensors

SHAPES = (TensorShape(name="w", shape=(2, 3)), TensorShape(name="b", shape=()), TensorShape(name="a", shape=(4,)))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("num", [1, 2, 3, 64, 1000])
@pytest.mark.parametrize("limit", [2.0**-40, 1e-3, 1.0, 3.7, 2.0**40])
def test_a_sum_of_values_at_the_limit_does_not_wrap_and_the_step_is_the_finest_that_allows_it(bits, num, limit):
    encoding = Encoding(limit, bits, num)
    for sign in (1, -1):
        one = encoding.encode(np.full(3, sign * limit))
        total = encoding.reduce(one * np.uint64(num))
        found = encoding.decode(total, num)
        assert abs(Fraction(found[0]) - sign * num * Fraction(limit)) <= num * Fraction(encoding.step) / 2
    most = min(2 ** (bits - 1) - 1, 2**53)
    assert num * encoding.largest <= most
    assert num * round(math.ldexp(limit, encoding.exponent + 1)) > most


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.floats(-3.0, 3.0), min_size=4, max_size=4), min_size=1, max_size=9),
    st.sampled_from(BITS),
)
def test_a_decoded_sum_is_off_by_at_most_half_a_step_for_each_value(rows, bits):
    encoding = Encoding(3.0, bits, 9)
    total = np.zeros(4, np.uint64)
    for row in rows:
        total = encoding.reduce(total + encoding.encode(np.array(row)))
    found = encoding.decode(total, len(rows))
    bound = len(rows) * Fraction(encoding.step) / 2
    for column in range(4):
        exact = sum(Fraction(row[column]) for row in rows)
        assert abs(Fraction(found[column]) - exact) <= bound


@pytest.mark.parametrize("bits", BITS)
def test_what_is_encoded_exactly_comes_back_exactly(bits):
    encoding = Encoding(4.0, bits, 5)
    values = np.arange(-4, 4.5, 0.5)
    assert np.array_equal(encoding.decode(encoding.encode(values), 1), values)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(wrong):
    with pytest.raises(RunFailed, match=r"^tensor 'x' holds NaN or infinity and is not sent$"):
        Encoding(1.0, 32, 2).encode(np.array([0.0, wrong]), "tensor 'x'")


@pytest.mark.parametrize("sign", [1, -1])
def test_a_value_beyond_the_limit_is_refused_and_not_told(sign):
    encoding = Encoding(0.7, 32, 2)
    encoding.encode(np.array([sign * 0.7]))
    with pytest.raises(PolicyError) as caught:
        encoding.encode(np.array([0.1, sign * np.nextafter(0.7, 1)]))
    assert str(caught.value) == "the vector holds a value beyond the agreed limit of 0.7 and is not sent"
    with pytest.raises(PolicyError) as caught:
        encoding.encode(np.array([0.123456]) * 1e300)
    assert "123456" not in str(caught.value)


@pytest.mark.parametrize(
    ("limit", "bits", "num", "said"),
    [
        (1.0, 16, 2, "bits is 16, expected one of 32, 48, 64"),
        (0.0, 32, 2, "limit is 0.0"),
        (-1.0, 32, 2, "limit is -1.0"),
        (math.nan, 32, 2, "limit is nan"),
        (math.inf, 32, 2, "limit is inf"),
        (1.0, 32, 0, "num_summands is 0"),
        (1.0, 32, 2**16 + 1, "num_summands is 65537"),
        (1e99, 7, 0, "bits is 7, expected one of 32, 48, 64; limit is 1e"),
    ],
)
def test_settings_out_of_range(limit, bits, num, said):
    with pytest.raises(ConfigError, match=said):
        Encoding(limit, bits, num)


@pytest.mark.parametrize("bits", BITS)
def test_a_sum_beyond_what_the_values_can_add_up_to_is_refused(bits):
    encoding = Encoding(1.0, bits, 4)
    for number in (2 * encoding.largest + 1, -2 * encoding.largest - 1):
        with pytest.raises(NormTooLarge, match="beyond what 2 values within 1 add up to"):
            encoding.decode(np.array([number % 2**bits], np.uint64), 2)
    with pytest.raises(ConfigError, match="a sum of 5 values"):
        encoding.decode(np.zeros(1, np.uint64), 5)


@pytest.mark.parametrize("bits", BITS)
def test_bytes_are_little_end_first_and_come_back(bits):
    encoding = Encoding(1.0, bits, 2)
    numbers = encoding.reduce(np.array([1, 2**64 - 1, 0x0102030405060708], np.uint64))
    raw = encoding.to_bytes(numbers)
    width = bits // 8
    assert raw == b"".join((int(n) % 2**bits).to_bytes(width, "little") for n in numbers)
    assert np.array_equal(encoding.from_bytes(raw), numbers)
    back = encoding.from_bytes(raw)
    back += np.uint64(1)  # storage of its own, and writable


def test_tensors_are_joined_in_the_declared_order():
    encoding = Encoding(8.0, 32, 2)
    tensors = {
        "a": torch.arange(4, dtype=torch.bfloat16),
        "w": -torch.arange(6.0).reshape(3, 2).T.contiguous().reshape(2, 3),
        "b": torch.tensor(0.5, dtype=torch.float64, requires_grad=True),
    }
    vector = encode_tensors(tensors, SHAPES, encoding)
    assert len(vector) == count_numbers(SHAPES) == 11
    values = encoding.decode(vector, 1)
    assert values.tolist() == [*tensors["w"].reshape(-1).tolist(), 0.5, 0, 1, 2, 3]
    back = decode_tensors(vector, SHAPES, encoding, 1)
    assert list(back) == ["w", "b", "a"]
    for name, tensor in tensors.items():
        assert back[name].dtype == torch.float64
        assert torch.equal(back[name], tensor.detach().double())


def sound():
    return {"w": torch.zeros(2, 3), "b": torch.zeros(()), "a": torch.zeros(4)}


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda t: t.pop("a"), WrongNames, "'a' is missing"),
        (lambda t: t.update(z=torch.zeros(1)), WrongNames, "'z' was not agreed upon"),
        (lambda t: t.update(w=torch.zeros(3, 2)), WrongShape, r"shape \(3, 2\) of float32, agreed was \(2, 3\)"),
        (lambda t: t.update(b=torch.zeros(1)), WrongShape, "'b'"),
        (lambda t: t.update(a=torch.zeros(4, dtype=torch.int64)), WrongShape, "of int64"),
        (lambda t: t.update(a=torch.full((4,), math.nan)), RunFailed, "tensor 'a'"),
        (lambda t: t.update(a=torch.full((4,), 9.0)), PolicyError, "tensor 'a'"),
    ],
)
def test_tensors_other_than_agreed(change, error, said):
    tensors = sound()
    change(tensors)
    with pytest.raises(error, match=said):
        encode_tensors(tensors, SHAPES, Encoding(8.0, 32, 2))


def test_a_sum_of_another_length_is_refused():
    with pytest.raises(WrongShape, match="a vector of 3 numbers, the agreed shapes have 11"):
        decode_tensors(np.zeros(3, np.uint64), SHAPES, Encoding(8.0, 32, 2), 1)
