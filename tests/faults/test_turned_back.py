"""Every store, every choice of its files put back from before, with a write-ahead file or without: no old one is used.

A process that is killed leaves ``NAME.db-wal``, and SQLite lays the pages in it over whatever database stands beside
it. So each case here is two moments of one store, each left by a process that was killed or that closed; then some of
the later moment's files are replaced by the earlier one's. Only three things may come of it: what SQLite reads is the
later moment all the same, row by row; log and head are the earlier ones, and so is every row, which nothing on the
machine can notice; or the store is refused, and what lies there is as it was, so that the right files can be put back.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sqlite3
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest

from client.privacy.budget import BudgetLedger, Members
from client.privacy.dpsgd import Guarantee
from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.job import Job, parse_job
from offsite.audits.accounting import Mechanism, account
from offsite.errors import Replayed
from offsite.sealed.ledger import Ledger
from offsite.state.chain import read_log
from server.registry.registry import Registry

OWNER, CLIENT = ("-".join([letter * 4] * 13) for letter in "ab")
BOUND = {"package_digest": "sha256:" + "1" * 64, "base_digest": "sha256:" + "2" * 64}
JOB = Job(job_id="0" * 32, owner=OWNER, client=CLIENT, adapter=AdapterSpec(), rounds=99, created=1, expires=9, **BOUND)
MECHANISM = Mechanism(1.0, 0.1, 10)
GUARANTEE = Guarantee(MECHANISM, 1.0, 4, "example", None, True, account(MECHANISM, 1e-3))


def digest_of(number: int) -> str:
    return f"sha256:{number:064x}"[:7] + f"{number:016x}" + "f" * 48


class RegistryCase:
    stem, head = "state/registry", "keys/registry-{}.head"

    @staticmethod
    def opened(folder: Path) -> Registry:
        (folder / "keys").mkdir(exist_ok=True)
        return Registry.open(folder / "state", folder / "keys", create=True)

    @staticmethod
    def step(registry: Registry, number: int) -> None:
        registry.add_job(JOB, package=Path("/nowhere"), client_name="client")
        digest = digest_of(number)
        envelope = SimpleNamespace(job_id=JOB.job_id, issuer=CLIENT, round=number, sequence=number)
        registry.receive(envelope, digest)
        place = registry.bundle_folder(f"{number:016x}")
        place.mkdir()
        (place / "adapter.safetensors").write_bytes(b"weights")
        registry.verified(digest, bundle_digest=digest, tensors_sha256=digest, figures={"x": 1.0})
        registry.advance(f"{number:016x}", "accepted")

    @staticmethod
    def state(registry: Registry) -> object:
        assert registry.verify_log().number > 0
        return registry.entries()

    @staticmethod
    def store(registry):
        return registry.store


class LedgerCase:
    stem, head = "keys/ledger", "keys/ledger.head"

    @staticmethod
    def opened(folder: Path) -> Ledger:
        (folder / "keys").mkdir(exist_ok=True, mode=0o700)
        return Ledger(folder / "keys")

    @staticmethod
    def step(ledger: Ledger, number: int) -> None:
        ledger.remember(parse_job(JOB.model_dump_json().encode()))
        with ledger.sending(JOB.job_id, "bundle") as slot:
            slot.digest, slot.round = digest_of(number), number

    @staticmethod
    def state(ledger: Ledger) -> object:
        ledger._store.verify_log()
        return [tuple(row) for row in ledger._store.rows("SELECT * FROM sent ORDER BY sequence")]

    @staticmethod
    def store(ledger):
        return ledger._store


class BudgetCase:
    stem, head = "ledger/budget", "ledger.head"

    @staticmethod
    def opened(folder: Path) -> BudgetLedger:
        return BudgetLedger(folder / "ledger")

    @staticmethod
    def step(ledger: BudgetLedger, number: int) -> None:
        members = Members([bytes([number, other]) * 8 for other in range(20)], [bytes([number, 99]) * 8])
        run = ledger.charge(members, GUARANTEE, place=f"place {number}", settings="s", budget=None).run
        ledger.resumed(run)
        ledger.release(run, digest_of(number))

    @staticmethod
    def state(ledger: BudgetLedger) -> object:
        ledger._store.verify_log()
        return [tuple(row) for row in ledger._store.rows("SELECT * FROM runs, members ON number = run ORDER BY 1, 17")]

    @staticmethod
    def store(ledger):
        return ledger._store


LAST = 43
MIXED = {("db", name) for name in ("registry", "ledger", "budget")}
CASES = {"registry": RegistryCase, "ledger": LedgerCase, "budget": BudgetCase}


def _work(case, folder: Path, numbers: range, killed: bool) -> None:
    store = case.opened(folder)
    for number in numbers:
        case.step(store, number)
    if killed:
        os._exit(0)
    store.__exit__(None, None, None)


def work(case, folder: Path, numbers: range, *, killed: bool) -> None:
    """Another process opens the store and takes these steps; then it closes, or is gone as if it were killed."""
    process = multiprocessing.get_context("fork").Process(target=_work, args=(case, folder, numbers, killed))
    process.start()
    process.join()
    assert process.exitcode == 0


def names_of(case, folder: Path) -> list[str]:
    head = case.head
    if "{}" in head:
        head = head.format((folder / "state" / "registry.id").read_text().strip())
    return [*(case.stem + end for end in (".db", ".db-wal", ".db-shm", ".log")), head]


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file but locks and SQLite's index of the write-ahead file, which it makes anew whenever it needs it."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: content
        for name, path in found.items()
        if not name.endswith((".lock", "-shm")) and ((content := path.read_bytes()) or not name.endswith("-wal"))
    }


def state_of(case, folder: Path) -> object:
    with case.opened(folder) as store:
        return case.state(store)


@pytest.fixture(scope="module")
def moments(tmp_path_factory):
    """Make the two moments of a store once: (earlier, later, the state of each), by how each was left."""
    made = {}

    def moments(name: str, early_killed: bool, late_killed: bool):
        key = (name, early_killed, late_killed)
        if key not in made:
            case, folder = CASES[name], tmp_path_factory.mktemp(name)
            live, early, late = folder / "live", folder / "early", folder / "late"
            live.mkdir()
            work(case, live, range(1, 4), killed=early_killed)
            shutil.copytree(live, early)
            work(case, live, range(4, 40), killed=False)  # what it wrote is in the database now
            work(
                case, live, range(40, LAST + 1), killed=late_killed
            )  # and these last steps, killed, in the file beside it
            shutil.copytree(live, late)
            states = [state_of(case, Path(shutil.copytree(one, folder / f"{one.name}-read"))) for one in (early, late)]
            assert states[0] != states[1]
            made[key] = (early, late, *states)
        return made[key]

    return moments


CHOICES = [choice for count in range(6) for choice in combinations(("db", "wal", "shm", "log", "head"), count)]
QUICK = [(), ("db",), ("db", "log"), ("wal", "shm"), ("db", "wal", "shm", "log", "head")]


@pytest.mark.parametrize(
    "choice",
    [
        pytest.param(one, id="+".join(one) or "nothing", marks=[] if one in QUICK else [pytest.mark.slow])
        for one in CHOICES
    ],
)
@pytest.mark.parametrize("late_killed", [True, False], ids=["late killed", "late closed"])
@pytest.mark.parametrize("early_killed", [True, False], ids=["early killed", "early closed"])
@pytest.mark.parametrize("name", CASES)
def test_row_12_every_choice_of_files_put_back(name, early_killed, late_killed, choice, moments, tmp_path):
    case = CASES[name]
    early, late, early_state, late_state = moments(name, early_killed, late_killed)
    folder = Path(shutil.copytree(late, tmp_path / "mixed"))
    names = dict(zip(("db", "wal", "shm", "log", "head"), names_of(case, late), strict=True))
    for part in choice:
        (folder / names[part]).unlink(missing_ok=True)
        if (early / names[part]).exists():
            shutil.copy(early / names[part], folder / names[part])
    before, found = content_of(folder), None
    if before == content_of(late):
        assert state_of(case, folder) == late_state
        return
    with suppress(Replayed):
        found = state_of(case, folder)
    if found is None:
        assert content_of(folder) == before
        for part, path in names.items():  # the right files, put back, are all that is needed
            (folder / path).unlink(missing_ok=True)
            if part != "shm" and (late / path).exists():
                shutil.copy(late / path, folder / path)
        assert state_of(case, folder) == late_state
        assert name != "registry" or len(list((folder / "state" / "bundles").iterdir())) == LAST
        return
    assert (*choice, name) not in MIXED  # there the pages that SQLite puts together are of two moments
    if {"log", "head"} <= set(choice):  # SECURITY.md says so: nothing remembers more
        assert found == early_state
    else:
        assert found == late_state


@pytest.mark.parametrize("name", CASES)
def test_row_12_a_write_ahead_file_alone(name, moments, tmp_path):
    """The database was deleted; what lies beside it must not be thrown away by opening an empty one."""
    case = CASES[name]
    _, late, _, late_state = moments(name, False, True)
    folder = Path(shutil.copytree(late, tmp_path / "mixed"))
    database = folder / names_of(case, late)[0]
    kept = database.read_bytes()
    for nothing in (True, False):
        database.unlink()
        if nothing:
            database.touch()
        with pytest.raises(Replayed, match="is empty or gone"):
            case.opened(folder)
        database.write_bytes(kept)
    assert state_of(case, folder) == late_state


def _in_form_0(path: Path) -> None:
    """Turn the database into what an earlier offsite wrote: no sum over the rows, another table for the state."""
    connection = sqlite3.connect(path)
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    state = "one, number, hash, log_bytes, previous_number, previous_hash, previous_bytes"
    connection.executescript(
        f"CREATE TABLE store_head AS SELECT {state} FROM store_state; DROP TABLE store_state;"
        f"PRAGMA user_version = {version % 1000}"
    )
    connection.close()


DAMAGE = {
    "registry": "DELETE FROM bundles WHERE round = 2",
    "ledger": "DELETE FROM sent WHERE sequence = 2",
    "budget": "UPDATE runs SET num_releases = 0 WHERE number = 2",
}


@pytest.mark.parametrize("name", CASES)
def test_row_12_what_an_earlier_version_wrote_is_brought_up_once_if_its_log_agrees(name, moments, tmp_path):
    case = CASES[name]
    _, late, _, late_state = moments(name, False, False)
    folder = Path(shutil.copytree(late, tmp_path / "old"))
    database = folder / names_of(case, late)[0]
    _in_form_0(database)
    old = Path(shutil.copytree(folder, tmp_path / "damaged"))
    assert state_of(case, folder) == late_state
    lines = list(read_log(database.with_suffix(".log")))
    assert lines[-1]["event"] == "schema"
    assert state_of(case, folder) == late_state
    assert list(read_log(database.with_suffix(".log"))) == lines  # once
    shutil.copy(old / database.relative_to(folder), database)
    with pytest.raises(Replayed, match="remembers more"):
        case.opened(folder)

    other = old / database.relative_to(folder)
    connection = sqlite3.connect(other)
    connection.execute(DAMAGE[name])
    connection.commit()
    connection.close()
    for _ in range(2):
        with pytest.raises(Replayed, match="not what its log leads to"):
            case.opened(old)
    assert name != "registry" or len(list((old / "state" / "bundles").iterdir())) == LAST


@pytest.mark.parametrize("name", CASES)
def test_row_12_a_row_that_was_edited(name, moments, tmp_path):
    case = CASES[name]
    _, late, _, _ = moments(name, False, False)
    folder = Path(shutil.copytree(late, tmp_path / "edited"))
    connection = sqlite3.connect(folder / names_of(case, late)[0])
    connection.execute(DAMAGE[name])
    connection.commit()
    connection.close()
    with pytest.raises(Replayed, match="holds other rows than entry"):
        case.opened(folder)


@pytest.mark.parametrize("name", CASES)
def test_row_12_rows_that_change_under_an_open_store_are_found_by_the_logs_check(name, moments, tmp_path):
    case = CASES[name]
    _, late, _, _ = moments(name, False, False)
    folder = Path(shutil.copytree(late, tmp_path / "open"))
    with case.opened(folder) as store:
        connection = sqlite3.connect(folder / names_of(case, late)[0])
        connection.execute(DAMAGE[name])
        connection.commit()
        connection.close()
        with pytest.raises(Replayed, match="holds other rows than entry"):
            case.store(store).verify_log()


def test_row_12_a_folder_that_the_log_calls_verified_is_never_deleted(moments, tmp_path):
    """Also when its row is lost while the registry is open."""
    _, late, _, _ = moments("registry", False, False)
    folder = Path(shutil.copytree(late, tmp_path / "open"))
    with RegistryCase.opened(folder) as registry:
        connection = sqlite3.connect(folder / "state" / "registry.db")
        connection.execute(DAMAGE["registry"])
        connection.commit()
        connection.close()
        with pytest.raises(Replayed, match=f"has lost the row of bundle {2:016x}"):
            registry.collect()
        assert len(list((folder / "state" / "bundles").iterdir())) == LAST
