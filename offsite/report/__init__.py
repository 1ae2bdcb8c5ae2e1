"""The page of a run, made from what ``offsite evaluate`` wrote."""

__all__ = ["charts", "config", "markup", "numbers", "page"]
