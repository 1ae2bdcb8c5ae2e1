"""The sealed format: its manifest, encryption, recipients, the release record, the replay ledger, and withdrawals."""

__all__ = ["config", "encryption", "folder", "ledger", "manifest", "recipients", "release", "withdrawal"]
