"""``offsite owner init`` and ``offsite owner up``: what an owner needs, the exchange, and the pages to decide on.

The dashboard shows what is there and carries out verbs by the functions that the command line calls. It listens apart
from the exchange, by default for this machine alone.
"""

__all__ = ["begin", "config", "up"]
