"""A federation under Flower's own simulation: every client in a Ray process of its own.

Run as: ``python simulate.py CONFIG``, with the settings of ``offsite federate simulate`` in a YAML file, after
``pip install 'flwr[simulation]'``. Everything is as with that command, keys, jobs and seals included; what
differs is that Flower's backend calls the clients' app, and several at a time.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from offsite.config import build
from offsite.errors import OffsiteError
from offsite.keys.identity import open_identity
from server.federation.federation import opened_federation
from server.federation.flower import run
from server.federation.results import finish, require_output, require_own, watch_of
from server.federation.simulation import prepared
from server.federation.simulationconfig import SimulateConfig


class ByPartition(ClientApp):
    """The client's app, with the settings file of the partition that Flower gives the node."""

    def __init__(self, settings: list[str]) -> None:
        super().__init__()
        self._settings = settings

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer as that client."""
        from client.federation.flower import app

        context.node_config["client"] = self._settings[int(context.node_config["partition-id"])]
        return app(message, context)


def main() -> None:
    """Run the federation; the last line is what ``offsite federate simulate`` prints."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("config", type=Path)
    config = build(SimulateConfig, file=options.parse_args().config)
    require_output(config)
    owner, clients = prepared(config)
    (config.work / "outbox").mkdir(exist_ok=True)
    server_app, told = ServerApp(), {}

    @server_app.main()
    def rounds(grid: Grid, context: Context) -> None:
        with opened_federation(owner, open_identity(owner), outbox=config.work / "outbox") as federation:
            require_own(federation)
            watch = watch_of(federation)
            run(federation, grid, watch=watch)
            told.update(finish(federation, watch))

    run_simulation(
        server_app=server_app,
        client_app=ByPartition([str(path.resolve()) for path in clients.values()]),
        num_supernodes=len(clients),
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    if not told:
        raise SystemExit(1)
    print(json.dumps(told))


if __name__ == "__main__":
    try:
        main()
    except OffsiteError as error:
        raise SystemExit(f"simulate: error: {error}") from None
