"""What computes: canaries, tuning and the audit, each a verb in a process of its own that has no keys.

Each is run once for the same words and inputs (`offsite.stages`). A tuning that was stopped goes on from its last
checkpoint, whoever stopped it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.join.config import InvitedConfig
from client.join.fetch import Opened
from client.join.outlook import NUM_SECRETS
from offsite.audits.canaries import USED_NAME
from offsite.console import say
from offsite.digests import joined_digest, sha256_bytes, sha256_file
from offsite.errors import ConfigError
from offsite.keys.files import PASSPHRASE_VARIABLE
from offsite.stages import Stage, play, was_done
from offsite.staging import remove, staged_file
from offsite.text.rows import files_in

_LOCK = "join.lock"


@dataclass(frozen=True)
class Place:
    """The work folder, whose lock this process and every process that it starts hold.

    Args:
        folder: what was opened lies here, the same for every round of the job.
        round: that the bundle is for. The first one's is made here, too, another's in a folder of its own.
    """

    folder: Path
    lock: int
    round: int = 1

    @property
    def made(self) -> Path:
        """Where what is made for this round lies: canaries, bundle, audit, and what is sealed."""
        return self.folder if self.round == 1 else self.folder / f"round-{self.round}"

    @property
    def notes(self) -> Path:
        """Where notes of what was done for this round lie."""
        return self.made / "notes"

    def recalled(self, name: str) -> dict[str, Any] | None:
        """Return what was noted under that name; None where nothing was, or the note was torn."""
        try:
            found = json.loads((self.notes / f"{name}.json").read_bytes())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def note(self, name: str, found: dict[str, Any]) -> None:
        """It is noted, for another start of the same command."""
        self.notes.mkdir(parents=True, exist_ok=True)
        with staged_file(self.notes / f"{name}.json", replace=True) as stage:
            stage.write_text(json.dumps(found, sort_keys=True), encoding="utf-8")


@contextmanager
def taken(folder: Path) -> Iterator[Place]:
    """Yield the work folder, made for nobody else to read; no other join, nor what one left running, works in it.

    Raises:
        ConfigError: when one does, or it is no folder of join's.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"--work {folder.name!r} is not a folder", hint="give another --work")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _LOCK).is_file():
        raise ConfigError(f"--work {folder.name!r} holds what no join made", hint="give another --work")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot use --work {folder.name!r}: {(error.strerror or 'i/o error').lower()}") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another join works in {folder.name!r}, or a step of one that was killed still runs",
                hint="wait until it has ended; then the same command goes on",
            ) from None
        yield Place(folder, lock)
    finally:
        os.close(lock)


def data_digest(config: InvitedConfig) -> str:
    """Return the digest of all files of data, those that are validated on among them."""
    found = [sha256_file(path) for path in files_in(config.data)]
    held_out = [sha256_file(path) for path in files_in(config.eval)]
    if not held_out:
        return joined_digest(found)
    return sha256_bytes(json.dumps(["offsite/v1/data-and-eval", found, held_out]).encode())


def compute(
    config: InvitedConfig, place: Place, opened: Opened, words: Sequence[str], *, data: str, num_canaries: int
) -> dict[str, dict[str, Any]]:
    """Return what canaries, tuning and audit came to, by their names; bundle and audit stand in the work folder.

    Args:
        words: of ``offsite tune``, beside where it reads and writes.
        data: digest of all files of data.
        num_canaries: made-up texts to plant; 0 for none.

    Raises:
        RunFailed: when one of them fails; its own message is above.
    """
    folder, made, here = place.folder, place.made, Path.cwd()
    texts = [word for path in config.data for word in ("--data", str(path))]
    texts += [word for path in config.eval for word in ("--eval", str(path))]
    joined = {"package": opened.package.digest, "job": opened.job.digest, "data": data}
    run = {**joined, "run": sha256_bytes(json.dumps(list(words)).encode())}
    tune = ["tune", str(folder / "package"), "--job", str(folder / "job"), *texts, *words, "--resume"]
    planted: list[str] = []
    stages = {}
    given: dict[str, Any] = {"holding": [place.lock], "hiding": {PASSPHRASE_VARIABLE}}
    if num_canaries:
        out = made / "canaries"
        planted = ["--canaries", str(out)]
        count = ["--count", str(num_canaries), "--secrets", str(NUM_SECRETS)]
        words_of = ["canaries", str(folder / "package"), "--job", str(folder / "job"), *count]
        words_of += ["--device", config.device, "-o", str(out)]
        stages["canaries"] = Stage("canaries", here, words_of, out, run, **given)
    bundle = made / "bundle"
    tuned = Stage("tune", here, [*tune, *planted, "-o", str(bundle)], bundle, run, resumes=True, **given)
    if num_canaries:
        drop_used(stages["canaries"], tuned, place)
        play([stages["canaries"]], place.notes)
        tuned.inputs = {**run, "canaries": str(stages["canaries"].outcome["commitment"])}
    play([tuned], place.notes)
    stages["tune"] = tuned
    audit = ["audit", "bundle", str(folder / "package"), str(bundle), *texts, *planted]
    audit += [] if config.retunings is None else ["--retunings", str(config.retunings)]
    if "retuning_minutes" in config.model_fields_set:
        audit += ["--retuning-minutes", str(config.retuning_minutes)]
    audit += ["--device", config.device, "--seed", str(config.seed), "-o", str(made / "audit")]
    inputs = {**tuned.inputs, "bundle": str(tuned.outcome["bundle_digest"])}
    stages["audit"] = Stage("audit", here, audit, made / "audit", inputs, resumes=True, **given)
    play([stages["audit"]], place.notes)
    return {name: stage.outcome for name, stage in stages.items()}


def drop_used(canaries: Stage, tuned: Stage, place: Place) -> None:
    """A set of canaries that went into a bundle is gone, unless that bundle is the one that still counts.

    So it is where a run was killed between the bundle and the note of it, or settings changed: a set is for one bundle.
    """
    out = canaries.leaves
    if out is None or not was_done(canaries, place.notes):
        return
    tuned.inputs = {**tuned.inputs, "canaries": str(canaries.outcome["commitment"])}
    used = out / USED_NAME
    if used.is_file() and not was_done(tuned, place.notes) and json.loads(used.read_bytes()).get("bundle"):
        say("the canaries went into a bundle that does not count any more: others are made")
        remove(out)
        remove(place.made / "bundle")
        (place.made / "bundle.run.json").unlink(missing_ok=True)
