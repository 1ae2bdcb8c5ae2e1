"""``offsite serve``: adapted models behind an OpenAI-style HTTP interface."""

__all__ = ["config", "serve"]
