"""``offsite inspect``: what a file or folder of either party is, recognised by what it states, and told in words.

``inspect`` recognises it and hands it to the function that knows its kind; for things that only an owner has, that lies
in ``server/``. Whatever is shown has its form, is escaped, and is called verified only if it was.
"""

__all__ = ["artefacts", "config", "inspect", "thing", "words"]
