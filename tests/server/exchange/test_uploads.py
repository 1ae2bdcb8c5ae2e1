"""Uploads that are begun again, and a folder for them in which other things lie."""

from __future__ import annotations

import pytest

from client.exchange.http import ExchangeClient
from client.exchange.verbs import hand_in
from offsite.errors import ArtefactError, ConfigError
from offsite.sealed.folder import read_sealed
from offsite.sealed.manifest import SealedManifest
from offsite.sealed.recipients import read_keys, wrap_keys, write_keys
from offsite.strictjson import parse_strict
from server.exchange.uploads import Quotas, UploadStore

QUOTAS = Quotas(upload_bytes=2**30, disk_bytes=2**30, num_client_uploads=8, free_bytes=0)


@pytest.fixture
def sealed(live_exchange, make_job, tmp_path):
    return live_exchange.seal(tmp_path / "sealed", live_exchange.add(make_job()))


def dialled(live):
    return ExchangeClient(live.url, live.client.identity, live.owner.fingerprint, patience_seconds=30.0)


def parts(raw):
    return raw.manifest_raw, raw.signatures_raw, raw.keys_raw


def declared(store, raw, **changes):
    manifest = parse_strict(raw.manifest_raw, SealedManifest, "manifest.json", {})
    stated = {"manifest_raw": raw.manifest_raw, "signatures_raw": raw.signatures_raw, "keys_raw": raw.keys_raw}
    return store.declare(raw.digest.removeprefix("sha256:"), manifest, tuple({**stated, **changes}.values()))


def test_a_declaration_that_comes_again_brings_its_own_keys_and_signatures(sealed, tmp_path):
    """Neither is bound by the digest, so those of an upload that was begun may be others."""
    raw, store = read_sealed(sealed), UploadStore(tmp_path / "uploads", QUOTAS)
    first = declared(store, raw, keys_raw=b"wrong", signatures_raw=b"wrong")
    name = min(first.files)
    store.append(first, name, 0, b"x" * 10)
    again = declared(store, raw)
    assert again is first
    assert tuple((first.folder / file).read_bytes() for file in ("manifest.json", "signatures.json", "keys.json")) == (
        parts(raw)
    )
    assert again.offsets()[name] == 10
    store.close(first)
    declared(store, raw, keys_raw=b"other")  # while it is being verified nothing of it changes
    assert (first.folder / "keys.json").read_bytes() == raw.keys_raw


def test_keys_that_do_not_open_are_refused_when_they_are_declared(live_exchange, sealed, tmp_path):
    """And a sound push afterwards is taken at once."""
    raw = read_sealed(sealed)
    right = raw.keys_raw
    other = live_exchange.client.identity.public
    for wrong in (
        write_keys([wrap_keys([bytes(32)] * 2, raw.digest, other)]),
        write_keys([wrap_keys([bytes(32)], raw.digest, live_exchange.owner.identity.public)]),
        write_keys([read_keys(right).wraps[0].model_copy(update={"wrapped": "AAAA" * 400})]),
    ):
        (sealed / "keys.json").write_bytes(wrong)
        exchange = live_exchange.start()
        with dialled(live_exchange) as client, pytest.raises(ArtefactError):
            hand_in(client, sealed, verdict_seconds=10)
        assert exchange.counts.num_bundles_refused == 0
        assert not list((live_exchange.registry_folder / "exchange" / "uploads").iterdir())
        (sealed / "keys.json").write_bytes(right)
        live_exchange.stop()
    live_exchange.start()
    with dialled(live_exchange) as client:
        assert hand_in(client, sealed, verdict_seconds=10)[0].state == "verified"


def test_only_what_has_an_uploads_name_is_removed(tmp_path):
    folder = tmp_path / "uploads"
    own = ["a" * 64, f".{'b' * 64}.0123abcd.partial"]
    foreign = ["photos", "c" * 63, "d" * 65, ".hidden", ".x.0123abcd.partial", "E" * 64]
    for name in (*own, *foreign):
        (folder / name / "inside").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (folder / ("f" * 64)).symlink_to(tmp_path / "elsewhere")
    UploadStore(folder, QUOTAS)
    assert {path.name for path in folder.iterdir()} == {*foreign, "f" * 64}
    assert all((folder / name / "inside").is_dir() for name in foreign)


def test_a_link_to_elsewhere_is_refused(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / ("a" * 64)).mkdir(parents=True)
    (tmp_path / "uploads").symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="folder 'uploads' for uploads is a link"):
        UploadStore(tmp_path / "uploads", QUOTAS)
    assert len(list(elsewhere.iterdir())) == 1
