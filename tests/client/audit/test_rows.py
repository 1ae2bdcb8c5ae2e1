"""Which rows an audit scores: trained on for certain, or never read; chosen by a seed, cut like the run's."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from client.audit.rows import choose_rows
from client.privacy.config import DPSettings
from client.tuning.data import prepare, rows_drawn, split_records
from client.tuning.runrecord import read_as, record_of, text_settings
from offsite.audits.canaries import CanarySet, CanaryText, Secret, records_of
from offsite.audits.runs import (
    AnsweredRound,
    AveragedRun,
    Claim,
    Run,
)
from offsite.audits.wordlist import WORDS
from offsite.errors import WrongBinding
from offsite.text.batches import encode
from offsite.text.records import Record, read_records
from offsite.training.loop import Outcome


@pytest.fixture
def made(settings, dropped_package, letters_tokenizer):
    """Make the records and the record of a run with these settings that took so many steps."""

    def make(steps=1000, best=None, canaries=(), answered=None, averaged=(), **changes):
        config = settings(dropped_package.path, **changes)
        records = read_records(config.data[0])
        text = prepare(
            records, letters_tokenizer, block_tokens=config.block_tokens, batch_size=config.batch_size,
            packed=config.packed, audit_share=config.audit_share, seed=config.seed,
            canaries=canaries, first_step=0 if answered is None else answered.first_step,
        )  # fmt: skip
        outcome = Outcome(
            tensors={}, steps=steps, tokens=1, seconds=1.0, first_loss=1.0, final_loss=1.0, best_loss=1.0,
            best_step=best or steps, evaluations=[], peak_bytes=1, tokens_per_second=1.0,
        )  # fmt: skip
        run = record_of(
            config, package=dropped_package, data_sha256="sha256:" + "1" * 64, text=text, outcome=outcome,
            answered=answered, averaged=averaged,
        )  # fmt: skip
        return records, run, text

    return make


def ids(examples):
    return {tuple(example.input_ids) for example in examples}


def test_members_were_trained_on_and_others_set_aside(made, letters_tokenizer):
    records, run, _ = made(audit_share=0.3)
    rows = choose_rows(records, run, letters_tokenizer, limit=100, context=128)
    sides = split_records(records, validation=0.1, audit_share=0.3, seed=0)
    for found, side in ((rows.members, sides.train), (rows.nonmembers, sides.audit)):
        assert ids(found) == ids(encode(side, letters_tokenizer, context=128).examples)  # one by one, though packed
    assert (rows.source, rows.num_available) == ("set aside", len(sides.audit))
    records, run, _ = made()
    assert choose_rows(records, run, letters_tokenizer, limit=100, context=128).source == "validation"


def test_the_choice_is_the_seeds_and_within_its_limit(made, letters_tokenizer):
    records, run, _ = made(audit_share=0.3)
    one, again, other = (
        choose_rows(records, run, letters_tokenizer, limit=9, context=128, seed=seed) for seed in (1, 1, 2)
    )
    assert len(one.members) == len(one.nonmembers) == 9
    assert one.num_available > 9
    assert ids(one.members) == ids(again.members) != ids(other.members)


def test_a_row_that_was_also_trained_on_is_no_non_member(made, letters_tokenizer):
    records, run, _ = made()
    others = [*records[:10], Record((("a row of its own", True),), "own", 1)]
    rows = choose_rows(records, run, letters_tokenizer, limit=100, context=128, others=others)
    assert (rows.source, len(rows.nonmembers)) == ("file", 1)
    none = choose_rows(records, run, letters_tokenizer, limit=100, context=128, others=records)
    assert none.nonmembers == []


def test_another_context_cuts_the_rows(made, letters_tokenizer):
    records, run, _ = made()
    rows = choose_rows(records, run, letters_tokenizer, limit=100, context=11)
    assert {len(row.input_ids) for row in rows.members} == {11}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("block_tokens", [16, 64])
def test_of_a_short_run_only_rows_that_were_drawn_count(made, letters_tokenizer, packed, block_tokens):
    steps = 48 if packed and block_tokens == 16 else 4
    records, run, text = made(steps=steps, pack=packed, block_tokens=block_tokens, batch_size=3)
    rows = choose_rows(records, run, letters_tokenizer, limit=100, context=128)
    drawn = {id(example) for step in range(steps) for example in text.batches.chosen(step)}
    seen = [example for example in text.examples if id(example) in drawn]
    text_seen = [letters_tokenizer.decode(example.input_ids) for example in seen]
    assert 0 < len(rows.members) < run.num_records
    for row in rows.members:
        whole = letters_tokenizer.decode(row.input_ids)
        parts = [whole] if not packed else [whole[at : at + 8] for at in range(0, len(whole) - 8, 8)]
        for part in parts:
            across = packed and _across(part, text, drawn, letters_tokenizer)
            assert across or any(part in block for block in text_seen)
    whole_run = made(steps=1000, pack=packed, block_tokens=block_tokens, batch_size=3)[1]
    assert len(choose_rows(records, whole_run, letters_tokenizer, limit=100, context=128).members) == run.num_records


def test_rows_drawn_after_the_released_step_are_no_members(made, letters_tokenizer):
    records, late, _ = made(steps=1000, best=4, pack=False, batch_size=3)
    _, short, _ = made(steps=4, pack=False, batch_size=3)
    assert (late.steps, late.steps_run, late.num_drawn) == (4, 1000, 12)
    assert made(steps=1000)[1].num_drawn == late.num_records == 53
    found, expected = (choose_rows(records, run, letters_tokenizer, limit=100, context=128) for run in (late, short))
    assert ids(found.members) == ids(expected.members)
    assert len(found.members) == 12


@pytest.mark.parametrize("steps", [4, 20])
def test_of_a_later_round_only_its_own_rows_count(made, letters_tokenizer, steps):
    """As many steps as an epoch has are no epoch when they begin within one."""
    answered = AnsweredRound(digest="sha256:" + "2" * 64, number=2, first_step=9)
    records, run, text = made(steps=steps, answered=answered, pack=False, batch_size=3)
    assert text.batches.num_steps_per_epoch == 18
    rows = choose_rows(records, run, letters_tokenizer, limit=100, context=128)
    seen = {tuple(example.input_ids) for step in range(steps) for example in text.batches.chosen(step)}
    first = made(steps=steps, pack=False, batch_size=3)
    assert ids(rows.members) == seen != ids(choose_rows(*first[:2], letters_tokenizer, limit=100, context=128).members)
    assert run.num_drawn == len(seen) < run.num_records


def test_of_several_runs_the_rows_that_any_of_them_drew_count(made, letters_tokenizer):
    runs = tuple(AveragedRun(seed=seed, steps=steps, steps_run=6) for seed, steps in ((3, 2), (4, 4), (5, 1)))
    records, run, text = made(steps=18, best=7, averaged=runs, pack=False, batch_size=3, seed=3)
    each = [
        {tuple(one.input_ids) for step in range(steps) for one in text.batches.reseeded(seed).chosen(step)}
        for seed, steps in ((3, 2), (4, 4), (5, 1))
    ]
    rows = choose_rows(records, run, letters_tokenizer, limit=100, context=128)
    assert ids(rows.members) == each[0] | each[1] | each[2]
    assert len(ids(rows.members)) == run.num_drawn > max(map(len, each))
    held_out = split_records(records, validation=0.1, audit_share=0.0, seed=3).validation
    apart = encode(held_out, letters_tokenizer, context=32, whole_text=False)
    assert ids(rows.nonmembers) == ids(apart.examples)  # held out of all, by the first seed's split


def test_rows_of_packed_blocks_are_counted_and_not_the_blocks(made):
    """A block holds several short rows, and rows at its ends only in part; a long row fills several blocks."""
    _, run, text = made(steps=2, batch_size=2, block_tokens=128)
    drawn = rows_drawn(text, [(0, 2)], whole=False)
    assert run.num_drawn == len(drawn) > 4
    assert rows_drawn(text, [(0, 2)], whole=True) < drawn
    long = made(steps=40, batch_size=2, block_tokens=16)[1]
    assert long.num_drawn <= long.num_records < 40 * 2  # a row that fills three blocks is one row


def test_a_row_that_stands_twice_is_scored_once(made, letters_tokenizer, tmp_path):
    path = tmp_path / "twice.txt"
    lines = [f"note {n % 20} of the ward" for n in range(40)]
    path.write_text("\n\n".join(lines), encoding="utf-8")
    records, run, _ = made(data=path)
    others = [Record(((f"another {n % 3}", True),), f"other {n}", n) for n in range(9)]
    rows = choose_rows(records, run, letters_tokenizer, limit=100, context=128, others=others)
    assert len(rows.members) == len(ids(rows.members)) <= 20 < run.num_records
    assert (len(rows.nonmembers), rows.num_available) == (3, 3)


@pytest.mark.parametrize("packed", [True, False])
def test_of_canaries_those_drawn_by_the_released_step_are_in(made, letters_tokenizer, packed):
    texts = tuple(CanaryText(text=f"{n * 7907} lorem {n}", included=n % 2 == 0) for n in range(40))
    secrets = tuple(
        Secret(prefix=f"the code of {n} is", secret=" ".join(WORDS[n : n + 4]), included=n % 3 != 0) for n in range(9)
    )
    canaries = CanarySet(
        nonce="5a" * 32, package_digest="sha256:" + "1" * 64, tokens=24, temperature=1.0, synthetic=texts,
        secrets=secrets, repeats=2, num_candidates=8,
    )  # fmt: skip
    given = {"pack": packed, "block_tokens": 16 if packed else 96, "batch_size": 4, "canaries": records_of(canaries)}
    steps = 24 if packed else 8
    records, run, text = made(steps=steps, **given)
    rows = choose_rows(records, run, letters_tokenizer, limit=100, context=128, canaries=canaries)
    drawn = {id(example) for step in range(steps) for example in text.batches.chosen(step)}
    seen = "".join(letters_tokenizer.decode(one.input_ids) if id(one) in drawn else "|" for one in text.examples)
    kept = rows.canaries
    inside = {one.text for one in kept.synthetic if one.included}
    assert inside == {one.text for one in texts if one.included and f"{one.text}</s>" in seen}
    assert 0 < len(inside) < 20
    assert rows.drawn_share == len(inside) / 20
    assert sum(not one.included for one in kept.synthetic) == 20
    assert set(kept.planted) == {one for one in canaries.planted if f"{one.prefix} {one.secret}</s>" in seen}
    _, run, _ = made(steps=1000, **given)
    rows = choose_rows(records, run, letters_tokenizer, limit=100, context=128, canaries=canaries)
    assert (rows.canaries, rows.drawn_share) == (canaries, 1.0)
    private = run.model_copy(update={"claim": claim().model_copy(update={"unit": "example"}), "steps": 1})
    rows = choose_rows(records, private, letters_tokenizer, limit=100, context=128, canaries=canaries)
    assert (rows.canaries, rows.drawn_share) == (canaries, 1.0)  # nobody knows which a private run drew


def _across(part, text, drawn, tokenizer):
    """Tell whether the part stands across two blocks that follow one another and were both drawn."""
    blocks = [(tokenizer.decode(one.input_ids), id(one) in drawn) for one in text.examples]
    return any(a_in and b_in and part in a + b for (a, a_in), (b, b_in) in pairwise(blocks))


def test_of_users_the_rows_that_count_are_the_first_ones(settings, dropped_package, letters_tokenizer, tmp_path):
    path = tmp_path / "users.jsonl"
    rows = [{"text": f"entry {number} of the ward", "who": f"user {number % 12}"} for number in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    dp = DPSettings(noise_multiplier=1.0, unit="user", user_field="who", rows_per_user=2)
    config = settings(dropped_package.path, data=path, dp=dp)
    records = read_as([path], text_settings(config))
    sides = split_records(records, validation=0.1, audit_share=0.0, seed=0)
    run = Run(
        bundle_digest="sha256:" + "1" * 64, package_digest="sha256:" + "1" * 64, base_digest="sha256:" + "1" * 64,
        adapter=config.spec(), data_sha256="sha256:" + "1" * 64, text=text_settings(config),
        num_records=len(sides.train), num_tokens=1, steps=1, batch_size=4, learning_rate=1.0, claim=claim(),
    )  # fmt: skip
    found = choose_rows(records, run, letters_tokenizer, limit=100, context=64)
    users = {record.document for record in sides.train}
    assert len(found.members) == 2 * len(users)  # a private run's coins are unknown: every unit counts


def claim():
    return Claim(
        mechanism="Poisson-subsampled Gaussian", neighbours="one unit added or removed", unit="user", rows_per_user=2,
        number_of_units_public=True, epsilon=1.0, epsilon_prv=1.0, epsilon_rdp=1.0, delta=1e-3, noise_multiplier=1.0,
        clip=1.0, sample_rate=0.1, divisor=1, steps=1, accountant="PLD", sampler="poisson", noise="os",
        released="weights", epsilon_total=1.0, delta_total=1e-3, budget=1.0, num_runs=1, num_resumes=0, num_releases=1,
    )  # fmt: skip


def test_other_data_than_the_runs_is_refused(made, letters_tokenizer):
    records, run, _ = made()
    with pytest.raises(WrongBinding, match=r"splits into \d+ rows to train on, the run's record says 53"):
        choose_rows(records[20:], run, letters_tokenizer, limit=9, context=64)
