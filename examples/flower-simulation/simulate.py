"""A federation under Flower's own simulation: every client in a Ray process of its own.

Run as: ``python simulate.py CONFIG``, with the settings of ``offsite federate simulate`` in a YAML file, after
``pip install 'flwr[simulation]'``. Everything is as with that command, keys, jobs and seals included; what
differs is that Flower's backend calls the clients' app, and several at a time.

It is started as Flower says, by ``flwr run``, at a SuperLink of its own on loopback that ends with it.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from offsite.config import build
from offsite.console import say
from offsite.errors import OffsiteError, RunFailed
from offsite.staging import staged_file
from server.federation.config import FederationConfig
from server.federation.results import require_output
from server.federation.simulation import prepared
from server.federation.simulationconfig import SimulateConfig

APP = Path(__file__).resolve().parent
STARTS_SECONDS = 300.0
TOLD = ("name", "mode", "rounds", "zero_shot", "plugged_in", "not_better")
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def main() -> None:
    """Run the federation; the last line is what ``offsite federate simulate`` prints."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("config", type=Path)
    config = build(SimulateConfig, file=options.parse_args().config)
    require_output(config)
    owner, clients = prepared(config)
    (config.work / "outbox").mkdir(exist_ok=True)
    settings = written(config, owner, [str(path.resolve()) for path in clients.values()])
    result, before = config.output / "results.json", stamp(config.output / "results.json")
    with superlink(config.work.resolve() / "flower-home") as env:
        words = " ".join(f"{name}={json.dumps(str(path))}" for name, path in settings.items())
        nodes = f"num-supernodes={len(clients)} client-resources-num-cpus=1"
        run = ["run", str(APP), "simulation", "--stream", "--run-config", words, "--federation-config", nodes]
        done = subprocess.run([program("flwr"), *run], env=env, stdout=sys.stderr, check=False)
    if done.returncode or stamp(result) == before:
        raise RunFailed("the run ended without a result", hint="the lines above say why; the same command goes on")
    found = json.loads(result.read_text(encoding="utf-8"))
    told = {"clients": sorted(clients), "output": config.output.name, **{name: found[name] for name in TOLD}}
    print(json.dumps(told, sort_keys=True))


def written(config: SimulateConfig, owner: FederationConfig, clients: list[str]) -> dict[str, Path]:
    """Write what the two apps read, and return the files by their names in the run's configuration."""
    content = {"federation": owner.model_dump(mode="json"), "nodes": clients}
    found = {name: config.work.resolve() / f"{name}.json" for name in content}
    for name, path in found.items():
        with staged_file(path, replace=True) as stage:
            stage.write_text(json.dumps(content[name], indent=1) + "\n", encoding="utf-8")
    return found


@contextmanager
def superlink(home: Path) -> Iterator[dict[str, str]]:
    """Yield the environment in which ``flwr run APP simulation`` finds a SuperLink, which is there meanwhile.

    Raises:
        RunFailed: when it does not start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    home.mkdir(parents=True, exist_ok=True)
    connection = (
        f'[superlink]\ndefault = "simulation"\n[superlink.simulation]\naddress = "{address}"\ninsecure = true\n'
    )
    (home / "config.toml").write_text(connection, encoding="utf-8")
    env = {**os.environ, **QUIET, "FLWR_HOME": str(home)}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"  # it starts others by their names
    host, port = address.split(":")
    words = ["--simulation", "--insecure", "--host", host, "--port", port, "--disable-runtime-dependency-installation"]
    with (home / "superlink.log").open("wb") as log:
        process = subprocess.Popen([program("flower-superlink"), *words], env=env, stdout=log, stderr=log)
        try:
            wait_for(process, int(port), home)
            yield env
        finally:
            process.terminate()
            process.wait(timeout=60)


def wait_for(process: subprocess.Popen[bytes], port: int, home: Path) -> None:
    """Return once somebody listens on the port."""
    say(f"waiting for Flower's SuperLink; its log is superlink.log in {home.name!r}")
    until = time.monotonic() + STARTS_SECONDS
    while time.monotonic() < until and process.poll() is None:
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise RunFailed("Flower's SuperLink did not start", hint=f"see superlink.log in {home.name!r}")


def program(name: str) -> str:
    """Return the path of a program of this Python's environment."""
    return str(Path(sys.executable).parent / name)


def stamp(path: Path) -> int:
    """Return when the file was written, 0 when there is none."""
    return path.stat().st_mtime_ns if path.is_file() else 0


if __name__ == "__main__":
    try:
        main()
    except OffsiteError as error:
        hint = f"\nsimulate: hint: {error.hint}" if error.hint else ""
        raise SystemExit(f"simulate: error: {error}{hint}") from None
