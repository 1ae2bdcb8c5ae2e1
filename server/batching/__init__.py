"""Generation for several requests at once: rows with adapters of their own, their caches, and how tokens are drawn."""

__all__ = ["batch", "batches", "cache", "generate", "rows", "sampling"]
