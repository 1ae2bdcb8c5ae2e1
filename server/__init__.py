"""The owner's side on return: check bundles, plug them in, evaluate, serve; run the exchange and federations."""

OFFSITE_ROLE = "server"

__all__ = ["OFFSITE_ROLE"]
