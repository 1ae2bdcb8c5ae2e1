"""Canaries: what is committed to is what is revealed, byte for byte, and the rows are those that the coins say."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from offsite.audits.canaries import (
    CANARIES_LIMIT_BYTES,
    CanarySet,
    CanaryText,
    Commitment,
    Secret,
    candidates_of,
    commitment_of,
    drawn_only,
    open_reveal,
    read_canaries,
    read_commitment,
    records_of,
    synthetic_records,
    words_of,
    write_canaries,
)
from offsite.audits.wordlist import WORDS
from offsite.errors import ArtefactError, BadDigest, BadSchema, ConfigError, TooLarge, WrongBinding, WrongNames
from offsite.exchange.verbs import read_content
from offsite.strictjson import write_compact

PACKAGE, JOB = "sha256:" + "a" * 64, "b" * 32


def made(**changes: Any) -> CanarySet:
    stated: dict[str, Any] = {
        "nonce": "0" * 64,
        "package_digest": PACKAGE,
        "job_id": JOB,
        "tokens": 16,
        "temperature": 1.0,
        "synthetic": tuple(CanaryText(text=f"naïve text {n}", included=n % 2 == 0) for n in range(6)),
        "secrets": tuple(
            Secret(prefix=f"code {n} is", secret=words_of(bytes(4 * [n])), included=n > 0) for n in range(3)
        ),
        "repeats": 2,
        "num_candidates": 32,
    }
    return CanarySet(**{**stated, **changes})


def test_the_list_gives_a_word_for_every_byte():
    assert len(WORDS) == len(set(WORDS)) == 256
    assert all(word.isascii() and word.isalpha() and word.islower() and len(word) <= 8 for word in WORDS)


def test_the_folder_is_for_the_client_alone_and_can_be_sealed(tmp_path):
    canaries = made()
    commitment = write_canaries(tmp_path / "canaries", canaries)
    folder = tmp_path / "canaries"
    found, digest = read_canaries(folder)
    assert (found, digest) == (canaries, commitment.digest)
    assert read_commitment(folder / "commitment") == commitment
    assert commitment == Commitment(digest=digest, package_digest=PACKAGE, job_id=JOB, num=6, num_secrets=3)
    assert (folder / "reveal" / "report.json").read_bytes() == (folder / "canaries.json").read_bytes()
    assert open_reveal(folder / "reveal", commitment) == canaries
    for path in folder.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for name in ("commitment", "reveal"):
        assert read_content(folder / name).kind == "report"
    sent = (folder / "commitment" / "report.json").read_text()
    assert not any(secret in sent for secret in ("text", WORDS[1], "included", canaries.nonce))


def test_a_commitment_hides_by_its_nonce_and_has_a_label():
    one, other = write_compact(made()), write_compact(made(nonce="1" * 64))
    assert commitment_of(one) != commitment_of(other)
    from offsite.digests import sha256_bytes

    assert commitment_of(one) == sha256_bytes(b"offsite/v1/canaries\0" + one) != sha256_bytes(one)


def test_an_output_that_stands_is_kept(tmp_path):
    write_canaries(tmp_path / "canaries", made())
    before = (tmp_path / "canaries" / "canaries.json").read_bytes()
    with pytest.raises(ConfigError, match="already exists"):
        write_canaries(tmp_path / "canaries", made(nonce="2" * 64))
    assert (tmp_path / "canaries" / "canaries.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["canaries"]


def test_rows_to_train_on_are_those_of_the_coins():
    rows = records_of(made())
    texts = ["".join(segment for segment, _ in row.segments) for row in rows]
    assert texts[:3] == ["naïve text 0", "naïve text 2", "naïve text 4"]
    assert texts[3:] == 2 * [f"code 1 is {words_of(bytes(4 * [1]))}"] + 2 * [f"code 2 is {words_of(bytes(4 * [2]))}"]
    assert len({row.document for row in rows}) == len(rows)
    assert all(counts for row in rows for _, counts in row.segments)
    assert len({row.document for row in rows}) == len(rows)
    assert all("0" * 16 in row.document for row in (*rows, *synthetic_records(made())))
    assert [row.segments[0][0] for row in synthetic_records(made())] == [f"naïve text {n}" for n in range(6)]
    assert "naïve" not in repr(rows) + repr(made())


def test_candidates_are_distinct_others_of_the_nonce():
    canaries = made()
    one, other = (candidates_of(canaries, secret) for secret in canaries.secrets[:2])
    assert len(one) == len(set(one)) == 31
    assert one == candidates_of(canaries, canaries.secrets[0])
    assert not set(one) & set(other)
    assert not set(one) & set(candidates_of(made(nonce="3" * 64), canaries.secrets[0]))
    drawn = canaries.secrets[0].model_copy(update={"secret": one[3]})
    assert one[3] not in candidates_of(canaries, drawn)
    assert len(candidates_of(canaries, drawn)) == 31
    assert {word for candidate in one for word in candidate.split(" ")} <= set(WORDS)


def edited(change: Callable[[dict[str, Any]], None], canaries: CanarySet | None = None) -> bytes:
    stated = json.loads(write_compact(canaries or made()))
    change(stated)
    return json.dumps(stated).encode()


def flip(stated: dict[str, Any]) -> None:
    stated["synthetic"][0]["included"] = not stated["synthetic"][0]["included"]


SEALED_BYTES = write_compact(made())
OTHER_BYTES = {
    "a coin turned": edited(flip),
    "the same in other words": json.dumps(json.loads(SEALED_BYTES), indent=1).encode(),
    "a byte more": SEALED_BYTES + b"\n",
    "a byte less": SEALED_BYTES[:-1],
    "another nonce": write_compact(made(nonce="f" * 64)),
    "nothing": b"",
}


def reveal(folder: Path, raw: bytes) -> Path:
    folder.mkdir()
    (folder / "report.json").write_bytes(raw)
    return folder


def test_what_was_to_be_trained_on_and_never_was_is_neither_in_nor_out():
    canaries = made()
    rows = records_of(canaries)
    kept = drawn_only(canaries, {rows[1].document, rows[-1].document})
    assert [(one.text, one.included) for one in kept.synthetic] == [
        ("naïve text 1", False), ("naïve text 2", True), ("naïve text 3", False), ("naïve text 5", False),
    ]  # fmt: skip
    assert kept.planted == (canaries.secrets[2],)  # one of its two copies was drawn
    assert drawn_only(canaries, {row.document for row in rows}) == canaries
    assert drawn_only(canaries, ()).num_included == 0


@pytest.mark.parametrize("raw", OTHER_BYTES.values(), ids=OTHER_BYTES.keys())
def test_a_commitment_opens_with_the_exact_bytes_alone(tmp_path, raw):
    commitment = write_canaries(tmp_path / "canaries", made())
    with pytest.raises(BadDigest, match="committed to were sha256:") as caught:
        open_reveal(reveal(tmp_path / "reveal", raw), commitment)
    assert "naïve" not in str(caught.value)


ILL_FORMED: dict[str, tuple[Callable[[dict[str, Any]], object], type[ArtefactError]]] = {
    "another format": (lambda s: s.update(format="offsite/canaries/2"), WrongBinding),
    "an unknown key": (lambda s: s.update(seed=1), BadSchema),
    "a text twice": (lambda s: s["synthetic"][1].update(text=s["synthetic"][0]["text"]), BadSchema),
    "a blank text": (lambda s: s["synthetic"][1].update(text=" \n"), BadSchema),
    "a text too long": (lambda s: s["synthetic"][1].update(text="a" * 20_001), BadSchema),
    "half a surrogate pair": (lambda s: s["synthetic"][1].update(text="a\ud800"), BadSchema),
    "no canary": (lambda s: s.update(synthetic=[]), BadSchema),
    "too many": (
        lambda s: s.update(synthetic=[{"text": f"{n}", "included": n % 2 == 0} for n in range(10_001)]),
        BadSchema,
    ),
    "a coin that is a number": (lambda s: s["synthetic"][1].update(included=1), BadSchema),
    "a prefix twice": (lambda s: s["secrets"][1].update(prefix=s["secrets"][0]["prefix"]), BadSchema),
    "a word of no list": (lambda s: s["secrets"][1].update(secret="acid acid acid xyzzy"), BadSchema),
    "five words": (lambda s: s["secrets"][1].update(secret="acid acid acid acid acid"), BadSchema),
    "a short nonce": (lambda s: s.update(nonce="00"), BadSchema),
    "endless candidates": (lambda s: s.update(num_candidates=10**9), BadSchema),
    "more to rank than anybody has time for": (
        lambda s: s.update(
            num_candidates=4096,
            secrets=[{"prefix": f"{n} is", "secret": "acid acid acid acid", "included": n % 2 == 0} for n in range(65)],
        ),
        BadSchema,
    ),
    "endless repeats": (lambda s: s.update(repeats=10**9), BadSchema),
    "not finite": (lambda s: s.update(temperature=math.inf), BadSchema),
}


@pytest.mark.parametrize(("change", "error"), ILL_FORMED.values(), ids=ILL_FORMED.keys())
def test_what_was_committed_to_must_be_a_set(tmp_path, change, error):
    raw = edited(change)
    commitment = Commitment(digest=commitment_of(raw), package_digest=PACKAGE, job_id=JOB, num=6, num_secrets=3)
    with pytest.raises(error) as caught:
        open_reveal(reveal(tmp_path / "reveal", raw), commitment)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert "xyzzy" not in str(caught.value)
    assert "naïve" not in str(caught.value)


@pytest.mark.parametrize(
    "stated", [{"package_digest": "sha256:" + "c" * 64}, {"job_id": None}, {"job_id": "c" * 32}, {"num": 7}]
)
def test_what_the_commitment_states_must_be_so(tmp_path, stated):
    commitment = write_canaries(tmp_path / "canaries", made()).model_copy(update=stated)
    with pytest.raises(WrongBinding, match="is not the one that the commitment states"):
        open_reveal(tmp_path / "canaries" / "reveal", commitment)


def test_coins_that_nobody_threw_are_refused(tmp_path):
    texts = tuple(CanaryText(text=f"text {n}", included=n < 5) for n in range(60))
    commitment = write_canaries(tmp_path / "canaries", made(synthetic=texts))
    with pytest.raises(BadSchema, match="5 of 60 canaries are included, fair coins include about half"):
        open_reveal(tmp_path / "canaries" / "reveal", commitment)


def test_a_folder_that_is_something_else_is_refused(tmp_path):
    commitment = write_canaries(tmp_path / "canaries", made())
    folder = tmp_path / "canaries"
    with pytest.raises(ArtefactError, match="no reveal named 'gone'"):
        open_reveal(tmp_path / "gone", commitment)
    with pytest.raises(ArtefactError, match="holds no report"):
        read_commitment(folder)
    with pytest.raises(ArtefactError, match="holds no canaries"):
        read_canaries(folder / "reveal")
    with pytest.raises(TooLarge):
        read_commitment(reveal(tmp_path / "large", b" " * 2**17))
    (folder / "reveal" / "more").write_bytes(b"")
    with pytest.raises(WrongNames, match=r"holds .more. besides"):
        open_reveal(folder / "reveal", commitment)
    with pytest.raises(WrongBinding):
        read_commitment(reveal(tmp_path / "other", (folder / "canaries.json").read_bytes()))
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "report.json").symlink_to(folder / "reveal" / "report.json")
    with pytest.raises(ArtefactError, match="holds no report"):
        open_reveal(tmp_path / "linked", commitment)


def test_a_set_beyond_the_limit_is_not_read(tmp_path, monkeypatch):
    commitment = write_canaries(tmp_path / "canaries", made())
    assert CANARIES_LIMIT_BYTES > 10**7
    monkeypatch.setattr("offsite.audits.canaries.CANARIES_LIMIT_BYTES", 100)
    with pytest.raises(TooLarge, match="over 100 bytes"):
        open_reveal(tmp_path / "canaries" / "reveal", commitment)


def test_a_set_that_contradicts_itself_cannot_be_made():
    with pytest.raises(ValidationError):
        made(synthetic=2 * (CanaryText(text="a", included=True),))
