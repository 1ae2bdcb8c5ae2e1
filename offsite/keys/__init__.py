"""A party's keys and its card, the files that hold them, and the cards of others that are pinned here."""

__all__ = ["config", "files", "identity", "start", "trust"]
