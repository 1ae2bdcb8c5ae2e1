"""``offsite federate node``: take part through Flower's deployment engine, and run nothing that it sends.

A stock SuperNode starts a process for every message, which installs the app that came and imports its code, beside the
private data. Here Flower's SuperNode carries messages and starts nothing: it runs in its isolation mode ``process``, in
which somebody else must fetch what came and answer it. That is this process (``client/federation/messages.py``). It
answers with the app as it is installed here, whatever came, and answers only what came with the app whose digest its
user pinned.

The two meet on a loopback port, under a secret that is drawn anew each time; other users of the machine can reach the
port and cannot take a message.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from client.federation.config import MemberConfig
from client.federation.member import Member
from client.federation.nodeconfig import NodeConfig
from offsite.config import build
from offsite.console import say
from offsite.errors import ConfigError, RunFailed
from offsite.keys.files import read_private, write_private

_HOST = "127.0.0.1"
_POLL_SECONDS = 0.5
_KEY_LIMIT_BYTES = 16 * 2**10
_SECRET_BYTES = 32


def node_run(config: NodeConfig) -> dict[str, object]:
    """Carry out ``offsite federate node``, until Ctrl-C or SIGTERM.

    Raises:
        ConfigError, ArtefactError: when the client's settings, keys, job or package do not fit.
        BadKey: when others can read the node's key.
        RunFailed: when the SuperNode ends: the SuperLink does not know its key, or is not to be reached for long.
    """
    settings = config.client.resolve()
    if not settings.is_file():
        raise ConfigError(f"no file named {config.client.name!r}", hint="check --client")
    member = Member(build(MemberConfig, file=settings))
    read_private(config.node_key, _KEY_LIMIT_BYTES, what="node key")
    if config.root_certificate is not None and not config.root_certificate.is_file():
        raise ConfigError(f"no file named {config.root_certificate.name!r}", hint="check --root-certificate")
    try:
        from client.federation.messages import SUPERNODE, MessageHandler
    except ImportError as error:
        raise ConfigError(
            f"this version of flwr is not one that a node of offsite knows: no {error.name}",
            hint="install flwr 1.41, or take part over the owner's exchange: offsite federate join",
        ) from None

    with _interruptible(), contextlib.ExitStack() as open_things:
        folder = Path(open_things.enter_context(tempfile.TemporaryDirectory(prefix="offsite-node-")))
        secret, port = secrets.token_bytes(_SECRET_BYTES), config.port or _free_port()
        write_private(folder / "secret", secret)
        supernode = open_things.enter_context(_supernode(config, folder, port, SUPERNODE))
        handler = MessageHandler(f"{_HOST}:{port}", secret=secret, pin=config.app, settings=settings)
        open_things.callback(handler.close)
        say(f"node of {member.job.client[:9]} for {config.superlink}; answers app {config.app[:12]}; Ctrl-C ends it")
        try:
            while (code := supernode.poll()) is None:
                if not handler.answer_next():
                    time.sleep(_POLL_SECONDS)
        except KeyboardInterrupt:
            return {"answered": handler.num_answered, "refused": handler.num_refused}
    raise RunFailed(
        f"Flower's SuperNode ended with exit code {code}; what it says is above",
        hint="its 305 is a key that the owner has not registered, or a SuperLink that is not to be reached",
    )


@contextlib.contextmanager
def _supernode(config: NodeConfig, folder: Path, port: int, program: str) -> Iterator[subprocess.Popen[bytes]]:
    """Flower's SuperNode runs, starts no app by itself and reports to nobody; it has ended on leaving."""
    words = ["--superlink", config.superlink, "--auth-supernode-private-key", str(config.node_key.resolve())]
    if config.root_certificate is not None:
        words += ["--root-certificates", str(config.root_certificate.resolve())]
    words += ["--isolation", "process", "--superexec-auth-secret-file", str(folder / "secret")]
    words += ["--host", _HOST, "--port", str(port), "--max-wait-time", str(config.wait_seconds)]
    own = {"FLWR_HOME": str(folder), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OFFSITE_", "FLWR_"))}
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", program, str(os.getpid()), *words],
        env={**inherited, **own},
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno(),
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM interrupts as Ctrl-C does, so that the SuperNode is ended too."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((_HOST, 0))
        return int(found.getsockname()[1])
