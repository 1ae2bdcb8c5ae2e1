"""Text in, tensors out: rows of files to records, records to token ids, token ids to batches."""

__all__ = ["answers", "batches", "calls", "config", "fold", "headrows", "prompts", "records", "rows"]
