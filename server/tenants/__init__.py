"""``offsite tenant``: who may ask what the owner serves, with which key, and what each has used."""

__all__ = ["config", "store", "verbs"]
