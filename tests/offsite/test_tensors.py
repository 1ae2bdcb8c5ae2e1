"""The header reader against well-formed files, a table of attacks, and files damaged at random."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from offsite.errors import ArtefactError, BadSchema, NotFinite, TooLarge, WrongNames, WrongShape
from offsite.tensors import (
    TensorSpec,
    check_dtype,
    check_exact,
    check_finite,
    read_header,
    read_tensors,
    spec_of,
    torch_dtype,
    write_tensors,
)

ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
ANY_NUMBER = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def pack(header: object, data: bytes = bytes(16), *, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


@pytest.fixture
def written(tmp_path):
    def write(content: bytes):
        path = tmp_path / "x.safetensors"
        path.write_bytes(content)
        return path

    return write


def test_a_written_file_reads_back(tmp_path):
    wide = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    found = {"a.b": wide[:, ::2], "c": wide.to(torch.bfloat16), "d": torch.tensor(7)}
    found["view"], found["t"] = wide[1], wide.T
    write_tensors(tmp_path / "x", found)
    specs = {name: spec_of(tensor) for name, tensor in found.items()}
    assert read_header(tmp_path / "x") == specs
    again = read_tensors(tmp_path / "x", specs)
    assert all(torch.equal(again[name], tensor) for name, tensor in found.items())


def test_only_what_the_tensor_shows_is_written(tmp_path):
    secret = torch.full((1000,), 42.0)
    write_tensors(tmp_path / "x", {"part": secret[:2]})
    assert (tmp_path / "x").stat().st_size < 200


ATTACKS = {
    "empty file": (b"", BadSchema),
    "shorter than the length field": (b"\x01\x00", BadSchema),
    "header longer than the file": (pack({"a": ENTRY}, length=2**40), BadSchema),
    "length that is negative in 64 bits": (pack({"a": ENTRY}, length=2**64 - 1), BadSchema),
    "not JSON": (pack(b"{'a': 1}"), BadSchema),
    "not UTF-8": (pack(b'{"\xff": 1}'), BadSchema),
    "UTF-16": (pack(json.dumps({"a": ENTRY}).encode("utf-16")), BadSchema),
    "byte order mark": (pack(b"\xef\xbb\xbf" + json.dumps({"a": ENTRY}).encode()), BadSchema),
    "leading space": (pack(b" " + json.dumps({"a": ENTRY}).encode()), BadSchema),
    "a list": (pack([ENTRY]), BadSchema),
    "nested too deep": (pack(b"[" * 100_000), BadSchema),
    "a number of five thousand digits": (pack(b'{"a": ' + b"9" * 5000 + b"}"), BadSchema),
    "a name twice": (pack(b'{"a": %s, "a": %s}' % ((json.dumps(ENTRY).encode(),) * 2)), BadSchema),
    "notes": (pack({"__metadata__": {"author": "someone"}, "a": ENTRY}), BadSchema),
    "notes that are no mapping": (pack({"__metadata__": 5, "a": ENTRY}), BadSchema),
    "a hole": (pack({"a": {**ENTRY, "data_offsets": [4, 20]}}, bytes(20)), BadSchema),
    "a hole between": (
        pack({"a": ENTRY, "b": {"dtype": "U8", "shape": [1], "data_offsets": [17, 18]}}, bytes(18)),
        BadSchema,
    ),
    "an overlap": (pack({"a": ENTRY, "b": ENTRY}), BadSchema),
    "a part overlap": (pack({"a": ENTRY, "b": {**ENTRY, "data_offsets": [8, 24]}}, bytes(24)), BadSchema),
    "trailing bytes": (pack({"a": ENTRY}, bytes(17)), BadSchema),
    "missing bytes": (pack({"a": ENTRY}, bytes(15)), BadSchema),
    "span and shape differ": (pack({"a": {**ENTRY, "shape": [2, 3]}}), BadSchema),
    "reversed span": (pack({"a": {**ENTRY, "data_offsets": [16, 0]}}), BadSchema),
    "negative dimensions": (pack({"a": {**ENTRY, "shape": [-2, -2]}}), BadSchema),
    "huge dimension": (pack({"a": {**ENTRY, "shape": [2**60]}}), BadSchema),
    "dimensions whose product overflows": (
        pack({"a": {**ENTRY, "shape": [2**52, 2**52, 0], "data_offsets": [0, 0]}}, b""),
        BadSchema,
    ),
    "too many dimensions": (pack({"a": {**ENTRY, "shape": [2, 2, 1, 1, 1, 1, 1, 1, 1]}}), BadSchema),
    "fractional dimension": (pack({"a": {**ENTRY, "shape": [2.0, 2]}}), BadSchema),
    "a truth value as dimension": (pack({"a": {**ENTRY, "shape": [True, 4]}}), BadSchema),
    "shape that is text": (pack({"a": {**ENTRY, "shape": "22"}}), BadSchema),
    "three offsets": (pack({"a": {**ENTRY, "data_offsets": [0, 8, 16]}}), BadSchema),
    "unknown dtype": (pack({"a": {**ENTRY, "dtype": "F8_E4M3"}}), BadSchema),
    "dtype that is a list": (pack({"a": {**ENTRY, "dtype": ["F32"]}}), BadSchema),
    "entry that is a number": (pack({"a": 5}), BadSchema),
    "entry with more": (pack({"a": {**ENTRY, "code": "x"}}), BadSchema),
    "entry with less": (pack({"a": {"dtype": "F32", "shape": [2, 2]}}), BadSchema),
    "path-like name": (pack({"../a": ENTRY}), BadSchema),
    "absolute name": (pack({"/etc/passwd": ENTRY}), BadSchema),
    "name that starts with a dot": (pack({".a": ENTRY}), BadSchema),
    "name with a space": (pack({"a b": ENTRY}), BadSchema),
    "name with a line break": (pack({"a\n": ENTRY}), BadSchema),
    "name with a letter that looks like another": (pack({"\u0430": ENTRY}), BadSchema),
    "name with an escape sequence": (pack({"\x1b[2J": ENTRY}), BadSchema),
    "empty name": (pack({"": ENTRY}), BadSchema),
    "long name": (pack({"a" * 256: ENTRY}), BadSchema),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_on_the_header(written, name):
    content, expected = ATTACKS[name]
    path = written(content)
    with pytest.raises(expected) as caught:
        read_tensors(path, read_header(path))
    message = str(caught.value)
    assert "\n" not in message
    assert "\x1b" not in message
    assert len(message) < 300


def test_a_caller_narrows_what_it_reads(written):
    path = written(pack({"a": ENTRY, "b": {**ENTRY, "data_offsets": [16, 32]}}, bytes(32)))
    assert len(read_header(path, max_tensors=2)) == 2
    with pytest.raises(TooLarge, match=r"header of \d+ bytes, limit 40"):
        read_header(path, limit_bytes=40)
    with pytest.raises(TooLarge, match="header of 2 entries, limit 1"):
        read_header(path, max_tensors=1)
    with pytest.raises(TooLarge, match="limit 1"):
        read_tensors(path, read_header(path), max_tensors=1)


def test_the_format_note_and_no_note_are_fine(written):
    for note in ({"__metadata__": {"format": "pt"}}, {}):
        assert read_header(written(pack({**note, "a": ENTRY}))) == {"a": TensorSpec(shape=(2, 2), dtype="float32")}


names = st.from_regex(r"\A[a-z0-9_][a-z0-9_.]{0,12}\Z")
shapes = st.lists(st.integers(1, 4), max_size=4)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool])


@ANY_NUMBER
@given(st.dictionaries(names, st.tuples(shapes, dtypes), max_size=5))
def test_the_header_agrees_with_safetensors_own_reader(tmp_path, wanted):
    tensors = {name: torch.ones(shape).to(dtype) for name, (shape, dtype) in wanted.items()}
    save_file(tensors, tmp_path / "x")
    assert read_header(tmp_path / "x") == {name: spec_of(tensor) for name, tensor in tensors.items()}


@ANY_NUMBER
@given(data=st.data())
def test_a_file_damaged_anywhere_is_refused_or_is_still_whole(tmp_path, data):
    save_file({"a": torch.ones(2, 3), "b.c": torch.arange(4), "d": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "x")
    content = bytearray((tmp_path / "x").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["set", "insert", "delete", "cut"])):
            case "set":
                content[where] = data.draw(st.integers(0, 255))
            case "insert":
                content[where:where] = data.draw(st.binary(min_size=1, max_size=9))
            case "delete":
                del content[where : where + data.draw(st.integers(1, 9))]
            case "cut":
                del content[where:]
        if not content:
            break
    path = tmp_path / "damaged"
    path.write_bytes(bytes(content))
    try:
        specs = read_header(path)
    except ArtefactError:
        return
    assert {name: spec_of(tensor) for name, tensor in load_file(path).items()} == specs


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "U8", "X"]) | JSON,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 20), max_size=3) | JSON,
    },
)


@ANY_NUMBER
@given(st.dictionaries(names | st.text(max_size=5), ENTRIES | JSON, max_size=3), st.binary(max_size=20))
def test_any_header_is_read_or_refused(tmp_path, header, data):
    path = tmp_path / "x"
    path.write_bytes(pack(header, data))
    try:
        specs = read_header(path)
    except ArtefactError:
        return
    assert {name: spec_of(tensor) for name, tensor in load_file(path).items()} == specs


SPECS = {"a": TensorSpec(shape=(2,), dtype="float32"), "b": TensorSpec(shape=(), dtype="int64")}


@pytest.mark.parametrize(
    ("found", "expected", "message"),
    [
        ({}, WrongNames, "missing 'a', 'b'"),
        ({**SPECS, "c": SPECS["a"]}, WrongNames, "not expected 'c'"),
        ({"a": SPECS["a"], "B": SPECS["b"]}, WrongNames, "missing 'b'; not expected 'B'"),
        ({**SPECS, **{f"x{i}": SPECS["a"] for i in range(9)}}, WrongNames, "'x0', 'x1', 'x2' and 6 more"),
        ({**SPECS, "a": TensorSpec(shape=(2, 1), dtype="float32")}, WrongShape, "'a' is float32 "),
        ({**SPECS, "a": TensorSpec(shape=(2,), dtype="float16")}, WrongShape, "expected float32"),
    ],
)
def test_names_shapes_and_dtypes_are_exact(found, expected, message):
    check_exact("file 'x'", SPECS, SPECS)
    with pytest.raises(expected, match=message):
        check_exact("file 'x'", found, SPECS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_finite_is_refused(tmp_path, value, dtype):
    tensor = torch.zeros(3, 3, dtype=dtype)
    tensor[2, 1] = value
    write_tensors(tmp_path / "x", {"good": torch.ones(2), "bad": tensor})
    with pytest.raises(NotFinite, match="tensor 'bad' holds NaN or infinity"):
        read_tensors(tmp_path / "x", read_header(tmp_path / "x"))
    check_finite("here", {"whole numbers": torch.tensor([2**62])})


def test_reading_takes_exactly_what_is_expected(tmp_path):
    write_tensors(tmp_path / "x", {"a": torch.ones(2), "b": torch.tensor(1)})
    assert set(read_tensors(tmp_path / "x", SPECS)) == {"a", "b"}
    with pytest.raises(WrongNames):
        read_tensors(tmp_path / "x", {"a": SPECS["a"]})


@pytest.mark.parametrize("name", ["float8_e4m3fn", "save", "Tensor", "__class__", "complex64", ""])
def test_dtypes_are_of_a_list(name):
    with pytest.raises(BadSchema):
        torch_dtype(name)
    with pytest.raises(BadSchema):
        check_dtype("a", TensorSpec(shape=(), dtype=name))
    assert torch_dtype("bfloat16") is torch.bfloat16


def test_a_declaration_is_strict():
    assert TensorSpec(shape=(2, 3), dtype="bfloat16").num_bytes == 12
    for raw in (
        '{"shape": [1.0], "dtype": "float32"}',
        '{"shape": [1], "dtype": "float32", "more": 1}',
        '{"shape": [1]}',
    ):
        with pytest.raises(ValidationError):
            TensorSpec.model_validate_json(raw)


def test_a_full_disk_is_one_clear_error(tmp_path):
    """The limit on file size stands for a full disk; it is set in a process of its own."""
    lines = [
        "import resource, signal, sys, torch",
        "from pathlib import Path",
        "from offsite.errors import RunFailed",
        "from offsite.staging import staged_folder",
        "from offsite.tensors import write_tensors",
        "big = {'a': torch.zeros(1_000_000)}",
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)",
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))",
        "try:",
        "    with staged_folder(Path(sys.argv[1])) as stage:",
        "        write_tensors(stage / 'x.safetensors', big)",
        "except RunFailed as error:",
        "    print(error)",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ,
    )
    assert done.stdout.startswith("cannot write 'x.safetensors'")
    assert list(tmp_path.iterdir()) == []


def test_the_bytes_are_those_of_the_safetensors_library(tmp_path):
    generator = torch.Generator().manual_seed(0)
    found = {"scalar": torch.tensor(1.5), "slice": torch.arange(12.0).view(3, 4).T}
    for number, dtype in enumerate(("int64", "float64", "float32", "int32", "bfloat16", "float16", "uint8", "bool")):
        for letter in "zB_a":
            drawn = torch.randint(0, 2, (2, 3), generator=generator).to(getattr(torch, dtype))
            found[f"{letter}.{number}"] = drawn
    write_tensors(tmp_path / "ours", found)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_only_what_is_declared_is_written_in_the_dtype_that_is_declared(tmp_path):
    found = {"a": torch.tensor([1.5, 2.5]), "b": torch.ones(2)}
    spec = spec_of(found["a"], dtype="bfloat16")
    write_tensors(tmp_path / "x", found, {"a": spec}, finite="the whole")
    assert read_tensors(tmp_path / "x", {"a": spec})["a"].tolist() == [1.5, 2.5]
    with pytest.raises(NotFinite, match="the whole: tensor 'a'"):
        write_tensors(
            tmp_path / "y",
            {"a": torch.tensor([1e39], dtype=torch.float64)},
            {"a": TensorSpec(shape=(1,), dtype="float32")},
            finite="the whole",
        )
