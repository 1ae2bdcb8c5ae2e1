"""The client's side: open a package, read private text, tune an adapter, audit what it gives away, hand it in."""

OFFSITE_ROLE = "client"

__all__ = ["OFFSITE_ROLE"]
