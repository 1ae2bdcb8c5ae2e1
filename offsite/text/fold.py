"""Text folded to what it says: its words, without case, Unicode form, white space, punctuation or invisible characters.

Two texts that fold alike are the same to whoever looks for one in another (`client/tuning/scan.py`) or counts what was
spent on it (`client/privacy/budget.py`). Other words, another order of them, or a text cut in two is another text.
"""

from __future__ import annotations

import re
import unicodedata

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_UNSPACED += "\U00020000-\U000323af"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_INVISIBLE = re.compile(  # Unicode's default ignorable code points
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]+"
)


def folded(text: str) -> str:
    """Return the text without case, in one Unicode form (NFKC), without characters that nobody sees."""
    seen = _INVISIBLE.sub("", unicodedata.normalize("NFKC", text))
    return unicodedata.normalize("NFKC", seen.casefold())


def words_of(text: str) -> list[str]:
    """Return the folded text's words: letters and digits; in scripts written without spaces every character is one."""
    return _WORD.findall(folded(text))


def said(text: str) -> str:
    """Return what the text says, its words with a space between them; of a text without words, what it has instead."""
    words = words_of(text)
    return " ".join(words) if words else "".join(folded(text).split())
