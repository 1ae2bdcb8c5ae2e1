"""Measuring a model: perplexity, preferences, tasks, sampled answers, the folder of results, and rehearsals."""

__all__ = [
    "config",
    "embeddings",
    "figures",
    "heads",
    "measure",
    "preferences",
    "rehearsal",
    "results",
    "sampling",
    "tasks",
]
