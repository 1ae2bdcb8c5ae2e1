"""The signed privacy report: its record, how it is issued and verified, and its page."""

__all__ = ["attest", "config", "issue", "record", "verify"]
