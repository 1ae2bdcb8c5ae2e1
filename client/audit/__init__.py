"""``offsite canaries`` and ``audit bundle``: what an adapter gives away of the private text."""

__all__ = ["audit", "canaries", "canaryconfig", "config", "retunings"]
