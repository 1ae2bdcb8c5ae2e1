"""``offsite federate join`` and ``node``: the client's part in a federation's rounds."""

__all__ = ["config", "join", "node", "nodeconfig"]
