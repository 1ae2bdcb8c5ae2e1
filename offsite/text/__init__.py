"""Text in, tensors out: rows of files to records, records to token ids, token ids to batches."""

__all__ = ["answers", "batches", "calls", "config", "fold", "images", "prompts", "records", "rows", "writing"]
