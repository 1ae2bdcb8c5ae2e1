"""What lies in the project's folders: packages, jobs, audits, results, adapted folders, reports, invitations.

Things are told by their content, as ``offsite inspect`` tells them, one level deep in the project's folder and beside
the packages that the registry knows; a privacy report also in a folder that holds it beside what stays here. What is
unsound is left out: inspecting it says why. No path comes from a request: things are found by digest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from offsite.artefacts.job import OpenedJob, read_job
from offsite.artefacts.layout import PackageManifest
from offsite.artefacts.manifest import read_manifest
from offsite.artefacts.package import PACKAGE_FORMAT
from offsite.audits.record import Audit, PackageAudit, PluggedAudit, read_audit
from offsite.console import muted
from offsite.digests import sha256_bytes
from offsite.errors import OffsiteError
from offsite.evaluation.results import Results, read_results
from offsite.folders import read_plain
from offsite.inspection.inspect import recognise
from offsite.keys.identity import CARD_NAME
from offsite.keys.trust import TRUST_NAME
from offsite.privacyreport.config import ReportVerifyConfig
from offsite.privacyreport.issue import REPORT_FOLDER
from offsite.privacyreport.record import PrivacyReport
from offsite.privacyreport.verify import verify
from offsite.sealed.invitation import INVITATION_LIMIT_BYTES, Invited, parse_invitation
from offsite.sealed.withdrawal import WITHDRAWAL_LIMIT_BYTES, Statement, read_withdrawal
from server.dashboard.config import INVITATIONS, WITHDRAWALS
from server.plugging.adapted import ADAPTED_FORMAT, AdaptedManifest

WITHDRAWAL_END = ".withdrawal.json"

_MAX_ENTRIES = 500
_VERIFIED_SECONDS = 300

_Stamp = tuple[object, ...]


@dataclass(frozen=True)
class HeldPackage:
    """A package's folder, as its manifest describes it; its files are not hashed to be shown."""

    path: Path
    manifest: PackageManifest
    digest: str

    @property
    def num_bytes(self) -> int:
        """Bytes of all files that the manifest names."""
        return sum(entry.bytes for entry in self.manifest.files.values())


@dataclass(frozen=True)
class HeldReport:
    """A privacy report's folder: the report once every check has passed, or why one did not."""

    name: str
    report: PrivacyReport | None
    problem: str = ""


class Shelf:
    """What is found in `home` and beside the packages.

    Args:
        packages: folders of packages that the registry knows.
    """

    def __init__(self, home: Path, keys: Path, packages: Callable[[], list[Path]]) -> None:
        self._home, self._keys, self._packages = home, keys, packages
        self._kinds: dict[Path, tuple[tuple[int, int], str]] = {}
        self._reports: dict[Path, tuple[_Stamp, int, HeldReport]] = {}

    @property
    def invitations_folder(self) -> Path:
        """Where invitations are written."""
        return self._home / INVITATIONS

    def withdrawal_path(self, bundle_id: str) -> Path:
        """Return where the statement about a bundle is written."""
        return self._home / WITHDRAWALS / f"{bundle_id}{WITHDRAWAL_END}"

    def packages(self) -> dict[str, HeldPackage]:
        """Return the packages by digest."""
        found: dict[str, HeldPackage] = {}
        for path in self._of("package"):
            try:
                manifest, digest = read_manifest(path, PackageManifest, PACKAGE_FORMAT)
            except OffsiteError:
                continue
            found.setdefault(digest, HeldPackage(path, manifest, digest))
        return found

    def jobs(self) -> dict[str, tuple[Path, OpenedJob]]:
        """Return folder and content of the jobs by id."""
        found: dict[str, tuple[Path, OpenedJob]] = {}
        for path in self._of("job"):
            try:
                opened = read_job(path)
            except OffsiteError:
                continue
            found.setdefault(opened.job.job_id, (path, opened))
        return found

    def audits(self, package_digest: str) -> list[tuple[str, PackageAudit]]:
        """Return name and content of the audits of that package."""
        return [
            (name, audit)
            for name, audit in self._audits()
            if isinstance(audit, PackageAudit) and audit.package_digest == package_digest
        ]

    def plugged_audits(self, bundle_digest: str) -> list[tuple[str, PluggedAudit]]:
        """Return name and content of the audits of that bundle in the full model."""
        return [
            (name, audit)
            for name, audit in self._audits()
            if isinstance(audit, PluggedAudit) and audit.bundle_digest == bundle_digest
        ]

    def _audits(self) -> Iterator[tuple[str, Audit]]:
        for path in self._of("audit"):
            try:
                audit, _ = read_audit(path)
            except OffsiteError:
                continue
            yield path.name, audit

    def results(self, bundle_digest: str) -> list[tuple[str, Results]]:
        """Return name and content of what ``offsite evaluate`` measured with that bundle."""
        found = []
        for path in self._of("results"):
            try:
                results = read_results(path)
            except OffsiteError:
                continue
            if any(one.digest == bundle_digest for one in results.bundles.values()):
                found.append((path.name, results))
        return found

    def adapted(self, bundle_id: str) -> dict[str, Path]:
        """Return the adapted folders that hold that bundle, each by a digest of its manifest and its place.

        Two of them may have the same manifest.
        """
        found = {}
        for path in self._of("adapted folder"):
            try:
                manifest, digest = read_manifest(path, AdaptedManifest, ADAPTED_FORMAT)
            except OffsiteError:
                continue
            if manifest.intake == bundle_id:
                found[sha256_bytes(f"{digest} {path}".encode("utf-8", "surrogateescape"))] = path
        return found

    def reports(self, now: int) -> list[HeldReport]:
        """Return the privacy reports, each verified as ``offsite report verify`` does.

        A verdict is kept for a few minutes, since cards end, as long as no file of the report and no card changes.
        """
        cards = (_stamp(self._keys / TRUST_NAME), _stamp(self._keys / CARD_NAME))  # whom it counts from may change
        found = []
        for path, name in self._report_folders().items():
            stamp = (*cards, *_stamps_in(path))
            known = self._reports.get(path)
            if known is None or known[0] != stamp or not 0 <= now - known[1] < _VERIFIED_SECONDS:
                known = (stamp, now, self._verified(path, name, now))
                self._reports[path] = known
            found.append(known[2])
        return found

    def _report_folders(self) -> dict[Path, str]:
        """Return the folders of privacy reports with a name for each; a folder that has others in it holds one, too."""
        found = {}
        for path in self._paths():
            inner = path / REPORT_FOLDER
            kind = self._kind(path)
            if kind == "privacy report":
                found[path] = path.name
            elif not kind and not inner.is_symlink() and self._kind(inner) == "privacy report":
                found.setdefault(inner, f"{path.name}/{REPORT_FOLDER}")
        return found

    def _verified(self, path: Path, name: str, now: int) -> HeldReport:
        try:
            with muted():
                report, _ = verify(ReportVerifyConfig(report=path, keys=self._keys), now=now)
        except OffsiteError as error:
            return HeldReport(name, None, f"{type(error).__name__}: {error}")
        return HeldReport(name, report)

    def invitations(self) -> list[tuple[Path, Invited]]:
        """Return file and content of the invitations, the latest first."""
        found = []
        for path in self._of("invitation"):
            try:
                found.append((path, parse_invitation(read_plain(path, INVITATION_LIMIT_BYTES, "invitation"))))
            except OffsiteError:
                continue
        return sorted(found, key=lambda pair: (pair[1].invitation.created, pair[0].name), reverse=True)

    def withdrawals(self) -> dict[str, tuple[Path, Statement]]:
        """Return file and content of the signed withdrawals, by the sealed digest of the bundle."""
        found = {}
        for path in self._of("withdrawal"):
            try:
                statement, _ = read_withdrawal(read_plain(path, WITHDRAWAL_LIMIT_BYTES, "withdrawal"))
            except OffsiteError:
                continue
            found[statement.bundle] = (path, statement)
        return found

    def file(self, kind: str, digest: str) -> tuple[str, bytes] | None:
        """Return name and bytes of the invitation or the withdrawal whose bytes have that SHA-256, in hex."""
        for path in self._of(kind):
            try:
                raw = read_plain(path, WITHDRAWAL_LIMIT_BYTES, kind)
            except OffsiteError:
                continue
            if sha256_bytes(raw) == f"sha256:{digest}":
                return path.name, raw
        return None

    def _of(self, kind: str) -> list[Path]:
        return [path for path in self._paths() if self._kind(path) == kind]

    def _paths(self) -> Iterator[Path]:
        places = [self._home, self._home / INVITATIONS, self._home / WITHDRAWALS]
        places += [path.parent for path in self._packages()]
        seen: set[Path] = set()
        for place in places:
            real = place.resolve()
            if real in seen:
                continue
            seen.add(real)
            try:
                with os.scandir(real) as entries:
                    names = sorted(entry.name for entry in islice(entries, _MAX_ENTRIES) if not entry.is_symlink())
            except OSError:
                continue
            yield from (real / name for name in names if not name.startswith("."))
        yield from self._packages()  # also one of more things than are looked at

    def _kind(self, path: Path) -> str:
        """Return what lies there, empty for nothing of offsite's; looked at again when it changes."""
        is_folder = path.is_dir()
        if not is_folder and path.suffix != ".json":
            return ""
        stamp = _stamp(path)
        known = self._kinds.get(path)
        if known is None or known[0] != stamp:
            try:
                what = recognise(path).what
            except OffsiteError:
                what = ""
            known = (stamp, what)
            self._kinds[path] = known
        return known[1]


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return (found.st_mtime_ns, found.st_ino)


def _stamps_in(folder: Path) -> Iterator[_Stamp]:
    """Yield what changes when the folder or one of its files does; the time of the last change cannot be set back."""
    yield (".", *_stamp(folder))
    try:
        with os.scandir(folder) as entries:
            files = sorted((entry.name, entry.stat(follow_symlinks=False)) for entry in islice(entries, _MAX_ENTRIES))
    except OSError:
        return
    for name, file in files:
        yield (name, file.st_size, file.st_mtime_ns, file.st_ctime_ns, file.st_ino)
