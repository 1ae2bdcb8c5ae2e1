"""The owner's factory: choose blocks, compress the middle, distil it, write the package."""

OFFSITE_ROLE = "emulator"

__all__ = ["OFFSITE_ROLE"]
