"""What a client tunes towards: the loss of a text's tokens, and the experiments beside it."""

__all__ = ["anchor", "channels", "config", "pairs", "tokens"]
