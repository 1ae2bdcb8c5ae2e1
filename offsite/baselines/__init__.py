"""What a model makes of a task without being tuned: ways of asking, answers, and one table of them with intervals."""

__all__ = ["answering", "asking", "check", "config", "table", "verb"]
