"""The trainable parts: kinds of adapter, where they sit, and their canonical tensor names."""

OFFSITE_ROLE = "adapters"

__all__ = ["OFFSITE_ROLE"]
