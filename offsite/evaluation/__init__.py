"""Measuring a model: perplexity, multiple-choice tasks, sampled answers, the folder of results, and rehearsals."""

__all__ = ["config", "figures", "measure", "rehearsal", "results", "sampling", "tasks"]
