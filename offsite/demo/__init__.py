"""``offsite demo``: owner and client as separate processes on one machine."""

__all__ = ["config", "play"]
