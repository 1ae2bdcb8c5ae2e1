"""The budget ledger: what is charged, what adds up, and what it refuses."""

from __future__ import annotations

import shutil
import stat

import pytest

from client.privacy.budget import BudgetLedger, Members
from client.privacy.dpsgd import Guarantee
from offsite.audits.accounting import Mechanism, account, pld_epsilon
from offsite.errors import ConfigError, PolicyError, Replayed
from offsite.text.records import Record

DELTA = 1e-3
MECHANISM = Mechanism(1.0, 0.1, 10)
ONE = pld_epsilon([MECHANISM], DELTA)
TWO = pld_epsilon([MECHANISM, MECHANISM], DELTA)


def guarantee(mechanism=MECHANISM, unit="example"):
    return Guarantee(mechanism, 1.0, 4, unit, None, True, account(mechanism, DELTA))


def records(*texts):
    return [Record(((text, True),), text, number) for number, text in enumerate(texts)]


def charge(ledger, *texts, budget=None, place="here", unit="example"):
    return ledger.charge(
        ledger.members(records(*texts)), guarantee(unit=unit), place=place, settings="s", budget=budget
    )


@pytest.fixture
def ledger(tmp_path):
    with BudgetLedger(tmp_path / "ledger") as opened:
        yield opened


def test_the_first_run_sets_the_budget_by_default_to_its_own(ledger):
    found = charge(ledger, "a", "b")
    assert (found.epsilon_total, found.budget, found.num_runs) == (ONE, ONE, 1)
    with pytest.raises(PolicyError, match="with 1 earlier run") as caught:
        charge(ledger, "a", "b")
    assert "nothing was trained" in caught.value.hint
    assert ledger.account(found.run) == found


def test_runs_add_up_until_the_budget_is_spent_and_no_further(ledger):
    charge(ledger, "a", budget=TWO)
    second = charge(ledger, "a")
    assert (second.epsilon_total, second.budget, second.num_runs) == (TWO, TWO, 2)
    with pytest.raises(PolicyError, match="the budget of this data set is"):
        charge(ledger, "a")


def test_data_sets_that_share_a_record_share_the_budget_in_whatever_order(ledger):
    charge(ledger, "a", "b", "c", budget=TWO)
    assert charge(ledger, "x", "y").num_runs == 1
    assert charge(ledger, "z", "c").num_runs == 2
    for shared in (("b", "a"), ("new", "a"), ("z",)):
        assert (ledger.members(records(*shared)) == ledger.members(records(*reversed(shared)))) is True
    assert charge(ledger, "b", "new", budget=None).num_runs == 2  # of a, b, c and b, new: z, c shares nothing with it
    with pytest.raises(PolicyError):
        charge(ledger, "c", "new")


SAME = {
    "spaces": "  The  FIRST\twindow:\nof the house ",
    "case": "THE FIRST WINDOW OF THE HOUSE",
    "punctuation": "the first window, of the house!",
    "compatibility form": "the \ufb01rst window of the house",
    "a zero-width space": "the fi\u200brst win\u00addow of the house\ufeff",
    "wide letters": "\uff34he first window of the house",
}


@pytest.mark.parametrize("name", SAME)
def test_a_row_that_says_the_same_is_the_same_row(ledger, name):
    charge(ledger, "the first window of the house", "b", budget=TWO)
    assert charge(ledger, SAME[name], "c").num_runs == 2
    with pytest.raises(PolicyError):
        charge(ledger, SAME[name].upper())


def test_a_row_is_known_again_in_another_shape_and_composition(ledger):
    charge(ledger, "caf\u00e9 au lait", budget=TWO)
    pair = Record((("cafe\u0301 ", False), ("au lait", True)), "p", 1)
    chat = Record((), "m", 1, (("user", "CAF\u00c9"), ("assistant", "au lait")))
    for record in (pair, chat):
        assert set(ledger.members([record]).folded) == set(ledger.members(records("caf\u00e9 au lait")).folded)
        assert set(ledger.members([record]).exact) != set(ledger.members(records("caf\u00e9 au lait")).exact)


def test_what_says_something_else_or_nothing_is_another_row(ledger):
    charge(ledger, "one two", "!!!", "\u200b", budget=TWO)
    for other in ("two one", "one", "onetwo", "???", "\u200d", "one 2"):
        assert charge(ledger, other).num_runs == 1


def test_users_are_known_again_however_they_are_written(ledger):
    first, again = (ledger.members([], users=[name]) for name in ("Ann Lee", "ann  lee"))
    assert first.folded == again.folded
    assert first.exact != again.exact


def test_a_ledger_of_an_earlier_version_goes_on_counting(ledger):
    members = ledger.members(records("The window", "b"))
    earlier = Members(members.exact, [])  # all that was kept of a run then
    told = ledger.charge(earlier, guarantee(), place="here", settings="s", budget=TWO)
    now = charge(ledger, "The window", "b")
    assert (now.num_runs, now.data) == (2, told.data)
    with pytest.raises(PolicyError):
        charge(ledger, "The window")


def test_a_budget_can_be_lowered_and_never_raised(ledger):
    first = charge(ledger, "a", budget=10.0)
    with pytest.raises(PolicyError, match=r"budget 11, an earlier run on this data set 10"):
        charge(ledger, "a", budget=11.0)
    assert charge(ledger, "a", budget=TWO).budget == TWO
    assert ledger.account(first.run).budget == TWO


def test_units_do_not_mix(ledger):
    charge(ledger, "a", budget=10.0)
    with pytest.raises(PolicyError, match="counted per example, this one counts per user"):
        charge(ledger, "a", unit="user")


def test_users_are_known_again_under_other_rows(ledger):
    first = ledger.members(records("a"), users=["ann"])
    again = ledger.members(records("b"), users=["ann"])
    assert [len(set(one) & set(two)) for one, two in zip(first, again, strict=True)] == [1, 1]


def test_a_run_is_released_once_with_the_same_weights_as_often_as_one_likes(ledger):
    run = charge(ledger, "a").run
    assert ledger.release(run, "w").num_releases == 1
    assert ledger.release(run, "w").num_releases == 2
    with pytest.raises(PolicyError, match="other weights of this run"):
        ledger.release(run, "v")
    assert ledger.account(run).num_releases == 2
    assert ledger.newest("here").is_released


def test_resuming_costs_nothing_and_is_counted(ledger):
    run = charge(ledger, "a").run
    assert ledger.newest("elsewhere") is None
    assert ledger.newest("here").run == run
    found = ledger.resumed(run)
    assert (found.num_runs, found.num_resumes, found.epsilon_total) == (1, 1, ONE)


def test_a_run_of_another_ledger_is_not_released(ledger):
    with pytest.raises(PolicyError, match="not in the ledger"):
        ledger.release("0" * 32, "w")


def test_it_tells_nobody_what_is_in_the_data(ledger, tmp_path):
    charge(ledger, "the secret of ward nine")
    raw = b"".join(path.read_bytes() for path in (tmp_path / "ledger").iterdir())
    assert b"secret" not in raw
    assert stat.S_IMODE((tmp_path / "ledger" / "key").stat().st_mode) == 0o600
    with BudgetLedger(tmp_path / "other") as other:
        assert not {*other.members(records("a")).all} & {*ledger.members(records("a")).all}


def test_it_is_remembered_and_cannot_be_turned_back(tmp_path):
    folder = tmp_path / "ledger"
    with BudgetLedger(folder) as ledger:
        charge(ledger, "a", budget=TWO)
    shutil.copytree(folder, tmp_path / "backup")
    with BudgetLedger(folder) as ledger:
        assert charge(ledger, "a").num_runs == 2
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "backup", folder)
    with pytest.raises(Replayed):
        BudgetLedger(folder)


def test_another_key_is_refused(tmp_path):
    folder = tmp_path / "ledger"
    BudgetLedger(folder).__exit__()
    key = folder / "key"
    kept = key.read_bytes()
    key.unlink()
    with pytest.raises(PolicyError, match="kept with another key"):
        BudgetLedger(folder)
    key.write_bytes(kept[:5])
    with pytest.raises(ConfigError, match="has 5 bytes, expected 32"):
        BudgetLedger(folder)
    key.write_bytes(kept)
    key.chmod(0o644)
    with pytest.raises(ConfigError, match="can be read by others"):
        BudgetLedger(folder)
    key.chmod(0o600)
    BudgetLedger(folder).__exit__()


def test_a_release_of_a_run_that_was_never_charged_is_noticed():
    from client.privacy.budget import _agree

    line = {"event": "released", "fields": {"run": "5" * 32, "weights": "sha256:" + "5" * 64}}
    with pytest.raises(Replayed, match="not what its log leads to"):
        _agree([line], lambda *_: [])
