from __future__ import annotations

import hashlib

import pytest

from client.federation.pinned import require_pinned
from offsite.errors import PolicyError


def test_the_pinned_bytes_and_no_others():
    pin = hashlib.sha256(b"app").hexdigest()
    require_pinned(b"app", pin)
    for other in (b"", b"app\n", b"App"):
        with pytest.raises(PolicyError, match=f"{pin[:12]} is pinned; nothing of it was installed or run"):
            require_pinned(other, pin)
