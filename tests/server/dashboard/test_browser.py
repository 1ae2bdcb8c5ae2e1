"""An owner's day in a real browser, without scripts, by keyboard alone, at a desk and on a phone; axe on every page.

It needs Chromium, which Debian has (``apt-get install chromium``); ``OFFSITE_SCREENSHOTS=DIR`` keeps pictures.
"""

from __future__ import annotations

import os
import shutil
import tarfile
import threading
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from owners_desk import Desk
from playwright.sync_api import Browser, Page, expect, sync_playwright

from offsite.audits.record import Capability, PackageAudit, Recovery, RecoveryPoint, Similarity, Withheld, write_audit
from offsite.evaluation.results import read_results, write_results
from offsite.sealed.invitation import parse_invitation
from server.dashboard.up import hosts_of
from server.exchange.serve import process_of
from server.http.certificates import server_context, write_certificate
from server.http.serve import listen
from server.registry.federations import FederationStore

pytestmark = pytest.mark.slow

CHROMIUM = os.environ.get("OFFSITE_CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
SIZES = {"desk": {"width": 1280, "height": 900}, "phone": {"width": 375, "height": 720}}
MOST_TABS = 60
EARLIER = Path(__file__).parents[2] / "vectors" / "loop" / "parties.tar.gz"


@pytest.fixture(scope="module")
def chromium():
    assert Path(CHROMIUM).exists(), "these tests need Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def served(desk: Desk, tmp_path):
    """The address of the desk's dashboard, served as ``owner up`` serves it."""
    folder = tmp_path / "tls"
    write_certificate(folder, ("127.0.0.1",), days=1)
    tls = server_context(folder / "certificate.pem", folder / "certificate-key.pem")
    desk.begin(url="https://owner.example:8443", model="smollm2-135m")
    with listen("127.0.0.1", 0) as sock:
        sock.listen(64)
        port = sock.getsockname()[1]
        app = desk.board.application(hosts_of(("127.0.0.1",), "127.0.0.1", port))
        process = process_of(app, desk.settings(), tls)
        thread = threading.Thread(target=process.run, kwargs={"sockets": [sock]})
        thread.start()
        yield f"https://127.0.0.1:{port}"
        process.should_exit = True
        thread.join()


def furnish(desk: Desk, arrived: str, job) -> None:
    """What an owner has after a while lies in the project: an audit, an evaluation, a report, a federation."""
    with desk.registry() as registry:
        bundle = registry.entry(arrived).bundle_digest
        begun = FederationStore(registry, "cough-and-fever", {"jobs": [job.job_id]})
        told = {"used": [job.client], "left_out": {"x" * 9: "NotFinite: a number is NaN"}, "norms": {}, "files": {}}
        begun.finish(1, {**told, "figures": {"perplexity": 11.2}})
    with tarfile.open(EARLIER) as archive:
        archive.extractall(desk.folder / ".earlier", filter="data")
    found = read_results(desk.folder / ".earlier" / "owner" / "results")
    bundles = {seed: one.model_copy(update={"digest": bundle}) for seed, one in found.bundles.items()}
    (desk.folder / "results").mkdir()
    write_results(desk.folder / "results", found.model_copy(update={"bundles": bundles}))
    shutil.copytree(desk.folder / ".earlier" / "client" / "privacy", desk.folder / "privacy")
    audit = PackageAudit(
        package_digest=job.package_digest, base_digest=job.base_digest, method={"name": "width", "settings": {}},
        middle_parameters=9_000, emulator_parameters=3_000,
        capabilities=(Capability(name="perplexity", metric="nats", num_rows=96, chance=7.1, full=2.57, emulator=3.42,
                                 kept=0.81),),
        similarity=Similarity(num_parameters=20_000, num_verbatim=6_000, num_verbatim_by_row=7_100, blocks=()),
        recovery=(Recovery(attack="heal", trained_parameters=100,
                           points=(RecoveryPoint(num_tokens=50_000, perplexity=24.0, regained=0.31),)),),
        withheld=(Withheld(way="rehearsed client", nats=0.27, perplexity=17.2, num_tokens=20_000,
                           told="LoRA of rank 8, 200 steps"),),
    )  # fmt: skip
    write_audit(desk.folder / "package-audit", audit)


def look(page: Page, name: str) -> None:
    """Nothing sticks out sideways; a picture is kept where one was asked for."""
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0, f"{name}: {wide} pixels stick out"
    if folder := os.environ.get("OFFSITE_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def tab_to(page: Page, words: str) -> None:
    """Press Tab until what is called so has the focus, and can be seen to have it."""
    for _ in range(MOST_TABS):
        page.keyboard.press("Tab")
        found = page.evaluate(
            "[document.activeElement.innerText || '', document.activeElement.labels?.[0]?.innerText || '',"
            " getComputedStyle(document.activeElement).outlineStyle]"
        )
        if found[0].strip() == words or found[1].strip().startswith(words):
            assert found[2] != "none", f"{words}: the focus cannot be seen"
            return
    raise AssertionError(f"{words!r} is not reached by Tab")


def press(page: Page, words: str) -> None:
    tab_to(page, words)
    with page.expect_navigation():
        page.keyboard.press("Enter")


def entered(chromium: Browser, served: str, desk: Desk, size: str, **settings) -> Page:
    """A page of somebody who logged in by keyboard."""
    context = chromium.new_context(ignore_https_errors=True, viewport=SIZES[size], **settings)
    page = context.new_page()
    page.goto(served)
    expect(page).to_have_title("Log in · offsite")
    look(page, f"{size}-login")
    tab_to(page, "Token")
    page.keyboard.type(desk.token)
    page.keyboard.press("Enter")
    expect(page).to_have_title("Overview · offsite")
    return page


@pytest.mark.parametrize("size", SIZES)
def test_an_owners_day_by_keyboard_and_without_scripts(size, chromium, served, desk, make_job, live_exchange, tmp_path):
    job = desk.add_job(make_job(terms="Tune on notes of 2026; research alone."), client_name="Example Hospital")
    arrived = desk.arrive(live_exchange.seal(tmp_path / "sealed", job))
    furnish(desk, arrived, job)
    page = entered(chromium, served, desk, size, java_script_enabled=False)
    look(page, f"{size}-overview")
    press(page, "package")
    expect(page.get_by_role("heading", level=1)).to_have_text("package")
    expect(page.get_by_text("rehearsed client")).to_be_visible()
    look(page, f"{size}-package")
    press(page, "Invitations")
    tab_to(page, "Title")
    page.keyboard.type("Questions of patients")
    look(page, f"{size}-invitations")
    press(page, "Write invitation")
    expect(page.get_by_role("status")).to_contain_text("Written.")
    (written,) = (desk.folder / "invitations").iterdir()
    assert parse_invitation(written.read_bytes()).invitation.title == "Questions of patients"
    with page.expect_download() as saved:
        tab_to(page, written.name)
        page.keyboard.press("Enter")
    assert Path(saved.value.path()).read_bytes() == written.read_bytes()
    press(page, "Arrived")
    look(page, f"{size}-arrived")
    press(page, arrived)
    expect(page.get_by_text("before and after", exact=False).first).to_be_visible()
    look(page, f"{size}-bundle")
    press(page, "Accept")
    look(page, f"{size}-accept")
    press(page, "Yes, accept")
    expect(page.get_by_role("status")).to_have_text("Accepted.")
    assert desk.state(arrived) == "accepted"
    press(page, "Withdraw")
    look(page, f"{size}-withdraw")
    press(page, "No, go back")
    assert desk.state(arrived) == "accepted"
    press(page, "Withdraw")
    press(page, "Yes, withdraw")
    expect(page.get_by_role("status")).to_contain_text("Withdrawn")
    assert desk.state(arrived) == "withdrawn"
    for section in ("Federations", "Reports", "Log"):
        press(page, section)
        look(page, f"{size}-{section.lower()}")
    press(page, "Verify from the first line")
    expect(page.get_by_role("status")).to_contain_text("follows from the one before")
    press(page, "Log out")
    expect(page).to_have_title("Log in · offsite")
    page.goto(f"{served}/log")
    expect(page).to_have_title("Log in · offsite")
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_on_any_page(scheme, chromium, served, desk, make_job, live_exchange, tmp_path):
    job = desk.add_job(make_job(), client_name="Example Hospital")
    arrived = desk.arrive(live_exchange.seal(tmp_path / "sealed", job))
    furnish(desk, arrived, job)
    page = entered(chromium, served, desk, "phone", color_scheme=scheme)
    outside: list[str] = []
    page.on("request", lambda request: outside.append(request.url))
    problems = []
    here = f"/submissions/{arrived}"
    package = f"/packages/{job.package_digest.removeprefix('sha256:')}"
    pages = ["/", package, "/submissions", here, f"{here}/accept", f"{here}/withdraw", "/invitations"]
    pages += ["/federations", "/reports", "/log", "/nothing", "/login"]
    for path in pages:
        page.goto(served + path)
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        look(page, f"open-{scheme}-{path.strip('/').replace('/', '-')[:12] or 'overview'}")
        found = Axe().run(page).response
        problems += [
            (path, one["id"], one["impact"], [node["html"][:90] for node in one["nodes"]][:3])
            for one in found["violations"]
            if one["impact"] in ("serious", "critical", "moderate")
        ]
        assert found["passes"], "axe has looked"
    assert problems == []
    assert all(url.startswith(served) for url in outside)
    page.context.close()
