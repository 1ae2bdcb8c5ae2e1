"""Secure aggregation: terms, messages, masks, secret shares and fixed-point numbers that both sides use."""

__all__ = ["fixedpoint", "masking", "messages", "shamir", "sharebox", "terms"]
