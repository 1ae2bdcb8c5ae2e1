"""One update made of many clients': averaging rules, screening, central privacy, secure sums."""

__all__ = ["aggregate", "privacy", "screening", "secagg"]
