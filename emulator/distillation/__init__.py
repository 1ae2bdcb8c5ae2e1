"""``offsite distill`` and ``realign``: training a compressed middle to imitate the full one, publishing the package."""

__all__ = ["config", "distill", "public", "realign", "realignconfig", "selfwritten"]
