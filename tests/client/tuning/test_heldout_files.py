"""``--eval``: other files are validated on, what stands in both is not trained on, and nothing of them leaves."""

from __future__ import annotations

import json
import math

import pytest

import client.tuning.tune as module
from client.audit.config import AuditBundleConfig
from client.audit.rows import choose_rows
from client.privacy.config import DPSettings
from client.tuning.runrecord import read_as
from client.tuning.tune import attach_to_package
from client.tuning.verb import run
from offsite import cli
from offsite.artefacts.bundle import open_bundle
from offsite.audits.runs import quoted, read_run, run_path
from offsite.digests import sha256_file
from offsite.errors import ConfigError, DataError, RunFailed
from offsite.evaluation.measure import perplexity
from offsite.text.batches import encode, pad_id
from offsite.text.records import read_files

HELD = [f"case {number}: the gout of ward {number % 4} stayed for {number} weeks" for number in range(300, 320)]


@pytest.fixture
def held_out(tmp_path, notes):
    """Twenty rows of another form, and two of those that are trained on."""
    path = tmp_path / "held-out-secret.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*HELD, *notes[:2]]))
    return path


def test_it_is_what_is_validated_on_and_what_stands_in_both_is_not_trained_on(
    settings, dropped_package, held_out, notes, letters_tokenizer, capsys
):
    config = settings(dropped_package.path, eval=held_out, pack=False, adapter="lora", rank=2)
    told = run(config)
    assert (told["num_records"], told["num_in_both"]) == (58, 2)
    err = capsys.readouterr().err
    assert "2 rows stand in --eval, too: they are not trained on" in err
    assert f"(perplexity {math.exp(told['best_loss']):.4g}, {math.exp(told['before_loss']):.4g})" in err
    attached = attach_to_package(dropped_package, config.spec(), device=module.torch.device("cpu"))
    rows = encode(read_files([held_out]), letters_tokenizer, context=32).examples
    expected = perplexity(attached.model.eval(), rows, batch_size=8, pad_id=pad_id(letters_tokenizer)).loss
    assert told["before_loss"] == pytest.approx(expected, rel=1e-5)
    record = read_run(run_path(config.output))
    assert (record.text.validation, record.eval_files) == (0.0, (sha256_file(held_out),))
    open_bundle(config.output)
    left = b"".join(path.read_bytes() for path in config.output.iterdir()) + quoted(record).model_dump_json().encode()
    assert not any(
        word.encode() in left for word in ("held-out", "gout", sha256_file(held_out).removeprefix("sha256:"))
    )


def test_an_audit_takes_its_rows_for_neither_members_nor_doubles_of_them(
    settings, dropped_package, held_out, letters_tokenizer
):
    config = settings(dropped_package.path, eval=held_out, pack=False, adapter="lora", rank=2, epochs=2, steps=30)
    run(config)
    record = read_run(run_path(config.output))
    records, others = read_as(config.data, record.text), read_as(config.eval, record.text)
    found = choose_rows(records, record, letters_tokenizer, limit=100, context=128, held_out=others)
    members, rest = (
        {letters_tokenizer.decode(row.input_ids) for row in rows} for rows in (found.members, found.nonmembers)
    )
    assert (found.source, found.num_available, len(members)) == ("validation", 22, 58)
    assert not members & rest


def test_the_audit_wants_the_very_file(settings, dropped_package, held_out, notes_file, tmp_path, capsys):
    config = settings(dropped_package.path, eval=held_out, adapter="lora", rank=2)
    run(config)
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(HELD))
    words = ["audit", "bundle", dropped_package.path, config.output, "--data", notes_file, "-o", tmp_path / "audit"]
    for more, told in (
        ([], "--eval: 0 file(s), this bundle was validated on 1"),
        (["--eval", other], "other.txt: not the file that this bundle was validated on"),
    ):
        assert cli.run([str(word) for word in [*words, *more]]) == 3
        assert told in capsys.readouterr().err
    assert "eval" in AuditBundleConfig.model_fields
    small = ["--tokens-per-row", "16", "--rows", "20", "--device", "cpu", "--eval", held_out]
    assert cli.run([str(word) for word in [*words, *small]]) == 0
    written = (tmp_path / "audit" / "audit.json").read_text()
    assert json.loads(written)["nonmembers"] == "validation"
    assert "held-out" not in written


def test_a_folder_of_files_each_counted(settings, dropped_package, tmp_path, notes, held_out, capsys):
    folder = tmp_path / "wards"
    folder.mkdir()
    for name, texts in (("b.txt", notes[:20]), ("a.txt", notes[20:])):
        (folder / name).write_text("\n\n".join(texts))
    config = settings(dropped_package.path, data=folder, eval=held_out, adapter="lora", rank=2)
    run(config)
    err = capsys.readouterr().err
    assert "a.txt: 40 rows\nb.txt: 20 rows\n" in err
    assert f"--data {folder} --eval {held_out} -o" in err
    stated = read_run(run_path(config.output)).data_files
    assert stated == tuple(sha256_file(folder / name) for name in ("a.txt", "b.txt"))


def test_a_run_is_not_gone_on_from_with_another_file(settings, dropped_package, held_out, tmp_path, monkeypatch):
    config = settings(dropped_package.path, eval=held_out, adapter="lora", rank=2, evaluate_every=2)
    plain, calls = module.next_token_loss, []

    def breaks(model, batch):
        calls.append(1)
        loss, count = plain(model, batch)
        return (loss * float("nan"), count) if len(calls) == 5 else (loss, count)

    monkeypatch.setattr(module, "next_token_loss", breaks)
    with pytest.raises(RunFailed):
        run(config)
    monkeypatch.undo()
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(HELD))
    for eval_, told in ((other, r"eval 'sha256:\w+' \(now 'sha256:\w+'\)"), ((), r"eval 'sha256:\w+' \(now None\)")):
        changed = settings(dropped_package.path, eval=eval_, adapter="lora", rank=2, evaluate_every=2, resume=True)
        with pytest.raises(ConfigError, match=told):
            run(changed)
    assert run(config.model_copy(update={"resume": True}))["num_in_both"] == 2


WRONG = [
    ({"validation": 0.2}, ValueError, "--validation: a share of --data is held out, or --eval is"),
    ({"eval": "data"}, ConfigError, "--eval: .* is among --data"),
    ({"data": "eval"}, ConfigError, "--eval: .* is among --data"),
    ({"dp": True}, DataError, "--dp: 2 rows of --data stand in --eval, too"),
]


@pytest.mark.parametrize(("changes", "error", "told"), WRONG)
def test_what_does_not_go_together(settings, dropped_package, held_out, notes_file, tmp_path, changes, error, told):
    changes = {"eval": held_out, **changes}
    changes = {
        name: {"data": notes_file, "eval": held_out}.get(one, one) for name, one in changes.items() if one is not True
    } | ({"dp": DPSettings(epsilon=8.0, ledger=tmp_path / "ledger")} if "dp" in changes else {})
    with pytest.raises(error, match=told):
        run(settings(dropped_package.path, **changes))
    assert not (tmp_path / "bundle").exists()
