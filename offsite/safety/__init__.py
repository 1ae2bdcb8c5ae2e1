"""Whether a model refuses: a small set of harmful requests and harmless look-alikes, a list of phrases, and shares."""

__all__ = ["prompts", "refusals", "shares"]
