"""``offsite tune``: the private text, the training of the adapter, and the last look at what is written."""

__all__ = ["config", "data", "hidden", "ready", "rounds", "runrecord", "sandbox", "scan", "tune", "verb"]
