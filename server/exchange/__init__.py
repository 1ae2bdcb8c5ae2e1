"""``offsite exchange serve``: sealed folders out, sealed bundles in, over HTTP."""

__all__ = ["config", "serve"]
