"""Evidence of what machine issued a report: as it stands in the report, a TPM's quote, and the auditor's policy."""

__all__ = ["evidence", "policy", "tpm"]
