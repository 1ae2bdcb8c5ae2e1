"""The sealed format: its manifest, encryption, recipients, the release record and the replay ledger."""

__all__ = ["config", "encryption", "folder", "ledger", "manifest", "recipients", "release"]
