"""``offsite federate serve``: a federation over this owner's exchange, until its last round or Ctrl-C.

The exchange runs in a thread; Flower's loop in this one. Both use the registry, which is made for that.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from offsite.console import say
from offsite.errors import RunFailed
from offsite.keys.identity import open_identity
from server.exchange.serve import opened_exchange, server_process, tls_of
from server.federation.config import FederateServeConfig
from server.federation.federation import opened_federation
from server.federation.flower import run
from server.federation.grids import ExchangeGrid
from server.federation.results import finish, require_output, require_own, watch_of
from server.http.serve import listen, url_of


def serve_run(config: FederateServeConfig) -> dict[str, object]:
    """Carry out ``offsite federate serve``.

    Raises:
        ConfigError: when settings, jobs and package do not fit, or the output holds something else.
        RunFailed: when a round has too few answers, the port cannot be had or the disk fails; running again goes on.
    """
    require_output(config)
    identity = open_identity(config)
    with contextlib.ExitStack() as open_things:
        federation = open_things.enter_context(opened_federation(config, identity, outbox=config.outbox))
        require_own(federation)
        watch = watch_of(federation)
        sock = open_things.enter_context(listen(config.host, config.port))
        tls = tls_of(config)
        exchange = open_things.enter_context(opened_exchange(config, identity))
        process = server_process(exchange, config, tls)
        sock.listen(min(config.limit_connections, 1024))
        say(f"serving the exchange at {url_of(sock, 'https' if tls else 'http')}; Ctrl-C ends it")
        open_things.enter_context(running(process, [sock]))
        run(federation, ExchangeGrid(federation), watch=watch)
        result = finish(federation, watch)
        say(f"finished; clients may hear of it for {config.linger_seconds:g} s more")
        time.sleep(config.linger_seconds)
    return result


@contextlib.contextmanager
def running(process: uvicorn.Server, sockets: list[Any]) -> Iterator[None]:
    """The server answers in a thread of its own; it has ended on leaving.

    Raises:
        RunFailed: when it does not start.
    """
    thread = threading.Thread(target=process.run, kwargs={"sockets": sockets}, name="exchange", daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not process.started and thread.is_alive() and time.monotonic() < until:
        time.sleep(0.02)
    if not process.started:
        raise RunFailed("the exchange does not start")
    try:
        yield
    finally:
        process.should_exit = True
        thread.join(timeout=30)
