"""What may leave: `offsite seal` holds a bundle to its gates here, and a package to the limits that its owner set.

A bundle whose gates did not all pass goes only with ``--accept-leakage``. What it went on is recorded beside the sealed
folder, from where reports take it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from offsite.audits.gates import Gate, Release, bundle_gates, package_gates, passed, unmeasured
from offsite.audits.record import BundleAudit, PackageAudit, read_audit
from offsite.config import flag_name
from offsite.console import say
from offsite.errors import ConfigError, PolicyError, WrongBinding
from offsite.folders import read_own
from offsite.sealed.config import SealConfig
from offsite.sealed.manifest import Kind
from offsite.staging import staged_file
from offsite.strictjson import parse_strict, write_compact

RELEASE_FORMAT = "offsite/release/1"
RELEASE_LIMIT_BYTES = 2**20
_LIMITS = ("max_capability", "max_recovery", "max_union", "min_withheld")
_MEASURE = "offsite audit bundle measures them; --accept-leakage lets the bundle go all the same, and reports show it"


@dataclass(frozen=True)
class Grounds:
    """On what a bundle is let go: its gates, the audit they come from, and whether leakage was accepted."""

    bundle_digest: str
    audit: str | None
    gates: tuple[Gate, ...]
    accepted_leakage: bool


def require_gates(config: SealConfig, kind: Kind, digest: str | None) -> Grounds | None:
    """Return on what a bundle is let go; None for what has no gates.

    Args:
        digest: of the bundle or package that is to be sealed.

    Raises:
        ConfigError: when a setting belongs to another kind, or a limit is given without an audit.
        PolicyError: when a gate did not pass, with its figures.
        ArtefactError: when the audit is unsound or of something else.
    """
    limits = {name: getattr(config, name) for name in _LIMITS if getattr(config, name) is not None}
    if foreign := _foreign(config, kind, list(limits)):
        raise ConfigError(f"{', '.join(foreign)}: not for a {kind}", hint="offsite seal --help")
    if kind == "package" and limits:
        _require_within(config.audit, digest, limits)
    return _grounds(config, str(digest)) if kind == "bundle" else None


def write_release(output: Path, grounds: Grounds, *, sealed_digest: str, round: int) -> None:  # noqa: A002
    """The record of what was let go, and why, stands beside the sealed folder `output`; accepted leakage is said."""
    release = Release(
        bundle_digest=grounds.bundle_digest,
        sealed_digest=sealed_digest,
        audit=grounds.audit,
        gates=grounds.gates,
        accepted_leakage=grounds.accepted_leakage,
        round=round,
    )
    with staged_file(release_path(output), replace=True) as stage:
        stage.write_bytes(write_compact(release))
    if grounds.accepted_leakage:
        say(f"leakage accepted: {_told(grounds.gates)}")


def release_path(sealed: Path) -> Path:
    """Return where the record of a sealed bundle's release lies: ``SEALED.release.json`` beside it."""
    return sealed.parent / f"{sealed.name}.release.json"


def read_release(path: Path) -> Release:
    """Return the record of a release.

    Raises:
        ConfigError: when there is none.
        TooLarge, WrongBinding, BadSchema: when it is not one of this format.
    """
    if not path.is_file():
        raise ConfigError(f"no release record {path.name!r}", hint="offsite seal leaves it beside a sealed bundle")
    raw = read_own(path, RELEASE_LIMIT_BYTES)
    return parse_strict(raw, Release, path.name, {"format": RELEASE_FORMAT})


def _foreign(config: SealConfig, kind: Kind, limits: Sequence[str]) -> list[str]:
    found = [flag_name(name) for name in limits if kind != "package"]
    if config.accept_leakage and kind != "bundle":
        found.append("--accept-leakage")
    if config.audit is not None and kind not in ("bundle", "package"):
        found.append("--audit")
    return found


def _grounds(config: SealConfig, digest: str) -> Grounds:
    audit_digest, gates = None, unmeasured()
    if config.audit is not None:
        audit, audit_digest = read_audit(config.audit)
        if not isinstance(audit, BundleAudit):
            raise WrongBinding(f"{config.audit.name!r} is an audit of a {audit.kind}, not of a bundle")
        if audit.run.bundle_digest != digest:
            raise WrongBinding(
                f"audit {config.audit.name!r} is of bundle {audit.run.bundle_digest[:19]}, this is {digest[:19]}",
                hint="audit this bundle",
            )
        gates = bundle_gates(audit)
    if not passed(gates) and not config.accept_leakage:
        raise PolicyError(_told(gates), hint=_MEASURE)
    return Grounds(digest, audit_digest, gates, config.accept_leakage and not passed(gates))


def _require_within(folder: Path | None, digest: str | None, limits: dict[str, float]) -> None:
    flags = ", ".join(flag_name(name) for name in limits)
    if folder is None:
        raise ConfigError(f"{flags}: --audit is missing", hint="offsite audit package measures them")
    audit, _ = read_audit(folder)
    if not isinstance(audit, PackageAudit):
        raise WrongBinding(f"{folder.name!r} is an audit of a {audit.kind}, not of a package")
    if audit.package_digest != digest:
        raise WrongBinding(f"audit {folder.name!r} is of another package than this one", hint="audit this package")
    gates = package_gates(audit, **limits)
    if not passed(gates):
        raise PolicyError(_told(gates), hint="make a package that gives less away, or set another limit")


def _told(gates: Sequence[Gate]) -> str:
    open_gates = [gate for gate in gates if gate.verdict != "passed"]
    words = []
    for gate in open_gates:
        limit = f", limit {gate.limit:g}" if gate.limit is not None and gate.verdict == "failed" else ""
        words.append(f"{gate.name} {gate.verdict}: {gate.told}{limit}")
    return "; ".join(words)
