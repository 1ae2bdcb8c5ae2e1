"""Text that a model writes, token by token: how a token is drawn, an answer in pieces, and answers to many prompts."""

__all__ = ["asked", "config", "generate", "kept", "sampling", "verb"]
