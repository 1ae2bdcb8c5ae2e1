"""What a client tunes towards: next tokens, preferences, rewards of sampled answers, heads, and experiments."""

__all__ = [
    "anchor",
    "channels",
    "config",
    "heads",
    "pairs",
    "preferences",
    "rewardmodel",
    "rollouts",
    "tokens",
]
