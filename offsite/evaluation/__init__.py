"""Measuring a model: perplexity, multiple-choice tasks, sampled answers, and the folder of results."""

__all__ = ["config", "measure", "results", "sampling", "tasks"]
