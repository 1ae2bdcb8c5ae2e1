"""The one training loop: steps, checkpoints, the log of a run, devices and processes."""

__all__ = ["checkpoints", "config", "devices", "loop", "processes", "step"]
