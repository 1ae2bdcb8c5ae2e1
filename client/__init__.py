"""The data side: open a package, read private data, tune an adapter, write the bundle."""

OFFSITE_ROLE = "client"

__all__ = ["OFFSITE_ROLE"]
