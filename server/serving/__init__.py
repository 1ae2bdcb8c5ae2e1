"""``offsite serve``: an adapted model behind an OpenAI-style HTTP interface."""

__all__ = ["config", "serve"]
