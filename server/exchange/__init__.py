"""``offsite exchange serve``: sealed folders out, sealed bundles in, over HTTP; ``offsite invite``: who is to come."""

__all__ = ["config", "invite", "serve"]
