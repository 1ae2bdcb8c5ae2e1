"""Encoders: models that read a text in both directions: trunk, head, and transformers' classifier of the two."""

__all__ = ["classifier", "head", "outputs", "trunk"]
