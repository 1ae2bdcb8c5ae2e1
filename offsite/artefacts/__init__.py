"""What crosses between owner and client: package, job, round, bundle. Start at ``package`` and ``bundle``.

Each module says in its docstring what its folder holds and what is checked, in which order, when one arrives.
"""

__all__ = ["bundle", "encodings", "inspect", "job", "known", "layout", "manifest", "owner", "package", "round", "trial"]
