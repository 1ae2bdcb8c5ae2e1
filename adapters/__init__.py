"""The trainable parts: kinds of adapter, where they sit, their canonical tensor names, and what they change.

A new kind is a module here with two functions for ``kinds.register_kind``.
"""

OFFSITE_ROLE = "adapters"

__all__ = [
    "OFFSITE_ROLE",
    "average",
    "heads",
    "held",
    "kinds",
    "lift",
    "lowrank",
    "norms",
    "rates",
    "rounds",
    "settings",
    "shared",
    "targets",
    "updates",
    "vector",
]
