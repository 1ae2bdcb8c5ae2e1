"""An owner's project with a dashboard over it, and somebody who asks for its pages."""

from __future__ import annotations

import asyncio
import re
import shutil
from contextlib import ExitStack
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx

from offsite.artefacts.job import write_job
from offsite.keys.trust import TrustStore
from server.dashboard.access import make_token
from server.dashboard.config import OwnerUpConfig
from server.dashboard.up import opened_dashboard
from server.registry.intake import take_in
from server.registry.registry import Registry

HOST = "127.0.0.1:8444"


class Browser:
    """Asks one application for pages, and keeps its cookies; follows nothing by itself."""

    def __init__(self, application: Any, *, address: str = "127.0.0.1") -> None:
        self._runner = asyncio.Runner()
        transport = httpx.ASGITransport(application, client=(address, 50_000), raise_app_exceptions=False)
        self._client = httpx.AsyncClient(transport=transport, base_url=f"https://{HOST}")
        self.cookies = self._client.cookies

    def request(self, method: str, path: str, **given: Any) -> httpx.Response:
        return self._runner.run(self._client.request(method, path, **given))

    def get(self, path: str, **given: Any) -> httpx.Response:
        return self.request("GET", path, **given)

    def post(self, path: str, **given: Any) -> httpx.Response:
        return self.request("POST", path, **given)

    def close(self) -> None:
        self._runner.run(self._client.aclose())
        self._runner.close()


class Hidden(HTMLParser):
    """The hidden fields of every form of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        given = dict(attrs)
        if tag == "input" and given.get("type") == "hidden":
            self.found[given["name"]] = given["value"]


class Desk:
    """One owner's project in `folder`, and somebody at its dashboard."""

    def __init__(self, folder: Path, owner: Any, client: Any, package: Any, bundle: Any) -> None:
        self.folder, self.owner, self.client, self.bundle = folder, owner, client, bundle
        folder.mkdir()
        self.package = folder / "package"
        shutil.copytree(package.path, self.package)
        shutil.copy(package.path.with_name(f"{package.path.name}.owner.json"), folder / "package.owner.json")
        (folder / "outbox").mkdir()
        with Registry.open(folder / "registry", owner.keys, create=True):
            pass
        self.token = make_token(owner.keys)
        self._held = ExitStack()

    def settings(self, **changes: Any) -> OwnerUpConfig:
        stated = {"registry": self.folder / "registry", "keys": self.owner.keys, "outbox": self.folder / "outbox"}
        stated |= {"home": self.folder, "limit_free_bytes": 0, "passphrase_file": self.owner.passphrase}
        return OwnerUpConfig(**{**stated, **changes})

    def registry(self) -> Registry:
        return Registry.open(self.folder / "registry", self.owner.keys)

    def add_job(self, job: Any, *, client_name: str = "client") -> Any:
        with self.registry() as registry:
            registry.add_job(job, package=self.package, client_name=client_name)
        write_job(self.folder / f"job-{job.job_id[:6]}", job)
        return job

    def arrive(self, sealed: Path) -> str:
        """Take in a sealed bundle; return its id."""
        with self.registry() as registry:
            return take_in(registry, sealed, self.owner.identity, TrustStore(self.owner.keys)).id

    def state(self, bundle_id: str) -> str:
        with self.registry() as registry:
            return registry.entry(bundle_id).state

    def begin(self, **changes: Any) -> None:
        """Open the dashboard, as `board`."""
        self.board = self._held.enter_context(opened_dashboard(self.settings(**changes), self.owner.identity))

    def open(self, **changes: Any) -> Browser:
        """Open the dashboard; nobody is logged in."""
        self.begin(**changes)
        return self.browser()

    def browser(self, **given: Any) -> Browser:
        """Somebody else at the dashboard that is open."""
        found = Browser(self.board.application([HOST]), **given)
        self._held.callback(found.close)
        return found

    def logged_in(self, **changes: Any) -> Browser:
        browser = self.open(**changes)
        assert submit(browser, "/login", "/login", token=self.token).status_code == 303
        return browser

    def close(self) -> None:
        self._held.close()


def submit(browser: Browser, page: str, action: str, **fields: Any) -> Any:
    """Send the form of a page as a browser does, with its hidden fields."""
    shown = browser.get(page)
    assert shown.status_code == 200, shown.text
    hidden = Hidden(re.sub(r'<header class="top">.*</header>', "", shown.text, flags=re.S)).found
    return browser.post(action, data={**hidden, **fields})
