"""What the command line offers: the table of verbs, the pages of ``--help``, completion in a shell."""

__all__ = ["completion", "pages", "settings", "verbs"]
