"""The table of verbs: who uses each, a line about it, and where its settings and its function are.

Everything is a string here: nothing of a verb is imported before it is called.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

TRY = "To try it"
BOTH = "Both parties"
OWNER = "The owner"
CLIENT = "The client"
AUDITOR = "The auditor"
PARTIES = (TRY, BOTH, OWNER, CLIENT, AUDITOR)
"""Who uses verbs, in the order of ``--help``."""


@dataclass(frozen=True)
class Verb:
    """One verb: a line for ``--help``, where its settings are, where its function is, and who uses it."""

    summary: str
    settings: str
    function: str
    party: str = BOTH


VERBS: dict[str, Verb] = {
    "demo": Verb(
        "both parties here, on a real model and text",
        "offsite.demo.config:DemoConfig",
        "offsite.demo.play:run",
        TRY,
    ),
    "fetch": Verb(
        "get the demo's 135M model and convert it once",
        "offsite.modelling.config:FetchConfig",
        "offsite.modelling.fetch:run",
        TRY,
    ),
    "init": Verb(
        "begin a project here, with keys of its own",
        "offsite.keys.config:InitConfig",
        "offsite.keys.start:run",
    ),
    "keygen": Verb(
        "make this party's keys and its public card",
        "offsite.keys.config:KeygenConfig",
        "offsite.keys.identity:run",
    ),
    "trust add": Verb(
        "pin another party's card by its fingerprint",
        "offsite.keys.config:TrustAddConfig",
        "offsite.keys.trust:add",
    ),
    "trust list": Verb(
        "show the pinned parties",
        "offsite.keys.config:TrustListConfig",
        "offsite.keys.trust:show",
    ),
    "trust revoke": Verb(
        "trust a pinned party no longer",
        "offsite.keys.config:TrustRevokeConfig",
        "offsite.keys.trust:revoke",
    ),
    "seal": Verb(
        "encrypt and sign a job, package, bundle or report",
        "offsite.sealed.config:SealConfig",
        "offsite.exchange.verbs:seal_run",
    ),
    "open": Verb(
        "verify and decrypt a sealed folder",
        "offsite.sealed.config:OpenConfig",
        "offsite.exchange.verbs:open_run",
    ),
    "inspect": Verb(
        "show in words what a file or folder of offsite is",
        "offsite.inspection.config:InspectConfig",
        "offsite.inspection.inspect:run",
    ),
    "generate": Verb(
        "answers of a package with a bundle, or of a model",
        "offsite.generation.config:GenerateConfig",
        "offsite.generation.verb:run",
    ),
    "rewrap": Verb(
        "address a sealed folder to this party's newer keys",
        "offsite.sealed.config:RewrapConfig",
        "offsite.exchange.verbs:rewrap_run",
    ),
    "task check": Verb(
        "check a task file, and show what a model reads of it",
        "offsite.tasks.config:TaskCheckConfig",
        "offsite.baselines.check:run",
    ),
    "task baseline": Verb(
        "what models make of a task untuned, asked in several ways",
        "offsite.baselines.config:BaselineConfig",
        "offsite.baselines.verb:run",
    ),
    "report run": Verb(
        "a page from what evaluate wrote",
        "offsite.report.config:ReportConfig",
        "offsite.report.page:run",
    ),
    "report privacy": Verb(
        "one signed report of what audits found",
        "offsite.privacyreport.config:PrivacyReportConfig",
        "offsite.privacyreport.issue:run",
    ),
    "report attest": Verb(
        "add a TPM's quote to a signed privacy report",
        "offsite.privacyreport.config:ReportAttestConfig",
        "offsite.privacyreport.attest:run",
    ),
    "owner init": Verb(
        "what an owner needs: keys, registry, certificate",
        "server.dashboard.config:OwnerInitConfig",
        "server.dashboard.begin:run",
        OWNER,
    ),
    "owner up": Verb(
        "serve the exchange, and a dashboard to decide on",
        "server.dashboard.config:OwnerUpConfig",
        "server.dashboard.up:run",
        OWNER,
    ),
    "distill": Verb(
        "make a package (emulator, ends) of a model",
        "emulator.dial.config:DialConfig",
        "emulator.dial.verb:run",
        OWNER,
    ),
    "mark": Verb(
        "mark a package for one recipient, to trace a leak",
        "emulator.marking.config:MarkConfig",
        "emulator.marking.mark:run",
        OWNER,
    ),
    "audit package": Verb(
        "measure what a package gives away of the model",
        "emulator.audit.config:AuditPackageConfig",
        "emulator.audit.audit:run",
        OWNER,
    ),
    "rehearse": Verb(
        "play a client first, to see what comes back",
        "server.evaluation.rehearseconfig:RehearseConfig",
        "server.evaluation.rehearse:run",
        OWNER,
    ),
    "job create": Verb(
        "set the terms for one client",
        "server.registry.config:JobCreateConfig",
        "server.registry.job:run",
        OWNER,
    ),
    "invite": Verb(
        "write the file by which a client joins a job",
        "server.exchange.config:InviteConfig",
        "server.exchange.invite:run",
        OWNER,
    ),
    "exchange certificate": Verb(
        "make a TLS certificate for the exchange",
        "server.exchange.config:CertificateConfig",
        "server.exchange.serve:certificate_run",
        OWNER,
    ),
    "exchange serve": Verb(
        "serve sealed files over HTTP",
        "server.exchange.config:ServeExchangeConfig",
        "server.exchange.serve:serve_run",
        OWNER,
    ),
    "intake": Verb(
        "verify a client's sealed bundle and register it",
        "server.registry.config:IntakeConfig",
        "server.registry.intake:run",
        OWNER,
    ),
    "registry list": Verb(
        "what arrived and what became of it",
        "server.registry.config:RegistryListConfig",
        "server.registry.verbs:list_run",
        OWNER,
    ),
    "registry show": Verb(
        "one arrival in full",
        "server.registry.config:RegistryShowConfig",
        "server.registry.verbs:show_run",
        OWNER,
    ),
    "registry accept": Verb(
        "allow a verified bundle to be plugged in",
        "server.registry.config:RegistryAcceptConfig",
        "server.registry.verbs:accept_run",
        OWNER,
    ),
    "registry refuse": Verb(
        "refuse a bundle for good",
        "server.registry.config:RegistryRefuseConfig",
        "server.registry.verbs:refuse_run",
        OWNER,
    ),
    "withdraw": Verb(
        "take one client's adapter out again, signed",
        "server.plugging.config:WithdrawConfig",
        "server.plugging.withdraw:run",
        OWNER,
    ),
    "log verify": Verb(
        "check the registry's log from its first line",
        "server.registry.config:LogVerifyConfig",
        "server.registry.verbs:log_verify_run",
        OWNER,
    ),
    "plug-in": Verb(
        "put a returned adapter into the full model",
        "server.plugging.config:PlugConfig",
        "server.plugging.plug:run",
        OWNER,
    ),
    "export": Verb(
        "write an adapter as another server loads it",
        "server.export.config:ExportConfig",
        "server.export.export:run",
        OWNER,
    ),
    "evaluate": Verb(
        "measure zero-shot, emulator-tuned and plugged in",
        "server.evaluation.config:EvaluateConfig",
        "server.evaluation.evaluate:run",
        OWNER,
    ),
    "audit plugged-in": Verb(
        "measure what an adapter gives away, plugged in",
        "server.evaluation.auditconfig:AuditPluggedConfig",
        "server.evaluation.audit:run",
        OWNER,
    ),
    "serve": Verb(
        "serve adapted models, OpenAI-style",
        "server.serving.config:ServeConfig",
        "server.serving.serve:run",
        OWNER,
    ),
    "tenant add": Verb(
        "give a tenant a key to what is served",
        "server.tenants.config:TenantAddConfig",
        "server.tenants.verbs:add_run",
        OWNER,
    ),
    "tenant list": Verb(
        "show tenants, their limits and what they used",
        "server.tenants.config:TenantListConfig",
        "server.tenants.verbs:list_run",
        OWNER,
    ),
    "tenant revoke": Verb(
        "take a tenant's key away",
        "server.tenants.config:TenantRevokeConfig",
        "server.tenants.verbs:revoke_run",
        OWNER,
    ),
    "trace": Verb(
        "find whose marked package a model comes from",
        "emulator.marking.config:TraceConfig",
        "emulator.marking.leak:run",
        OWNER,
    ),
    "federate simulate": Verb(
        "try a whole federation in one process",
        "server.federation.simulationconfig:SimulateConfig",
        "server.federation.simulation:run",
        OWNER,
    ),
    "federate serve": Verb(
        "run a federation of clients over the exchange",
        "server.federation.config:FederateServeConfig",
        "server.federation.serve:serve_run",
        OWNER,
    ),
    "realign": Verb(
        "let an emulator follow the rounds of a federation",
        "emulator.distillation.realignconfig:RealignConfig",
        "emulator.distillation.realign:run",
        OWNER,
    ),
    "join": Verb(
        "from an invitation to a sealed bundle, step by step",
        "client.join.config:InvitedConfig",
        "client.join.verb:run",
        CLIENT,
    ),
    "exchange pull": Verb(
        "fetch what the owner sealed for you",
        "client.exchange.config:PullConfig",
        "client.exchange.verbs:pull_run",
        CLIENT,
    ),
    "canaries": Verb(
        "make up rows that show what tuning gives away",
        "client.audit.canaryconfig:CanaryConfig",
        "client.audit.canaries:run",
        CLIENT,
    ),
    "tune": Verb(
        "tune an adapter on private data",
        "client.tuning.config:TuneConfig",
        "client.tuning.verb:run",
        CLIENT,
    ),
    "audit bundle": Verb(
        "measure what a bundle gives away of its data",
        "client.audit.config:AuditBundleConfig",
        "client.audit.audit:run",
        CLIENT,
    ),
    "exchange push": Verb(
        "hand in a sealed bundle",
        "client.exchange.config:PushConfig",
        "client.exchange.verbs:push_run",
        CLIENT,
    ),
    "exchange status": Verb(
        "what became of a bundle",
        "client.exchange.config:StatusConfig",
        "client.exchange.verbs:status_run",
        CLIENT,
    ),
    "federate join": Verb(
        "take part in an owner's federation",
        "client.federation.config:JoinConfig",
        "client.federation.join:join_run",
        CLIENT,
    ),
    "federate node": Verb(
        "take part through Flower, and run nothing it sends",
        "client.federation.nodeconfig:NodeConfig",
        "client.federation.node:node_run",
        CLIENT,
    ),
    "report verify": Verb(
        "check a privacy report, its signatures and figures",
        "offsite.privacyreport.config:ReportVerifyConfig",
        "offsite.privacyreport.verify:run",
        AUDITOR,
    ),
}
"""In each party's order of work, which is the order of ``--help``."""

HEAVY = frozenset(
    (
        *(
            "distill",
            "mark",
            "trace",
            "audit package",
            "rehearse",
            "job create",
            "intake",
            "plug-in",
            "export",
            "evaluate",
        ),
        *("task baseline", "audit plugged-in", "serve", "realign", "canaries", "tune", "audit bundle"),
        *("exchange certificate", "exchange serve", "generate", "owner up", "withdraw"),
        *("federate simulate", "federate serve", "federate join", "federate node"),
    )
)
"""Verbs that take seconds to load what they need; they say so before they do."""


GROUPS: dict[str, str] = {
    "audit": "measure what a package, a bundle or an adapter gives away",
    "exchange": "hand sealed files over by HTTP",
    "federate": "one adapter of many clients, over rounds",
    "job": "the terms for one client",
    "log": "the registry's log",
    "owner": "begin as an owner; the exchange and a dashboard",
    "registry": "what arrived: list, show, accept, refuse",
    "report": "a page, or a signed privacy report and its check",
    "task": "a task in one file: check it, measure models on it",
    "tenant": "who may ask the server: add, list, revoke",
    "trust": "whom to trust, by pinned cards: add, list, revoke",
}
"""What ``--help`` says of the first word of several verbs."""


def verb_of(words: Iterable[str]) -> str | None:
    """Return the verb that typed words begin with, flags left out; None where they name none."""
    typed = [word for word in words if not word.startswith("-")]
    return next((name for name in VERBS if typed[: len(name.split())] == name.split()), None)


def listed(group: str | None = None) -> dict[str, list[tuple[str, str]]]:
    """Return (what is typed, what it does) of every verb, or of a group's, by party.

    Several verbs with one first word, all of one party, are one line: their group's.
    """
    found: dict[str, list[tuple[str, str]]] = {party: [] for party in PARTIES}
    for name, verb in VERBS.items():
        first, _, rest = name.partition(" ")
        if group is not None and not (first == group and rest):
            continue
        line = (rest, verb.summary) if group is not None else (name, verb.summary)
        if group is None and rest and _is_one_line(first):
            line = (first, GROUPS[first])
        if line not in found[verb.party]:
            found[verb.party].append(line)
    return {party: lines for party, lines in found.items() if lines}


def _is_one_line(group: str) -> bool:
    verbs = [verb for name, verb in VERBS.items() if name.startswith(f"{group} ")]
    return len(verbs) > 1 and len({verb.party for verb in verbs}) == 1
