"""Privacy reports on the shelf: seen wherever ``offsite report privacy`` writes them, and verified as they lie now."""

from __future__ import annotations

import html
import importlib.util
import os
import time
from pathlib import Path

import pytest
from tpm_lab import Quoted, attestation_key, signed

from offsite import cli
from offsite.audits.record import write_audit
from offsite.privacyreport.record import nonce_of, parse_report
from server.dashboard.shelf import Shelf

SAMPLES = Path(__file__).parents[2] / "offsite" / "privacyreport" / "privacy_samples.py"


@pytest.fixture
def samples():
    spec = importlib.util.spec_from_file_location(SAMPLES.stem, SAMPLES)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def reported(desk, samples, tmp_path):
    """Write the client's report into the owner's project, by the verb; return its folder."""
    write_audit(
        tmp_path / "audit", samples.bundle_audit(membership=samples.bundle_audit().membership[:1], canaries=None)
    )

    def make(name="privacy", *words):
        given = ["report", "privacy", "--audit", str(tmp_path / "audit"), "-o", str(desk.folder / name), *words]
        assert cli.run([*given, *desk.client.flags]) == 0
        return desk.folder / name

    return make


@pytest.fixture
def shelf(desk):
    return Shelf(desk.folder, desk.owner.keys, list)


def breaks_a_signature(folder):
    """One digit of a signature, as large as before and with the date of before."""
    path = folder / "report.signatures.json"
    before, raw = path.stat(), bytearray(path.read_bytes())
    place = raw.rindex(b'"', 0, len(raw) - 4) - 8
    raw[place] = ord("A") if raw[place] != ord("A") else ord("B")
    path.write_bytes(raw)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaces_the_page(folder):
    (folder / "new.html").write_text("<p>Nothing was found.</p>")
    (folder / "new.html").replace(folder / "report.html")


def writes_into_the_page(folder):
    with (folder / "report.html").open("a") as page:
        page.write("<p>Nothing was found.</p>")


def adds_a_file(folder):
    (folder / "more.txt").write_text("All is well.")


@pytest.mark.parametrize("change", [breaks_a_signature, replaces_the_page, writes_into_the_page, adds_a_file])
def test_a_report_that_was_touched_since_is_verified_again(reported, shelf, change):
    folder, now = reported(), int(time.time())
    (held,) = shelf.reports(now)
    assert held.report is not None
    change(folder)
    (held,) = shelf.reports(now)
    assert held.report is None
    assert held.problem


def test_a_verdict_is_kept_for_minutes_and_not_past_the_end_of_a_card(reported, shelf, monkeypatch):
    reported()
    now, seen, verify = int(time.time()), [], shelf._verified
    monkeypatch.setattr(shelf, "_verified", lambda *given: seen.append(given) or verify(*given))
    for seconds in (0, 1, 200, 301):
        assert shelf.reports(now + seconds)[0].report is not None
    assert len(seen) == 2
    (held,) = shelf.reports(now + 10**9)
    assert held.problem.startswith("Untrusted: ")


def test_a_report_beside_what_stays_here_is_shown_as_any_other(desk, reported, shelf):
    """A sheet for a board, or what an output checker loads: the signed report lies in a folder below."""
    made = reported("for-the-board", "--format", "board")
    assert {path.name for path in made.iterdir()} == {"board.html", "report"}
    (held,) = shelf.reports(int(time.time()))
    assert (held.name, held.report is None) == ("for-the-board/report", False)
    (desk.folder / "linked").mkdir()
    (desk.folder / "linked" / "report").symlink_to(made / "report")
    assert len(shelf.reports(int(time.time()))) == 1
    assert "for-the-board/report" in desk.logged_in().get("/reports").text


def test_the_page_says_what_is_known_of_the_machine(desk, reported, tmp_path):
    folder, browser = reported(), desk.logged_in()
    page = browser.get("/reports").text
    assert "<bdi>none</bdi>" in page
    assert "not verified here" not in page
    raw = Quoted(nonce_of(parse_report((folder / "report.json").read_bytes()))).raw()
    (tmp_path / "quote.msg").write_bytes(raw)
    (tmp_path / "quote.sig").write_bytes(signed(attestation_key("ec"), raw))
    words = ["--quote", str(tmp_path / "quote.msg"), "--quote-signature", str(tmp_path / "quote.sig")]
    given = ["report", "attest", str(folder), *words, "-o", str(desk.folder / "attested")]
    assert cli.run([*given, *desk.client.flags]) == 0
    page = html.unescape(browser.get("/reports").text)
    assert page.count("<bdi>a TPM's quote, not verified here</bdi>") == 1
    assert "--attestation-policy" in page
