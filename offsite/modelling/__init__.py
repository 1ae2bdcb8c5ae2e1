"""Models of transformers: finding the block stack, cutting it, loading a checkpoint, going on from a text.

Facts about architectures live in ``blocks``, ``depth``, ``mlps`` and ``experts`` alone.
"""

__all__ = [
    "blocks",
    "causal",
    "config",
    "context",
    "depth",
    "dtypes",
    "experts",
    "fetch",
    "head",
    "load",
    "locate",
    "mlps",
    "precision",
    "split",
    "steps",
]
