"""The sealed format: manifest, encryption, recipients, release record, replay ledger; invitations and withdrawals."""

__all__ = ["config", "encryption", "folder", "invitation", "ledger", "manifest", "recipients", "release", "withdrawal"]
