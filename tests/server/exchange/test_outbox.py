"""The outbox reads what lies in it as sealed folders are read: plain files of their own, opened once, never awaited."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from contextlib import contextmanager
from pathlib import Path

import pytest

from offsite.sealed.folder import read_sealed
from server.exchange.outbox import Outbox
from server.http.refusals import Refusal


@contextmanager
def within(seconds):
    """What takes longer fails instead of hanging."""

    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def offered(live_exchange, make_job):
    """Two sealed packages in the outbox, and who may have them."""
    job = make_job()
    one, two = live_exchange.offer("one", job), live_exchange.offer("two", job, sequence=2)
    return live_exchange, one, two


def outbox_of(live):
    return Outbox(live.outbox, live.owner.fingerprint)


def names(outbox, live):
    return {offer.folder.name for offer in outbox.offers(live.client.fingerprint)}


def digest_of(folder):
    return read_sealed(folder).digest.removeprefix("sha256:")


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


def replace_by_hard_link(path):
    os.link(path, path.parent.parent.parent / "elsewhere")


def replace_by_link(path):
    path.rename(path.parent.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent.parent / "elsewhere")


def replace_by_socket(path):
    path.unlink()
    here = os.getcwd()  # noqa: PTH109 - the address of a socket is short
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


REPLACE = [replace_by_pipe, replace_by_hard_link, replace_by_link, replace_by_socket]


@pytest.mark.parametrize("replace", REPLACE)
def test_row_14_a_manifest_that_is_no_plain_file_of_its_own(replace, offered, capsys):
    live, one, two = offered
    replace(one / "manifest.json")
    outbox = outbox_of(live)
    with within(5):
        assert names(outbox, live) == {"two"}
        handle, _ = outbox.open(live.client.fingerprint, digest_of(two), "manifest.json")
    os.close(handle)
    assert "'one' in the outbox is not a sealed folder of plain files" in capsys.readouterr().err


@pytest.mark.parametrize("replace", REPLACE)
@pytest.mark.parametrize("which", ["keys.json", "payload"])
def test_row_14_a_file_that_is_no_plain_file_of_its_own_is_not_served(which, replace, offered):
    live, one, _ = offered
    digest, outbox = digest_of(one), outbox_of(live)
    target = next((one / "payload").iterdir()) if which == "payload" else one / which
    handle, size = outbox.open(live.client.fingerprint, digest, target.name)
    assert (os.fstat(handle).st_size, os.pread(handle, size, 0)) == (size, target.read_bytes())
    os.close(handle)
    before = len(list(Path("/dev/fd").iterdir()))
    replace(target)
    with within(5), pytest.raises(Refusal) as caught:
        outbox.open(live.client.fingerprint, digest, target.name)
    assert caught.value.status == 404
    assert len(list(Path("/dev/fd").iterdir())) == before


def test_row_14_a_link_to_a_folder_is_none_of_the_outbox(offered):
    live, one, _ = offered
    one.rename(live.folder / "elsewhere")
    one.symlink_to(live.folder / "elsewhere")
    assert names(outbox_of(live), live) == {"two"}


def test_row_14_a_link_instead_of_the_payload_folder(offered):
    live, one, _ = offered
    name = next((one / "payload").iterdir()).name
    digest = digest_of(one)
    shutil.move(one / "payload", live.folder / "payload")
    (one / "payload").symlink_to(live.folder / "payload")
    with pytest.raises(Refusal):
        outbox_of(live).open(live.client.fingerprint, digest, name)


def test_what_file_managers_leave_is_not_told_and_anything_else_is_in_ascii(offered, capsys):
    live, _, _ = offered
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (live.outbox / name).write_text("x")
    (live.outbox / "späti\n").mkdir()
    assert names(outbox_of(live), live) == {"one", "two"}
    told = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert told == ["warning: 'sp\\xe4ti\\n' in the outbox is not a sealed folder of plain files; it is not offered"]
