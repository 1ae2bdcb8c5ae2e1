"""What was sealed and opened: order, replay, forks, and a ledger that was turned back."""

from __future__ import annotations

import shutil

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from offsite.artefacts.job import OpenedJob, parse_job
from offsite.digests import sha256_bytes
from offsite.errors import BadKey, Replayed, WrongBinding
from offsite.sealed.ledger import Ledger
from offsite.sealed.manifest import SealedFile, SealedManifest, sealed_size

NAMES = {"job": "job.json", "package": "offsite.json", "bundle": "offsite.json", "report": "results.json"}


def digest_of(number: int) -> str:
    return sha256_bytes(b"%d" % number)


def opened(job) -> OpenedJob:
    return parse_job(job.model_dump_json().encode())


def manifest_of(job, kind="package", *, sequence=1, previous=None, round_=None, issuer=None) -> SealedManifest:
    issuer = issuer or (job.client if kind == "bundle" else job.owner)
    file = SealedFile(
        name=NAMES[kind],
        bytes=1,
        sha256=digest_of(0),
        sealed_bytes=sealed_size(1),
        sealed_sha256=digest_of(1),
        tensors_sha256=None,
    )
    return SealedManifest(
        kind=kind,
        job_id=job.job_id,
        issuer=issuer,
        recipients=(job.other_party(issuer),),
        created=job.created,
        expires=job.expires,
        sequence=sequence,
        round=int(kind == "bundle") if round_ is None else round_,
        previous=previous,
        base_digest=job.base_digest,
        package_digest=job.package_digest,
        files=(file,),
    )


@pytest.fixture
def job(make_job):
    return make_job()


@pytest.fixture
def ledger(parties, job):
    with Ledger(parties[1].keys) as found:
        found.remember(opened(job))
        yield found


def test_sent_ones_are_numbered_and_linked(ledger, job):
    for number in (1, 2, 3):
        with ledger.sending(job.job_id, "bundle") as slot:
            assert slot.sequence == number
            assert slot.previous == (digest_of(number - 1) if number > 1 else None)
            slot.digest, slot.round = digest_of(number), 1
    with ledger.sending(job.job_id, "report") as slot:
        assert (slot.sequence, slot.previous) == (1, None)


def test_a_slot_that_was_not_used_is_free_again(ledger, job):
    with pytest.raises(RuntimeError, match="full"), ledger.sending(job.job_id, "bundle"):
        raise RuntimeError("disk full")
    with ledger.sending(job.job_id, "bundle") as slot:
        assert slot.sequence == 1


def test_jobs_are_remembered_and_never_change(ledger, job, make_job):
    ledger.remember(opened(job))
    assert ledger.job(job.job_id).job == job
    with pytest.raises(Replayed, match="other terms"):
        ledger.remember(opened(job.model_copy(update={"rounds": 9})))
    other = make_job()
    with pytest.raises(WrongBinding, match="not known here"):
        ledger.job(other.job_id)
    with pytest.raises(WrongBinding, match="not known here"), ledger.sending(other.job_id, "bundle"):
        pass
    with pytest.raises(WrongBinding, match="not known here"):
        ledger.admit(manifest_of(other), digest_of(1))


def test_the_same_again_is_no_news(ledger, job):
    manifest = manifest_of(job)
    assert ledger.check(manifest, digest_of(1)) == "new"
    assert ledger.admit(manifest, digest_of(1)) == "new"
    assert ledger.check(manifest, digest_of(1)) == "again"
    assert ledger.admit(manifest, digest_of(1)) == "again"


@pytest.mark.parametrize(
    ("sequence", "previous", "message"),
    [
        (1, None, "number 1 of its issuer's, number 2 came before it"),
        (2, 7, "another number 2"),
        (3, 9, "does not follow from number 2"),
    ],
)
def test_older_forked_and_unlinked_ones_are_refused(ledger, job, sequence, previous, message):
    ledger.admit(manifest_of(job, sequence=2, previous=digest_of(5)), digest_of(2))
    later = manifest_of(job, sequence=sequence, previous=previous and digest_of(previous))
    for ask in (ledger.check, ledger.admit):
        with pytest.raises(Replayed, match=message):
            ask(later, digest_of(8))
    assert ledger.admit(manifest_of(job, sequence=3, previous=digest_of(2)), digest_of(3)) == "new"
    assert ledger.admit(manifest_of(job, sequence=9, previous=digest_of(7)), digest_of(9)) == "new"  # some were lost


def test_row_12_what_was_refused_counts_as_seen(ledger, job):
    """One was held back, two was refused for what it says: then one is no news, two is judged again, three follows."""
    two = manifest_of(job, sequence=2, previous=digest_of(1))
    for _ in range(2):
        ledger.refuse(two, digest_of(2), WrongBinding("another package"))
        with pytest.raises(Replayed, match="number 1 of its issuer's, number 2 came before it"):
            ledger.admit(manifest_of(job), digest_of(1))
        assert ledger.check(two, digest_of(2)) == "new"
    assert ledger.admit(manifest_of(job, sequence=3, previous=digest_of(2)), digest_of(3)) == "new"
    assert [line["event"] for line in ledger._store.lines()].count("refused") == 1
    ledger._store.verify_log()


def test_what_was_refused_of_an_unknown_job_leaves_nothing(ledger, make_job):
    ledger.refuse(manifest_of(make_job()), digest_of(2), WrongBinding("another package"))
    assert [line["event"] for line in ledger._store.lines()] == ["schema", "job"]


def test_kinds_and_issuers_are_counted_apart(ledger, job):
    ledger.admit(manifest_of(job, sequence=5, previous=digest_of(4)), digest_of(5))
    assert ledger.admit(manifest_of(job, "report"), digest_of(6)) == "new"
    assert ledger.admit(manifest_of(job, "report", issuer=job.client), digest_of(7)) == "new"


def test_one_bundle_a_round(ledger, job):
    ledger.admit(manifest_of(job, "bundle"), digest_of(1))
    with pytest.raises(Replayed, match="round 1, which has its bundle"):
        ledger.admit(manifest_of(job, "bundle", sequence=2, previous=digest_of(1)), digest_of(2))
    assert ledger.admit(manifest_of(job, "bundle", sequence=2, previous=digest_of(1), round_=2), digest_of(3)) == "new"


def test_a_keys_folder_that_others_may_read_is_refused(parties):
    parties[0].keys.chmod(0o755)
    with pytest.raises(BadKey, match="open to others"):
        Ledger(parties[0].keys)


@pytest.mark.parametrize("turned_back", ["ledger.db", "ledger.log", "ledger.head"])
def test_row_12_an_older_copy_is_noticed(parties, job, tmp_path, turned_back):
    keys = parties[1].keys
    with Ledger(keys) as ledger:
        ledger.remember(opened(job))
    shutil.copyfile(keys / turned_back, tmp_path / "old")
    with Ledger(keys) as ledger:
        ledger.admit(manifest_of(job), digest_of(1))
        ledger.admit(manifest_of(job, "report"), digest_of(2))  # a head one step behind is what a crash leaves
    shutil.copyfile(tmp_path / "old", keys / turned_back)
    for name in ("ledger.db-wal", "ledger.db-shm"):
        (keys / name).unlink(missing_ok=True)
    with pytest.raises(Replayed, match="turned back"):
        Ledger(keys)


class Order(RuleBasedStateMachine):
    """Whatever order things arrive in, and however often it restarts, no number is admitted twice or after a later."""

    folder = job = None
    made = Bundle("made")

    def __init__(self):
        super().__init__()
        self.keys = self.folder / f"keys-{len(list(self.folder.iterdir()))}"
        self.keys.mkdir(mode=0o700)
        self.ledger = Ledger(self.keys)
        self.ledger.remember(opened(self.job))
        self.admitted: list[tuple[int, str]] = []

    def teardown(self):
        self.ledger.close()
        shutil.rmtree(self.keys)

    @rule(target=made, sequence=st.integers(1, 4), previous=st.integers(0, 3), content=st.integers(0, 2))
    def seal(self, sequence, previous, content):
        link = digest_of(10 * previous) if sequence > 1 else None
        return manifest_of(self.job, sequence=sequence, previous=link), digest_of(10 * sequence + content)

    @rule(sealed=made)
    def arrive(self, sealed):
        manifest, digest = sealed
        expected = self.verdict(manifest, digest)
        try:
            found = self.ledger.admit(manifest, digest)
        except Replayed:
            found = "refused"
        assert found == expected
        if found == "new":
            self.admitted.append((manifest.sequence, digest))

    @rule()
    def restart(self):
        self.ledger.close()
        self.ledger = Ledger(self.keys)

    @invariant()
    def in_order(self):
        numbers = [number for number, _ in self.admitted]
        assert numbers == sorted(set(numbers))

    def verdict(self, manifest, digest):
        if digest in [known for _, known in self.admitted]:
            return "again"
        last, link = self.admitted[-1] if self.admitted else (0, None)
        follows = manifest.sequence != last + 1 or last == 0 or manifest.previous == link
        return "new" if manifest.sequence > last and follows else "refused"


def test_row_11_any_order_of_arrivals_and_restarts(tmp_path, job):
    Order.folder, Order.job = tmp_path / "machines", job
    Order.folder.mkdir()
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run_state_machine_as_test(
        Order,
        settings=settings(
            max_examples=20, stateful_step_count=12, deadline=None, database=None, suppress_health_check=checks
        ),
    )
