"""``offsite mark`` and ``trace``: a package that names its recipient, and finding whose copy leaked."""

__all__ = ["config", "leak", "mark"]
