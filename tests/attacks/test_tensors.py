"""Rows 16-19 and 21: tensor files and adapters of a client who wishes the owner ill."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import subprocess
import sys
import time
import tracemalloc

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.kinds import attach, declared
from adapters.norms import adapted_names, base_tensors, check_norms, update_norms
from offsite.artefacts.bundle import TENSOR_FILE, AdapterSpec, open_bundle, write_bundle
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
    seconds = float("inf")
    for _ in range(3):  # the best of three: a collection of the whole test run's garbage may fall into one
        begin = time.process_time()
        with pytest.raises(expected) as caught:
            read_header(path)
        seconds = min(seconds, time.process_time() - begin)
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


SPEC = AdapterSpec(kind="lora", placement="1+1", rank=2, alpha=4.0, targets="attention", dtype="float32")
NAME = "top.1.self_attn.q_proj.lora_B"
PAIR = (NAME, NAME.replace("lora_B", "lora_A"))


def tuned_tensors(package):
    names = declared(SPEC, package.layout, package.block_tensors())
    attached = attach(package.load_model(), SPEC, package.layout.blocks, names)
    generator = torch.Generator().manual_seed(0)
    noise = {name: 0.05 * torch.randn(spec.shape, generator=generator) for name, spec in names.items()}
    return {name: tensor + noise[name] for name, tensor in attached.tensors().items()}, names


@pytest.fixture
def bundle(tmp_path, dropped_package):
    tensors, names = tuned_tensors(dropped_package)
    return write_bundle(tmp_path / "bundle", package=dropped_package, spec=SPEC, tensors=tensors, expected=names)


def take_in(path, package):
    """What an intake does with the files, once their envelope is known to be good."""
    found = open_bundle(path)
    found.bind(package_digest=package.digest, base_digest=package.manifest.base_digest)
    expected = declared(SPEC, package.layout, package.block_tensors())
    tensors = found.load_tensors(expected)
    names = adapted_names(SPEC, package.layout, package.block_tensors())
    norms = update_norms(SPEC, tensors, base_tensors(package, names))
    check_norms(norms, max_relative_frobenius=1.0, max_relative_spectral=2.0)
    return norms


def rewritten(change):
    """Change the tensors in a bundle's file, which its manifest then binds and declares."""

    def edit(folder):
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / TENSOR_FILE).items()}
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSOR_FILE)

    return edit


def replaced(name, make):
    return lambda found: found.update({name: make(found[name])})


def renamed(found):
    found[NAME.replace("q_proj", "p_proj")] = found.pop(NAME)


def elsewhere(found):
    """All of it on another block, which has the same shapes."""
    for name in [name for name in found if name.startswith("top.1.")]:
        found[name.replace("top.1.", "top.0.")] = found.pop(name)


def scaled(k_a, k_b):
    def change(found):
        found[PAIR[0]] *= k_b
        found[PAIR[1]] *= k_a

    return change


def spike(found):
    """One direction, as strong as the Frobenius norm of a whole base weight may be, and many times its spectrum."""
    for name, size in ((PAIR[0], 3.3), (PAIR[1], 1.0)):
        vector = torch.zeros_like(found[name])
        vector.view(-1)[0] = size
        found[name] = vector


ROWS = {
    "17 an extra tensor": (lambda found: found.update({"top.1.self_attn.q_proj.lora_C": torch.ones(1)}), WrongNames),
    "17 a tensor outside the adapter": (lambda found: found.update({"lm_head.weight": torch.ones(9, 9)}), WrongNames),
    "17 a missing tensor": (lambda found: found.pop(NAME), WrongNames),
    "17 no tensor at all": (lambda found: found.clear(), WrongNames),
    "17 a renamed tensor": (renamed, WrongNames),
    "17 another block": (elsewhere, WrongNames),
    "17 a shape that broadcasts": (replaced(NAME, lambda _: torch.ones(1)), WrongShape),
    "17 a scalar": (replaced(NAME, lambda _: torch.tensor(1.0)), WrongShape),
    "17 a shape with ones that broadcasts": (replaced(NAME, lambda old: old[:1]), WrongShape),
    "17 a turned shape": (replaced(NAME, lambda old: old.T), WrongShape),
    "17 an axis more": (replaced(NAME, lambda old: old[None]), WrongShape),
    "17 another rank": (
        lambda found: found.update({n: torch.cat([found[n]] * 2, a) for n, a in zip(PAIR, (1, 0), strict=True)}),
        WrongShape,
    ),
    "17 another dtype": (replaced(NAME, lambda old: old.double()), WrongShape),
    "17 whole numbers": (replaced(NAME, lambda old: old.to(torch.int32)), WrongShape),
    "18 NaN": (replaced(NAME, lambda old: old.index_fill_(0, torch.tensor([3]), float("nan"))), NotFinite),
    "18 infinity": (replaced(NAME, lambda old: old.fill_(float("inf"))), NotFinite),
    "18 minus infinity": (replaced(NAME, lambda old: old.index_fill_(0, torch.tensor([0]), -float("inf"))), NotFinite),
    "18 subnormal numbers": (replaced(NAME, lambda old: old.fill_(1e-40)), BadSchema),
    "18 norms beyond half precision": (replaced(NAME, lambda old: old.fill_(6e4)), NormTooLarge),
    "18 norms beyond single precision": (scaled(1e30, 1e30), NormTooLarge),
    "19 a norm bomb": (scaled(1.0, 1e4), NormTooLarge),
    "19 a norm bomb in the other factor": (scaled(1e6, 1e-2), NormTooLarge),
    "19 a spike of rank one": (spike, NormTooLarge),
}


@pytest.mark.parametrize("row", ROWS)
def test_rows_17_to_19_hostile_adapters(bundle, dropped_package, tamper, row):
    change, expected = ROWS[row]
    path = tamper(bundle.path, change=rewritten(change), redeclare=True)
    with pytest.raises(ArtefactError) as caught:
        take_in(path, dropped_package)
    assert type(caught.value) is expected
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("row", [row for row in ROWS if row.startswith("17")])
def test_row_17_what_the_manifest_does_not_declare(bundle, dropped_package, tamper, row):
    path = tamper(bundle.path, change=rewritten(ROWS[row][0]))
    with pytest.raises((WrongNames, WrongShape)):
        take_in(path, dropped_package)


def test_row_19_the_spike_is_within_the_frobenius_limit(bundle, dropped_package, tamper):
    path = tamper(bundle.path, change=rewritten(spike), redeclare=True)
    with pytest.raises(NormTooLarge, match="q_proj': the update's spectral norm"):
        take_in(path, dropped_package)


@pytest.mark.parametrize("k", [1e-6, 1e-3, 0.5, 8.0, 1e3, 1e6])
def test_row_19_the_scale_between_the_factors_does_not_count(bundle, dropped_package, tamper, k):
    plain = take_in(bundle.path, dropped_package)
    moved = take_in(tamper(bundle.path, change=rewritten(scaled(k, 1 / k)), redeclare=True), dropped_package)
    for name, norms in plain.items():
        assert moved[name].frobenius == pytest.approx(norms.frobenius, rel=1e-6)
        assert moved[name].spectral == pytest.approx(norms.spectral, rel=1e-6)


@pytest.mark.parametrize("k", [1e-6, 1e-3, 0.5, 8.0, 1e3, 1e6])
def test_row_19_nor_does_it_hide_a_norm_bomb(bundle, dropped_package, tamper, k):
    with pytest.raises(NormTooLarge, match="q_proj"):
        take_in(tamper(bundle.path, change=rewritten(scaled(k, 1e3 / k)), redeclare=True), dropped_package)


class Bomb:
    """What a pickle of a client's would do."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (self.target, "w"))


@pytest.fixture
def tripwire(monkeypatch):
    """Fail on whatever would unpickle, and note every attempt; the audit hook of the interpreter sees those in C."""
    touched: list[str] = []

    def refuse(*args, **kwargs):
        touched.append("called")
        raise AssertionError("something was unpickled")

    class Refuser:
        def __init__(self, *args, **kwargs):
            refuse()

    monkeypatch.setattr(pickle, "Unpickler", Refuser)
    monkeypatch.setattr(pickle, "_Unpickler", Refuser)
    for owner, name in ((pickle, "load"), (pickle, "loads"), (torch, "load"), (torch.serialization, "load")):
        monkeypatch.setattr(owner, name, refuse)
    return touched


def test_row_21_a_round_trip_never_unpickles(tmp_path, dropped_package, tripwire):
    tensors, names = tuned_tensors(dropped_package)
    done = write_bundle(tmp_path / "bundle", package=dropped_package, spec=SPEC, tensors=tensors, expected=names)
    found = open_bundle(done.path).load_tensors(names)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert take_in(done.path, dropped_package)
    assert tripwire == []
    with pytest.raises(AssertionError, match="unpickled"):  # the wire is live
        torch.load(io.BytesIO(b""))


FOREIGN = (
    "adapter.bin", "pytorch_model.bin", "adapter.pt", "state.pkl", "tune.py", "adapter_config.json", "config.json"
)  # fmt: skip


@pytest.fixture
def opened():
    """Paths that the interpreter opens while the test runs; an audit hook cannot be taken off, so it is switched."""
    found: list[str] = []
    watching = [True]

    def hook(event, args):
        if watching and event in {"open", "pickle.find_class"}:
            found.append(str(args[0]))

    sys.addaudithook(hook)
    yield found
    watching.clear()


@pytest.mark.parametrize("bound", [False, True], ids=["unbound", "bound"])
@pytest.mark.parametrize("name", FOREIGN)
def test_row_21_files_that_hold_code_are_never_opened(
    bundle, dropped_package, tamper, tripwire, opened, tmp_path, name, bound
):
    target = tmp_path / "ran"
    harm = pickle.dumps(Bomb(str(target)))
    if name.endswith(".json"):
        harm = json.dumps({"auto_mapping": {"base_model_class": "x"}, "megatron_core": "os", "auto_map": {}}).encode()
    entry = {"bytes": len(harm), "sha256": "sha256:" + hashlib.sha256(harm).hexdigest()}
    path = tamper(
        bundle.path,
        change=lambda folder: (folder / name).write_bytes(harm),
        edit=lambda manifest: manifest["files"].update({name: entry} if bound else {}),
    )
    opened.clear()
    with pytest.raises(WrongNames):
        take_in(path, dropped_package)
    assert any(found.endswith("offsite.json") for found in opened)
    assert not any(found.endswith(name) for found in opened)
    assert tripwire == []
    assert not target.exists()


def test_row_21_a_pickle_under_the_tensor_files_name(bundle, dropped_package, tamper, tripwire, tmp_path):
    target = tmp_path / "ran"
    harm = pickle.dumps(Bomb(str(target)))
    archive = io.BytesIO()
    torch.save({NAME: torch.ones(2)}, archive)
    for number, content in enumerate((harm, archive.getvalue(), b"PK\x03\x04" + bytes(60))):
        copy = tamper(bundle.path, change=lambda folder, content=content: (folder / TENSOR_FILE).write_bytes(content))
        with pytest.raises((BadSchema, TooLarge)):
            take_in(copy, dropped_package)
        copy.rename(tmp_path / f"done-{number}")
    assert tripwire == []
    assert not target.exists()
