"""The page of a run, made from what ``offsite evaluate`` wrote; and the engine, drawings and figures of every page."""

__all__ = ["charts", "config", "drawing", "engine", "figures", "numbers", "page"]
