"""``offsite distill --target`` and ``--explore``: sizes tried with a rehearsed client, and the package asked for.

Every stage is a process of a verb: ``distill`` makes a package, ``rehearse`` plays a client on it.
"""

__all__ = ["config", "verb"]
