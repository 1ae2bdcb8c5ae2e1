"""What the pages show, as plain text: every word that somebody else wrote is one bounded line that turns no direction.

A figure comes with a sentence that says what it is. Templates escape all of it once more.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from offsite.artefacts.job import Job
from offsite.audits.gates import plugged_gates
from offsite.config import project_folders
from offsite.console import utc
from offsite.digests import sha256_file
from offsite.inspection.words import adapter_words, ends, shown, when
from offsite.keys.identity import PublicKeys
from offsite.privacyreport.record import PrivacyReport
from offsite.report.numbers import NONE, number, size
from offsite.sealed.invitation import fingerprint_words
from server.dashboard.config import OwnerUpConfig
from server.dashboard.measured import (
    audit_tables,
    gate_fact,
    gives_away,
    membership_table,
    results_tables,
    update_figures,
)
from server.dashboard.shapes import (
    LINE_CHARACTERS,
    NAME_CHARACTERS,
    TEXT_CHARACTERS,
    Action,
    Arrival,
    Arrived,
    Fact,
    Federation,
    Invited,
    Link,
    LogLine,
    Measured,
    Option,
    PackageRow,
    Refusal,
    Report,
    Round,
)
from server.dashboard.shelf import HeldPackage, HeldReport, Shelf
from server.http.serve import is_loopback
from server.registry import federations
from server.registry.registry import Registry
from server.registry.rows import Entry

LOG_LINES, MOST_ARRIVALS = 100, 200

STATES = {
    "received": "came, and is being verified",
    "verified": "passed every check, and waits for your word",
    "accepted": "may be plugged in",
    "plugged-in": "is in an adapted folder or a merged model",
    "served": "was served",
    "refused": "was refused; its files are gone",
    "withdrawn": "was taken out again; its files are gone",
}
CHECKS = (
    "sizes, and both signatures (Ed25519 and ML-DSA-65) over the bytes as they came",
    "its client is pinned here and trusted; the job is yours and was running; the round was open; it was new",
    "every file has the digest that was signed",
    "it belongs to the package and the full model of the job",
    "exactly the tensors of the job's adapter, with their shapes and types",
    "every number is finite, and no module's update is over the job's caps",
)
"""What intake has checked of whatever is verified, in its order (``server/registry/verify.py``)."""

ATTESTATIONS = {
    "none": ("none", "Signatures show whose keys were used, not on which machine, nor by which program."),
    "tpm2-quote": (
        "a TPM's quote, not verified here",
        "It is about this very report. It counts once you hold it against a policy: "
        "offsite report verify REPORT --attestation-policy FILE",
    ),
}
"""What a report states of the machine that issued it, by kind, and what that means."""


class Views:
    """Makes what pages show, of an open registry and the project's folders; changes nothing."""

    def __init__(self, config: OwnerUpConfig, registry: Registry, shelf: Shelf, own: PublicKeys) -> None:
        self._config, self._registry, self._shelf, self._own = config, registry, shelf, own

    # --- overview and packages

    def overview(self) -> dict[str, object]:
        """Return what the first page shows."""
        entries, names = self._registry.entries(), self._registry.client_names()
        jobs, packages = self._registry.jobs(), self._shelf.packages()
        waiting = [entry for entry in entries if entry.state == "verified"]
        used = [entry for entry in entries if entry.state in ("accepted", "plugged-in", "served")]
        tiles = [
            (str(len(waiting)), "waiting for your decision"),
            (str(len(used)), "accepted, plugged in or served"),
            (str(sum(job.expires > time.time() for job in jobs)), "jobs that are running"),
            (str(len(names)), "clients known here"),
        ]
        return {
            "figures": tiles,
            "model": shown(self._config.model, LINE_CHARACTERS),
            "waiting": [self._arrival(entry, names, packages) for entry in reversed(waiting)],
            "packages": [self._package_row(one, jobs) for one in packages.values()],
            "gone": [shown(path.name, NAME_CHARACTERS) for digest, path in self._registry.packages().items()
                     if digest not in packages],
        }  # fmt: skip

    def _package_row(self, package: HeldPackage, jobs: Sequence[Job]) -> PackageRow:
        audits = self._shelf.audits(package.digest)
        num = sum(job.package_digest == package.digest for job in jobs)
        return PackageRow(
            name=shown(package.path.name, NAME_CHARACTERS),
            href=f"/packages/{_hex(package.digest)}",
            made=shown(package.manifest.method.name, NAME_CHARACTERS),
            size=size(package.num_bytes),
            gives=gives_away(audits[-1][1]) if audits else "not measured",
            audited="" if audits else "offsite audit package measures it",
            jobs=f"{num} job{'' if num == 1 else 's'}",
        )

    def package(self, digest: str) -> dict[str, object] | None:
        """Return what a package's page shows; None when there is none of that digest, in hex."""
        found = self._shelf.packages().get(f"sha256:{digest}")
        if found is None:
            return None
        manifest, names = found.manifest, self._registry.client_names()
        settings = ", ".join(f"{name} {value}" for name, value in manifest.method.settings.items())
        facts = [
            Fact("middle", shown(f"{manifest.method.name}{f' ({settings})' if settings else ''}"),
                 "How the middle of your model was made smaller. What is in the package is the client's to study."),
            Fact("size", size(found.num_bytes), "What is sent to a client, before it is encrypted."),
            Fact("blocks", f"{manifest.layout.num_bottom} bottom, {manifest.layout.num_middle} middle, "
                 f"{manifest.layout.num_top} top", "The ends are your own blocks; the middle is the emulator."),
            Fact("licence", shown(manifest.licence or "none stated")),
            Fact("package", found.digest, "The digest of its manifest; a job names it.", "digest"),
            Fact("full model", manifest.base_digest, "The digest of the model it was made of.", "digest"),
        ]  # fmt: skip
        facts += [
            Fact(
                shown(name, NAME_CHARACTERS).replace("_", " "),
                number(value),
                "Stated in the package, to the client too.",
            )
            for name, value in manifest.figures.items()
        ]
        jobs = [
            Fact(job.job_id[:12], shown(names.get(job.client, job.client[:9]), NAME_CHARACTERS), self._job_told(job))
            for job in self._registry.jobs() if job.package_digest == found.digest
        ]  # fmt: skip
        audits = self._shelf.audits(found.digest)
        return {
            "name": shown(found.path.name, NAME_CHARACTERS),
            "described": facts,
            "audits": [(shown(name, NAME_CHARACTERS), audit_tables(audit)) for name, audit in audits],
            "jobs": jobs,
            "audit_command": self._command("audit", "package", found.path, "--model", self._config.model or "MODEL",
                                           "--heldout", "FILE", "-o", f"{found.path.name}-audit"),
            "job_command": self._command("job", "create", found.path, "--client", "NAME", "-o", "job"),
        }  # fmt: skip

    def _job_told(self, job: Job) -> str:
        return f"{adapter_words(job.adapter)}; {job.rounds} round(s); until {ends(job.expires, int(time.time()))}"

    # --- what arrived

    def submissions(self) -> dict[str, object]:
        """Return what the list of arrivals shows."""
        names, packages = self._registry.client_names(), self._shelf.packages()
        entries = self._registry.entries()
        arrivals = [self._arrival(entry, names, packages) for entry in reversed(entries[-MOST_ARRIVALS:])]
        refused = [
            Refusal(one.id, shown(one.reason_class or "", NAME_CHARACTERS), shown(one.message, LINE_CHARACTERS))
            for one in self._registry.refusals()
        ]
        return {
            "arrivals_found": arrivals,
            "refused": refused,
            "states": list(STATES.items()),
            "more": max(len(entries) - MOST_ARRIVALS, 0),
        }

    def _arrival(self, entry: Entry, names: Mapping[str, str], packages: Mapping[str, HeldPackage]) -> Arrival:
        package = packages.get(self._registry.job(entry.job_id).package_digest)
        return Arrival(
            id=entry.id,
            href=f"/submissions/{entry.id}",
            state=entry.state,
            client=shown(names.get(entry.client, entry.client[:9]), NAME_CHARACTERS),
            package=NONE if package is None else shown(package.path.name, NAME_CHARACTERS),
            round=str(entry.round),
            since=utc(entry.changed),
        )

    def submission(self, entry: Entry) -> Arrived:
        """Return one bundle's page."""
        job, now = self._registry.job(entry.job_id), int(time.time())
        name = self._registry.client_names().get(entry.client, "")
        package = self._shelf.packages().get(job.package_digest)
        facts = [
            Fact("client", shown(name, NAME_CHARACTERS), "The name on its card, as the client chose it."),
            Fact(
                "fingerprint",
                entry.client,
                "What you compared over another channel; the name proves nothing.",
                "digest",
            ),
            Fact("arrived", when(entry.received, now)),
            Fact("in this state since", when(entry.changed, now)),
            Fact("round", f"{entry.round} of {job.rounds}", "Each round of a job takes one bundle."),
            Fact("job", job.job_id, "What you agreed with the client.", "digest"),
            Fact("adapter", adapter_words(job.adapter), "What was tuned, as the job asks for it."),
            Fact("sealed bundle", entry.digest, "The bytes as they came; its first digits are the id.", "digest"),
        ]
        report, told = self._report_of(entry, now)
        audit = None if report is None else report.audits.bundle
        return Arrived(
            id=entry.id,
            state=entry.state,
            told=STATES[entry.state],
            client=shown(name or entry.client[:9], NAME_CHARACTERS),
            facts=facts,
            figures=update_figures(entry, job),
            checks=CHECKS if entry.bundle_digest is not None else (),
            why=shown(f"{entry.reason}: {entry.message}", LINE_CHARACTERS) if entry.reason else "",
            tables=self._measured(entry),
            gates=[] if report is None else [gate_fact(gate) for gate in report.gates.bundle],
            gates_told=told,
            headline="" if report is None else shown(report.headline, LINE_CHARACTERS),
            attacks=[] if audit is None else membership_table(audit.membership),
            plugged=self._plugged(entry),
            actions=self._actions(entry),
            commands=self._next(entry, package),
            terms=shown(job.terms, TEXT_CHARACTERS),
            package=None if package is None
            else Link(shown(package.path.name, NAME_CHARACTERS), f"/packages/{_hex(package.digest)}"),
        )  # fmt: skip

    def _measured(self, entry: Entry) -> list[Measured]:
        if entry.bundle_digest is None:
            return []
        found = self._shelf.results(entry.bundle_digest)
        return [table for name, results in found for table in results_tables(name, results)]

    def _report_of(self, entry: Entry, now: int) -> tuple[PrivacyReport | None, str]:
        """Return the verified privacy report of this very bundle, if one is here, and whose it is."""
        for held in self._shelf.reports(now):
            report = held.report
            if report is not None and entry.bundle_digest is not None and report.digests.bundle == entry.bundle_digest:
                who = "the client" if report.issuer == entry.client else "another party than the client"
                return report, f"From the privacy report {shown(held.name, NAME_CHARACTERS)}, of {who}."
        return None, "No privacy report of this bundle is here: ask the client for one (offsite report privacy)."

    def _plugged(self, entry: Entry) -> list[tuple[str, list[Fact]]]:
        """Return the gates of the owner's own audits of the bundle in the full model."""
        if entry.bundle_digest is None:
            return []
        audits = self._shelf.plugged_audits(entry.bundle_digest)
        return [
            (shown(name, NAME_CHARACTERS), [gate_fact(gate) for gate in plugged_gates(audit, None)])
            for name, audit in audits
        ]

    def _actions(self, entry: Entry) -> list[Action]:
        here = f"/submissions/{entry.id}"
        accept = Action("Accept", f"{here}/accept", "It may be plugged in then. Nothing is plugged in by itself.")
        refuse = Action(
            "Refuse", f"{here}/refuse", "Its files are deleted for good, and its round is free again.", True
        )
        withdraw = Action("Withdraw", f"{here}/withdraw", "Its files are deleted for good, and you sign that.", True)
        again = Action("Sign the withdrawal", f"{here}/withdraw", "It is withdrawn, and nothing signed says so yet.")
        signed = self._shelf.withdrawal_path(entry.id).exists() or entry.digest in self._shelf.withdrawals()
        return {
            "verified": [accept, refuse],
            "accepted": [withdraw, refuse],
            "plugged-in": [withdraw],
            "served": [withdraw],
            "withdrawn": [] if signed else [again],
        }.get(entry.state, [])

    def _next(self, entry: Entry, package: HeldPackage | None) -> list[Fact]:
        """Return commands that a person may type next: what takes hours or the full model is not a click."""
        if entry.state not in ("accepted", "plugged-in", "served"):
            return []
        model, path = self._config.model or "MODEL", "PACKAGE" if package is None else package.path
        made = next(iter(self._shelf.adapted(entry.id).values()), None)
        adapted = f"adapted-{entry.id}" if made is None else made.name
        return [
            Fact("plug in", self._command("plug-in", model, entry.id, "-o", f"adapted-{entry.id}")),
            Fact("measure", self._command("evaluate", model, "--package", path, "--bundle", entry.id,
                                          "--data", "FILE", "-o", f"results-{entry.id}")),
            Fact("serve", self._command("serve", adapted), "Ctrl-C stops it. What you withdraw, it serves no longer."),
        ]  # fmt: skip

    def _command(self, *words: object) -> str:
        """Return a command as it is typed in the project's folder; registry and keys are named where no file does."""
        flags: list[str] = []
        if words[0] == "serve" or (words[0] in ("plug-in", "evaluate", "job") and not self._is_project()):
            flags += ["--registry", str(self._config.registry)]
        if words[0] not in ("audit", "serve") and not self._is_project():
            flags += ["--keys", str(self._config.keys)]
        return shown(shlex.join(["offsite", *(str(word) for word in words), *flags]), TEXT_CHARACTERS)

    def _is_project(self) -> bool:
        """Whether commands that are typed in the project's folder find keys and registry by themselves."""
        found = project_folders(self._config.home)
        return (found.get("registry"), found.get("keys")) == (self._config.registry, self._config.keys)

    # --- invitations

    def invitations(self) -> dict[str, object]:
        """Return what the page of invitations shows: those that were written, and what one may be about."""
        names, now = self._registry.client_names(), int(time.time())
        written = [
            Invited(
                name=shown(path.name, NAME_CHARACTERS),
                href=f"/invitations/{_file_hex(path)}",
                about=shown(one.invitation.title or "no title", LINE_CHARACTERS),
                client=shown(names.get(one.invitation.client or "", "anybody whose card you pin"), NAME_CHARACTERS),
                expires=ends(one.invitation.expires, now),
            )
            for path, one in self._shelf.invitations()
        ]
        return {
            "written": written,
            "options": self.invitable(),
            "url": self._config.url or "",
            "is_reached": not is_loopback(urlsplit(self._config.url or "").hostname or "localhost"),
            "fingerprint": self._own.fingerprint,
            "words": " ".join(fingerprint_words(self._own.fingerprint)),
            "trust_command": self._command("trust", "add", "CARD"),
            "job_command": self._command("job", "create", "PACKAGE", "--client", "NAME", "-o", "job"),
        }

    def invitable(self) -> list[Option]:
        """Return the jobs that run and the packages, by what a form calls them."""
        names, now = self._registry.client_names(), int(time.time())
        jobs = [
            Option(f"job:{key}", f"job {shown(path.name, NAME_CHARACTERS)}, for "
                   f"{shown(names.get(opened.job.client, opened.job.client[:9]), NAME_CHARACTERS)}")
            for key, (path, opened) in self._shelf.jobs().items()
            if opened.job.owner == self._own.fingerprint and opened.job.expires > now
        ]  # fmt: skip
        packages = [
            Option(f"package:{_hex(digest)}",
                   f"package {shown(one.path.name, NAME_CHARACTERS)}, for a client whose card is not pinned yet")
            for digest, one in self._shelf.packages().items()
        ]  # fmt: skip
        return [*jobs, *packages]

    # --- federations, reports, log

    def federations(self) -> list[Federation]:
        """Return the federations, the latest first, with what is known of their rounds."""
        names = self._registry.client_names()

        def named(client: str) -> str:
            return shown(names.get(client, client[:9]), NAME_CHARACTERS)

        found = []
        for one in reversed(federations.known(self._registry)):
            last = one.finished[-1].round if one.finished else 0
            under_way = f"{one.last_drawn}, asked and not finished" if one.last_drawn > last else "none"
            facts = [
                Fact("begun", utc(one.begun)),
                Fact("clients", str(len(one.content.get("jobs", ()))), "Whose jobs were named when it began."),
                Fact("rounds finished", str(len(one.finished))),
                Fact("round under way", under_way, "A round ends when enough answers are in, or its time is over."),
            ]
            rounds = [
                Round(
                    number=str(done.round),
                    used=", ".join(named(client) for client in done.content.get("used", ())) or "nobody",
                    left_out=[f"{named(client)}: {shown(why, LINE_CHARACTERS)}"
                              for client, why in done.content.get("left_out", {}).items()],
                    figures=", ".join(f"{shown(name, NAME_CHARACTERS)} {number(value)}"
                                      for name, value in done.content.get("figures", {}).items()) or NONE,
                )
                for done in reversed(one.finished)
            ]  # fmt: skip
            found.append(Federation(shown(one.name, NAME_CHARACTERS), facts, rounds))
        return found

    def reports(self) -> list[Report]:
        """Return the privacy reports in the project's folder, each with what came of checking it."""
        now = int(time.time())
        return [self._report(held) for held in self._shelf.reports(now)]

    def _report(self, held: HeldReport) -> Report:
        name, report = shown(held.name, NAME_CHARACTERS), held.report
        if report is None:
            return Report(name, "", [], shown(held.problem, LINE_CHARACTERS))
        names = {self._own.fingerprint: self._own.name, **self._registry.client_names()}
        failed = [gate.name for gate in report.gates.every if gate.verdict == "failed"]
        open_ = [gate.name for gate in report.gates.every if gate.verdict == "not measurable"]
        about = next((entry.id for entry in self._registry.entries()
                      if entry.bundle_digest and entry.bundle_digest == report.digests.bundle), "")  # fmt: skip
        facts = [
            Fact("from", shown(names.get(report.issuer, report.issuer[:9]), NAME_CHARACTERS),
                 "Signed by these keys; signatures, verdicts and figures were worked out again here."),
            Fact("of", utc(report.created)),
            Fact("about bundle", about or "none that is here"),
            Fact("attestation", *ATTESTATIONS["none" if report.attestation is None else report.attestation.kind]),
            Fact("gates", f"{len(report.gates.every)}: {len(failed)} failed, {len(open_)} could not be measured",
                 "Each gate is a limit; the page of the bundle lists them."),
        ]  # fmt: skip
        return Report(name, shown(report.headline, LINE_CHARACTERS), facts, "")

    def log(self, before: int | None) -> dict[str, object]:
        """Return a page of the log, the newest lines first, after every line was found to follow from the last."""
        lines = [line for line in self._registry.store.lines() if before is None or line["number"] < before]
        cut = lines[-LOG_LINES:]
        told = [
            LogLine(
                number=str(line["number"]),
                time=utc(line["time"]),
                event=shown(line["event"], NAME_CHARACTERS),
                fields=shown(
                    ", ".join(f"{name} {_short(value)}" for name, value in line["fields"].items()), LINE_CHARACTERS
                ),
            )
            for line in reversed(cut)
        ]
        names = self._registry.client_names()
        signed = [
            Invited(
                name=shown(path.name, NAME_CHARACTERS),
                href=f"/withdrawals/{_file_hex(path)}",
                about=shown(f"bundle {one.bundle.removeprefix('sha256:')[:16]}, which was {one.was}"),
                client=shown(names.get(one.client, one.client[:9]), NAME_CHARACTERS),
                expires=utc(one.created),
            )
            for path, one in self._shelf.withdrawals().values()
        ]
        older = str(cut[0]["number"]) if len(lines) > len(cut) else ""
        return {"lines": told, "older": older, "signed": signed}


def _short(value: object) -> str:
    text = str(value)
    return text[:19] if text.startswith("sha256:") else text[:LINE_CHARACTERS]


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")


def _file_hex(path: Path) -> str:
    return _hex(sha256_file(path))
