"""The dashboard's pages and forms: one click does what the verb does; strangers' words stay words."""

from __future__ import annotations

import hashlib
import html
import json
import re
import shlex
import shutil

import pytest
from owners_desk import HOST, Browser, submit
from page_lab import EVIL, Outline
from two_parties import PASSPHRASE, TwoParties

from offsite import cli
from offsite.artefacts.manifest import read_manifest
from offsite.config import flag_name
from offsite.errors import BadDigest
from offsite.evaluation.results import read_results
from offsite.keys.identity import load_identity
from offsite.keys.trust import TrustStore
from offsite.privacyreport.record import parse_report
from offsite.report.numbers import number
from offsite.sealed.invitation import read_invitation
from offsite.sealed.withdrawal import read_withdrawal
from server.dashboard.access import make_token
from server.dashboard.config import OwnerUpConfig
from server.dashboard.guard import HEADERS
from server.dashboard.up import opened_dashboard
from server.plugging.adapted import ADAPTED_FORMAT, AdaptedManifest

BIDI = "\N{RIGHT-TO-LEFT OVERRIDE}"


def routes(board):
    """Every path and method of the application, its parameters filled in."""
    app = board.application([HOST])._app
    for route in app.routes:
        for method in sorted(route.methods):
            yield method, route.path


def test_every_route_answers_with_every_header_and_asks_for_a_session(desk, arrived):
    stranger = desk.open()
    owner = desk.logged_in()
    tried = []
    for method, path in routes(desk.board):
        there = path.replace("{bundle_id}", arrived).replace("{digest}", "0" * 64).replace("{verb}", "accept")
        tried.append((method, path))
        for browser in (stranger, owner):
            answer = browser.request(method, there)
            assert all(answer.headers.get(name) == value for name, value in HEADERS.items()), path
            assert "<script" not in answer.text, path
        answer = stranger.request(method, there)
        if path not in ("/login", "/style.css"):
            assert (answer.status_code, answer.headers["location"]) == (303, "/login"), path
        if method == "POST":  # the owner is logged in, and sends no token
            assert owner.request(method, there, data={"a": "b"}).status_code == 403, path
    assert len(tried) >= 18
    assert desk.state(arrived) == "verified"
    for path in ("/nothing", "/submissions/0123456789abcdef", "/submissions/..%2f..%2fetc", "/packages/x"):
        answer = owner.get(path)
        assert answer.status_code == 404
        assert all(answer.headers.get(name) == value for name, value in HEADERS.items())


def test_accept_is_asked_confirmed_and_what_the_verb_does(desk, arrived):
    browser = desk.logged_in()
    page = browser.get(f"/submissions/{arrived}").text
    for told in (
        "passed every check",
        "largest update",
        "cap 1",
        "for research alone",
        f"/submissions/{arrived}/accept",
    ):
        assert told in page
    assert desk.state(arrived) == "verified", "a page that is looked at decides nothing"
    confirm = f"/submissions/{arrived}/accept"
    assert browser.get(confirm).status_code == 200
    assert desk.state(arrived) == "verified"
    answer = submit(browser, confirm, confirm)
    assert (answer.status_code, answer.headers["location"]) == (303, f"/submissions/{arrived}?done=accept")
    assert desk.state(arrived) == "accepted"
    assert submit(browser, confirm, confirm).status_code == 303, "again changes nothing"
    page = browser.get(f"/submissions/{arrived}?done=accept").text
    assert "Accepted." in page
    commands = [shlex.split(html.unescape(one)) for one in re.findall(r"<code>(offsite [^<]*)</code></pre>", page)]
    assert [words[1] for words in commands] == ["plug-in", "evaluate", "serve"]
    for words in commands:
        fields = cli._resolve(cli.VERBS[words[1]].settings).model_fields
        assert {word for word in words if word.startswith("--")} <= {flag_name(name) for name in fields}, words


def test_refuse_deletes_its_files_and_a_verbs_refusal_is_told(desk, arrived):
    browser = desk.logged_in()
    withdraw, refuse = f"/submissions/{arrived}/withdraw", f"/submissions/{arrived}/refuse"
    answer = submit(browser, withdraw, withdraw)
    assert answer.status_code == 409
    assert "there is nothing to take out again" in answer.text
    assert desk.state(arrived) == "verified"
    assert submit(browser, refuse, refuse).status_code == 303
    assert desk.state(arrived) == "refused"
    assert not (desk.folder / "registry" / "bundles" / arrived).exists()
    assert "refused by the owner" in browser.get(f"/submissions/{arrived}").text


def adapted_folder(desk, arrived, name):
    """An adapted folder that says it holds the bundle: enough of one to be found and named."""
    with desk.registry() as registry:
        entry = registry.entry(arrived)
        job = registry.job(entry.job_id)
    folder = desk.folder / name
    folder.mkdir()
    manifest = AdaptedManifest(
        form="own", base="tiny", base_digest=job.base_digest, package_digest=job.package_digest,
        bundle_digest=entry.bundle_digest, intake=arrived, adapter=job.adapter, sites={}, tensors={}, files={},
    )  # fmt: skip
    (folder / "offsite.json").write_text(json.dumps(manifest.model_dump(mode="json")))
    return read_manifest(folder, AdaptedManifest, ADAPTED_FORMAT)[1]


def test_withdraw_deletes_what_was_ticked_and_signs(desk, arrived, monkeypatch):
    browser = desk.logged_in()
    accept, withdraw = f"/submissions/{arrived}/accept", f"/submissions/{arrived}/withdraw"
    submit(browser, accept, accept)
    manifest, same = (adapted_folder(desk, arrived, name) for name in ("adapted", "other"))
    assert manifest == same, "two folders of one bundle may say the same"
    monkeypatch.setattr("server.plugging.withdraw.open_adapted",
                        lambda path: read_manifest(path, AdaptedManifest, ADAPTED_FORMAT)[0])  # fmt: skip
    page = browser.get(withdraw).text
    (ticked,) = re.findall(r'name="adapted" value="([^"]+)" checked/> *<bdi>adapted</bdi>', page)
    assert len(re.findall('name="adapted"', page)) == 2
    gone = submit(browser, withdraw, withdraw, adapted="sha256:" + "0" * 64)
    assert (gone.status_code, desk.state(arrived)) == (409, "accepted"), "a folder that is not there stops all of it"
    assert submit(browser, withdraw, withdraw, adapted=ticked).status_code == 303
    assert desk.state(arrived) == "withdrawn"
    assert not (desk.folder / "adapted").exists()
    assert (desk.folder / "other").exists()
    statement, verify = read_withdrawal((desk.folder / "withdrawals" / f"{arrived}.withdrawal.json").read_bytes())
    verify(desk.owner.identity.public)
    assert statement.removed == (manifest,)
    (link,) = re.findall(r'href="(/withdrawals/[0-9a-f]{64})"', browser.get("/log").text)
    saved = browser.get(link)
    assert saved.content == (desk.folder / "withdrawals" / f"{arrived}.withdrawal.json").read_bytes()
    assert saved.headers["content-disposition"].startswith("attachment")


def test_a_withdrawal_that_broke_off_before_it_was_signed_can_be_signed(desk, arrived):
    browser = desk.logged_in()
    with desk.registry() as registry:
        registry.advance(arrived, "accepted")
        registry.withdraw(arrived)  # and then the power went
    withdraw = f"/submissions/{arrived}/withdraw"
    assert "Sign the withdrawal" in browser.get(f"/submissions/{arrived}").text
    assert submit(browser, withdraw, withdraw).status_code == 303
    assert (desk.folder / "withdrawals" / f"{arrived}.withdrawal.json").is_file()
    assert "Sign the withdrawal" not in browser.get(f"/submissions/{arrived}").text


def test_an_invitation_is_the_one_that_the_verb_writes(desk, make_job):
    job = desk.add_job(make_job())
    browser = desk.logged_in(url="https://owner.example:8443")
    chosen = f"job:{job.job_id}"
    answer = submit(browser, "/invitations", "/invitations", what=chosen, title="Rare diseases", seals="yes",
                    by_exchange="yes")  # fmt: skip
    assert answer.status_code == 303, answer.text
    (path,) = (desk.folder / "invitations").iterdir()
    found = read_invitation(path, now=job.created + 1).invitation
    assert (found.title, found.url, found.job_id) == ("Rare diseases", "https://owner.example:8443", job.job_id)
    assert {one.name[:3] for one in (desk.folder / "outbox").iterdir()} == {"job", "pac"}
    page = browser.get("/invitations?done=1").text
    (link,) = re.findall(r'href="(/invitations/[0-9a-f]{64})"', page)
    assert browser.get(link).content == path.read_bytes()
    refused = submit(browser, "/invitations", "/invitations", what="job:" + "0" * 32, title="x")
    assert refused.status_code == 409
    refused = submit(browser, "/invitations", "/invitations", what=chosen, title="two\nlines")
    assert refused.status_code == 409
    assert len(list((desk.folder / "invitations").iterdir())) == 1


def test_what_strangers_wrote_is_text_and_bounded(desk, make_job, live_exchange, tmp_path):
    """Names, terms and reasons with markup, turned directions and no end: shown, escaped, and cut."""
    name, terms = (EVIL + BIDI + "n" * 5000), (EVIL + "t" * 4000)
    job = desk.add_job(make_job(terms=terms[:4000]), client_name=name)
    arrived = desk.arrive(live_exchange.seal(tmp_path / "sealed", job))
    with desk.registry() as registry:
        error = BadDigest(EVIL + BIDI + "r" * 5000)
        registry.note_refusal("sha256:" + "1" * 64, error, is_final=False)
    shutil.copytree(desk.package, desk.folder / "<b>x")
    browser = desk.logged_in(model=EVIL + BIDI)
    calm = desk.logged_in()
    paths = ("/", "/submissions", f"/submissions/{arrived}", f"/submissions/{arrived}/accept", "/invitations", "/log")
    for path in paths:
        answer = browser.get(path)
        assert BIDI not in answer.text, path
        assert "<script" not in answer.text, path
        assert "<b>" not in answer.text, path
        assert "n" * 200 not in answer.text, path
        assert "t" * 2500 not in answer.text, path
        assert "r" * 500 not in answer.text, path
        seen, other = Outline(answer.text), Outline(calm.get(path).text)
        assert {tag for tag, _ in seen.tags} - {tag for tag, _ in other.tags} <= {"bdi", "/bdi"}, path
        assert not any(attribute.startswith("on") for _, attributes in seen.tags for attribute in attributes), path
    assert "alert(1)" in browser.get(f"/submissions/{arrived}").text, "it is shown, as text"


def test_a_file_that_is_offered_is_found_by_its_digest_alone(desk):
    (desk.folder / "private.json").write_text('{"format": "offsite/owner/1"}')
    browser = desk.logged_in()
    digest = hashlib.sha256((desk.folder / "private.json").read_bytes()).hexdigest()
    record = hashlib.sha256((desk.folder / "package.owner.json").read_bytes()).hexdigest()
    for one in (digest, record):
        for kind in ("invitations", "withdrawals"):
            assert browser.get(f"/{kind}/{one}").status_code == 404


def test_pages_of_packages_federations_reports_and_the_log(desk, arrived):
    browser = desk.logged_in()
    assert TrustStore(desk.owner.keys).peers()
    (link,) = set(re.findall(r'href="(/packages/[0-9a-f]{64})"', browser.get("/").text))
    assert "offsite audit package" in browser.get(link).text
    assert "There is none" in browser.get("/federations").text
    assert "There is none" in browser.get("/reports").text
    (desk.folder / "said").mkdir()
    (desk.folder / "said" / "report.json").write_text("{}")
    (desk.folder / "said" / "report.signatures.json").write_text('{"format": "offsite/signatures/1"}')
    assert "It does not count" in browser.get("/reports").text
    answer = submit(browser, "/log", "/log/verify")
    assert (answer.status_code, answer.headers["location"]) == (303, "/log?done=1")
    assert "verified" in browser.get("/log").text
    database = desk.folder / "registry" / "registry.log"
    database.write_bytes(database.read_bytes().replace(b'"event":"job"', b'"event":"jib"'))
    assert submit(browser, "/invitations", "/log/verify").status_code == 409


def test_a_fault_of_the_dashboard_is_a_plain_page(desk, monkeypatch, caplog):
    browser = desk.logged_in()

    def broken(_):
        raise RuntimeError("a secret of this machine")

    monkeypatch.setattr("server.dashboard.views.Views.federations", broken)
    answer = browser.get("/federations")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert all(answer.headers.get(name) == value for name, value in HEADERS.items())


@pytest.fixture
def after_one_loop(tmp_path, monkeypatch, capsys):
    """The dashboard of an owner whose client tuned, reported and was plugged in, all by the verbs."""
    both = TwoParties(tmp_path / "both", monkeypatch, capsys)
    shutil.copytree(both.client / "privacy", both.owner / "privacy")
    token = make_token(both.owner / "keys")
    config = OwnerUpConfig(
        registry=both.owner / "registry", keys=both.owner / "keys", home=both.owner, outbox=both.owner, model="model"
    )
    with opened_dashboard(config, load_identity(both.owner / "keys", PASSPHRASE.encode())) as board:
        browser = Browser(board.application([HOST]))
        assert submit(browser, "/login", "/login", token=token).status_code == 303
        yield both, browser
        browser.close()


def test_what_the_verbs_left_is_shown_and_withdrawn(after_one_loop):
    both, browser = after_one_loop
    results = read_results(both.owner / "results")
    (arrived,) = set(re.findall(r'href="/submissions/([0-9a-f]{16})"', browser.get("/submissions").text))
    page = browser.get(f"/submissions/{arrived}").text
    for row in ("zero_shot", "emulator_tuned", "plugged_in"):
        assert f"<bdi>{number(results.rows[row].perplexity.mean)}</bdi>" in page
    assert "From the privacy report privacy, of the client." in page
    assert "offsite serve adapted --registry" in page
    reported = browser.get("/reports").text
    report = parse_report((both.owner / "privacy" / "report.json").read_bytes())
    assert html.escape(report.headline)[:200] in reported
    assert arrived in reported
    for gate in report.gates.bundle:
        assert gate.name.replace("_", " ") in page
        assert html.escape(gate.told)[:100] in page
    for attack in report.audits.bundle.membership:
        assert f"<bdi>{number(attack.auc.value)}</bdi>" in page
    assert f"{sum(gate.verdict == 'failed' for gate in report.gates.every)} failed" in reported
    (reporter,) = TrustStore(both.owner / "keys").peers()
    TrustStore(both.owner / "keys").revoke(reporter.keys.fingerprint)
    assert "It does not count: <bdi>Untrusted" in browser.get("/reports").text, "and not only after a restart"
    (folder,) = re.findall(r'name="adapted" value="([^"]+)"', browser.get(f"/submissions/{arrived}/withdraw").text)
    there = f"/submissions/{arrived}/withdraw"
    assert submit(browser, there, there, adapted=folder).status_code == 303
    assert not (both.owner / "adapted").exists()
    (written,) = (both.owner / "withdrawals").iterdir()
    assert both.run("client", f"inspect {written} --keys keys")["verified"] is True
