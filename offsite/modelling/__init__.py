"""Models of transformers: finding the block stack, cutting it, loading a checkpoint.

Facts about architectures live in ``blocks`` and ``depth`` alone.
"""

__all__ = ["blocks", "causal", "config", "context", "depth", "dtypes", "fetch", "load", "split"]
