"""``offsite join``: a client's whole side in one command, from an invitation to a sealed bundle, stage by stage.

Whoever stops it anywhere goes on with the same command. Keys stay in this process; what computes are verbs in processes
of their own, which have none.
"""

__all__ = ["config", "verb"]
