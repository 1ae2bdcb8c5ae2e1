"""Measuring a model: perplexity, preferences, tasks, sampled answers, the folder of results, and rehearsals."""

__all__ = [
    "beginnings",
    "byhead",
    "config",
    "embeddings",
    "figures",
    "heads",
    "measure",
    "preferences",
    "regression",
    "rehearsal",
    "results",
    "sampling",
    "tags",
    "tasks",
]
