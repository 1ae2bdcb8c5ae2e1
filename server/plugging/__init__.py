"""``offsite plug-in``: a verified adapter fitted to the full model, put on it, and written as an adapted folder."""

__all__ = [
    "adapted",
    "card",
    "config",
    "fit",
    "fullmodel",
    "inspect",
    "offset",
    "plug",
    "shares",
    "sparing",
    "ways",
    "withdraw",
]
