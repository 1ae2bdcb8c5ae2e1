"""The owner's side before sending: compress the middle, distil it, mark the package, measure what it gives away."""

OFFSITE_ROLE = "emulator"

__all__ = ["OFFSITE_ROLE"]
