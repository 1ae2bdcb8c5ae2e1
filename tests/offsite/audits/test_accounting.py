"""Epsilon: known values, three accountants, and the refusals of what is no guarantee."""

from __future__ import annotations

import builtins
import math

import pytest

from offsite.audits import accounting
from offsite.audits.accounting import (
    Mechanism,
    Spent,
    account,
    calibrate,
    pld_epsilon,
    require_agreement,
    require_extra,
)
from offsite.errors import ConfigError, RunFailed

DELTA = 1000**-1.1


def test_known_values_of_a_thousand_records_in_batches_of_64_over_three_epochs():
    spent = account(Mechanism(0.574, 0.064, 47), DELTA)
    assert spent.epsilon == pytest.approx(8.003, abs=0.01)
    assert spent.epsilon_prv == pytest.approx(spent.epsilon, rel=0.02)
    assert spent.epsilon_rdp == pytest.approx(9.878, abs=0.01)


def test_without_sampling_it_is_the_gaussian_mechanism_in_closed_form():
    """Balle and Wang 2018, theorem 8: delta of the Gaussian mechanism at an epsilon."""

    def cdf(x):
        return (1 + math.erf(x / math.sqrt(2))) / 2

    mu = math.sqrt(9) / 2.0  # nine steps of noise 2 are one of noise 2/3
    epsilon = pld_epsilon([Mechanism(2.0, 1.0, 9)], 1e-5)
    delta = cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * cdf(-mu / 2 - epsilon / mu)
    assert delta == pytest.approx(1e-5, rel=0.02)


def test_calibration_spends_what_was_asked_and_hardly_less():
    sigma = calibrate(1.0, DELTA, rate=0.064, steps=47)
    assert sigma == pytest.approx(1.528, rel=0.01)
    assert 0.98 < pld_epsilon([Mechanism(sigma, 0.064, 47)], DELTA) <= 1.0


def test_runs_on_the_same_data_add_up_in_any_order():
    a, b = Mechanism(1.0, 0.1, 10), Mechanism(2.0, 0.2, 5)
    both = pld_epsilon([a, b], DELTA)
    assert both == pld_epsilon([b, a], DELTA)
    assert max(pld_epsilon([a], DELTA), pld_epsilon([b], DELTA)) < both
    assert both < pld_epsilon([a], DELTA / 2) + pld_epsilon([b], DELTA / 2)
    assert pld_epsilon([a, a], DELTA) == pytest.approx(pld_epsilon([Mechanism(1.0, 0.1, 20)], DELTA))


@pytest.mark.parametrize(("epsilon", "rate"), [(1000.0, 0.064), (1e-5, 0.9)])
def test_no_noise_to_speak_of_and_no_end_of_noise_are_refused(epsilon, rate):
    with pytest.raises(ConfigError, match=r"no meaningful guarantee|needs more noise"):
        calibrate(epsilon, DELTA, rate=rate, steps=4)


def test_too_little_noise_is_refused_before_an_accountant_is_asked():
    with pytest.raises(ConfigError, match="no meaningful guarantee"):
        account(Mechanism(0.05, 0.064, 47), DELTA)


def test_accountants_that_disagree_are_an_error(monkeypatch):
    require_agreement(Spent(1.0, 1.019, 2.0, DELTA))
    for prv in (1.03, 0.97, math.nan, math.inf):
        with pytest.raises(RunFailed, match="accountants disagree"):
            require_agreement(Spent(1.0, prv, 2.0, DELTA))
    monkeypatch.setattr(accounting, "_prv_epsilon", lambda *_: 9.0)
    with pytest.raises(RunFailed, match="accountants disagree"):
        account(Mechanism(1.0, 0.064, 47), DELTA)


def test_a_missing_library_is_told_with_what_to_install(monkeypatch):
    found = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.split(".")[0] == "dp_accounting":
            raise ModuleNotFoundError("no", name=name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match="'dp_accounting'") as caught:
        require_extra()
    assert "offsite-tuning[privacy]" in caught.value.hint
