"""Generation for several requests at once: rows with adapters of their own, and their caches."""

__all__ = ["batch", "batches", "cache", "rows"]
