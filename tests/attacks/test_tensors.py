"""Rows 16-19 and 21: tensor files and adapters of a client who wishes the owner ill."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import subprocess
import sys
import time
import tracemalloc

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.kinds import attach, declared
from adapters.norms import adapted_names, base_tensors, check_norms, update_norms
from offsite.bundle import TENSOR_FILE, AdapterSpec, open_bundle, write_bundle
from offsite.errors import ArtefactError, BadSchema, NormTooLarge, NotFinite, TooLarge, WrongNames, WrongShape
from offsite.tensors import (
    ADAPTER_HEADER_LIMIT_BYTES,
    HEADER_LIMIT_BYTES,
    MAX_TENSORS,
    read_header,
)

LIMIT_SECONDS = 0.1
LIMIT_BYTES = 50e6
BUSY = 5  # processor time still stretches on a machine whose caches and cores others use too

ENTRY = '{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}'
LARGE = HEADER_LIMIT_BYTES - 64


def one(**changes: object) -> str:
    return json.dumps({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}})


def literally(key: str, text: str) -> str:
    """The entry with `text`, which need not be JSON, in the place of one of its values."""
    return one(**{key: "HERE"}).replace('"HERE"', text)


def many(count: int, *, last: str = "", data_bytes: int = 1) -> str:
    """`count` sound entries, of one byte each or of none, and then `last`."""
    shape = data_bytes
    parts = (
        f'"t{i}":{{"dtype":"U8","shape":[{shape}],"data_offsets":[{i * data_bytes},{(i + 1) * data_bytes}]}}'
        for i in range(count)
    )
    return "{" + ",".join(parts) + ("," + last if last else "") + "}"


# header (or None: as given), bytes of data, length as stated if it is another, expected class
HOSTILE: dict[str, tuple[str, int, bytes | None, type[ArtefactError]]] = {
    "a name twice": (f'{{"a":{ENTRY},"a":{ENTRY}}}', 16, None, BadSchema),
    "a name twice after many": (many(MAX_TENSORS - 1, last=f'"t0":{ENTRY}'), MAX_TENSORS, None, BadSchema),
    "200,000 tensors": (many(200_000), 200_000, None, TooLarge),
    "200,000 tensors of no size": (many(200_000, data_bytes=0), 0, None, TooLarge),
    "as many as allowed, of no size": (many(MAX_TENSORS, data_bytes=0), 0, None, BadSchema),
    "one more than allowed": (many(MAX_TENSORS + 1), MAX_TENSORS + 1, None, TooLarge),
    "a header of 100 MB": ("", 100_000_000, (100_000_000).to_bytes(8, "little"), TooLarge),
    "a header longer than the file": (one(), 16, (2**40).to_bytes(8, "little"), BadSchema),
    "a length in the wrong byte order": (one(), 16, len(one()).to_bytes(8, "big"), BadSchema),
    "a length below zero": (one(), 16, b"\xff" * 8, BadSchema),
    "a dimension of 2^62": (one(shape=[2**62]), 16, None, BadSchema),
    "a dimension of 2^62 beside one of zero": (one(shape=[2**62, 0], data_offsets=[0, 0]), 0, None, BadSchema),
    "dimensions whose product wraps to the size": (one(shape=[2**32, 2**32, 4]), 16, None, BadSchema),
    "eight largest dimensions": (one(shape=[10**15] * 8), 16, None, BadSchema),
    "F64 for F32": (one(dtype="F64"), 16, None, BadSchema),
    "F32 for F64": (one(dtype="F64", shape=[2, 2], data_offsets=[0, 32]), 16, None, BadSchema),
    "a dtype for code": (one(dtype="object"), 16, None, BadSchema),
    "a hole": (one(data_offsets=[4, 20]), 20, None, BadSchema),
    "an overlap": (f'{{"a":{ENTRY},"b":{ENTRY}}}', 16, None, BadSchema),
    "trailing bytes": (one(), 17, None, BadSchema),
    "trailing gigabyte": (one(), 2**30, None, BadSchema),
    "bytes missing": (one(), 15, None, BadSchema),
    "a path for a name": (one().replace('"a"', '"../../etc/cron.d/x"'), 16, None, BadSchema),
    "a name of a megabyte": (one().replace('"a"', '"' + "a" * 2**20 + '"'), 16, None, BadSchema),
    "a name in Cyrillic": (json.dumps({"\u0430": 1}, ensure_ascii=False), 16, None, BadSchema),
    "a name by escapes": (one().replace('"a"', '"\\u0061"'), 16, None, BadSchema),
    "a control character": (one().replace('"a"', '"\x1b[2J"'), 16, None, BadSchema),
    "a leading space": (" " + one(), 16, None, BadSchema),
    "something after the object": (one() + one(), 16, None, BadSchema),
    "a number over every range": (literally("shape", "[1e400]"), 16, None, BadSchema),
    "NaN": (literally("shape", "[NaN,4]"), 16, None, BadSchema),
    "minus zero": (literally("data_offsets", "[-0,16]"), 16, None, BadSchema),
    "a truth value": (literally("shape", "[true,4]"), 16, None, BadSchema),
    "a fraction": (literally("shape", "[4.0]"), 16, None, BadSchema),
    "a leading zero": (literally("shape", "[04]"), 16, None, BadSchema),
    "a million digits": (literally("shape", f"[{'9' * 1_000_000}]"), 16, None, BadSchema),
    "a million dimensions": (literally("shape", "[" + "1," * 1_000_000 + "4]"), 16, None, BadSchema),
    "notes": ('{"__metadata__":{"format":"pt","x":"' + "y" * 1_000_000 + '"}}', 0, None, BadSchema),
    "notes twice": ('{"__metadata__":{"format":"pt"},"__metadata__":{"format":"pt"}}', 0, None, BadSchema),
    "lists in lists": ("[" * LARGE, 16, None, BadSchema),
    "lists in a shape": (literally("shape", "[" * 1_000_000), 16, None, BadSchema),
    "objects in objects": ('{"a":' * (LARGE // 5), 16, None, TooLarge),
    "objects in objects, few": ('{"a":' * MAX_TENSORS, 16, None, BadSchema),
    "empty objects": ("{" + '"":{},' * (LARGE // 6) + "}", 16, None, TooLarge),
    "braces in a name": ('{"' + "{" * MAX_TENSORS + '":1}', 16, None, BadSchema),
    "one long text": ('{"' + "x" * LARGE, 16, None, BadSchema),
    "nothing but quotes": ("{" + '"' * LARGE, 16, None, BadSchema),
    "nothing but commas": ("{" + "," * LARGE, 16, None, BadSchema),
    "nothing but blanks": ("{" + " " * LARGE, 16, None, BadSchema),
    "blanks everywhere": (one().replace(" ", " " * 100_000), 17, None, BadSchema),
    "nothing but zeros": ("{" + "\0" * LARGE, 16, None, BadSchema),
}


def write(path, name):
    header, num_data_bytes, length, _ = HOSTILE[name]
    raw = header.encode()
    with path.open("wb") as handle:
        handle.write((len(raw).to_bytes(8, "little") if length is None else length) + raw)
        handle.truncate(8 + len(raw) + num_data_bytes)  # sparse: the data itself is never looked at
    return path


@pytest.mark.parametrize("name", HOSTILE)
def test_row_16_hostile_headers_are_cheap_to_refuse(tmp_path, name):
    path, expected = write(tmp_path / "x.safetensors", name), HOSTILE[name][3]
    begin = time.process_time()
    with pytest.raises(expected) as caught:
        read_header(path)
    seconds = time.process_time() - begin
    assert type(caught.value) is expected
    message = str(caught.value)
    assert message.isascii()
    assert message.isprintable()
    assert len(message) < 400
    assert seconds < BUSY * LIMIT_SECONDS
    tracemalloc.start()
    try:
        with pytest.raises(expected):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < LIMIT_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", HOSTILE)
def test_row_16_the_limits_of_an_adapter_are_no_looser(tmp_path, name):
    path = write(tmp_path / "x.safetensors", name)
    with pytest.raises((TooLarge, BadSchema)):
        read_header(path, limit_bytes=ADAPTER_HEADER_LIMIT_BYTES)


def test_row_16_hostile_headers_leave_the_process_small(tmp_path):
    """What the operating system says of a process that has read all of them, one after the other."""
    paths = [str(write(tmp_path / f"{number}.safetensors", name)) for number, name in enumerate(HOSTILE)]
    lines = [
        "import resource, sys",
        "from pathlib import Path",
        "from offsite.errors import ArtefactError",
        "from offsite.tensors import read_header",
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss",
        "refused = 0",
        "for path in sys.argv[1:]:",
        "    try:",
        "        read_header(Path(path))",
        "    except ArtefactError:",
        "        refused += 1",
        "print(refused, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines), *paths], capture_output=True, text=True, check=True)
    refused, grown_kib = map(int, done.stdout.split())
    assert refused == len(HOSTILE)
    assert grown_kib * 1024 < LIMIT_BYTES
