"""The client's app, with the settings file of the partition that Flower's simulation gives a node."""

from __future__ import annotations

import json
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp


class ByPartition(ClientApp):
    """Answers as the client whose number the node has; ``nodes`` of the run's configuration names the list."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer as that client."""
        from client.federation.flower import app as installed

        settings = json.loads(Path(str(context.run_config["nodes"])).read_text(encoding="utf-8"))
        context.node_config["client"] = settings[int(context.node_config["partition-id"])]
        return installed(message, context)


app = ByPartition()
