"""What an audit measures and records: membership attacks, canaries, extraction, statistics, DP accounting, gates."""

__all__ = [
    "accounting",
    "canaries",
    "canaryaudit",
    "config",
    "extraction",
    "gates",
    "keptscores",
    "lowerbound",
    "membership",
    "noise",
    "record",
    "retunings",
    "runs",
    "scores",
    "statistics",
]
