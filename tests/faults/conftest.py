"""The lab of federations, for tests that run an owner and clients as processes."""

from __future__ import annotations

import federation_lab as lab
import pytest


@pytest.fixture(scope="session")
def federation_lab():
    return lab
