"""The owner's side on return: plug a bundle in, evaluate what came of it, serve it."""

OFFSITE_ROLE = "server"

__all__ = ["OFFSITE_ROLE"]
