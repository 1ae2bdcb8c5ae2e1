"""Retunings of a run: which rows are in, what is kept of a killed audit, and which runs have none."""

from __future__ import annotations

import hashlib
import json
import shutil
from types import SimpleNamespace

import pytest

import client.audit.retunings as module
from client.audit.audit import run as audit_run
from client.audit.config import AuditBundleConfig
from client.audit.retunings import sharing, why_never, work_of
from client.tuning.config import TuneConfig
from client.tuning.verb import run as tune_run
from offsite.audits.gates import bundle_gates
from offsite.audits.record import read_audit
from offsite.audits.runs import Objective, read_run, run_path
from offsite.errors import ConfigError
from offsite.text.batches import Example

TUNE = {
    "adapter": "lora", "learning_rate": 1e-3, "steps": 12, "batch_size": 16, "block_tokens": 24, "pack": False,
    "evaluate_every": 12, "precision": "fp32", "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, dropped_package):
    """A bundle of 130 short rows, of which two are alike; read only."""
    folder = tmp_path_factory.mktemp("few")
    data = folder / "rows.txt"
    rows = [f"ward {hashlib.sha256(str(n).encode()).hexdigest()[:12]}" for n in range(129)]
    data.write_text("\n\n".join([*rows, rows[7]]), encoding="utf-8")
    tune_run(TuneConfig(package=dropped_package.path, data=data, output=folder / "bundle", **TUNE))
    return SimpleNamespace(folder=folder, data=data, package=dropped_package, bundle=folder / "bundle")


def settings(tuned, out, **changes):
    given = {"retunings": 3, "device": "cpu", "batch_size": 64, "secrets_samples": 1, **changes}
    return AuditBundleConfig(package=tuned.package.path, bundle=tuned.bundle, data=(tuned.data,), output=out, **given)


@pytest.fixture(scope="module")
def whole(tuned):
    """An audit with three retunings, and the texts that these were on."""
    texts, plain = [], module.train_run

    def watched(ready, **given):
        texts.append(ready.text)
        return plain(ready, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "train_run", watched)
        told = audit_run(settings(tuned, tuned.folder / "audit"))
    audit, _ = read_audit(tuned.folder / "audit")
    return SimpleNamespace(told=told, audit=audit, texts=texts)


def test_of_few_rows_membership_is_measured_by_retunings(whole, tuned):
    found = whole.audit.retuned
    assert (found.num_asked, len(found.num_in), len(found.steps), whole.told["retunings"]) == (3, 3, 3, 3)
    assert all(35 < num < found.num_rows - 35 for num in found.num_in)
    assert [one.signal for one in found.attacks] == ["loss", "reference", "min-k", "min-k++"]
    assert {one.num_pairs for one in found.attacks} == {sum(min(num, found.num_rows - num) for num in found.num_in)}
    gates = {gate.name: gate for gate in bundle_gates(whole.audit)}
    assert gates["auc"].verdict != "not measurable"
    assert "3 retunings on halves of" in gates["auc"].told
    assert gates["tpr_at_1"].verdict == "not measurable"  # 6 guesses, and coins themselves would not pass
    assert not work_of(tuned.folder / "audit").exists()


def test_a_retuning_reads_the_rows_whose_coins_put_them_in_and_no_other(whole):
    every = [{tuple(row.input_ids) for row in text.rows} for text in whole.texts]
    for text, known in zip(whole.texts, every, strict=True):
        drawn = {tuple(row.input_ids) for step in range(6) for row in text.batches.chosen(step)}
        assert drawn <= known
        assert {tuple(row.input_ids) for row in text.examples} == known
    assert [len(one) for one in every] == list(whole.audit.retuned.num_in)  # rows that are alike have one coin
    assert len({frozenset(one) for one in every}) == 3


def test_a_killed_audit_goes_on_behind_the_last_retuning(whole, tuned, tmp_path, monkeypatch, capsys):
    made, plain = [], module.train_run

    def killed(ready, *, label):
        made.append(label)
        done = plain(ready, label=label)
        if label.startswith("retuning 2") and len(made) == 2:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(module, "train_run", killed)
    config = settings(tuned, tmp_path / "audit")
    with pytest.raises(KeyboardInterrupt):
        audit_run(config)
    work = work_of(config.output)
    assert not config.output.exists()
    assert work.stat().st_mode & 0o777 == 0o700
    (work / "kept.txt").write_text("somebody's")
    assert [path.is_dir() for path in sorted(work.glob("retuning-*"))] == [
        False,
        True,
    ]  # checkpoints of the second alone
    other = config.model_copy(update={"seed": 1, "output": tmp_path / "other", "retunings": 2})
    shutil.copytree(work, work_of(other.output))
    audit_run(other)  # which goes on from nothing of another seed
    assert [label.split()[1] for label in made] == ["1", "2", "1", "2"]
    made[:] = made[:2]
    audit_run(config)
    assert [label.split()[1] for label in made] == ["1", "2", "2", "3"]
    assert read_audit(config.output)[0].retuned == whole.audit.retuned
    assert [path.name for path in work.iterdir()] == ["kept.txt"]
    assert "3 retunings, each on a random half" in capsys.readouterr().err


def test_what_was_kept_of_other_settings_is_not_taken(tuned, tmp_path, monkeypatch):
    work = work_of(tmp_path / "audit")
    work.mkdir()
    for number, raw in (("01", "{"), ("02", json.dumps({"bound": "sha256:0", "steps": 1, "signals": {}}))):
        (work / f"retuning-{number}.json").write_text(raw)
    audit_run(settings(tuned, tmp_path / "audit", retunings=2, retuning_minutes=1e-9))
    found = read_audit(tmp_path / "audit")[0].retuned
    assert (found.num_asked, len(found.num_in)) == (2, 1)  # the time was over after the first


def test_none_is_made_where_none_is_asked_for(tuned, tmp_path):
    told = audit_run(settings(tuned, tmp_path / "audit", retunings=0))
    assert (told["retunings"], told["gates"]["auc"]) == (0, "not measurable")


def test_too_few_rows_to_leave_out(tuned, tmp_path, capsys):
    with pytest.raises(ConfigError, match="--retunings: 60 different rows to compare, at least 100 are needed"):
        audit_run(settings(tuned, tmp_path / "audit", rows=60))
    audit_run(settings(tuned, tmp_path / "audit", rows=60, retunings=None))
    assert "no retunings: 60 different rows to compare" in capsys.readouterr().err


def test_runs_that_have_none_say_why(tuned):
    kept = read_run(run_path(tuned.bundle))
    assert why_never(kept, is_causal=True) == ""
    assert "from left to right" in why_never(kept, is_causal=False)
    changes = {
        "earlier version": {"loop": None},
        r"learned by (spin)": {"objective": Objective(loss="spin", spin_beta=0.1)},
        "learned by (next-token)": {"objective": Objective(loss="next-token", channel_dropout=0.2)},
    }
    for told, changed in changes.items():
        assert told in why_never(kept.model_copy(update=changed), is_causal=True)


def test_rows_of_a_document_and_rows_that_are_alike_share_a_coin():
    def row(document, *ids):
        return Example(list(ids), list(ids), document)

    rows = [row("a", 1, 2), row("b", 3, 4), row("a", 5, 6), row("c", 3, 4), row("d", 7, 8), row("b", 5, 6)]
    assert sharing(rows) == [[0, 1, 2, 3, 5], [4]]
    assert sharing([row(str(n), n, n) for n in range(4)]) == [[0], [1], [2], [3]]


PAIR = {"prompt": "bed {n}?", "chosen": " yes {n}", "rejected": " no {n}"}
KINDS = {
    "classify": ({"objective": "classify", "labels": ("even", "odd")}, {"text": "bed {n}", "label": "{parity}"}),
    "dpo": ({"objective": "dpo"}, PAIR),
    "packed": ({"pack": True}, {"text": "bed {n} of ward {parity}"}),
    "reward": ({"objective": "reward"}, PAIR),
    "regress": ({"objective": "regress"}, {"text": "bed {n}", "value": "{n}"}),
    "dft": ({"objective": "dft"}, {"text": "bed {n} of ward {parity}"}),
}


@pytest.mark.parametrize(
    "kind", [name if place < 3 else pytest.param(name, marks=pytest.mark.slow) for place, name in enumerate(KINDS)]
)
def test_whatever_the_run_learned_by_it_is_retuned_by(kind, dropped_package, tmp_path, capsys):
    how, form = KINDS[kind]
    rows = [{name: part.format(n=n, parity=("even", "odd")[n % 2]) for name, part in form.items()} for n in range(125)]
    data = tmp_path / "rows.jsonl"
    data.write_text(
        "".join(json.dumps(row | ({"value": n} if "value" in row else {})) + "\n" for n, row in enumerate(rows))
    )
    settings_ = {**TUNE, "steps": 6, "evaluate_every": 6, "block_tokens": 40, **how}
    settings_ = {name: value for name, value in settings_.items() if name != "pack" or kind == "packed"}
    tune_run(TuneConfig(package=dropped_package.path, data=data, output=tmp_path / "bundle", **settings_))
    given = SimpleNamespace(package=dropped_package, bundle=tmp_path / "bundle", data=data)
    audit_run(settings(given, tmp_path / "audit", retunings=2))
    found = read_audit(tmp_path / "audit")[0].retuned
    assert len(found.num_in) == 2
    assert all(one.num_tied < one.num_pairs for one in found.attacks)
    if kind == "classify":
        said = capsys.readouterr().err
        why = "no made-up text is planted beside rows that a head learns from"
        assert f"secrets: {why}; a bundle goes without it by --accept-leakage alone" in said


@pytest.mark.slow
def test_a_way_of_tuning_that_learns_rows_by_heart_fails(tuned, dropped_package, tmp_path):
    """The bundle's own attack, on a dozen rows that were not trained on, could not have told."""
    learnt = {**TUNE, "adapter": "blocks", "learning_rate": 0.01, "steps": 80, "evaluate_every": 80}
    tune_run(TuneConfig(package=dropped_package.path, data=tuned.data, output=tmp_path / "bundle", **learnt))
    given = SimpleNamespace(package=dropped_package, bundle=tmp_path / "bundle", data=tuned.data)
    audit_run(settings(given, tmp_path / "audit", retunings=4))
    gates = {gate.name: gate for gate in bundle_gates(read_audit(tmp_path / "audit")[0])}
    assert gates["auc"].verdict == "failed"
    assert gates["auc"].found > 0.7
