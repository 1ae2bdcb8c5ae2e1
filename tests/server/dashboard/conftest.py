"""An owner's project with one bundle that was verified, and its dashboard."""

from __future__ import annotations

import pytest
from owners_desk import Desk


@pytest.fixture
def desk(tmp_path, parties, dropped_package, quiet_bundle):
    made = Desk(tmp_path / "project", *parties, dropped_package, quiet_bundle)
    yield made
    made.close()


@pytest.fixture
def arrived(desk, make_job, live_exchange, tmp_path):
    """The id of a verified bundle."""
    job = desk.add_job(make_job(terms="for research alone"))
    return desk.arrive(live_exchange.seal(tmp_path / "sealed", job))
