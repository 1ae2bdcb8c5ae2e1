"""Sealing and opening files: what comes out is what went in, streamed, for the recipient alone."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offsite.errors import ConfigError, RunFailed, TooLarge, WrongNames
from offsite.sealed.encryption import decrypt_files, encrypt_files, seal_files
from offsite.sealed.folder import check_payload, read_sealed
from offsite.sealed.manifest import sealed_size, tensors_digest, verify_sealed
from offsite.tensors import TensorSpec

JOB = "0123456789abcdef" * 2
ZERO = "sha256:" + "0" * 64
NOW = 1_800_000_000


@pytest.fixture(scope="module")
def pair(key_ring):
    return key_ring("owner")[1], key_ring("client")[1]


def seal(pair, files, out, **changes):
    settings = {
        "kind": "report",
        "job_id": JOB,
        "created": NOW,
        "expires": NOW + 60,
        "sequence": 1,
        "round": 0,
        "previous": None,
        "base_digest": ZERO,
        "package_digest": ZERO,
    }
    return seal_files(files, out, **{**settings, **changes}, identity=pair[0], recipients=[pair[1].public])


def unseal(pair, sealed, out):
    raw = read_sealed(sealed)
    lookup = {pair[0].public.fingerprint: pair[0].public}
    manifest = verify_sealed(raw.manifest_raw, raw.signatures_raw, lookup.__getitem__, now=NOW)
    out.mkdir()
    decrypt_files(sealed, raw, manifest, pair[1], out)
    return manifest


@pytest.mark.parametrize("size", [0, 1, 16383, 16384, 16385, 2**20 - 1, 2**20, 2**20 + 1, 3_000_000])
def test_what_went_in_comes_out(tmp_path, pair, size):
    content = os.urandom(size)
    (tmp_path / "in").write_bytes(content)
    digest = seal(pair, {"results.json": tmp_path / "in"}, tmp_path / "sealed")
    assert digest == "sha256:" + hashlib.sha256((tmp_path / "sealed" / "manifest.json").read_bytes()).hexdigest()
    manifest = unseal(pair, tmp_path / "sealed", tmp_path / "out")
    assert (tmp_path / "out" / "results.json").read_bytes() == content
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.json"]
    (payload,) = (tmp_path / "sealed" / "payload").iterdir()
    assert payload.stat().st_size == manifest.files[0].sealed_bytes == sealed_size(size)
    assert content[:64] not in payload.read_bytes() or size < 8


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None)
@given(first=st.binary(max_size=40_000), second=st.binary(max_size=200), round_=st.integers(0, 10_000))
def test_any_content_comes_out(tmp_path_factory, pair, first, second, round_):
    folder = tmp_path_factory.mktemp("any")
    contents = {"report.json": first, "results.json": second}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    seal(pair, {name: folder / name for name in contents}, folder / "sealed", round=round_)
    manifest = unseal(pair, folder / "sealed", folder / "out")
    assert {path.name: path.read_bytes() for path in (folder / "out").iterdir()} == contents
    assert manifest.round == round_


def test_equal_files_are_sealed_differently(tmp_path, pair):
    (tmp_path / "a").write_bytes(b"the same")
    for name in ("one", "two"):
        seal(pair, {"report.json": tmp_path / "a", "results.json": tmp_path / "a"}, tmp_path / name)
    names = {path.name for sealed in ("one", "two") for path in (tmp_path / sealed / "payload").iterdir()}
    assert len(names) == 4


def test_only_what_the_kind_may_hold_is_sealed(tmp_path, pair):
    (tmp_path / "a").write_bytes(b"x")
    for name in ("model.py", "notes.txt", "offsite.json"):
        with pytest.raises(WrongNames, match="file 0 has a name that a report may not hold"):
            seal(pair, {name: tmp_path / "a"}, tmp_path / "sealed")
    with (tmp_path / "large").open("wb") as handle:
        handle.truncate(2**20)
    with pytest.raises(TooLarge, match="limit 262144"):
        seal(pair, {"job.json": tmp_path / "large"}, tmp_path / "sealed", kind="job")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "large"]


def test_an_existing_output_is_left_alone(tmp_path, pair):
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "sealed").mkdir()
    with pytest.raises(ConfigError, match="already exists"):
        seal(pair, {"report.json": tmp_path / "a"}, tmp_path / "sealed")


def test_a_full_disk_leaves_nothing(tmp_path, pair, monkeypatch):
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    real = os.write

    def full(handle, data):
        if len(data) > 1000:
            raise OSError(28, "No space left on device")
        return real(handle, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(RunFailed, match="no space left"):
        seal(pair, {"report.json": tmp_path / "a"}, tmp_path / "sealed")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_failing_disk_is_no_bug_of_ours(tmp_path, pair, monkeypatch):
    (tmp_path / "a").write_bytes(b"x" * 100)
    seal(pair, {"report.json": tmp_path / "a"}, tmp_path / "sealed")

    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "read", broken)
    with pytest.raises(RunFailed, match="cannot read 'sealed': input/output error"):
        read_sealed(tmp_path / "sealed")


def test_the_payload_can_be_checked_without_a_key(tmp_path, pair):
    (tmp_path / "a").write_bytes(b"x" * 100)
    seal(pair, {"report.json": tmp_path / "a"}, tmp_path / "sealed")
    manifest = unseal(pair, tmp_path / "sealed", tmp_path / "out")
    check_payload(tmp_path / "sealed", manifest)


def test_the_digest_of_a_tensor_file_is_of_what_it_declares():
    specs = {"b": TensorSpec(shape=(2, 3), dtype="float32"), "a": TensorSpec(shape=(), dtype="int64")}
    text = b"offsite/v1/tensor-schema\0a\0int64\0\nb\0float32\x002,3\n"
    assert tensors_digest(specs) == "sha256:" + hashlib.sha256(text).hexdigest()


def test_the_manifest_says_nothing_of_this_machine(tmp_path, pair):
    (tmp_path / "secret-project.json").write_bytes(b"{}")
    seal(pair, {"report.json": tmp_path / "secret-project.json"}, tmp_path / "sealed")
    raw = (tmp_path / "sealed" / "manifest.json").read_bytes()
    assert b"secret" not in raw
    assert str(tmp_path).encode() not in raw
    assert set(json.loads(raw)["files"][0]) == set(
        "name bytes sha256 sealed_bytes sealed_sha256 tensors_sha256".split()
    )


def test_data_keys_are_not_shown(tmp_path, pair):
    (tmp_path / "a").write_bytes(b"x")
    encrypted = encrypt_files({"report.json": tmp_path / "a"}, tmp_path, kind="report", job_id=JOB)
    assert repr(encrypted) == "Encrypted(1 files)"


def test_modules_that_seal_import_no_torch():
    names = (
        "artefacts.job sealed.config sealed.encryption sealed.folder sealed.ledger sealed.manifest sealed.recipients"
    )
    code = "import sys; " + "".join(f"import offsite.{name}; " for name in names.split())
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_a_gibibyte_takes_under_60_mb_of_extra_memory(tmp_path):
    """Seals and opens 1 GiB in a process of its own and compares its peak before and after."""
    code = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from offsite.keys.identity import generate
        from offsite.sealed.encryption import decrypt_files, seal_files
        from offsite.sealed.folder import read_sealed
        from offsite.sealed.manifest import verify_sealed

        def peak():  # ru_maxrss would start at the peak of the process that spawned this one
            return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

        folder, zero = Path(sys.argv[1]), "sha256:" + "0" * 64
        one, two = generate("one", days=1), generate("two", days=1)
        def both(source, out, now=int(time.time())):
            seal_files({"chat_template.jinja": source}, folder / (out + ".sealed"), kind="package", job_id="0" * 32,
                created=now, expires=now + 60, sequence=1, round=0, previous=None, base_digest=zero,
                package_digest=zero, identity=one, recipients=[two.public])
            sealed = peak()
            raw = read_sealed(folder / (out + ".sealed"))
            manifest = verify_sealed(raw.manifest_raw, raw.signatures_raw, lambda _: one.public, now=now)
            (folder / out).mkdir()
            decrypt_files(folder / (out + ".sealed"), raw, manifest, two, folder / out)
            return sealed, peak()
        small = folder / "small"
        small.write_bytes(bytes(100))
        before = both(small, "first")[1]
        sealed, opened = both(folder / "large", "second")
        print(sealed - before, opened - before)
        """
    )
    with (tmp_path / "large").open("wb") as handle:
        piece = os.urandom(2**20)
        for _ in range(1024):
            handle.write(piece)
    started = time.monotonic()
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    grown = [int(word) for word in run.stdout.split()]
    assert 0 < max(grown) < 60e6, f"grew by {grown} bytes in {time.monotonic() - started:.1f} s"
    assert _sha256(tmp_path / "second" / "chat_template.jinja") == _sha256(tmp_path / "large")


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
