"""Models of transformers: finding the block stack, cutting it, loading a checkpoint, going on from a text.

Facts about architectures live in ``blocks`` and ``depth`` alone.
"""

__all__ = ["blocks", "causal", "config", "context", "depth", "dtypes", "fetch", "load", "precision", "split", "steps"]
