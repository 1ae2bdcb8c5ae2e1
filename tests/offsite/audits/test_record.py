"""Audits and run records as files: what was written is read, anything else is refused by the class that says why."""

from __future__ import annotations

import json

import pytest

from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.layout import Method
from offsite.audits.record import (
    AUDIT_NAME,
    BundleAudit,
    CanaryAudit,
    Capability,
    Estimate,
    Membership,
    PackageAudit,
    PluggedAudit,
    ScanFigures,
    Similarity,
    Withheld,
    read_audit,
    write_audit,
)
from offsite.audits.runs import (
    RECORD_LIMIT_BYTES,
    Claim,
    Run,
    TextSettings,
    quoted,
    read_run,
    run_path,
    write_run,
)
from offsite.digests import sha256_file
from offsite.errors import ArtefactError, BadSchema, ConfigError, TooLarge, WrongBinding, WrongNames

ONE = "sha256:" + "1" * 64


@pytest.fixture
def record():
    return Run(
        bundle_digest=ONE, package_digest=ONE, base_digest=ONE, adapter=AdapterSpec(), data_sha256=ONE,
        text=TextSettings(packed=True, block_tokens=64, validation=0.1, audit_share=0.0, seed=0),
        num_records=9, num_tokens=9, steps=1, batch_size=4, learning_rate=1e-3, versions={"torch": "2.13"},
    )  # fmt: skip


def attack(**changes):
    given = {
        "signal": "min-k++", "num_members": 1, "num_nonmembers": 1, "balanced_accuracy": 0.5, "tpr_at_1": None,
        "tpr_at_01": None, "auc": Estimate(value=0.5, low=0.0, high=1.0), "roc": ((0.0, 0.0), (1.0, 1.0)), **changes,
    }  # fmt: skip
    return Membership(**given)


@pytest.fixture
def audits(record):
    """One audit of each kind."""
    scan = ScanFigures(num_bytes=1, num_ngrams_compared=1, found={"training_text": 0})
    return {
        "bundle": BundleAudit(run=record, tokens_per_row=8, membership=(attack(),), scan=scan),
        "plugged-in": PluggedAudit(
            bundle_digest=ONE, package_digest=ONE, base_digest=ONE,
            canaries=CanaryAudit(commitment=ONE, num=2, num_included=1),
        ),
        "package": PackageAudit(
            package_digest=ONE, base_digest=ONE, method=Method(name="drop"), middle_parameters=2, emulator_parameters=1,
            similarity=Similarity(num_parameters=1, num_verbatim=0, num_verbatim_by_row=0, blocks=()),
            capabilities=(Capability(name="perplexity", metric="nats", num_rows=1, chance=2.0, full=1.0, emulator=1.5,
                                     kept=0.5),),
        ),
    }  # fmt: skip


def test_a_quotation_names_neither_the_data_nor_its_columns(record):
    text = record.text.model_copy(update={"fields": {"text": "diagnosis"}, "document_field": "mrn", "separator": "~"})
    whole = record.model_copy(update={"text": text, "num_drawn": 4})
    found = quoted(whole)
    assert found.model_dump(exclude={"data_sha256", "text"}) == whole.model_dump(exclude={"data_sha256", "text"})
    told = found.model_dump_json()
    assert not any(word in told for word in ("diagnosis", "mrn", "~"))
    assert found.data_sha256 is None
    assert (found.text.fields, found.text.document_field, found.text.separator) == ({}, None, None)
    for is_public in (True, False):
        claim = Claim.model_construct(number_of_units_public=is_public)
        numbers = quoted(whole.model_copy(update={"claim": claim}))
        expected = (9, 4, 9) if is_public else (None, None, None)
        assert (numbers.num_records, numbers.num_drawn, numbers.num_tokens) == expected


KINDS = ("bundle", "plugged-in", "package")


@pytest.mark.parametrize("kind", KINDS)
def test_an_audit_is_read_as_it_was_written(audits, tmp_path, kind):
    digest = write_audit(tmp_path / "audit", audits[kind])
    assert read_audit(tmp_path / "audit") == (audits[kind], digest)
    assert digest == sha256_file(tmp_path / "audit" / AUDIT_NAME)
    assert (tmp_path / "audit" / AUDIT_NAME).read_bytes().isascii()


def test_an_audit_does_not_replace_another(audits, tmp_path):
    write_audit(tmp_path / "audit", audits["bundle"])
    with pytest.raises(ConfigError, match="already exists"):
        write_audit(tmp_path / "audit", audits["package"])
    assert read_audit(tmp_path / "audit")[0] == audits["bundle"]


def text(value):
    return json.dumps(value).encode()


def edited(**changes):
    return lambda stated: text({**stated, **changes})


def inside(name, **changes):
    return lambda stated: text({**stated, name: {**stated[name], **changes}})


def of_several(*runs, steps=(3, 6), seed=4, **changes):
    """The audit of a mean of such runs: (seed, steps, steps_run)."""

    def tamper(stated):
        run = {**stated["run"], "steps": steps[0], "steps_run": steps[1], **changes}
        run["text"] = {**run["text"], "seed": seed}
        run["averaged"] = [dict(zip(("seed", "steps", "steps_run"), one, strict=True)) for one in runs]
        return text({**stated, "run": run})

    return tamper


def claimed(**changes):
    """A claim of three steps by two runs."""
    given = {
        "mechanism": "Poisson-subsampled Gaussian", "neighbours": "one unit added or removed", "unit": "example",
        "number_of_units_public": True, "epsilon": 2.0, "epsilon_prv": 2.0, "epsilon_rdp": 2.2, "delta": 1e-5,
        "noise_multiplier": 1.0, "clip": 1.0, "sample_rate": 0.1, "divisor": 8, "steps": 3, "accountant": "PLD",
        "sampler": "poisson", "noise": "operating system", "released": "weights", "epsilon_total": 2.0,
        "delta_total": 1e-5, "budget": 2.0, "num_runs": 2, "num_resumes": 0, "num_releases": 2,
    }  # fmt: skip
    return {**given, **changes}


def test_what_is_said_of_several_runs_is_read_and_of_one_nothing_is_written(audits, tmp_path):
    alone = json.loads(audits["bundle"].model_dump_json())
    assert "averaged" not in alone["run"]
    for more in ({}, {"claim": claimed()}):
        raw = of_several((4, 1, 2), (5, 2, 4), **more)(alone)
        folder = tmp_path / f"audit{len(more)}"
        folder.mkdir()
        (folder / AUDIT_NAME).write_bytes(raw)
        found = read_audit(folder)[0].run
        assert found.draws == ((4, 1), (5, 2))
        assert quoted(found).averaged == found.averaged
    assert audits["bundle"].run.draws == ((0, 1),)


TAMPERED = {
    "a mean of one run": (of_several((4, 3, 6)), BadSchema),
    "a mean of one run twice": (of_several((4, 1, 2), (4, 2, 4)), BadSchema),
    "a mean of runs from another seed": (of_several((5, 1, 2), (6, 2, 4)), BadSchema),
    "a mean of more steps than its runs took": (of_several((4, 1, 2), (5, 2, 4), steps=(4, 6)), BadSchema),
    "a mean of fewer steps run than its runs": (of_several((4, 1, 2), (5, 2, 4), steps=(3, 5)), BadSchema),
    "a mean of a run without a step": (of_several((4, 0, 2), (5, 3, 4)), BadSchema),
    "a mean whose claim is of one run's steps": (
        of_several((4, 1, 2), (5, 2, 4), claim=claimed(steps=2)),
        BadSchema,
    ),
    "a mean whose claim counts one run": (of_several((4, 1, 2), (5, 2, 4), claim=claimed(num_runs=1)), BadSchema),
    "not JSON": (lambda _: b"{", BadSchema),
    "a list": (lambda _: b"[]", BadSchema),
    "another format": (edited(format="offsite/audit/2"), WrongBinding),
    "another kind": (edited(kind="rumour"), BadSchema),
    "another's kind": (edited(kind="package"), BadSchema),
    "an unknown field": (edited(verdict="passed"), BadSchema),
    "an unknown field inside": (inside("scan", trusted=True), BadSchema),
    "a missing field": (lambda stated: text({k: v for k, v in stated.items() if k != "scan"}), BadSchema),
    "a number as text": (edited(tokens_per_row="8"), BadSchema),
    "NaN": (lambda stated: text(stated).replace(b'"tokens_per_row": 8', b'"tokens_per_row": NaN'), BadSchema),
    "an infinity": (lambda stated: text(stated).replace(b'"tokens_per_row": 8', b'"tokens_per_row": 1e999'), BadSchema),
    "a key twice": (lambda stated: text(stated)[:-1] + b', "tokens_per_row": 9}', BadSchema),
    "a negative count": (inside("scan", num_bytes=-1), BadSchema),
    "a category with an escape": (inside("scan", found={"\x1b[2J": 1}), BadSchema),
    "a digest that is none": (inside("run", data_sha256="sha256:1"), BadSchema),
    "a run of another format": (inside("run", format="offsite/run/2"), BadSchema),
    "a value outside its interval": (
        lambda stated: text(stated).replace(b'"value": 0.5', b'"value": 1.5'),
        BadSchema,
    ),
    "a curve of one point": (
        lambda stated: text(stated).replace(b"[[0.0, 0.0], [1.0, 1.0]]", b"[[0.0, 0.0]]"),
        BadSchema,
    ),
    "a curve outside the square": (lambda stated: text(stated).replace(b"[1.0, 1.0]", b"[1.0, 1.1]"), BadSchema),
    "too many points": (
        lambda stated: text(stated).replace(b"[0.0, 0.0]", b", ".join([b"[0.0, 0.0]"] * 400)),
        BadSchema,
    ),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_what_is_not_an_audit_is_refused(audits, tmp_path, name):
    change, error = TAMPERED[name]
    write_audit(tmp_path / "audit", audits["bundle"])
    path = tmp_path / "audit" / AUDIT_NAME
    raw = change(json.loads(path.read_text()))
    assert raw != text(json.loads(path.read_text())), "the change did nothing"
    path.write_bytes(raw)
    with pytest.raises(error) as caught:
        read_audit(tmp_path / "audit")
    assert type(caught.value) is error
    assert "\x1b" not in str(caught.value)


def left(way="client", nats=0.25, perplexity=12.0, num_tokens=None):
    return Withheld(way=way, nats=nats, perplexity=perplexity, num_tokens=num_tokens, told="40 steps")


def test_what_is_withheld_is_read_as_it_was_written_and_its_least_known(audits, tmp_path):
    ways = (left("rehearsed client", nats=-0.5, num_tokens=640), left(nats=0.0), left("recovery attack", num_tokens=9))
    audit = PackageAudit.model_validate(audits["package"].model_dump() | {"withheld": ways})
    write_audit(tmp_path / "audit", audit)
    found, _ = read_audit(tmp_path / "audit")
    assert found == audit
    assert found.least_withheld == ways[0]
    assert found.withheld_zero_shot == 0.5


def test_an_audit_of_an_earlier_version_has_the_bytes_it_had(audits, tmp_path):
    """What has no new figure is written without the new field, and what was written without it is read."""
    write_audit(tmp_path / "audit", audits["package"])
    stated = json.loads((tmp_path / "audit" / AUDIT_NAME).read_text())
    assert "withheld" not in stated
    assert set(stated) == {
        "format", "kind", "package_digest", "base_digest", "method", "middle_parameters", "emulator_parameters",
        "capabilities", "similarity", "recovery", "recovery_text", "union", "versions",
    }  # fmt: skip
    found, _ = read_audit(tmp_path / "audit")
    assert (found.withheld, found.least_withheld) == ((), None)


def way(**changes):
    """Return a change of the first of the ways that are stated."""
    return lambda stated: text({**stated, "withheld": [{**stated["withheld"][0], **changes}, *stated["withheld"][1:]]})


WITHHELD = {
    "a perplexity below 0": way(perplexity=-12.0),
    "a perplexity of 0": way(perplexity=0.0),
    "tokens below 0": way(num_tokens=-1),
    "no token": way(num_tokens=0),
    "half a token": way(num_tokens=0.5),
    "nats as text": way(nats="0.25"),
    "no nats": way(nats=None),
    "NaN": lambda stated: text(stated).replace(b'"nats": 0.25', b'"nats": NaN'),
    "an infinity": lambda stated: text(stated).replace(b'"nats": 0.25', b'"nats": 1e999'),
    "another way": way(way="friend"),
    "the way of another": way(way="recovery attack"),
    "another name": way(withheld=0.25),
    "a control character": way(told="\x1b[2J"),
    "a long story": way(told="x" * 201),
    "no list": edited(withheld={"client": 0.25}),
    "nothing": edited(withheld=None),
}


@pytest.mark.parametrize("name", WITHHELD)
def test_what_is_withheld_is_read_strictly(audits, tmp_path, name):
    ways = (left(), left("recovery attack", nats=0.5, num_tokens=9))
    write_audit(tmp_path / "audit", PackageAudit.model_validate(audits["package"].model_dump() | {"withheld": ways}))
    path = tmp_path / "audit" / AUDIT_NAME
    stated = json.loads(path.read_text())
    raw = WITHHELD[name](stated)
    assert raw != text(stated), "the change did nothing"
    path.write_bytes(raw)
    with pytest.raises(BadSchema):
        read_audit(tmp_path / "audit")


def test_the_folder_holds_an_audit_and_nothing_else(audits, tmp_path):
    with pytest.raises(ArtefactError, match="no audit folder named 'audit'"):
        read_audit(tmp_path / "audit")
    (tmp_path / "audit").mkdir()
    with pytest.raises(ArtefactError, match=r"holds no audit\.json"):
        read_audit(tmp_path / "audit")
    (tmp_path / "audit" / AUDIT_NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtefactError, match=r"holds no audit\.json"):
        read_audit(tmp_path / "audit")
    write_audit(tmp_path / "other", audits["bundle"])
    (tmp_path / "other" / "notes.txt").write_text("x")
    with pytest.raises(WrongNames, match=r"holds .notes\.txt. besides"):
        read_audit(tmp_path / "other")


def test_limits_on_size(audits, record, tmp_path):
    write_audit(tmp_path / "audit", audits["bundle"])
    with (tmp_path / "audit" / AUDIT_NAME).open("ab") as handle:
        handle.write(b" " * RECORD_LIMIT_BYTES)
    with pytest.raises(TooLarge):
        read_audit(tmp_path / "audit")
    path = tmp_path / "bundle.run.json"
    path.write_bytes(b" " * (RECORD_LIMIT_BYTES + 1))
    with pytest.raises(TooLarge):
        read_run(path)


# The run's record


def test_a_run_is_read_as_it_was_written_and_replaced(record, tmp_path):
    path = run_path(tmp_path / "bundle")
    assert path == tmp_path / "bundle.run.json"
    write_run(path, record)
    assert read_run(path).model_dump() == record.model_dump()
    other = record.model_copy(update={"steps": 5})
    write_run(path, other)
    assert read_run(path).model_dump() == other.model_dump()
    assert [found.name for found in tmp_path.iterdir()] == ["bundle.run.json"]


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (None, ArtefactError),
        (b"", BadSchema),
        (b"{}", WrongBinding),
        (b'{"format": "offsite/run/2"}', WrongBinding),
        (b'{"format": "offsite/run/1"}', BadSchema),
    ],
)
def test_what_is_not_a_run_is_refused(tmp_path, raw, error):
    path = tmp_path / "bundle.run.json"
    if raw is not None:
        path.write_bytes(raw)
    with pytest.raises(error) as caught:
        read_run(path)
    assert type(caught.value) is error
