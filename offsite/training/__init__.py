"""The one training loop: steps, checkpoints, the log and curves of a run, memory, devices and processes."""

__all__ = ["checkpoints", "config", "devices", "loop", "memory", "precision", "processes", "step", "trackers"]
