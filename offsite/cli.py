"""The command line: a table from verb to settings and function, resolved only when a verb is called.

People read stderr; the last line of stdout is one JSON object. Exit codes are in ``offsite/errors.py``.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from offsite.errors import ConfigError, OffsiteError


@dataclass(frozen=True)
class Verb:
    """One verb: a line for ``--help``, where its settings are and where its function is."""

    summary: str
    settings: str
    function: str


VERBS: dict[str, Verb] = {
    "fetch": Verb(
        "get the demo's 135M model and convert it once",
        "offsite.modelling.config:FetchConfig",
        "offsite.modelling.fetch:run",
    ),
    "distill": Verb(
        "owner: make a package (emulator, ends) of a model",
        "emulator.distillation.config:DistillConfig",
        "emulator.distillation.distill:run",
    ),
    "mark": Verb(
        "owner: mark a package for one recipient, to trace a leak",
        "emulator.marking.config:MarkConfig",
        "emulator.marking.mark:run",
    ),
    "trace": Verb(
        "owner: find whose marked package a model comes from",
        "emulator.marking.config:TraceConfig",
        "emulator.marking.leak:run",
    ),
    "audit package": Verb(
        "owner: measure what a package gives away of the model",
        "emulator.audit.config:AuditPackageConfig",
        "emulator.audit.audit:run",
    ),
    "inspect": Verb(
        "anyone: show what a package or bundle holds, verified",
        "offsite.artefacts.config:InspectConfig",
        "offsite.artefacts.inspect:run",
    ),
    "tune": Verb(
        "client: tune an adapter on private data", "client.tuning.config:TuneConfig", "client.tuning.tune:run"
    ),
    "canaries": Verb(
        "client: make up rows that show what tuning gives away",
        "client.audit.canaryconfig:CanaryConfig",
        "client.audit.canaries:run",
    ),
    "audit bundle": Verb(
        "client: measure what a bundle gives away of its data",
        "client.audit.config:AuditBundleConfig",
        "client.audit.audit:run",
    ),
    "audit plugged-in": Verb(
        "owner: measure what an adapter gives away in the full model, by the client's canaries",
        "server.evaluation.auditconfig:AuditPluggedConfig",
        "server.evaluation.audit:run",
    ),
    "plug-in": Verb(
        "owner: put a returned adapter into the full model",
        "server.plugging.config:PlugConfig",
        "server.plugging.plug:run",
    ),
    "keygen": Verb(
        "anyone: make this party's keys and its public card",
        "offsite.keys.config:KeygenConfig",
        "offsite.keys.identity:run",
    ),
    "trust add": Verb(
        "anyone: pin another party's card by its fingerprint",
        "offsite.keys.config:TrustAddConfig",
        "offsite.keys.trust:add",
    ),
    "trust list": Verb(
        "anyone: show the pinned parties", "offsite.keys.config:TrustListConfig", "offsite.keys.trust:show"
    ),
    "trust revoke": Verb(
        "anyone: trust a pinned party no longer", "offsite.keys.config:TrustRevokeConfig", "offsite.keys.trust:revoke"
    ),
    "rehearse": Verb(
        "owner: play a client first, to see what comes back",
        "server.evaluation.rehearseconfig:RehearseConfig",
        "server.evaluation.rehearse:run",
    ),
    "job create": Verb(
        "owner: set the terms for one client", "server.registry.config:JobCreateConfig", "server.registry.job:run"
    ),
    "seal": Verb(
        "anyone: encrypt and sign a job, package, bundle or report",
        "offsite.sealed.config:SealConfig",
        "offsite.exchange.verbs:seal_run",
    ),
    "open": Verb(
        "anyone: verify and decrypt a sealed folder",
        "offsite.sealed.config:OpenConfig",
        "offsite.exchange.verbs:open_run",
    ),
    "rewrap": Verb(
        "anyone: address a sealed folder to another key of its recipient",
        "offsite.sealed.config:RewrapConfig",
        "offsite.exchange.verbs:rewrap_run",
    ),
    "intake": Verb(
        "owner: verify a client's sealed bundle and register it",
        "server.registry.config:IntakeConfig",
        "server.registry.intake:run",
    ),
    "registry list": Verb(
        "owner: what arrived and what became of it",
        "server.registry.config:RegistryListConfig",
        "server.registry.verbs:list_run",
    ),
    "registry show": Verb(
        "owner: one arrival in full", "server.registry.config:RegistryShowConfig", "server.registry.verbs:show_run"
    ),
    "registry accept": Verb(
        "owner: allow a verified bundle to be plugged in",
        "server.registry.config:RegistryAcceptConfig",
        "server.registry.verbs:accept_run",
    ),
    "registry refuse": Verb(
        "owner: refuse a bundle for good",
        "server.registry.config:RegistryRefuseConfig",
        "server.registry.verbs:refuse_run",
    ),
    "log verify": Verb(
        "owner: check the registry's log from its first line",
        "server.registry.config:LogVerifyConfig",
        "server.registry.verbs:log_verify_run",
    ),
    "exchange serve": Verb(
        "owner: serve sealed files over HTTP",
        "server.exchange.config:ServeExchangeConfig",
        "server.exchange.serve:serve_run",
    ),
    "exchange certificate": Verb(
        "owner: make a TLS certificate for the exchange",
        "server.exchange.config:CertificateConfig",
        "server.exchange.serve:certificate_run",
    ),
    "exchange pull": Verb(
        "client: fetch what the owner sealed for you",
        "client.exchange.config:PullConfig",
        "client.exchange.verbs:pull_run",
    ),
    "exchange push": Verb(
        "client: hand in a sealed bundle", "client.exchange.config:PushConfig", "client.exchange.verbs:push_run"
    ),
    "exchange status": Verb(
        "client: what became of a bundle", "client.exchange.config:StatusConfig", "client.exchange.verbs:status_run"
    ),
    "federate serve": Verb(
        "owner: run a federation of clients over the exchange",
        "server.federation.config:FederateServeConfig",
        "server.federation.serve:serve_run",
    ),
    "realign": Verb(
        "owner: let an emulator follow the model that a federation's rounds made",
        "emulator.distillation.realignconfig:RealignConfig",
        "emulator.distillation.realign:run",
    ),
    "federate join": Verb(
        "client: take part in an owner's federation",
        "client.federation.config:JoinConfig",
        "client.federation.join:join_run",
    ),
    "federate node": Verb(
        "client: take part through Flower's SuperNode, and run nothing it sends",
        "client.federation.nodeconfig:NodeConfig",
        "client.federation.node:node_run",
    ),
    "federate simulate": Verb(
        "owner: try a whole federation in one process",
        "server.federation.simulationconfig:SimulateConfig",
        "server.federation.simulation:run",
    ),
    "evaluate": Verb(
        "owner: zero-shot, emulator-tuned, plugged in",
        "server.evaluation.config:EvaluateConfig",
        "server.evaluation.evaluate:run",
    ),
    "serve": Verb(
        "owner: serve an adapted model, OpenAI-style", "server.serving.config:ServeConfig", "server.serving.serve:run"
    ),
    "report run": Verb(
        "anyone: a page from what evaluate wrote", "offsite.report.config:ReportConfig", "offsite.report.page:run"
    ),
    "report privacy": Verb(
        "anyone: one signed report of what audits found",
        "offsite.privacyreport.config:PrivacyReportConfig",
        "offsite.privacyreport.issue:run",
    ),
    "report verify": Verb(
        "auditor: check a privacy report, its signatures and its figures",
        "offsite.privacyreport.config:ReportVerifyConfig",
        "offsite.privacyreport.verify:run",
    ),
    "demo": Verb(
        "both sides here, on a real model and text", "offsite.demo.config:DemoConfig", "offsite.demo.play:run"
    ),
}


GROUPS: dict[str, str] = {
    "audit": "both sides: measure what a bundle or package gives away",
    "federate": "both sides: one adapter of many clients, over rounds",
    "report": "anyone: a page, or a signed privacy report and its check",
}
"""What ``--help`` says of words that several roles' verbs begin with; of others, it is their first verb's line."""

_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb and exit with the code of its outcome."""
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Run one verb. Returns the exit code; an unexpected error propagates (it is a bug)."""
    _quiet_libraries()
    try:
        return _dispatch(arguments)
    except OffsiteError as error:
        if _speaks():
            print(f"offsite: error: {error}", file=sys.stderr)
            if error.hint:
                print(f"offsite: hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("offsite: interrupted", file=sys.stderr)
        return _INTERRUPTED


def _dispatch(arguments: list[str]) -> int:
    import click
    import typer

    words = [word for word in arguments if not word.startswith("-")]
    chosen = next((name for name in VERBS if words[: len(name.split())] == name.split()), None)
    app = _app(chosen, arguments)
    command = typer.main.get_command(app)
    try:
        outcome = command.main(args=arguments or ["--help"], prog_name="offsite", standalone_mode=False)
    except click.UsageError as error:
        verb = f"offsite {chosen}" if chosen else "offsite"
        raise ConfigError(_one_line(error.format_message()), hint=f"{verb} --help") from None
    except click.exceptions.Abort:
        raise KeyboardInterrupt from None
    if outcome == _INTERRUPTED:  # typer turns Ctrl-C into this code and says nothing
        raise KeyboardInterrupt
    return outcome if isinstance(outcome, int) else 0


def _one_line(message: str) -> str:
    text = " ".join(message.split()).rstrip(".")
    text = re.sub(r"\.? \(?Did you mean ([^?]*)\?\)?.*", r"; did you mean \1?", text)
    return text[:1].lower() + text[1:]


def _app(chosen: str | None, arguments: list[str]) -> Any:
    """Return the Typer application; only the chosen verb's settings are imported."""
    import typer

    def version(value: bool | None) -> None:
        if value:
            from offsite import __version__

            print(__version__)
            raise typer.Exit

    app = typer.Typer(
        name="offsite",
        no_args_is_help=False,
        add_completion=False,
        rich_markup_mode=None,
        help="Offsite-tuning: adapt a model to data that may not leave its owner, without the model leaving its own.",
    )

    def root(**_: Any) -> None:
        """Stands for the verbs' group; ``--version`` is answered by its own callback."""

    option = typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    root.__signature__ = inspect.Signature([_parameter("version", bool | None, option)])  # type: ignore[attr-defined]
    root.__annotations__ = {"version": Annotated[bool | None, option]}
    root.__doc__ = None
    app.callback()(root)

    groups: dict[str, Any] = {}
    for name, verb in VERBS.items():
        *group, word = name.split()
        target = app
        if group:
            if group[0] not in groups:
                groups[group[0]] = typer.Typer(rich_markup_mode=None, help=GROUPS.get(group[0], verb.summary))
                app.add_typer(groups[group[0]], name=group[0])
            target = groups[group[0]]
        function = _command(name, verb, arguments) if name == chosen else _placeholder
        target.command(word, help=_words_help(verb) if name == chosen else verb.summary)(function)
        if group:  # a group with a single command must still be typed in full
            target.callback()(_placeholder)
    return app


def _speaks() -> bool:
    """Tell whether this process prints: of several that were launched together, only the first does."""
    return os.environ.get("RANK", "0") == "0"


def _placeholder() -> None:
    pass  # stands for a verb that was not called; its help is the summary alone


def _command(name: str, verb: Verb, arguments: list[str]) -> Callable[..., int]:
    """Return a function whose signature Typer turns into the verb's flags."""
    import typer

    from offsite.config import VerbConfig, build, flag_name, is_positional

    cls: type[VerbConfig] = _resolve(verb.settings)
    fields = cls.model_fields
    positional = [field for field, info in fields.items() if is_positional(info)]
    shown = " ".join(field.upper() for field in positional)

    def command(**given: Any) -> int:
        words: list[str] = list(given.pop("words") or [])
        file = given.pop("config_file")
        overrides = [word for word in words if _is_override(word)]
        plain = [word for word in words if word not in overrides]
        if len(plain) > len(positional):
            raise ConfigError(f"unexpected word {plain[len(positional)]!r}", hint=f"offsite {name} --help")
        flags = {field: value for field, value in given.items() if value is not None and value != []}
        flags.update(zip(positional, plain, strict=False))
        config = build(cls, file=Path(file) if file else None, overrides=overrides, flags=flags)
        _guard()
        if getattr(config, "launch", 0) > 1 and "RANK" not in os.environ:
            launch = _resolve("offsite.training.processes:launch")
            return int(launch(config.launch, arguments))  # type: ignore[attr-defined]
        if getattr(config, "sealed_off", False):
            _resolve("client.tuning.sandbox:enter")(
                config
            )  # before the function's module loads torch and starts threads
        result = _resolve(verb.function)(config)
        if _speaks():
            print(json.dumps(result, sort_keys=True, allow_nan=False), flush=True)
        return 0

    words = typer.Argument(metavar=f"{shown} [KEY=VALUE]...".lstrip(), hidden=True)  # told in the verb's own help
    parameters = [_parameter("words", list[str] | None, words)]
    for field, info in fields.items():
        if field in positional:
            continue
        extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        flag = flag_name(field)
        if info.annotation is bool:
            option = typer.Option(f"{flag}/--no-{flag[2:]}", help=_help(info), show_default=False)
            parameters.append(_parameter(field, bool | None, option))
            continue
        spellings = [flag, str(extra["short"])] if "short" in extra else [flag]
        repeated = extra.get("repeated", False)
        option = typer.Option(*spellings, help=_help(info), metavar=_metavar(info.annotation), show_default=False)
        parameters.append(_parameter(field, (list[str] if repeated else str) | None, option))
    option = typer.Option("--config", help="YAML file with any of these settings.", metavar="FILE", show_default=False)
    parameters.append(_parameter("config_file", str | None, option))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _words_help(verb: Verb) -> str:
    """Return the verb's summary and what its words mean; typer prints no help of arguments with click 8.5."""
    from offsite.config import is_positional

    fields = _resolve(verb.settings).model_fields
    told = {field.upper(): info.description for field, info in fields.items() if is_positional(info)}
    told["KEY=VALUE"] = "any setting below; KEY.SUB=VALUE for one inside another"
    return f"{verb.summary}\n\n\b\n" + "\n".join(f"{word:<10} {text}" for word, text in told.items())


def _parameter(name: str, kind: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])


def _is_override(word: str) -> bool:
    return re.fullmatch(r"[a-z][a-z0-9_.]*=.*", word) is not None and not Path(word).exists()


def _help(info: Any) -> str:
    default = "" if info.is_required() or info.default in (None, (), {}) else f" [default: {info.default}]"
    return (info.description or "") + default


def _metavar(kind: Any) -> str:
    if isinstance(kind, type):
        return {"int": "N", "float": "X", "Path": "PATH", "str": "TEXT"}.get(kind.__name__, kind.__name__.upper())
    choices = [repr(value).strip("'") for value in getattr(kind, "__args__", ()) if isinstance(value, str)]
    if choices:
        return "|".join(choices)
    names = [_metavar(part) for part in getattr(kind, "__args__", ()) if part is not type(None)]
    return names[0] if names else "TEXT"


def _resolve(spec: str) -> Any:
    module, _, name = spec.partition(":")
    return getattr(importlib.import_module(module), name)


def _guard() -> None:
    from offsite.guard import check_install

    check_install()


def _quiet_libraries() -> None:
    """Third-party notices stay off the terminal; set before any of those libraries is imported."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }.items():
        os.environ.setdefault(name, value)
