"""``offsite exchange pull``, ``push`` and ``status``: the client's end of the exchange, over HTTP."""

__all__ = ["config", "http", "verbs"]
