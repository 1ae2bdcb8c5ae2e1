"""Names of the ways of compressing the middle. Imports no torch, so that settings are checked before anything loads."""

from __future__ import annotations

METHODS: set[str] = {"drop", "keep-all", "low-rank", "packed", "width"}
"""What ``--method`` takes; `emulator.compression.compress.register_compressor` adds to it."""
