"""The command line: from typed words to a verb's settings and function, resolved only when the verb is called.

People read stderr; the last line of stdout is one JSON object, at a terminal only with ``--json``. Exit codes are in
``offsite/errors.py``.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from offsite.commands.verbs import GROUPS, HEAVY, VERBS, Verb, verb_of
from offsite.errors import ConfigError, OffsiteError
from offsite.problems import meant
from offsite.staging import require_place

if TYPE_CHECKING:
    from offsite.config import VerbConfig


_INTERRUPTED = 130
_TOLD = -_INTERRUPTED  # between here and a verb's command: interrupted, and said already


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

    from offsite.commands import completion

    asked = completion.words_so_far()
    chosen = verb_of(arguments if asked is None else asked)
    if asked is not None:
        return completion.answer(typer.main.get_command(_app(chosen, VERBS)))
    command = typer.main.get_command(_app(chosen, VERBS)) if chosen is None else _parser(chosen, *_settings_of(chosen))
    given = arguments or ["--help"]
    try:
        outcome = command.main(args=given, prog_name="offsite", standalone_mode=False, obj=arguments)
    except click.NoSuchOption as error:
        found = meant(error.option_name, _flag_names(chosen))
        raise ConfigError(f"no such option {error.option_name!r}{found}", hint=_help_of(chosen)) from None
    except click.UsageError as error:
        group = arguments[0] if arguments else ""
        if chosen is None and group in GROUPS and error.format_message().startswith("Missing command"):
            words = ", ".join(name.split()[1] for name in VERBS if name.startswith(f"{group} "))
            raise ConfigError(f"offsite {group} needs a second word: {words}", hint=f"offsite {group} --help") from None
        raise ConfigError(_one_line(error.format_message()), hint=_help_of(chosen)) from None
    except click.exceptions.Abort:
        raise KeyboardInterrupt from None
    if outcome == _TOLD:
        return _INTERRUPTED
    if outcome == _INTERRUPTED:  # typer turns Ctrl-C into this code and says nothing
        raise KeyboardInterrupt
    return outcome if isinstance(outcome, int) else 0


def _help_of(chosen: str | None) -> str:
    return f"offsite {chosen} --help" if chosen else "offsite --help"


def _flag_names(chosen: str | None) -> list[str]:
    """Return the flags of a verb as they are typed."""
    if chosen is None:
        return ["--version", "--show-completion", "--help"]
    fields = _resolve(VERBS[chosen].settings).model_fields
    return ["--" + name.replace("_", "-") for name in (*fields, "config", "json", "help")]


def _one_line(message: str) -> str:
    text = " ".join(message.split()).rstrip(".")
    text = re.sub(r"\.? \(?Did you mean ([^?]*)\?\)?.*", r"; did you mean \1?", text)
    return text[:1].lower() + text[1:]


def _settings_of(chosen: str) -> tuple[Verb, type[VerbConfig]]:
    return VERBS[chosen], _resolve(VERBS[chosen].settings)


@functools.lru_cache
def _parser(chosen: str, verb: Verb, _settings: type[VerbConfig]) -> Any:
    """Return what reads the words of one verb; made once in a process that runs it several times."""
    import typer

    return typer.main.get_command(_app(chosen, {chosen: verb}))


def _app(chosen: str | None, verbs: Mapping[str, Verb]) -> Any:
    """Return the Typer application of these verbs; only the chosen one's settings are imported."""
    import typer

    from offsite.commands.pages import WIDTH, GroupPage

    app = typer.Typer(
        name="offsite",
        cls=GroupPage,
        context_settings=WIDTH,
        no_args_is_help=False,
        add_completion=False,
        rich_markup_mode=None,
        help="Offsite-tuning: adapt a model to data that may not leave its owner, without the model leaving its own.",
    )
    app.callback()(_root())
    groups: dict[str, Any] = {}
    for name, verb in verbs.items():
        *group, word = name.split()
        target = app
        if group:
            if group[0] not in groups:
                groups[group[0]] = typer.Typer(cls=GroupPage, rich_markup_mode=None, help=GROUPS[group[0]])
                groups[group[0]].callback()(_placeholder)  # a group with a single verb must still be typed in full
                app.add_typer(groups[group[0]], name=group[0])
            target = groups[group[0]]
        if name == chosen:
            _add(target, name, verb)
        else:
            target.command(word, help=verb.summary)(_placeholder)
    return app


def _root() -> Callable[..., None]:
    """Return the function of ``offsite`` without a verb, whose options answer by their own callbacks."""
    import typer

    def version(value: bool | None) -> None:
        if value:
            from offsite import __version__

            print(__version__)
            raise typer.Exit

    def show_completion(shell: str | None) -> None:
        if shell is not None:
            from offsite.commands.completion import script

            print(script(shell), end="")
            raise typer.Exit

    def root(**_: Any) -> None: ...

    shown = typer.Option("--version", callback=version, is_eager=True, help="print the version")
    completion = typer.Option(
        "--show-completion",
        callback=show_completion,
        is_eager=True,
        metavar="SHELL",
        help="print the script that completes verbs and flags in bash, zsh or fish",
        show_default=False,
    )
    return _with_signature(
        root, [_parameter("version", bool | None, shown), _parameter("show_completion", str | None, completion)]
    )


def _with_signature(function: Callable[..., Any], parameters: list[inspect.Parameter]) -> Callable[..., Any]:
    """Return the function with the parameters that Typer is to read off it."""
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return function


def _speaks() -> bool:
    """Tell whether this process prints: of several that were launched together, only the first does."""
    return os.environ.get("RANK", "0") == "0"


def _placeholder() -> None:
    pass  # stands for a verb that was not called; its help is the summary alone


def _add(app: Any, name: str, verb: Verb) -> None:
    """The application has the verb, with its settings for flags."""
    from offsite.commands.settings import VerbPage

    cls = _resolve(verb.settings)
    word = name.split()[-1]
    app.command(word, cls=VerbPage, context_settings={"obj": cls}, help=verb.summary)(_command(name, verb, cls))


def _command(name: str, verb: Verb, cls: type[VerbConfig]) -> Callable[..., int]:
    """Return a function whose signature Typer turns into the verb's flags."""
    import click

    from offsite.config import build, is_positional

    positional = [field for field, info in cls.model_fields.items() if is_positional(info)]

    def command(**given: Any) -> int:
        words: list[str] = list(given.pop("words") or [])
        file, as_json = _only("--config", given.pop("config_file") or []), given.pop("as_json")
        overrides = [word for word in words if _is_override(word)]
        plain = [word for word in words if word not in overrides]
        for field, value in given.items():
            _require_no_flag(cls, field, value)  # before the word that is left over then
        if len(plain) > len(positional):
            raise ConfigError(f"unexpected word {plain[len(positional)]!r}", hint=f"offsite {name} --help")
        flags = {field: _once(cls, field, value) for field, value in given.items() if value not in (None, [])}
        flags.update(zip(positional, plain, strict=False))
        config = build(cls, file=Path(file) if file else None, overrides=overrides, flags=flags)
        _require_reachable(config)
        _guard()
        output = getattr(config, "output", None)
        if isinstance(output, Path):
            require_place(output)  # before the run is sealed off, which would deny the trial
        if getattr(config, "launch", 0) > 1 and "RANK" not in os.environ:
            launch = _resolve("offsite.training.processes:launch")
            return int(launch(config.launch, click.get_current_context().find_root().obj))  # type: ignore[attr-defined]
        if getattr(config, "sealed_off", False):
            enter = _resolve("client.tuning.sandbox:enter")
            enter(config)  # before the function's module loads torch and starts threads
        try:
            if name in HEAVY and "torch" not in sys.modules and _speaks():
                print(f"{name}: loading", file=sys.stderr, flush=True)
            result = _resolve(verb.function)(config)
        except KeyboardInterrupt:
            if _speaks():
                print(_what_stays(config), file=sys.stderr, flush=True)
            return _TOLD
        if _speaks() and (as_json or not sys.stdout.isatty()):
            print(json.dumps(result, sort_keys=True, allow_nan=False), flush=True)
        return 0

    return _with_signature(command, _flags(cls))


def _require_no_flag(cls: type[VerbConfig], field: str, value: object) -> None:
    """Return only if no flag of the verb stands where another one's value belongs."""
    from offsite.config import flag_name

    flags = {"-o", *(flag_name(name) for name in cls.model_fields)}
    for word in value if isinstance(value, list) else []:
        if word in flags:
            raise ConfigError(f"{flag_name(field)} takes a value, found the flag {word!r} in its place")


def _once(cls: type[VerbConfig], field: str, value: object) -> object:
    """Return a flag's value; of one that takes no list the only one.

    Raises:
        ConfigError: when such a flag was given more than once: neither value would be what was meant.
    """
    from offsite.config import declared, flag_name

    if not isinstance(value, list) or declared(cls.model_fields[field]).get("repeated"):
        return value
    return _only(flag_name(field), value)


def _only(flag: str, values: list[str]) -> str | None:
    """Return the one value of a flag, None where it was not given; more than one is refused."""
    if len(values) > 1:
        raise ConfigError(f"{flag} is given {len(values)} times, it takes one value")
    return values[0] if values else None


def _require_reachable(config: VerbConfig) -> None:
    """Return only if it can be told of every path that was given whether something is there.

    Raises:
        ConfigError: naming one that is too long, or behind a folder that this user may not look into.
    """
    for name in type(config).model_fields:
        value = getattr(config, name)
        for path in value if isinstance(value, tuple) else (value,):
            if isinstance(path, Path):
                try:
                    path.expanduser().exists()
                except (OSError, RuntimeError) as error:
                    why = (getattr(error, "strerror", None) or str(error)).lower()
                    raise ConfigError(f"{path.name[:60]!r} cannot be looked for: {why}") from None


def _what_stays(config: VerbConfig) -> str:
    """Return what is left of a verb that Ctrl-C ended, and how to go on."""
    from offsite.console import PLAYED

    output = getattr(config, "output", None)
    if not isinstance(output, Path) or PLAYED in os.environ:  # whoever plays this verb as a stage says how to go on
        return "offsite: interrupted"
    work = output.with_name(f"{output.name}.work")
    if work.is_dir() and hasattr(config, "resume"):
        return (
            f"offsite: interrupted; what was done is kept in {work.name!r}\n"
            "offsite: hint: the same command with --resume goes on from there"
        )
    if work.is_dir():
        return f"offsite: interrupted; what was done is kept in {work.name!r}: the same command goes on from there"
    return f"offsite: interrupted; {output.name!r} was not written"


def _flags(cls: type[VerbConfig]) -> list[inspect.Parameter]:
    """Return a parameter for the verb's words, one for each of its flags, and one for ``--config``."""
    import typer

    from offsite.commands.settings import CONFIG, JSON, explained, metavar, spellings, value
    from offsite.config import is_positional

    words = typer.Argument(hidden=True, click_type=value(Path))
    parameters = [_parameter("words", list[str] | None, words)]
    for field, info in cls.model_fields.items():
        if is_positional(info):
            continue
        kind: Any = list[str]  # also where one value is taken: a second one is then seen, and refused
        given: dict[str, Any] = {"metavar": metavar(info.annotation), "click_type": value(info.annotation)}
        if info.annotation is bool:
            kind, given = bool, {}
        option = typer.Option(*spellings(field, info), help=explained(info), show_default=False, **given)
        parameters.append(_parameter(field, kind | None, option))
    option = typer.Option("--config", help=CONFIG[1], click_type=value(Path), show_default=False)
    parameters.append(_parameter("config_file", list[str] | None, option))
    as_json = typer.Option("--json", help=JSON[1], show_default=False)
    parameters.append(_parameter("as_json", bool | None, as_json))
    return parameters


def _parameter(name: str, kind: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])


def _is_override(word: str) -> bool:
    return re.fullmatch(r"[a-z][a-z0-9_.]*=.*", word) is not None and not Path(word).exists()


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
