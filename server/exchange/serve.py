"""``offsite exchange serve``: hand out what is sealed, take in what comes back, until Ctrl-C.

HTTP adds convenience, never trust: every file that passes here is sealed, and is checked as one that came by hand is.
"""

from __future__ import annotations

import contextlib
import ssl
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from offsite.console import say
from offsite.errors import ConfigError, RunFailed
from offsite.keys.identity import Identity, open_identity
from offsite.keys.trust import TrustStore
from server.exchange.app import Exchange
from server.exchange.authentication import Authenticator, Denials, Nonces, Peers, Rates
from server.exchange.config import CertificateConfig, ServeExchangeConfig
from server.exchange.outbox import Outbox
from server.exchange.submissions import Submissions
from server.exchange.uploads import Quotas, UploadStore
from server.http.bodies import Bodies
from server.http.certificates import CERTIFICATE_NAME, PRIVATE_KEY_NAME, server_context, write_certificate
from server.http.connections import guarded
from server.http.serve import is_loopback, listen, signals_end, url_of
from server.registry.registry import Registry

STATE_FOLDER = "exchange"

_BURST = 4
_KEEP_ALIVE_SECONDS = 15
_GRACE_SECONDS = 10
_HEAD_BYTES = 16 * 2**10


def serve_run(config: ServeExchangeConfig) -> dict[str, object]:
    """Serve until Ctrl-C or SIGTERM, then return what was done.

    Raises:
        ConfigError: certificate, host, registry or outbox is unusable, or other machines would reach it without TLS.
        RunFailed: the port cannot be had, or the disk fails.
        BadKey: the keys do not open.
        Replayed: the registry was turned back.
    """
    began = time.monotonic()
    tls = tls_of(config)
    with contextlib.ExitStack() as open_things:
        sock = open_things.enter_context(listen(config.host, config.port))
        exchange = open_things.enter_context(opened_exchange(config, open_identity(config)))
        process = server_process(exchange, config, tls)
        sock.listen(min(config.limit_connections, 1024))
        url = url_of(sock, "https" if tls else "http")
        say(f"serving the exchange at {url}; Ctrl-C ends it")
        with signals_end(process):
            process.run(sockets=[sock])
    return {"url": url, "seconds": round(time.monotonic() - began, 1), **asdict(exchange.counts)}


def certificate_run(config: CertificateConfig) -> dict[str, object]:
    """Write a certificate for the exchange and its key; clients pin the certificate.

    Raises:
        ConfigError: a host is neither a name nor an address, or the output exists.
    """
    digest = write_certificate(config.output, config.host, days=config.days)
    say(f"give {CERTIFICATE_NAME} to your clients; keep {PRIVATE_KEY_NAME} to yourself")
    return {"output": str(config.output), "sha256": digest}


@contextlib.contextmanager
def opened_exchange(config: ServeExchangeConfig, identity: Identity) -> Iterator[Exchange]:
    """Yield the exchange over the registry, the outbox and the uploads that the settings name; closed on leaving.

    Raises:
        ConfigError, RunFailed, Replayed: as `serve_run`.
    """
    own = identity.public
    outbox = Outbox(config.outbox, own.fingerprint)
    peers = Peers(config.keys)
    with contextlib.ExitStack() as open_things:
        registry = open_things.enter_context(Registry.open(config.registry, config.keys))
        state = config.registry / STATE_FOLDER
        quotas = Quotas(
            upload_bytes=config.limit_upload_bytes,
            disk_bytes=config.limit_disk_bytes,
            num_client_uploads=config.limit_client_uploads,
            free_bytes=config.limit_free_bytes,
        )
        _make(state)
        uploads = UploadStore(state / "uploads", quotas)
        nonces = Nonces(state / "nonces.db")
        open_things.callback(nonces.close)
        submissions = Submissions(registry, identity, TrustStore(config.keys), peers.require)
        rates = Rates(per_second=config.limit_rate, burst=_BURST * config.limit_rate)
        yield Exchange(
            authenticator=Authenticator(owner=own, lookup=peers.require, nonces=nonces, rates=rates),
            denials=Denials(submissions.log),
            bodies=Bodies(
                num_slots=config.limit_bodies, grace_seconds=config.body_seconds, bytes_per_second=config.min_rate
            ),
            outbox=outbox,
            uploads=uploads,
            submissions=submissions,
            limit_part_bytes=config.limit_part_bytes,
            limit_waiting=config.limit_waiting,
            idle_seconds=config.idle_hours * 3600,
        )


def server_process(exchange: Exchange, config: ServeExchangeConfig, tls: ssl.SSLContext | None) -> uvicorn.Server:
    """Return the server around the exchange."""
    return process_of(exchange.application(), config, tls)


def process_of(application: ASGIApp, config: ServeExchangeConfig, tls: ssl.SSLContext | None) -> uvicorn.Server:
    """Return a server around the application; its parser is the one that ``server/http/connections.py`` limits."""
    protocol = guarded(
        limit_connections=config.limit_connections,
        head_seconds=config.head_seconds,
        stall_seconds=config.stall_seconds,
    )
    return uvicorn.Server(
        uvicorn.Config(
            application,
            http=protocol,
            loop="asyncio",
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=_HEAD_BYTES,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_GRACE_SECONDS,
            ssl_context_factory=None if tls is None else lambda _config, _default: tls,
        )
    )


def tls_of(config: ServeExchangeConfig) -> ssl.SSLContext | None:
    """Return what encrypts the exchange's connections; None for loopback without a certificate.

    Raises:
        ConfigError: when other machines would reach it without TLS.
    """
    if config.certificate is not None and config.certificate_key is not None:
        return server_context(config.certificate, config.certificate_key)
    if not is_loopback(config.host):
        raise ConfigError(
            f"--host {config.host} can be reached from other machines, and there is no --certificate",
            hint="offsite exchange certificate makes one; or serve 127.0.0.1 behind a proxy with TLS",
        )
    return None


def _make(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise RunFailed(f"cannot use folder {folder.name!r}: {(error.strerror or 'i/o error').lower()}") from None
