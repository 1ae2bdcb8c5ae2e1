"""A socket to listen on, and a server that Ctrl-C and SIGTERM end cleanly; shared by what serves."""

from __future__ import annotations

import errno
import ipaddress
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from offsite.errors import ConfigError, RunFailed


def listen(host: str, port: int) -> socket.socket:
    """Return a bound socket; `port` 0 takes a free one.

    Raises:
        ConfigError: `host` is no address of this machine's resolver.
        RunFailed: the port is taken or may not be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror:
        raise ConfigError(f"--host {host!r} is not an address", hint="--host 127.0.0.1 is this machine alone") from None
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        reason = "is in use" if error.errno == errno.EADDRINUSE else os.strerror(error.errno or 0).lower()
        message = f"cannot listen on {host} port {port}: {reason}"
        raise RunFailed(message, hint="choose another with --port, or any free one with --port 0") from None
    return sock


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def url_of(sock: socket.socket, scheme: str = "http") -> str:
    """Return the address at which a bound socket is reached."""
    host, port = sock.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


@contextmanager
def signals_end(process: uvicorn.Server) -> Iterator[None]:
    """Ctrl-C and SIGTERM end `process` and nothing else: uvicorn raises them again after its own clean end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        process.should_exit = True

    previous = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
