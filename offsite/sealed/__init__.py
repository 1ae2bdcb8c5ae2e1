"""The sealed format: its manifest, encryption, recipients, the release record and the replay ledger; invitations."""

__all__ = ["config", "encryption", "folder", "invitation", "ledger", "manifest", "recipients", "release"]
