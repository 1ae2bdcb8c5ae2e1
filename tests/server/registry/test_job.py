"""``job create``, and the registry's verbs on the command line, from a job to acceptance."""

from __future__ import annotations

import json

import colours
import pytest

from offsite import cli
from offsite.artefacts.bundle import Head
from offsite.artefacts.job import read_job
from server.registry.registry import Registry


@pytest.fixture
def offsite(capsys):
    """Run a command line; return its exit code, its JSON object and what it said."""

    def run(*words):
        code = cli.run([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, json.loads(out.splitlines()[-1]) if out else None, err

    return run


@pytest.fixture
def create(offsite, parties, dropped_package, tmp_path):
    owner, client = parties

    def run(*more, package=None, to=None, out="job"):
        words = ["job", "create", package or dropped_package.path, "--client", to or client.fingerprint]
        words += ["--registry", tmp_path / "registry", "--keys", owner.keys, "-o", tmp_path / out]
        return offsite(*words, *more)

    return run


def test_a_job_states_the_terms_and_is_registered(create, parties, dropped_package, tmp_path):
    owner, client = parties
    more = ["--adapter", "lora", "--rank", "4", "--placement", "1+2", "--rounds", "3", "--days", "7"]
    more += ["--max-relative-frobenius", "0.5", "--terms", "for the trial of May"]
    code, found, err = create(*more)
    assert code == 0, err
    job = read_job(tmp_path / "job").job
    assert (job.owner, job.client, job.package_digest) == (
        owner.fingerprint,
        client.fingerprint,
        dropped_package.digest,
    )
    assert (job.rounds, job.expires - job.created, job.terms) == (3, 7 * 86400, "for the trial of May")
    assert job.policy.max_relative_frobenius == 0.5
    assert (job.adapter.kind, job.adapter.rank, job.adapter.placement) == ("lora", 4, "1+2")
    assert found["job_id"] == job.job_id
    with Registry.open(tmp_path / "registry", owner.keys) as registry:
        assert registry.job(job.job_id) == job
        assert registry.package_path(job.package_digest) == dropped_package.path.resolve()
    assert "next: offsite seal" in err


def test_a_task_crosses_in_the_job_and_is_shown(create, offsite, parties, tmp_path):
    (tmp_path / "task.yaml").write_text(colours.TEXT)
    code, found, err = create("--task", tmp_path / "task.yaml")
    assert code == 0, err
    assert found["task_digest"] == colours.task().digest
    with Registry.open(tmp_path / "registry", parties[0].keys) as registry:
        assert registry.job(found["job_id"]).task == colours.task()
    code, shown, err = offsite("inspect", tmp_path / "job")
    assert "| Name the colour." in err
    assert "| Thing: {{thing}}" in err
    assert shown["task"]["answer"]["labels"] == ["red", "green", "blue"]
    (tmp_path / "task.yaml").write_text(colours.text(("accuracy", "rouge-l")))
    code, found, err = create("--task", tmp_path / "task.yaml", out="other")
    assert (code, found) == (2, None)
    assert not (tmp_path / "other").exists()


def test_refusals_leave_no_job_and_no_registry(create, make_party, make_package, tmp_path):
    stranger = make_party("stranger")
    moved = make_package(tmp_path / "moved")
    (tmp_path / "moved.owner.json").unlink()
    cases = [
        ({"to": stranger.fingerprint}, [], 3, "is not pinned here"),
        ({}, ["--placement", "9+9"], 2, "--placement 9+9"),
        ({}, ["--placement", "many"], 2, "--placement"),
        ({}, ["--adapter", "evil"], 2, "no kind 'evil'"),
        ({}, ["--rounds", "0"], 2, "--rounds"),
        ({}, ["--max-relative-spectral", "-1"], 2, "--max-relative-spectral"),
        ({}, ["--terms", "a\x1bb"], 2, "--terms"),
        ({}, ["--head", "tag", "--labels", "O,B-X"], 2, "tags are learnt on an encoder, llama reads a text from left"),
        ({}, ["--head", "regress", "--labels", "a,b"], 2, "--labels: a value has none"),
        ({}, ["--head", "tag"], 2, "--labels: 0 given, a classifier has two or more"),
        ({"package": tmp_path / "nowhere"}, [], 3, "no package folder"),
        ({"package": moved.path}, [], 3, "no owner's record"),
    ]
    for named, more, expected, message in cases:
        code, found, err = create(*more, **named)
        assert (code, found) == (expected, None), err
        (line,) = [line for line in err.splitlines() if line.startswith("offsite: error: ")]
        assert message in line
    assert not (tmp_path / "job").exists()
    assert not (tmp_path / "registry").exists()
    (tmp_path / "job").mkdir()
    assert create()[0] == 2


def test_from_job_to_acceptance_on_the_command_line(create, offsite, parties, small_bundle, tmp_path):
    owner, client = parties
    adapter = ["--adapter", "lora", "--rank", "2", "--placement", "1+1", "--adapter-dtype", "float32"]
    assert create(*adapter)[0] == 0
    where = ["--registry", tmp_path / "registry", "--keys", owner.keys]
    taking = ["--registry", tmp_path / "registry", *owner.flags]
    assert offsite("seal", tmp_path / "job", "-o", tmp_path / "job.sealed", *owner.flags)[0] == 0
    assert offsite("open", tmp_path / "job.sealed", "-o", tmp_path / "terms", *client.flags)[0] == 0
    sealed = tmp_path / "sealed"
    terms = ("--job", tmp_path / "terms", "--accept-leakage")
    assert offsite("seal", small_bundle.path, "-o", sealed, *terms, *client.flags)[0] == 0

    code, verdict, err = offsite("intake", sealed, *taking)
    assert (code, verdict["state"], verdict["again"]) == (0, "verified", False), err
    assert verdict["figures"]["num_modules"] == 14
    assert f"offsite registry accept {verdict['id']}" in err
    code, again, err = offsite("intake", sealed, *taking)
    assert (code, again["again"]) == (0, True)
    assert "already verified" in err

    code, listed, err = offsite("registry", "list", *where)
    assert [entry["id"] for entry in listed["bundles"]] == [verdict["id"]]
    assert verdict["id"] in err
    code, shown, err = offsite("registry", "show", verdict["id"], *where)
    assert (shown["round"], shown["adapter"]["rank"], shown["client"]) == (1, 2, client.fingerprint)
    for _ in range(2):
        code, accepted, err = offsite("registry", "accept", verdict["id"], *where)
        assert (code, accepted["state"]) == (0, "accepted")
    assert "next: offsite plug-in" in err
    assert "already accepted" in offsite("intake", sealed, *taking)[2]
    code, log, err = offsite("log", "verify", *where)
    assert (code, log["lines"]) == (0, 5)

    raw = (tmp_path / "registry" / "registry.log").read_bytes()
    (tmp_path / "registry" / "registry.log").write_bytes(raw.replace(b'"round":1', b'"round":2'))
    code, found, err = offsite("log", "verify", *where)
    assert (code, found) == (3, None)
    assert "does not follow from the one before" in err
    (tmp_path / "registry" / "registry.log").write_bytes(raw)

    code, refused, err = offsite("registry", "refuse", verdict["id"], *where)
    assert (code, refused["state"]) == (0, "refused")
    code, found, err = offsite("intake", sealed, *taking)
    assert (code, found) == (3, None)
    assert "as before" in err
    assert offsite("registry", "accept", verdict["id"], *where)[0] == 3


def test_help_of_the_verbs_imports_no_torch():
    import subprocess
    import sys

    script = (
        "import sys; import server.registry.verbs, server.registry.config, server.registry.registry;"
        "assert 'torch' not in sys.modules, 'torch'"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_job_may_advise_a_learning_rate(create, tmp_path):
    code, _, err = create("--learning-rate", "0.004")
    assert code == 0, err
    assert read_job(tmp_path / "job").job.learning_rate == 0.004
    assert create(out="silent")[0] == 0
    assert read_job(tmp_path / "silent").job.learning_rate is None
    for wrong in ("0", "2", "nan", "fast"):
        code, _, err = create("--learning-rate", wrong, out="wrong")
        assert (code, "--learning-rate" in err) == (2, True)
        assert not (tmp_path / "wrong").exists()


def test_a_job_for_values_names_no_labels(create, tmp_path):
    code, _, err = create("--head", "regress", "--max-head-norm", "5000")
    assert code == 0, err
    job = read_job(tmp_path / "job").job
    assert job.adapter.head == Head(task="regress", hidden=32)
    assert job.policy.max_head_norm == 5000
