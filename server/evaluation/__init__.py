"""``offsite evaluate``, ``rehearse`` and ``audit plugged-in``: what came back, measured in the full model."""

__all__ = ["audit", "auditconfig", "config", "evaluate", "rehearse", "rehearseconfig"]
