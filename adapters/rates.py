"""Learning rates that clients start from, by kind of adapter. Imports nothing heavy: settings read it."""

from __future__ import annotations

__all__ = ["LEARNING_RATES", "SAMPLED_SHARE"]

LEARNING_RATES = {"blocks": 5e-4, "bitfit": 3e-3, "lora": 2e-3, "rslora": 1e-3, "dora": 2e-3}
"""Peak rate of AdamW used when none is given, by kind of adapter."""

SAMPLED_SHARE = 0.05
"""Share of it used for rewards of sampled answers: at the whole rate one step can take a policy past its leash."""
