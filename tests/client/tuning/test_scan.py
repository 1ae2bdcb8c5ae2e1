"""The scan before release: a real bundle is clean, and whatever is planted in a copy of it is found by its category."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import client.tuning.scan as module
import client.tuning.verb as verb_module
from client.tuning.ngrams import LEAST_BYTES, NUM_WORDS, Remembered
from client.tuning.scan import Scan, losses_in, own_names, require_clean, scan_bundle, texts_of
from client.tuning.verb import run
from offsite.artefacts.bundle import DISCLOSABLE, AdapterSpec, open_bundle, write_bundle
from offsite.errors import PolicyError
from offsite.tensors import TensorSpec
from offsite.text.records import read_records

SENTENCE = "the patient in ward seven was sent home with a fever of thirty nine"
ACCENTED = "Während der Nacht stieg das Fieber der Patientin auf über neununddreißig Grad"
UNSPACED = "患者昨晚高烧三十九度送往急诊"
TEXTS = [SENTENCE, ACCENTED, UNSPACED, "short and not enough for a run", "1 2 3 4 5 6 7 8 9"]
FIGURES = [5.805355548858643, 6.0767029793031755, 0.000123456]
NAMES = ["hallmeyer", "vm-of-jane", "root", "lora"]
SPEC = AdapterSpec(kind="lora", placement="1+0", rank=4, alpha=8.0, dtype="float32")
DISCLOSED = {"steps": 6.0}


class OnePackage:
    """What `write_bundle` reads of a package."""

    digest = "sha256:" + "0123456789abcdef" * 4

    class manifest:  # noqa: N801
        base_digest = "sha256:" + "ab" * 32


@pytest.fixture
def bundle(tmp_path):
    """A bundle of two tensors of random weights, which states its steps."""
    generator = torch.Generator().manual_seed(0)
    names = ("bottom.0.self_attn.q_proj.lora_A", "bottom.0.self_attn.q_proj.lora_B")
    tensors = {name: torch.randn((64, 128), generator=generator) for name in names}
    expected = {name: TensorSpec(shape=(64, 128), dtype="float32") for name in names}
    write_bundle(
        tmp_path / "bundle",
        package=OnePackage,
        spec=SPEC,
        tensors=tensors,
        expected=expected,
        figures=DISCLOSED,
        disclose=("steps",),
    )
    return tmp_path / "bundle"


def scanned(folder: Path, **changes) -> Scan:
    given = {"texts": TEXTS, "figures": FIGURES, "spec": SPEC, "disclosed": DISCLOSED, "names": NAMES, **changes}
    return scan_bundle(folder, **given)


def in_manifest(**keys):
    def plant(folder):
        path = folder / "offsite.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))

    return plant


def in_header(note):
    def plant(folder):
        path = folder / "adapter.safetensors"
        raw = path.read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        header = json.dumps({**json.loads(raw[8 : 8 + length]), "__metadata__": {"note": note}}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])

    return plant


def in_tensors(planted: bytes, place=12345):
    def plant(folder):
        path = folder / "adapter.safetensors"
        raw = bytearray(path.read_bytes())
        raw[-place : len(raw) - place + len(planted)] = planted
        path.write_bytes(bytes(raw))

    return plant


def extra_file(folder):
    (folder / "notes.bin").write_bytes(b"\0\1\2")


def symlink(folder):
    (folder / "link").symlink_to(folder / "offsite.json")


def set_number(*place, value):
    def plant(folder):
        path = folder / "offsite.json"
        manifest = json.loads(path.read_text())
        inner = manifest
        for name in place[:-1]:
            inner = inner[name]
        inner[place[-1]] = value
        path.write_text(json.dumps(manifest))

    return plant


EIGHT = " ".join(SENTENCE.split()[3:11])
SEVEN = " ".join(SENTENCE.split()[3:10])
TEXT = "training text"
PLANTED = {
    "a run in the manifest": (in_manifest(note=EIGHT), TEXT),
    "a run in another case and spacing": (in_manifest(note=EIGHT.upper().replace(" ", "\n  \t")), TEXT),
    "a run with other marks between": (in_manifest(note=EIGHT.replace(" ", " - ")), TEXT),
    "a run as tensor names are written": (in_manifest(note=EIGHT.replace(" ", ".")), TEXT),
    "a run word by word": (in_manifest(note=EIGHT.split()), TEXT),
    "a run in escapes": (in_manifest(note=ACCENTED), TEXT),
    "a run without spaces": (in_manifest(note=UNSPACED[2:11]), TEXT),
    "a run in the header": (in_header(EIGHT), TEXT),
    "a run in tensors": (in_tensors(EIGHT.encode()), TEXT),
    "a run in tensors, accented": (in_tensors(ACCENTED.encode()), TEXT),
    "a run in tensors, without spaces": (in_tensors(UNSPACED.encode()), TEXT),
    "a run in tensors, UTF-16": (in_tensors(EIGHT.encode("utf-16-le")), TEXT),
    "a run in tensors, UTF-16 at an odd place": (in_tensors(EIGHT.encode("utf-16-le"), 12346), TEXT),
    "a run in tensors, UTF-16 of the other order": (in_tensors(EIGHT.encode("utf-16-be")), TEXT),
    "a run in tensors, UTF-16 without spaces": (in_tensors(UNSPACED.encode("utf-16-be"), 999), TEXT),
    "a run in place of the manifest": (lambda f: (f / "offsite.json").write_bytes(EIGHT.encode("utf-16-le")), TEXT),
    "a run of digits in the manifest": (in_manifest(note="1 2 3 4 5 6 7 8"), TEXT),
    "a POSIX path": (in_manifest(note="/srv/ward/seven.txt"), "path"),
    "a Windows path": (in_manifest(note="D:\\ward\\seven.txt"), "path"),
    "a network path": (in_header("\\\\clinic\\share"), "path"),
    "a path by URL": (in_manifest(note="see file:///srv/x"), "path"),
    "a path from home": (in_manifest(note="~jane/x"), "path"),
    "the data's name": (in_manifest(note="made of secret-ward.jsonl"), "path"),
    "a path in tensors": (in_tensors(b"/home/jane/private"), "path"),
    "the data's path in tensors": (in_tensors(b"/clinic/data/secret-ward.jsonl"), "path"),
    "the data's path in tensors, UTF-16": (in_tensors("/clinic/data".encode("utf-16-le")), "path"),
    "a user's name": (in_manifest(note="by Hallmeyer"), "name"),
    "a user's name as a key": (in_manifest(hallmeyer=True), "name"),
    "a short user's name": (in_header("root"), "name"),
    "a host's name in tensors": (in_tensors(b"vm-of-jane"), "name"),
    "a user's name in tensors, UTF-16": (in_tensors("hallmeyer".encode("utf-16-be")), "name"),
    "a date": (in_manifest(note="2026-11-24"), "timestamp"),
    "a date and time": (in_manifest(note="2026-11-24T20:38:00Z"), "timestamp"),
    "a date without dashes": (in_header("20261124T203800"), "timestamp"),
    "a date of a mail": (in_manifest(note="Tue, 24 Nov 2026 20:38:00 +0000"), "timestamp"),
    "a date of C": (in_manifest(note="Tue Nov 24 2026"), "timestamp"),
    "a time": (in_manifest(note="at 20:38:01"), "timestamp"),
    "seconds in a string": (in_manifest(note="1764016680"), "timestamp"),
    "seconds": (in_manifest(created=1764016680), "timestamp"),
    "milliseconds": (in_manifest(created=1764016680123), "timestamp"),
    "seconds and their parts": (in_manifest(created=1764016680.25), "timestamp"),
    "a date in tensors": (in_tensors(b"2026-11-24T20:38"), "timestamp"),
    "a loss": (in_manifest(loss=FIGURES[0]), "loss"),
    "a loss in four digits": (in_manifest(loss=5.805), "loss"),
    "a small loss in a string": (in_manifest(note="1.235e-04"), "loss"),
    "a loss in the header": (in_header("loss 6.07670"), "loss"),
    "a number": (in_manifest(num_rows=53), "number"),
    "a number in a list": (in_manifest(curve=[1, 2]), "number"),
    "another rank": (set_number("adapter", "rank", value=5), "number"),
    "a figure that was not named": (set_number("disclosed", "num_records", value=53.0), "number"),
    "another figure than was named": (set_number("disclosed", "steps", value=7.0), "number"),
    "a file too many": (extra_file, "file"),
    "a link": (symlink, "file"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_row_32_what_is_planted_is_found(bundle, name):
    plant, category = PLANTED[name]
    paths = [Path("/clinic/data/secret-ward.jsonl")]
    assert scanned(bundle, paths=paths).found == {}
    plant(bundle)
    scan = scanned(bundle, paths=paths)
    assert scan.found.get(category, 0) >= 1, scan.found
    assert not scan.clean
    with pytest.raises(PolicyError, match=rf"{category} \(\d+\)") as caught:
        require_clean(scan)
    told = f"{caught.value} {caught.value.hint} {scan.model_dump_json()}".lower()
    for word in ("fever", "ward", "hallmeyer", "jane", "5.80", "2026", "/srv", "患"):
        assert word not in told


NOT_FOUND = {
    "seven words": in_manifest(note=SEVEN),
    "seven words in tensors": in_tensors(SEVEN.encode()),
    "runs of two texts": in_manifest(note="thirty nine während der nacht"),
    "eight digits in tensors": in_tensors(b"?1?2?3?4?5?6?7?8?"),  # weights of 1e-4 may look like this
    "other words": in_manifest(note="a sentence of more than eight words that was in no text"),
    "a name of the format": in_manifest(note="lora"),
    "a name within another": in_manifest(note="rootless uprooted"),
    "a short name in tensors": in_tensors(b"root"),
    "a loss in three digits": in_manifest(note="5.80"),
    "another number": in_manifest(note="5.806"),
    "a version": in_manifest(note="offsite/bundle/1"),
    "a relative path": in_manifest(note="ward/seven"),
}


@pytest.mark.parametrize("name", NOT_FOUND)
def test_what_is_no_finding(bundle, name):
    NOT_FOUND[name](bundle)
    assert scanned(bundle).clean, scanned(bundle).found


def test_every_byte_is_read(bundle):
    scan = scanned(bundle)
    assert scan.num_files == 2
    assert scan.num_bytes == sum(path.stat().st_size for path in bundle.iterdir())
    assert scan.num_ngrams_compared > 20
    assert Scan.model_validate_json(scan.model_dump_json()) == scan
    require_clean(scan)


@pytest.mark.parametrize("place", [1000, 4090, 4096, 4100, 9000])
def test_text_across_the_parts_of_a_large_file(bundle, monkeypatch, place):
    monkeypatch.setattr(module, "_CHUNK_BYTES", 4096)
    monkeypatch.setattr(module, "_OVERLAP_BYTES", 512)
    in_tensors(SENTENCE.encode(), place)(bundle)
    in_tensors(b"hallmeyer", place + 300)(bundle)
    found = scanned(bundle).found
    assert found.keys() == {"training text", "name"}
    assert found["name"] == 1


def random_tensors():
    generator = torch.Generator().manual_seed(7)
    scales = (1e-4, 1e-2, 0.05, 1.0, 100.0)
    for number in range(50):
        tensor = torch.randn((256, 256), generator=generator) * scales[number % 5]
        dtype = torch.bfloat16 if number % 2 else torch.float32
        yield tensor.to(dtype).view(torch.uint8).numpy().tobytes()


def test_random_weights_are_no_finding(tmp_path, bundle):
    """Texts of digits, single letters, Korean and Chinese are what the bytes of small weights look like most."""
    digits = np.random.default_rng(0).integers(0, 10, (200, 200))
    texts = [*TEXTS, *(" ".join(map(str, row)) for row in digits)]
    texts += ["".join(chr(code) for code in range(0xBC00, 0xBE00)), "".join(chr(c) for c in range(0x3C00, 0x4000))]
    for number, raw in enumerate(random_tensors()):
        in_tensors(raw[:30000], 31000)(bundle)
        scan = scanned(bundle, texts=texts if number < 6 else TEXTS)
        assert scan.clean, (number, scan.found)


def test_uniform_bytes_are_no_finding(bundle):
    generator = np.random.default_rng(3)
    (bundle / "adapter.safetensors").write_bytes(bytes(8) + generator.bytes(2**20))
    assert scanned(bundle).found == {}


def test_no_text_and_no_figures(bundle):
    assert scanned(bundle, texts=[], figures=[], names=[]).clean
    (bundle / "adapter.safetensors").write_bytes(b"")
    assert scanned(bundle, texts=[], figures=[], names=[]).found == {}


def test_bytes_are_looked_at_a_fixed_number_of_times(bundle, monkeypatch):
    """Twice the bytes are twice the work, in words compared and in bytes decoded, whatever the texts are."""
    read = []
    spelled = Remembered.spelled

    def counting(self, raw):
        read.append(len(raw))
        return spelled(self, raw)

    monkeypatch.setattr(Remembered, "spelled", counting)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 2**14)
    monkeypatch.setattr(module, "_OVERLAP_BYTES", 2**8)
    totals = {}
    for num in (1, 2, 4):
        (bundle / "adapter.safetensors").write_bytes(bytes(8) + (EIGHT + " ").encode() * (2000 * num))
        read.clear()
        totals[num] = scanned(bundle).num_ngrams_compared, sum(read)
    for one, two in ((1, 2), (2, 4)):
        assert totals[two][0] <= 2.1 * totals[one][0]
        assert totals[two][1] <= 2.1 * totals[one][1]


def test_own_names_ask_no_network(monkeypatch):
    monkeypatch.setattr(module.socket, "getfqdn", None)
    monkeypatch.setattr(module.socket, "gethostname", lambda: "vm7.clinic.example")
    monkeypatch.setenv("LOGNAME", "jane")
    assert {"vm7.clinic.example", "vm7", "jane"} <= own_names()
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module.os, "getuid", lambda: 2**31 - 5)
    assert own_names() == {"vm7.clinic.example", "vm7"}


def test_runs_are_counted_in_each_text_alone():
    remembered = Remembered([SENTENCE, SENTENCE.upper(), "five words are too few"])
    assert len(remembered) == len(SENTENCE.split()) - NUM_WORDS + 1
    assert remembered.compare([SENTENCE]) == (len(remembered), len(remembered))
    assert remembered.compare([SEVEN, SEVEN]) == (0, 0)
    assert remembered.compare(["1 2 3 4 5 6 7 8"]) == (1, 0)
    digits = Remembered(["1 2 3 4 5 6 7 8"])
    assert digits.compare(["1 2 3 4 5 6 7 8"]) == (1, 1)
    assert digits.compare(["1 2 3 4 5 6 7 8"], least_bytes=LEAST_BYTES) == (1, 0)


def test_a_record_is_one_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    words = SENTENCE.split()
    rows = [{"prompt": " ".join(words[:6]), "completion": " ".join(words[6:])}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert Remembered(texts_of(read_records(path))).compare([SENTENCE])[1] == len(words) - NUM_WORDS + 1
    path.write_text(
        json.dumps({"messages": [{"role": "user", "content": SENTENCE}, {"role": "assistant", "content": "yes"}]})
        + "\n"
    )
    assert Remembered(texts_of(read_records(path))).compare([SENTENCE])[1] == len(words) - NUM_WORDS + 1


def test_losses_of_a_log(tmp_path):
    log = tmp_path / "log.jsonl"
    assert losses_in(log) == []
    log.write_text('{"step": 1, "loss": 5.5, "rate": 0.1}\n{"step": 2, "loss": null, "evaluation_loss": 4.25}\n')
    assert losses_in(log) == [5.5, 4.25]


# In the verb


@pytest.mark.parametrize("adapter", ["lora", "blocks"])
def test_row_32_a_real_run_is_clean_and_says_what_was_read(settings, dropped_package, adapter, notes):
    config = settings(dropped_package.path, adapter=adapter, disclose=DISCLOSABLE)
    told = run(config)["scan"]
    assert told["found"] == {}
    assert told["num_bytes"] == sum(path.stat().st_size for path in config.output.iterdir())
    losses = losses_in(config.output.parent / "bundle.log.jsonl")
    assert len(losses) >= 6
    spec, stated = config.spec(), open_bundle(config.output).manifest.disclosed
    given = {"texts": notes, "figures": losses, "spec": spec, "names": None, "known": ()}
    assert scanned(config.output, **given, disclosed=stated).clean
    assert scanned(config.output, **given, disclosed={}).found == {"number": 4, "loss": 1}


def appended(stage, text):
    path = stage / "offsite.json"
    path.write_text(path.read_text() + text)


def last_loss(stage):
    lines = (stage.parent / "bundle.work" / "log.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["loss"]


WRITERS = {
    "training text": lambda stage, notes: appended(stage, " ".join(notes[:2])),
    "file": lambda stage, notes: (stage / "events.log").write_text("x"),
    "path": lambda stage, notes: in_tensors(str(stage).encode(), 400)(stage),
    "loss": lambda stage, notes: in_manifest(last=last_loss(stage))(stage),
}


@pytest.mark.parametrize("category", WRITERS)
def test_row_32_a_bundle_that_holds_it_gets_no_name(settings, dropped_package, notes, monkeypatch, category):
    """As if what writes the bundle were at fault: the scan sees the folder as it would leave."""

    def faulty(stage, **given):
        WRITERS[category](stage, notes)
        return scan_bundle(stage, **given)

    monkeypatch.setattr(verb_module, "scan_bundle", faulty)
    config = settings(dropped_package.path, adapter="lora")
    with pytest.raises(PolicyError, match=category):
        run(config)
    assert sorted(path.name for path in config.output.parent.iterdir()) == ["bundle.work", "secret-ward-notes.txt"]
