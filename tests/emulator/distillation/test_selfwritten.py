"""Text that the model writes itself: bounded rows, the same again, killed runs go on, and other words are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from emulator.distillation import selfwritten as module
from emulator.distillation.config import DistillConfig
from emulator.distillation.distill import run
from emulator.distillation.selfwritten import Asked, cut_answer, cut_question, read_stems, round_seed, write_text
from offsite.artefacts.package import open_package
from offsite.config import build
from offsite.errors import ConfigError, DataError, RunFailed
from offsite.text.records import read_records


@pytest.fixture(scope="module")
def author(tiny):
    """A tiny model that writes letters, question marks and line ends, and has room for a question and its answer."""
    model = tiny("llama", max_position_embeddings=512, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.05)  # next to nothing is likelier than anything else
        model.lm_head.weight[:4] = 0  # as likely as the others
    return model


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(module, "ROUND_ROWS", 4)
    monkeypatch.setattr(module, "ANSWER_TOKENS", 40)
    monkeypatch.setattr(module, "RUNNING_TOKENS", 48)


ASKED = Asked("sha256:" + "0" * 64, "question and answer about rare diseases", (), 400, 0)


def test_rows_are_of_both_forms_and_hold_nothing_of_the_words_given(author, tokenizer, tmp_path: Path) -> None:
    rows = write_text(tmp_path / "p.self.jsonl", tmp_path / "work", author, tokenizer, ASKED)
    stated = [json.loads(line) for line in (tmp_path / "p.self.jsonl").read_text().splitlines()]
    assert stated == rows
    questions = [row["text"] for row in rows if row["text"].startswith("Question: ")]
    assert 0 < len(questions) < len(rows)
    for text in questions:
        question, _, answer = text.partition("?\nAnswer:")
        assert question.removeprefix("Question: ").startswith(module.STEMS)
        assert len(answer.strip()) > module.FEWEST_CHARACTERS
        assert "\n" not in question
    assert not any("rare diseases" in row["text"] for row in rows)
    num = [len(tokenizer(row["text"])["input_ids"]) for row in rows]
    assert sum(num) >= 400
    last = max(row["seed"] for row in rows[-1:])
    assert sum(n for n, row in zip(num, rows, strict=True) if row["seed"] != last) < 400  # no round more than needed
    assert max(num) <= module.QUESTION_TOKENS + module.ANSWER_TOKENS + 60
    assert [record.document for record in read_records(tmp_path / "p.self.jsonl")] == [
        f"self-{place}" for place in range(len(rows))
    ]


def test_with_stems_every_row_begins_with_one(author, tokenizer, tmp_path: Path) -> None:
    asked = Asked(ASKED.model, "", ("What causes", "Who is at risk for"), 300, 1)
    rows = write_text(tmp_path / "out.jsonl", tmp_path / "work", author, tokenizer, asked)
    assert {row["text"].startswith(("Question: What causes", "Question: Who is at risk for")) for row in rows} == {True}


def test_a_run_that_was_stopped_ends_with_the_same_text(author, tokenizer, tmp_path: Path, monkeypatch) -> None:
    whole = write_text(tmp_path / "whole.jsonl", tmp_path / "whole", author, tokenizer, ASKED)
    seen = []
    rounds = module._round

    def stops(model, tokenizer, asked, number, show):
        seen.append(number)
        if number == 1:
            raise KeyboardInterrupt
        return rounds(model, tokenizer, asked, number, show)

    with monkeypatch.context() as patched:
        patched.setattr(module, "_round", stops)
        with pytest.raises(KeyboardInterrupt):
            write_text(tmp_path / "out.jsonl", tmp_path / "work", author, tokenizer, ASKED)
    assert not (tmp_path / "out.jsonl").exists()
    assert seen == [0, 1]
    again = []
    monkeypatch.setattr(module, "_round", lambda *given: again.append(given[3]) or rounds(*given))
    assert write_text(tmp_path / "out.jsonl", tmp_path / "work", author, tokenizer, ASKED) == whole
    assert again[0] == 1
    other = Asked(ASKED.model, "another field", (), 400, 0)
    with pytest.raises(ConfigError, match="asked for in other words"):
        write_text(tmp_path / "out.jsonl", tmp_path / "work", author, tokenizer, other)


def test_another_seed_writes_other_text(author, tokenizer, tmp_path: Path) -> None:
    texts = [
        [row["text"] for row in write_text(tmp_path / f"{seed}", tmp_path / f"work{seed}", author, tokenizer, asked)]
        for seed, asked in ((0, ASKED), (1, Asked(ASKED.model, ASKED.field, (), 400, 1)))
    ]
    assert not set(texts[0]) & set(texts[1])
    assert round_seed(0, 1) != round_seed(1, 0)


def test_a_model_that_writes_nothing_is_said_to(author, tokenizer, tmp_path: Path, monkeypatch) -> None:
    def ends(model, prompts, *, num_tokens, **settings):
        return [[tokenizer.eos_token_id] * num_tokens for _ in prompts]

    monkeypatch.setattr(module, "continuations", ends)
    with pytest.raises(RunFailed, match="nothing worth keeping in 5 rounds"):
        write_text(tmp_path / "out", tmp_path / "work", author, tokenizer, ASKED)
    assert not (tmp_path / "out").exists()


def test_a_context_that_is_too_short_is_refused(tiny, tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="context"):
        write_text(tmp_path / "out", tmp_path / "work", tiny("llama"), tokenizer, ASKED)


@pytest.mark.parametrize(
    ("text", "question"), [(" a cold? Answer: yes", " a cold"), (" a cold\nwhy?", " a cold"), (" a", " a"), ("?", "")]
)
def test_a_question_ends_at_its_mark_or_line(text: str, question: str) -> None:
    assert cut_question(text) == question


def test_an_answer_ends_where_the_next_question_begins() -> None:
    assert cut_answer(" rest.\n\nQuestion: What else?") == " rest."
    assert cut_answer(" rest.") == " rest."


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"\n \n", "expected 1 to"), (b"\xff", "not UTF-8"), (b"x" * 501, "expected 1 to"), (None, "cannot read stems")],
)
def test_stems_that_are_none_are_refused(content: bytes | None, told: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "stems.txt").write_bytes(content)
    with pytest.raises(DataError, match=told):
        read_stems(tmp_path / "stems.txt")


def test_stems_are_the_lines_that_are_not_blank(tmp_path: Path) -> None:
    (tmp_path / "stems.txt").write_text("What causes\n\n  How is \n")
    assert read_stems(tmp_path / "stems.txt") == ("What causes", "How is")


FLAGS = {"model": "m", "output": "o", "public": "self", "field": "law"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"public": ["self", "a.txt"]}, "--public self stands alone"),
        ({"field": None}, "--public self needs --field or --stems"),
        ({"field": " "}, "--public self needs --field or --stems"),
        ({"public": "a.txt"}, "--field belongs to --public self"),
        ({"public": "a.txt", "field": None, "stems": "s.txt"}, "--stems belongs to --public self"),
        ({"public": "a.txt", "field": None, "self_tokens": "500"}, "--self-tokens belongs to --public self"),
        ({"self_tokens": "10"}, "--self-tokens: expected at least 256"),
        ({"launch": "2"}, "--public self: the model writes in one process"),
    ],
)
def test_settings_that_contradict_each_other(changes: dict, told: str) -> None:
    flags = {name: value for name, value in {**FLAGS, **changes}.items() if value is not None}
    with pytest.raises(ConfigError, match=told):
        build(DistillConfig, flags=flags)


@pytest.fixture
def author_folder(author, tokenizer, tmp_path: Path) -> Path:
    author.save_pretrained(tmp_path / "author")
    tokenizer.save_pretrained(tmp_path / "author")
    return tmp_path / "author"


def test_the_verb_makes_a_package_of_text_that_the_model_wrote(author_folder, public_file, tmp_path: Path) -> None:
    flags = {"model": str(author_folder), "output": str(tmp_path / "package"), "public": "self", "field": "law"}
    small = {"self_tokens": "600", "block_tokens": "16", "bottom": "1", "top": "1", "device": "cpu", "steps": "0"}
    config = build(DistillConfig, flags={**flags, **small, "width": "0.5", "field_text": str(public_file)})
    outcome = run(config)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("author", "package", "package.owner.json", "package.self.jsonl")
    }
    package = open_package(tmp_path / "package")
    assert package.manifest.method.settings == {"width": 0.5}
    assert "field_kl" not in package.manifest.figures
    assert outcome["field_kl"] > 0
    (tmp_path / "other.self.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match=r"'other.self.jsonl' already exists"):
        run(config.model_copy(update={"output": tmp_path / "other"}))
    assert (tmp_path / "other.self.jsonl").read_text() == "mine"


def test_a_package_that_keeps_all_is_no_way_off_on_the_fields_text(author_folder, public_file, tmp_path: Path) -> None:
    flags = {"model": str(author_folder), "output": str(tmp_path / "package"), "method": "keep-all", "steps": "0"}
    more = {"bottom": "1", "top": "1", "block_tokens": "16", "field_text": str(public_file), "device": "cpu"}
    assert run(build(DistillConfig, flags={**flags, **more}))["field_kl"] == pytest.approx(0, abs=1e-6)
