"""The registry: steps that are taken once, rounds that are held by one, and nothing half after a restart."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest

from offsite.artefacts.job import Policy
from offsite.errors import ArtefactError, BadSchema, ConfigError, NotFinite, PolicyError, Replayed, WrongBinding
from server.registry.registry import Registry

DIGESTS = ["sha256:" + letter * 64 for letter in "abcdef"]


@pytest.fixture
def arrived(exchange):
    """Register bundles without files: the one of a job's first round, unless said otherwise."""
    job = exchange.job()

    def arrive(digest, *, state="verified", **changes):
        stated = {"job_id": job.job_id, "issuer": job.client, "round": 1, "sequence": 1, **changes}
        registry = exchange.registry
        registry.receive(SimpleNamespace(**stated), digest, now=exchange.now)
        registry.bundle_folder(digest[7:23]).mkdir()
        if state != "received":
            registry.verified(digest, bundle_digest=digest, tensors_sha256=digest, figures={"x": 1.0})
        return digest[7:23]

    return arrive


def events(exchange):
    from offsite.state.chain import read_log

    return [line["event"] for line in read_log(exchange.registry_folder / "registry.log")]


def test_a_job_is_registered_once_with_what_it_is_about(exchange):
    job = exchange.job()
    registry = exchange.opened()
    registry.add_job(job, package=exchange.package.path, client_name="client")
    assert registry.job(job.job_id) == job
    assert registry.jobs_of(job.client) == [job]
    assert registry.jobs_of(job.owner) == []
    assert registry.package_path(job.package_digest) == exchange.package.path.resolve()
    assert events(exchange) == ["schema", "job"]
    other = job.model_copy(update={"policy": Policy(max_relative_frobenius=9.0)})
    with pytest.raises(Replayed, match="registered with other terms"):
        registry.add_job(other, package=exchange.package.path, client_name="client")
    with pytest.raises(WrongBinding, match="not known to this registry"):
        registry.job("0" * 32)
    with pytest.raises(WrongBinding, match="not known to this registry"):
        registry.package_path(DIGESTS[0])


def test_steps_are_taken_in_order_and_once(exchange, arrived):
    bundle_id = arrived(DIGESTS[0])
    registry = exchange.registry
    for state in ("accepted", "plugged-in", "served"):
        for _ in range(2):
            assert registry.advance(bundle_id, state).state == state
    assert registry.advance(bundle_id, "accepted").state == "served"  # further already
    assert events(exchange) == ["schema", "job", "received", "verified", "accepted", "plugged-in", "served"]
    assert registry.entry(bundle_id).figures == '{"x": 1.0}'


def test_a_step_left_out_is_refused_with_the_next_command(exchange, arrived):
    bundle_id = arrived(DIGESTS[0])
    with pytest.raises(PolicyError, match="is verified, accepted comes first") as caught:
        exchange.registry.advance(bundle_id, "plugged-in")
    assert caught.value.hint == f"offsite registry accept {bundle_id}"


def test_unknown_and_malformed_ids_are_usage_errors(exchange):
    for bad in ("", "0" * 15, "G" * 16, "../../etc/passwd", "0" * 17):
        with pytest.raises(ConfigError, match="is no id of a bundle"):
            exchange.registry.entry(bad)
    with pytest.raises(ConfigError, match="no bundle 0000000000000000 in registry"):
        exchange.registry.advance("0" * 16, "accepted")


def test_a_round_is_held_by_one_that_is_not_refused(exchange, arrived):
    first = arrived(DIGESTS[0])
    with pytest.raises(Replayed, match="is taken by sha256:aaa"):
        arrived(DIGESTS[1], sequence=2)
    exchange.registry.refuse(first)
    assert not exchange.registry.bundle_folder(first).exists()
    assert exchange.registry.refuse(first).state == "refused"
    arrived(DIGESTS[1], sequence=2)
    assert [entry.state for entry in exchange.registry.entries()] == ["refused", "verified"]
    assert events(exchange).count("refused") == 1


def test_what_is_plugged_in_cannot_be_refused(exchange, arrived):
    bundle_id = arrived(DIGESTS[0])
    exchange.registry.advance(bundle_id, "accepted")
    exchange.registry.advance(bundle_id, "plugged-in")
    with pytest.raises(PolicyError, match="is plugged-in"):
        exchange.registry.refuse(bundle_id)
    assert exchange.registry.bundle_folder(bundle_id).exists()


def test_nothing_is_refused_while_something_is_plugged_in(exchange, arrived):
    bundle_id = arrived(DIGESTS[0])
    with exchange.opened().one_plug_in(), pytest.raises(PolicyError, match="is being plugged in"):
        exchange.registry.refuse(bundle_id)
    assert exchange.registry.refuse(bundle_id).state == "refused"


def test_two_digests_of_one_id_are_not_confused(exchange, arrived):
    arrived("sha256:" + "a" * 64)
    with pytest.raises(Replayed, match="another bundle has the id"):
        arrived("sha256:" + "a" * 63 + "b", round=2, sequence=2)


def test_verdicts_tell_the_class_of_a_refusal(exchange, arrived):
    registry = exchange.registry
    assert registry.verdict(DIGESTS[0]) is None
    registry.note_refusal(DIGESTS[0], BadSchema("no such thing"), is_final=False)
    registry.note_refusal(DIGESTS[0], BadSchema("no such thing"), is_final=False)
    found = registry.verdict(DIGESTS[0])
    assert (found.state, found.reason_class, found.is_final) == ("refused", "BadSchema", False)
    assert [verdict.digest for verdict in registry.refusals()] == [DIGESTS[0]]
    bundle_id = arrived(DIGESTS[1], state="received")
    registry.note_refusal(DIGESTS[1], NotFinite("tensor 'x' holds NaN"), is_final=True)
    found = registry.verdict(DIGESTS[1])
    assert (found.id, found.state, found.is_final) == (bundle_id, "refused", True)
    assert isinstance(found.error, NotFinite)
    with pytest.raises(NotFinite, match="holds NaN"):
        registry.advance(bundle_id, "accepted")
    arrived(DIGESTS[2], sequence=2)
    arrived(DIGESTS[0], round=2, sequence=3)  # once it passes, the refusals before are of no interest
    assert registry.refusals() == []


def test_the_owner_may_refuse_while_an_intake_is_at_work(exchange, arrived):
    bundle_id = arrived(DIGESTS[0], state="received")
    exchange.registry.refuse(bundle_id)
    exchange.registry.verified(DIGESTS[0], bundle_digest=DIGESTS[0], tensors_sha256=DIGESTS[0], figures={})
    found = exchange.registry.verdict(DIGESTS[0])
    assert found.state == "refused"
    assert type(found.error) is ArtefactError
    assert "verified" not in events(exchange)


def test_opening_collects_what_a_crash_left(exchange, arrived):
    kept = arrived(DIGESTS[0])
    lost = arrived(DIGESTS[1], state="received", round=2, sequence=2)
    folder = exchange.registry_folder
    (folder / "incoming" / lost).mkdir()
    (folder / "bundles" / "0123456789abcdef").mkdir()
    (folder / ".registry.id.0123abcd.partial").write_bytes(b"x")
    foreign = [folder / "incoming" / "file", folder / "bundles" / "file", folder / ".registry.id.notes.partial"]
    for path in foreign:
        path.write_bytes(b"theirs")
    (folder / "bundles" / "link").symlink_to("/etc")
    registry = exchange.opened()
    assert [entry.id for entry in registry.entries()] == [kept]
    assert {path.name for path in (folder / "bundles").iterdir()} == {kept, "link", "file"}
    assert [path.name for path in (folder / "incoming").iterdir()] == ["file"]
    assert {path.read_bytes() for path in foreign} == {b"theirs"}  # whatever has another name than ours stays
    assert [path.name for path in folder.glob(".*")] == [".registry.id.notes.partial"]
    assert events(exchange)[-1] == "forgotten"


@pytest.mark.parametrize("part", ["bundles", "incoming", "rounds", "federations", "notes", "exchange", "outbox"])
def test_a_part_that_is_a_link_to_a_bigger_disk_is_refused_and_nothing_on_it_is_touched(exchange, tmp_path, part):
    exchange.job()
    exchange.close()
    disk, folder = tmp_path / "disk", exchange.registry_folder
    disk.mkdir()
    for name in ("photos", "0123456789abcdef", "a" * 64):
        (disk / name / "inside").mkdir(parents=True)
    if (folder / part).exists():
        (folder / part).rmdir()
    (folder / part).symlink_to(disk)
    with pytest.raises(ConfigError, match=f"^'{part}' of registry .* is a link, expected a folder of its own$"):
        exchange.opened()
    assert len(list(disk.rglob("inside"))) == 3


def test_opening_leaves_an_intake_that_is_under_way_alone(exchange, arrived):
    arrived(DIGESTS[0], state="received")
    with exchange.registry.one_intake():
        assert [entry.state for entry in exchange.opened().entries()] == ["received"]
    assert exchange.opened().entries() == []


def test_where_there_is_no_registry_none_is_made(tmp_path):
    with pytest.raises(ConfigError, match=r"no keys folder at .*keys'"):
        Registry.open(tmp_path / "registry", tmp_path / "keys")
    (tmp_path / "keys").mkdir()
    with pytest.raises(ConfigError, match="'registry' is no registry") as caught:
        Registry.open(tmp_path / "registry", tmp_path / "keys")
    assert "offsite job create" in caught.value.hint
    assert not (tmp_path / "registry").exists()


def test_a_registry_may_move_its_head_stays_known(exchange, tmp_path):
    job = exchange.job()
    exchange.close()
    shutil.move(exchange.registry_folder, tmp_path / "elsewhere")
    with Registry.open(tmp_path / "elsewhere", exchange.keys) as registry:
        assert registry.job(job.job_id) == job
        assert registry.verify_log().number == 2


def test_a_damaged_name_is_one_line(exchange):
    exchange.close()
    (exchange.registry_folder / "registry.id").write_text("../../evil\n")
    with pytest.raises(BadSchema, match=r"registry\.id of 'registry' is damaged"):
        exchange.opened()


def test_a_log_line_of_others_is_part_of_the_chain(exchange):
    exchange.registry.log("exchange-denied", key="x", check="Expired")
    assert events(exchange) == ["schema", "exchange-denied"]
    assert exchange.registry.verify_log().number == 2


def test_a_bundle_is_named_by_its_first_digits_or_as_the_latest(exchange, arrived):
    registry = exchange.opened()
    with pytest.raises(ConfigError, match="is empty"):
        registry.named("latest")
    one, two = arrived("sha256:" + "abcd" * 16), arrived("sha256:" + "abce" * 16, round=2, sequence=2)
    assert registry.named("abcd").id == registry.named(one).id == one
    assert registry.named("latest").id == two
    with pytest.raises(ConfigError, match="no bundle whose id begins with abcf"):
        registry.named("abcf")
    with pytest.raises(ConfigError, match="no id of a bundle"):
        registry.named("abc")
    arrived("sha256:" + "abcd1" + "0" * 59, round=3, sequence=3)
    with pytest.raises(ConfigError, match="2 bundles have ids that begin with abcd"):
        registry.named("abcd")
