"""Tracebacks that quote the conversation: a chat template failed in another way than by Jinja's own errors.

What a template or a tokenizer raises may hold the text that it was given. People met divisions by zero, names that are
not defined, recursion, tokenizers that panic (no `Exception`, and it writes to the terminal by itself), and patterns
that try every way of matching. Of all of it only the file, the row and the kind of failure are told, in one line.
"""

from __future__ import annotations

import json
import time
import traceback

import pytest
from chat_templates import tokenizer_of
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from offsite import cli
from offsite.artefacts.package import open_package
from offsite.errors import BadSchema, DataError
from offsite.text import calls
from offsite.text.batches import encode
from offsite.text.calls import decoded, encoded, quietly
from offsite.text.records import Record

SECRET = "SECRET of ward nine"
CHAT = (("user", SECRET), ("assistant", SECRET))
TEMPLATES = {
    "a division by zero": ("{{ messages[0].content / 0 }}", "TypeError"),
    "a number by zero": ("{{ messages[0].content | length / 0 }}", "ZeroDivisionError"),
    "a name without value": ("{{ messages[0].content ~ undefined.x.y }}", "UndefinedError"),
    "a missing key": ("{{ {}[messages[0].content].x }}", "UndefinedError"),
    "a format": ("{{ '%d' % messages[0].content }}", "TypeError"),
    "recursion": ("{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(messages[0].content) }}", "RecursionError"),
    "a huge range": ("{% for i in range(10 ** 9) %}{{ messages[0].content }}{% endfor %}", "OverflowError"),
    "a huge text": (
        "{{ messages[0].content * 10 ** 18 }}",
        "fails on the conversation",
    ),  # MemoryError or OverflowError
    "a forbidden name": ("{{ messages[0].content.__class__.__mro__ }}", "SecurityError"),
    "a broken template": ("{% for m in messages %}{{ m.content ", "TemplateSyntaxError"),
    "its own error": ("{{ raise_exception(messages[0].content) }}", "refuses the conversation"),
}


def chat(row: int = 3) -> Record:
    return Record((), "d", row, CHAT, place=f"a.jsonl: line {row}")


def panicking() -> PreTrainedTokenizerFast:
    """A tokenizer that panics on a row of many a's: the search gives up after ten million tries, in half a second."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    cut = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_fails_is_one_line_without_text(name):
    template, reason = TEMPLATES[name]
    with pytest.raises(DataError, match=reason) as caught:
        encode([chat(1), chat(3)], tokenizer_of(template, "</s>"), context=100)
    assert str(caught.value).startswith("a.jsonl: line 1: the chat template ")
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert caught.value.hint


def test_a_panic_names_its_row_and_writes_nothing(capfd):
    rows = [Record(((text, True),), "d", n, place=f"a.txt: line {n}") for n, text in enumerate(("b", "a" * 30 + "b"))]
    with pytest.raises(DataError, match=r"^a\.txt: line 1: the model's tokenizer fails on this \(PanicException\)$"):
        encode(rows, panicking(), context=100)
    assert capfd.readouterr() == ("", "")


def test_what_takes_too_long_is_left(monkeypatch, capfd):
    monkeypatch.setattr(calls, "_LEAST_SECONDS", 0.05)
    rows = [Record((("a", True),), "d", n, place=f"a.txt: line {n}") for n in (1, 2)]
    slow = tokenizer_of("", "</s>")
    monkeypatch.setattr(type(slow), "__call__", lambda *_, **__: time.sleep(1))
    with pytest.raises(DataError, match=r"a\.txt: line 1 and 1 more rows: the model's tokenizer does not come to an"):
        encode(rows, slow, context=100)
    nested = "{% for i in range(9999) %}{% for j in range(999) %}{% endfor %}{% endfor %}{{ messages[0].content }}"
    with pytest.raises(DataError, match=r"a\.jsonl: line 3: the model's chat template does not come to an end"):
        encode([chat()], tokenizer_of(nested, "</s>"), context=100)
    assert capfd.readouterr() == ("", "")


def test_other_calls_tell_nothing_either(capfd):
    tokenizer = panicking()
    assert decoded(tokenizer, encoded(tokenizer, "ab", what="a prompt"), what="it", skip_special=True) == "ab"
    with pytest.raises(DataError, match=r"^the model's tokenizer fails on a prompt \(PanicException\)$"):
        encoded(tokenizer, "a" * 30 + "b", what="a prompt")
    with pytest.raises(DataError, match=r"^the model's tokenizer fails on an answer \(OverflowError\)$"):
        decoded(tokenizer, [-1], what="an answer", skip_special=True)
    assert capfd.readouterr() == ("", "")


def test_what_works_may_speak_and_ctrl_c_passes(capfd):
    def speak() -> int:
        import os

        os.write(2, b"heard\n")
        return 3

    assert quietly(speak, DataError, compiled=True) == 3
    assert capfd.readouterr().err == "heard\n"
    for passes in (KeyboardInterrupt, SystemExit):

        def stop(passes=passes) -> None:
            raise passes

        for limit in (None, 5.0):
            with pytest.raises(passes):
                quietly(stop, DataError, limit_seconds=limit)


def test_the_command_line_says_one_line(tamper, dropped_package, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    template = b"{{ messages[0].content / 0 }}"
    package = tamper(dropped_package.path, change=lambda folder: (folder / "chat_template.jinja").write_bytes(template))
    rows = [{"messages": [{"role": role, "content": f"{text} {n}"} for role, text in CHAT]} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["tune", str(package), "--data", "rows.jsonl", "-o", "bundle", "--steps", "1", "--device", "cpu"]
    assert cli.run(words) == 2
    out, err = capfd.readouterr()
    assert out == ""
    *_, first, hint = err.splitlines()
    assert SECRET not in err
    assert first.startswith("offsite: error: rows.jsonl: line ")
    assert first.endswith(": the chat template fails on the conversation (TypeError)")
    assert hint.startswith("offsite: hint: ")


def test_a_package_whose_pattern_could_go_on_for_ever_is_refused_before_any_text(
    tamper, dropped_package, tmp_path, capfd, monkeypatch
):
    def change(folder):
        content = json.loads((folder / "tokenizer.json").read_text())
        harmless = {"type": "Split", "pattern": {"Regex": "(?:x+y)+z"}, "behavior": "Isolated", "invert": False}
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [harmless, content["pre_tokenizer"]]}
        (folder / "tokenizer.json").write_text(json.dumps(content))

    monkeypatch.chdir(tmp_path)
    package = tamper(dropped_package.path, change=change)
    with pytest.raises(BadSchema, match=r"^tokenizer\.json of 'tampered': pattern 1 repeats what repeats"):
        open_package(package).load_tokenizer()
    (tmp_path / "a.txt").write_text(SECRET)
    assert cli.run(["tune", str(package), "--data", "a.txt", "-o", "bundle", "--device", "cpu"]) == 3
    out, err = capfd.readouterr()
    assert out == ""
    assert [line.split(":")[1] for line in err.splitlines() if line.startswith("offsite:")] == [" error", " hint"]
    assert SECRET not in err
