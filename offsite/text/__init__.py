"""Text in, tensors out: rows of files to records, records to token ids, token ids to batches."""

__all__ = [
    "batches",
    "calls",
    "config",
    "fold",
    "forms",
    "headrows",
    "prompts",
    "records",
    "rows",
    "writing",
]
