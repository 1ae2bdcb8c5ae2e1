"""Canaries: rows made up before tuning, each trained on or not by a fair coin, so that others can measure what leaks.

A client makes a set of them, commits to it before it tunes and reveals it afterwards. The commitment is a digest over
the set's exact bytes, which hold 32 random ones, so it says nothing of the texts and coins until they are revealed, and
no other set fits it. No text of the client's is in a set: what is revealed is made up.

*Synthetic* canaries are texts, of which those trained on are told from those not trained on. *Secrets* are a prefix and
four random words after it, for how far those words stand out of others that were drawn alike.

A folder of canaries holds ``canaries.json``, which stays with the client until it is revealed, and two folders ready to
be sealed as reports: ``commitment`` and ``reveal``, the same bytes again. A run that trains on the set leaves
``used.json`` there before its first step: a set is for one bundle, wherever bundles are written.

Source: exposure of secrets, arXiv:1802.08232; a coin for each row, arXiv:2305.08846; texts that a model made at high
temperature, arXiv:2606.10481.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, model_validator

from offsite.artefacts.job import JOB_ID_PATTERN
from offsite.audits.wordlist import WORDS
from offsite.digests import DIGEST_PATTERN, sha256_bytes
from offsite.errors import ArtefactError, BadDigest, BadSchema, PolicyError, TooLarge, WrongBinding, WrongNames
from offsite.folders import listed, names_in
from offsite.staging import staged_file, staged_folder
from offsite.strictjson import Strict, parse_strict, write_compact
from offsite.text.records import Record

CANARIES_FORMAT: Final = "offsite/canaries/1"
COMMITMENT_FORMAT: Final = "offsite/canaries-commitment/1"
USED_FORMAT: Final = "offsite/canaries-used/1"
CANARIES_NAME = "canaries.json"
USED_NAME = "used.json"
COMMITMENT_FOLDER, REVEAL_FOLDER = "commitment", "reveal"
REPORT_NAME = "report.json"  # the name under which `offsite seal` takes a report
CANARIES_LIMIT_BYTES = 32 * 2**20
COMMITMENT_LIMIT_BYTES = 64 * 2**10
MAX_CANARIES = 10_000
MAX_SECRETS = 1_000
MAX_TEXT = 20_000
MAX_RANKED = 2**18
SECRET_WORDS = 4
SECRET_SPACE = len(WORDS) ** SECRET_WORDS

_COMMITMENT_LABEL = b"offsite/v1/canaries\0"
_CANDIDATES_LABEL = b"offsite/v1/canary-candidates\0"
_PLACE_LABEL = b"offsite/v1/canaries-place\0"
_IMPLAUSIBLE = 1e-6

Digest = Annotated[str, Field(pattern=DIGEST_PATTERN)]
JobId = Annotated[str, Field(pattern=JOB_ID_PATTERN)]


class CanaryText(Strict):
    """A text that was made up, and whether it is trained on."""

    text: str = Field(min_length=1, max_length=MAX_TEXT, repr=False)
    included: bool = Field(repr=False)

    @model_validator(mode="after")
    def _not_blank(self) -> CanaryText:
        if not self.text.strip():
            raise ValueError("a text is blank")
        return self


class Secret(Strict):
    """A prefix and the four words that follow it, a space between them; and whether they are trained on."""

    prefix: str = Field(min_length=1, max_length=200, repr=False)
    secret: str = Field(max_length=200, repr=False)
    included: bool = Field(repr=False)

    @model_validator(mode="after")
    def _of_the_space(self) -> Secret:
        words = self.secret.split(" ")
        if len(words) != SECRET_WORDS or not set(words) <= set(WORDS):
            raise ValueError(f"a secret is not {SECRET_WORDS} words of the list")
        if not self.prefix.strip():
            raise ValueError("a prefix is blank")
        return self


class CanarySet(Strict):
    """The content of ``canaries.json``.

    Attributes:
        nonce: 32 random bytes in hexadecimal; hides the set behind its commitment, and draws the candidates.
        tokens: of each synthetic canary, at most; as many are scored.
        temperature: at which the synthetic texts were made.
        repeats: how often each secret that is trained on stands in the training text.
        num_candidates: of each secret's exposure, the secret itself among them.
    """

    format: Literal["offsite/canaries/1"] = CANARIES_FORMAT
    nonce: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    package_digest: Digest
    job_id: JobId | None = None
    tokens: int = Field(ge=2, le=4096)
    temperature: float = Field(gt=0, le=10)
    synthetic: tuple[CanaryText, ...] = Field(min_length=1, max_length=MAX_CANARIES)
    secrets: tuple[Secret, ...] = Field((), max_length=MAX_SECRETS)
    repeats: int = Field(1, ge=1, le=1000)
    num_candidates: int = Field(256, ge=2, le=4096)

    @model_validator(mode="after")
    def _distinct(self) -> CanarySet:
        if len({canary.text for canary in self.synthetic}) < len(self.synthetic):
            raise ValueError("two synthetic canaries have one text")
        if len({secret.prefix for secret in self.secrets}) < len(self.secrets):
            raise ValueError("two secrets have one prefix")
        if len(self.secrets) * self.num_candidates > MAX_RANKED:
            raise ValueError(f"more than {MAX_RANKED} candidates of all secrets together")
        return self

    @property
    def num_included(self) -> int:
        """Synthetic canaries that are trained on."""
        return sum(canary.included for canary in self.synthetic)

    @property
    def planted(self) -> tuple[Secret, ...]:
        """Secrets that are trained on."""
        return tuple(secret for secret in self.secrets if secret.included)


class Commitment(Strict):
    """The content of ``report.json`` of a commitment: what the client sends before it tunes."""

    format: Literal["offsite/canaries-commitment/1"] = COMMITMENT_FORMAT
    digest: Digest
    package_digest: Digest
    job_id: JobId | None = None
    num: int = Field(ge=1, le=MAX_CANARIES)
    num_secrets: int = Field(ge=0, le=MAX_SECRETS)


class Used(Strict):
    """The content of ``used.json``: where the one bundle that the set is for goes, and its digest once it stands."""

    format: Literal["offsite/canaries-used/1"] = USED_FORMAT
    place: Digest
    bundle: Digest | None = None


def commitment_of(raw: bytes) -> str:
    """Return the digest that commits to a set of canaries, of the exact bytes of its file."""
    return sha256_bytes(_COMMITMENT_LABEL + raw)


def records_of(canaries: CanarySet) -> list[Record]:
    """Return the rows to train on: every text that is included, every included secret `repeats` times.

    Each row is a document of its own, which no other set has: a ledger of users must not take two sets for one user.
    They belong behind the rows to train on, once those to validate on are chosen.
    """
    rows = [row for canary, row in zip(canaries.synthetic, synthetic_records(canaries), strict=True) if canary.included]
    for number, secret in enumerate(canaries.planted, 1):
        segments = ((f"{secret.prefix} {secret.secret}", True),)
        for copy in range(1, canaries.repeats + 1):
            document = f"offsite secret {_tag(canaries)}/{number}/{copy}"
            rows.append(Record(segments, document, len(rows) + 1, place=f"secret {number}"))
    return rows


def synthetic_records(canaries: CanarySet) -> list[Record]:
    """Return every synthetic canary, included or not, as the row that it is or would have been."""
    return [
        Record(((canary.text, True),), f"offsite canary {_tag(canaries)}/{number}", number, place=f"canary {number}")
        for number, canary in enumerate(canaries.synthetic, 1)
    ]


def drawn_only(canaries: CanarySet, documents: Collection[str]) -> CanarySet:
    """Return the set without what was to be trained on and never was: it is neither in nor out.

    Synthetic canaries that were never drawn are gone; secrets none of whose copies was drawn are not `planted`.

    Args:
        documents: names of the rows of `records_of` that were drawn.
    """
    synthetic = tuple(
        canary
        for canary, row in zip(canaries.synthetic, synthetic_records(canaries), strict=True)
        if not canary.included or row.document in documents
    )
    spoken = {row.segments[0][0] for row in records_of(canaries) if row.document in documents}
    secrets = tuple(
        secret.model_copy(update={"included": secret.included and f"{secret.prefix} {secret.secret}" in spoken})
        for secret in canaries.secrets
    )
    return canaries.model_copy(update={"synthetic": synthetic, "secrets": secrets})


def candidates_of(canaries: CanarySet, secret: Secret) -> list[str]:
    """Return what else the secret might have been: other secrets, distinct, drawn alike by the set's nonce.

    There are `num_candidates` less one, for the secret itself.
    """
    seed = _CANDIDATES_LABEL + bytes.fromhex(canaries.nonce) + secret.prefix.encode()
    wanted = canaries.num_candidates - 1
    # 256 words, a byte each; a few more than wanted, for those drawn twice
    stream = hashlib.shake_256(seed).digest(SECRET_WORDS * (2 * wanted + 64))
    drawn = dict.fromkeys(words_of(stream[at : at + SECRET_WORDS]) for at in range(0, len(stream), SECRET_WORDS))
    drawn.pop(secret.secret, None)
    return list(drawn)[:wanted]


def mark_used(folder: Path, canaries: CanarySet, output: Path, *, bundle: str | None = None) -> None:
    """The set in `folder` is known to be trained on for `output`, and once `bundle` is given, to have become it.

    Raises:
        RunFailed: when the disk is full or the folder cannot be written.
    """
    used = Used(place=_place(canaries, output), bundle=bundle)
    with staged_file(folder.resolve() / USED_NAME, replace=True) as stage:
        stage.touch(mode=0o600)
        stage.write_bytes(write_compact(used))


def require_unmarked(folder: Path, canaries: CanarySet, output: Path, *, resume: bool) -> None:
    """Return only if no run was begun on the set in `folder`, or the one towards `output` that is now resumed.

    Raises:
        PolicyError: when another was begun, or that one has its bundle.
        ArtefactError: when the mark is not one of this format.
    """
    path = folder / USED_NAME
    if not path.exists() and not path.is_symlink():
        return
    raw = _read(folder, USED_NAME, COMMITMENT_LIMIT_BYTES, "folder of canaries")
    used = parse_strict(raw, Used, USED_NAME, {"format": USED_FORMAT})
    is_same = used.place == _place(canaries, output)
    if is_same and resume and used.bundle is None:
        return
    hint = "offsite canaries makes another set"
    if used.bundle is None:
        hint = f"--resume goes on with that run; {hint}" if is_same else hint
    which = "this output" if is_same else "another output"
    raise PolicyError(f"canaries {folder.name!r} were trained on for {which}, a set is for one bundle", hint=hint)


def _place(canaries: CanarySet, output: Path) -> str:
    """Return the digest of where a bundle is to be written, salted: it tells nobody the path."""
    return sha256_bytes(_PLACE_LABEL + bytes.fromhex(canaries.nonce) + os.fsencode(output.resolve()))


def _tag(canaries: CanarySet) -> str:
    return canaries.nonce[:16]


def words_of(raw: bytes) -> str:
    """Return one word of the list for each byte, with spaces between them."""
    return " ".join(WORDS[byte] for byte in raw)


def write_canaries(out: Path, canaries: CanarySet) -> Commitment:
    """Write the folder of canaries `out`, whole or not at all and for nobody else to read; return its commitment.

    Raises:
        ConfigError: when `out` exists.
        RunFailed: when the disk is full.
    """
    raw = write_compact(canaries)
    commitment = Commitment(
        digest=commitment_of(raw),
        package_digest=canaries.package_digest,
        job_id=canaries.job_id,
        num=len(canaries.synthetic),
        num_secrets=len(canaries.secrets),
    )
    with staged_folder(out) as stage:
        stage.chmod(0o700)
        for path, content in (
            (stage / CANARIES_NAME, raw),
            (stage / COMMITMENT_FOLDER / REPORT_NAME, write_compact(commitment)),
            (stage / REVEAL_FOLDER / REPORT_NAME, raw),
        ):
            path.parent.mkdir(mode=0o700, exist_ok=True)
            path.touch(mode=0o600)
            path.write_bytes(content)
    return commitment


def read_canaries(folder: Path) -> tuple[CanarySet, str]:
    """Return the client's own canaries in the folder that `offsite canaries` wrote, and the digest committed to.

    Raises:
        ArtefactError: when there is no such folder or no canaries in it.
        TooLarge, WrongBinding, BadSchema: when the file is not a set of this format.
    """
    raw = _read(folder, CANARIES_NAME, CANARIES_LIMIT_BYTES, "folder of canaries")
    return _parse(raw, CANARIES_NAME), commitment_of(raw)


def read_commitment(folder: Path) -> Commitment:
    """Return the commitment in `folder`, which holds nothing else.

    Raises:
        ArtefactError: when there is no such folder or no report in it.
        WrongNames: when it holds anything besides.
        TooLarge, WrongBinding, BadSchema: when the report is no commitment of this format.
    """
    raw = _read(folder, REPORT_NAME, COMMITMENT_LIMIT_BYTES, "commitment", alone=True)
    what = f"{REPORT_NAME} of commitment {folder.name!r}"
    return parse_strict(raw, Commitment, what, {"format": COMMITMENT_FORMAT})


def open_reveal(folder: Path, commitment: Commitment) -> CanarySet:
    """Return the canaries revealed in `folder`, which are those that were committed to.

    Raises:
        ArtefactError: when there is no such folder or no report in it.
        WrongNames: when it holds anything besides.
        TooLarge: when the report is larger than any set of canaries.
        BadDigest: when its bytes are not those committed to.
        BadSchema: when it is not a set of canaries, or its coins are not fair ones.
        WrongBinding: when it has another format, or the commitment says otherwise of package, job or numbers.
    """
    raw = _read(folder, REPORT_NAME, CANARIES_LIMIT_BYTES, "reveal", alone=True)
    found = commitment_of(raw)
    if found != commitment.digest:
        raise BadDigest(
            f"reveal {folder.name!r}: canaries {found[:19]}, committed to were {commitment.digest[:19]}",
            hint="ask for the reveal/ folder that was written together with this commitment",
        )
    canaries = _parse(raw, f"{REPORT_NAME} of reveal {folder.name!r}")
    for what, stated, committed in (
        ("package", canaries.package_digest, commitment.package_digest),
        ("job", canaries.job_id, commitment.job_id),
        ("number of canaries", len(canaries.synthetic), commitment.num),
        ("number of secrets", len(canaries.secrets), commitment.num_secrets),
    ):
        if stated != committed:
            raise WrongBinding(f"reveal {folder.name!r}: its {what} is not the one that the commitment states")
    _require_fair([canary.included for canary in canaries.synthetic], "canaries")
    _require_fair([secret.included for secret in canaries.secrets], "secrets")
    return canaries


def _require_fair(coins: Sequence[bool], what: str) -> None:
    """Return only if fair coins could have fallen so: a set nearly all of which is in proves nothing."""
    num, most = len(coins), max(sum(coins), len(coins) - sum(coins))
    ways = (math.lgamma(num + 1) - math.lgamma(k + 1) - math.lgamma(num - k + 1) for k in range(most, num + 1))
    if 2 * math.fsum(math.exp(log - num * math.log(2)) for log in ways) < _IMPLAUSIBLE:
        raise BadSchema(f"{sum(coins)} of {num} {what} are included, fair coins include about half")


def _parse(raw: bytes, what: str) -> CanarySet:
    return parse_strict(raw, CanarySet, what, {"format": CANARIES_FORMAT})


def _read(folder: Path, name: str, limit_bytes: int, what: str, *, alone: bool = False) -> bytes:
    if not folder.is_dir():
        raise ArtefactError(f"no {what} named {folder.name!r}", hint="check the path")
    path = folder / name
    if path.is_symlink() or not path.is_file():
        raise ArtefactError(f"{what} {folder.name!r} holds no {name}", hint="offsite canaries writes it")
    if alone and (extra := names_in(folder) - {name}):
        raise WrongNames(f"{what} {folder.name!r} holds {listed(extra)} besides {name}")
    with path.open("rb") as handle:
        raw = handle.read(limit_bytes + 1)
    if len(raw) > limit_bytes:
        raise TooLarge(f"{name} of {folder.name!r}: over {limit_bytes} bytes")
    return raw
