"""Differentially private tuning: DP-SGD, gradient clipping, the budget ledger."""

__all__ = ["config", "dpsgd", "run"]
