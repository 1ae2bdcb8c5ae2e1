"""Handing artefacts over: ``offsite seal``, ``open`` and ``rewrap``, and the protocol both ends of the exchange speak.

What may leave is decided in ``verbs``, before anything is encrypted.
"""

__all__ = ["packing", "requests", "verbs", "wire"]
