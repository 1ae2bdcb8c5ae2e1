"""Encoder-decoders, whose encoder reads a prompt and whose decoder writes the answer: which, and their inputs."""

__all__ = ["inputs", "models", "refusals"]
