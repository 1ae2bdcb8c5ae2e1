"""The page of a run, made from what ``offsite evaluate`` wrote."""

__all__ = ["charts", "config", "drawing", "engine", "numbers", "page"]
