"""A task in one file: its models, the YAML reader, templates, forms of answers, rows, measures, and rules."""

__all__ = ["config", "forms", "read", "rows", "rules", "scores", "task", "templates"]
