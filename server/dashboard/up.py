"""``offsite owner up``: the exchange for clients and the dashboard for its owner, until Ctrl-C.

One process opens the keys once. The two are applications of their own on sockets of their own, each with its event
loop: no address of the exchange leads to the dashboard.
"""

from __future__ import annotations

import contextlib
import datetime
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict

import uvicorn

from offsite.console import say
from offsite.errors import ConfigError, RunFailed
from offsite.keys.identity import Identity, open_identity
from server.dashboard.access import Gatekeeper, Sessions, has_token, make_token
from server.dashboard.actions import Actions
from server.dashboard.app import Dashboard
from server.dashboard.begin import tell_token
from server.dashboard.config import INVITATIONS, WITHDRAWALS, OwnerUpConfig
from server.dashboard.shelf import Shelf
from server.dashboard.views import Views
from server.exchange.serve import opened_exchange, process_of, server_process, tls_of
from server.http.certificates import certificate_facts
from server.http.serve import is_loopback, listen, signals_end, url_of
from server.registry.registry import Registry

_LOG_LINES, _LOG_SECONDS = 20, 60.0
_WARN_DAYS = 30


def run(config: OwnerUpConfig) -> dict[str, object]:
    """Serve until Ctrl-C or SIGTERM, then return what was done.

    Raises:
        ConfigError: certificate, host, registry or outbox is unusable, or there is no certificate.
        RunFailed: a port cannot be had, or the disk fails.
        BadKey: the keys do not open.
        Replayed: the registry was turned back.
    """
    began = time.monotonic()
    tls = tls_of(config)
    if tls is None or config.certificate is None:
        message = "there is no --certificate, and the token is sent with TLS alone"
        raise ConfigError(message, hint="offsite owner init MODEL makes one")
    certificate = certificate_facts(config.certificate)
    with contextlib.ExitStack() as held:
        outside = held.enter_context(listen(config.host, config.port))
        inside = held.enter_context(listen(config.dashboard_host, config.dashboard_port))
        identity = open_identity(config)
        exchange = held.enter_context(opened_exchange(config, identity))
        board = held.enter_context(opened_dashboard(config, identity))
        port = inside.getsockname()[1]
        process = process_of(board.application(hosts_of(certificate.names, config.dashboard_host, port)), config, tls)
        other = server_process(exchange, config, tls)
        for sock in (outside, inside):
            sock.listen(min(config.limit_connections, 1024))
        urls = url_of(outside, "https"), url_of(inside, "https")
        say(f"the exchange is at {config.url or urls[0]}, for clients; it listens at {urls[0]}")
        whom = (
            "for this machine alone"
            if is_loopback(config.dashboard_host)
            else "for whoever reaches it and has the token"
        )
        say(f"the dashboard is at {urls[1]}, {whom}; a browser asks once about its certificate, whose SHA-256 is")
        say(f"  {certificate.sha256}")
        _warn_of_end(certificate.ends)
        say("Ctrl-C ends both")
        with signals_end(process), _beside(other, outside, process):
            process.run(sockets=[inside])
        if not (process.started and other.started):
            raise RunFailed("the servers could not start")
    seconds = round(time.monotonic() - began, 1)
    return {"exchange": urls[0], "dashboard": urls[1], "seconds": seconds, **asdict(exchange.counts)}


@contextlib.contextmanager
def opened_dashboard(config: OwnerUpConfig, identity: Identity) -> Iterator[Dashboard]:
    """Yield the dashboard over the registry and the folders that the settings name; closed on leaving.

    Raises:
        ConfigError, RunFailed, Replayed, BadKey: as `run`.
    """
    if config.new_token or not has_token(config.keys):
        tell_token(make_token(config.keys))
    try:
        for name in (INVITATIONS, WITHDRAWALS):
            (config.home / name).mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise RunFailed(f"cannot use folder {name!r}: {(error.strerror or 'i/o error').lower()}") from None
    with Registry.open(config.registry, config.keys) as registry:
        shelf = Shelf(config.home, config.keys, lambda: list(registry.packages().values()))
        yield Dashboard(
            registry=registry,
            shelf=shelf,
            views=Views(config, registry, shelf, identity.public),
            actions=Actions(config, shelf, identity),
            gatekeeper=Gatekeeper(config.keys),
            sessions=Sessions(idle_seconds=config.idle_minutes * 60),
            note=LoginLog(registry).note,
        )


class LoginLog:
    """Lines in the owner's log on who tried to log in, at most so many a minute."""

    def __init__(self, registry: Registry) -> None:
        self._registry, self._mutex = registry, threading.Lock()
        self._began, self._num_lines = time.monotonic(), 0

    def note(self, *, verdict: str, address: str) -> None:
        """One line more says what came of a token that was tried; past the limit, of those that opened alone."""
        with self._mutex:
            if time.monotonic() - self._began > _LOG_SECONDS:
                self._began, self._num_lines = time.monotonic(), 0
            self._num_lines += 1
            if verdict != "right" and self._num_lines > _LOG_LINES:
                return
        self._registry.log("dashboard-login", verdict=verdict, address=address)


def _warn_of_end(ends: datetime.datetime) -> None:
    """It is said when the certificate ends soon: clients who pinned it need the next one before."""
    days = (ends - datetime.datetime.now(datetime.UTC)).days
    if days < _WARN_DAYS:
        what = "has ended" if days < 0 else f"ends in {days} day(s)"
        say(f"warning: the certificate {what}; offsite exchange certificate makes another, which new invitations carry")


def hosts_of(names: tuple[str, ...], host: str, port: int) -> list[str]:
    """Return what a request to the dashboard may name as its host: what the certificate is for, and the address."""
    found = dict.fromkeys([*names, host])
    shown = [f"[{name}]" if ":" in name else name for name in found]
    return [f"{name}:{port}" for name in shown] + (shown if port == 443 else [])


@contextlib.contextmanager
def _beside(server: uvicorn.Server, sock: object, main: uvicorn.Server) -> Iterator[None]:
    """The other server runs in a thread meanwhile; when one of the two ends, both do."""

    def serve() -> None:
        try:
            server.run(sockets=[sock])  # type: ignore[list-item]
        finally:
            main.should_exit = True

    thread = threading.Thread(target=serve, name="exchange")
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()
