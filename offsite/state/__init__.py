"""State that must not be lost, torn or turned back: the database of rows, its sum, and the hash-chained log."""

__all__ = ["chain", "store"]
