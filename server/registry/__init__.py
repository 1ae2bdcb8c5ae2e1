"""The owner's registry: jobs, arriving bundles and what became of them.

What is checked when a bundle arrives is in ``verify``, in one order; ``intake`` carries it out.
"""

__all__ = ["config", "federations", "inspect", "intake", "job", "messages", "registry", "rows", "verbs", "verify"]
