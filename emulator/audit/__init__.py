"""``offsite audit package``: what a package gives away of the model, by figures and by attack."""

__all__ = ["audit", "config"]
