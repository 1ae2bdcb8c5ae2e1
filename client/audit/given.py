"""What an audit of a bundle is given: package, bundle, the record of its run, data, canaries, and that they fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.audit.config import AuditBundleConfig
from client.tuning.rounds import answered
from client.tuning.runrecord import read_as
from offsite.artefacts.bundle import Bundle, open_bundle
from offsite.artefacts.package import Package, open_package
from offsite.artefacts.round import Round, open_round
from offsite.audits.canaries import CanarySet, read_canaries
from offsite.audits.runs import KeptRun, Run, read_run, run_path
from offsite.digests import sha256_file
from offsite.errors import ConfigError, DataError, WrongBinding
from offsite.text.records import answer_of

if TYPE_CHECKING:
    from offsite.text.records import Record


@dataclass(frozen=True)
class Given:
    """What the verb was given, opened and found to belong together."""

    package: Package
    bundle: Bundle
    run: KeptRun
    records: list[Record] = field(repr=False)
    held_out: list[Record] | None = field(repr=False)
    others: list[Record] | None = field(repr=False)
    canaries: CanarySet | None = field(repr=False)
    round: Round | None


def open_given(config: AuditBundleConfig) -> Given:
    """Return what belongs together.

    Raises:
        ConfigError: when the bundle answers a federation's round and none is given, or the other way round.
        WrongBinding: when the record, the package, the round, the data or the canaries are not those of the bundle.
    """
    package, bundle = open_package(config.package), open_bundle(config.bundle)
    bundle.bind(package_digest=package.digest, base_digest=package.manifest.base_digest)
    round_ = _round(config, bundle)
    record = read_run(run_path(config.bundle))
    what = f"{run_path(config.bundle).name!r}"
    for name, stated, found in (
        ("bundle", record.bundle_digest, bundle.digest),
        ("package", record.package_digest, package.digest),
        ("adapter", record.adapter, bundle.manifest.adapter),
        ("round", record.round, answered(round_)),
    ):
        if stated != found:
            raise WrongBinding(f"{what} is the record of another {name}", hint="keep it beside its own bundle")
    canaries = _canaries(config, record)
    stated = run_path(config.bundle).name
    _require_same("--data", config.data, record.data_files or (record.data_sha256,), stated)
    _require_same("--eval", config.eval, record.eval_files, stated)
    by_user = record.claim is not None and record.claim.unit == "user"
    head = record.adapter.head
    how: dict[str, Any] = {"share_documents": by_user, "pairs": learns_preferences(record)}
    how |= {"questions": num_new(record) is not None, "labels": () if head is None else head.labels}
    how |= {"of_head": "" if head is None else head.task}
    how |= {"images": package.pixels is not None}
    records = read_as(config.data, record.text, **how)
    held_out = read_as(config.eval, record.text, **how) if config.eval else None
    others = read_as(config.nonmembers, record.text, **how) if config.nonmembers else None
    if num_new(record) is not None:
        _require_answers([*records, *(held_out or ()), *(others or ())])
    return Given(package, bundle, record, records, held_out, others, canaries, round_)


def learns_preferences(record: KeptRun) -> bool:
    """Tell whether the run's rows are pairs of a chosen and a rejected answer."""
    return record.objective is not None and record.objective.loss in ("dpo", "reward")


def num_new(record: KeptRun) -> int | None:
    """Return how many tokens at most followed a prompt, of a run that learned from rewards; None of others."""
    rewarded = None if record.objective is None else record.objective.rloo
    return None if rewarded is None else rewarded.max_new_tokens


def _require_answers(records: Sequence[Record]) -> None:
    """Return only if every row has an answer that can be scored.

    Raises:
        DataError: naming the first that has none.
    """
    missing = next((record for record in records if answer_of(record) is None), None)
    if missing is not None:
        raise DataError(
            f"{missing.place}: no answer; of a run with --objective rloo an audit scores the rows' answers",
            hint="such a bundle cannot be audited so: tune on rows with answers, or leave the audit out",
        )


def _require_same(flag: str, paths: Sequence[Path], stated: Sequence[str | None], record: str) -> None:
    """Return only if the files are those that the run read, in its order.

    Args:
        record: name of the file that states their digests.

    Raises:
        WrongBinding: naming the first that is another.
    """
    what = "tuned" if flag == "--data" else "validated"
    if len(stated) != len(paths):
        raise WrongBinding(
            f"{flag}: {len(paths)} file(s), this bundle was {what} on {len(stated)}",
            hint="give the same files, in the same order",
        )
    for path, digest in zip(paths, stated, strict=True):
        if sha256_file(path) != digest:
            raise WrongBinding(
                f"{path.name}: not the file that this bundle was {what} on", hint=f"{record!r} has its digest"
            )


def _round(config: AuditBundleConfig, bundle: Bundle) -> Round | None:
    """Return the round that the bundle answers, on whose weights it was tuned; None where it answers none."""
    stated = bundle.manifest.round_digest
    if config.round is None:
        if stated is None:
            return None
        raise ConfigError(
            f"bundle {config.bundle.name!r} was tuned on a federation's round, not on the package alone",
            hint="--round FOLDER names it: WORK/round-NNNN/round",
        )
    if stated is None:
        raise ConfigError(f"--round: bundle {config.bundle.name!r} answers no round", hint="leave --round out")
    found = open_round(config.round)
    if found.digest != stated:
        raise WrongBinding(
            f"bundle {config.bundle.name!r} answers round {stated[:19]}, {config.round.name!r} is {found.digest[:19]}",
            hint="give the round that was tuned on",
        )
    return found


def _canaries(config: AuditBundleConfig, record: Run) -> CanarySet | None:
    if config.canaries is None:
        if record.canaries is None:
            return None
        raise ConfigError("--canaries is missing: the run trained on some", hint="give the folder that tune was given")
    canaries, commitment = read_canaries(config.canaries)
    if commitment != record.canaries:
        stated = "trained on none" if record.canaries is None else f"trained on {record.canaries[:19]}"
        raise WrongBinding(f"canaries {config.canaries.name!r} are {commitment[:19]}, the run {stated}")
    return canaries
