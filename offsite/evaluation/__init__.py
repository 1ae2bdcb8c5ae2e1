"""Measuring a model: perplexity, multiple-choice tasks, sampled answers, and the folder of results."""

__all__ = ["config", "figures", "measure", "results", "sampling", "tasks"]
