"""What is said beside the audit's figures: how many canaries a claim takes."""

from __future__ import annotations

import pytest

from client.audit.table import canaries_to_refute
from offsite.audits.lowerbound import SHARES, one_run_ceiling


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 2.0, 4.0, 6.0])
def test_so_many_canaries_can_refute_and_a_few_less_cannot(epsilon):
    num = canaries_to_refute(epsilon, 0.95)
    enough, fewer = (
        one_run_ceiling(each, 1e-12, num_guesses=[round(share * each) for share in SHARES]) for each in (num, num - 6)
    )
    assert fewer < epsilon < enough
