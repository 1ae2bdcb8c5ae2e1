"""Settings of a verb: one frozen, strict model, filled from a YAML file, overrides and flags.

Later sources win: defaults, then ``--config FILE``, then ``key=value`` words, then flags. Every problem
is reported at once, in one `ConfigError`.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

from offsite.errors import ConfigError
from offsite.problems import expected, guess, meant

POSITIONAL: JsonDict = {"positional": True}
OUTPUT: JsonDict = {"short": "-o"}
REPEATED: JsonDict = {"repeated": True}
"""How a setting is typed: as a word, in field order; by a short flag, too; more than once."""

NEEDED: JsonDict = {"panel": "Needed"}
USUAL: JsonDict = {"panel": "Usual"}
DATA: JsonDict = {"panel": "Data"}
COMPRESSION: JsonDict = {"panel": "Compression"}
DIAL: JsonDict = {"panel": "Dial"}
ADAPTER: JsonDict = {"panel": "Adapter"}
TRAINING: JsonDict = {"panel": "Training"}
ROUNDS: JsonDict = {"panel": "Rounds"}
COMBINING: JsonDict = {"panel": "Combining"}
PLUGGING: JsonDict = {"panel": "Plugging in"}
MEASURING: JsonDict = {"panel": "Measuring"}
ATTACK: JsonDict = {"panel": "Attacks"}
PRIVACY: JsonDict = {"panel": "Privacy"}
NETWORK: JsonDict = {"panel": "Network"}
LIMITS: JsonDict = {"panel": "Limits"}
MACHINE: JsonDict = {"panel": "Machine"}
KEYS: JsonDict = {"panel": "Keys"}
"""Where a setting stands in ``--help``; what must be given stands in the first panel by itself."""

FROM_PROJECT: JsonDict = {"project": True}
"""What the project's file names where it is not given: `project_folders`."""

PROJECT_NAME = "offsite.toml"
PROJECT_FOLDERS = ("keys", "registry")
"""The project's file, and the settings that it may hold."""

PROJECT_TABLES = ("owner",)
"""Tables of the project's file: settings of the verbs whose `VerbConfig.project_table` names one."""

_PROJECT_LIMIT_BYTES = 64 * 2**10

_IN_ORDER: tuple[JsonDict, ...] = (
    *(NEEDED, USUAL, DIAL, DATA, COMPRESSION, ADAPTER, TRAINING, ROUNDS, COMBINING, PLUGGING),
    *(MEASURING, ATTACK, PRIVACY, NETWORK, LIMITS, MACHINE, KEYS),
)
PANELS = tuple(str(one["panel"]) for one in _IN_ORDER)
"""The panels of ``--help``, in their order."""


class VerbConfig(BaseModel):
    """Settings of one verb. Subclasses stand in the ``config.py`` of a folder and import nothing heavy.

    ``json_schema_extra`` of a field says how it is typed and where ``--help`` shows it, as ``DATA | REPEATED``.
    What several verbs take is declared once, in a class that they inherit.
    """

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        validate_default=False,
        allow_inf_nan=False,
        defer_build=True,  # --help needs no validator, and a base never does
    )
    verb: ClassVar[str]
    project_table: ClassVar[str] = ""
    project_begins: ClassVar[str] = ""


Config = TypeVar("Config", bound=VerbConfig)


def build(
    cls: type[Config],
    *,
    file: Path | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, object] | None = None,
) -> Config:
    """Return the settings of `cls` made of its defaults, `file`, `overrides` and `flags`, in that order.

    Args:
        file: YAML file with a mapping of field names.
        overrides: words of the form ``key=value`` or ``key.sub=value``.
        flags: field name to text (or list of texts, or bool) as typed; absent means not given.

    Raises:
        ConfigError: listing every unknown key, missing field and wrong value.
    """
    values: dict[str, Any] = {}
    if file is not None:
        values.update(_read_yaml(file))
    given_keys: set[str] = set()
    for word in overrides:
        key, _, text = word.partition("=")
        if key in given_keys:
            raise ConfigError(f"{key} is given twice", hint="one of the two has to go")
        given_keys.add(key)
        _put(cls, values, key.split("."), text)
    for name, given in (flags or {}).items():
        _put_flag(cls, values, name, given)
    _take_from_project(cls, values)
    try:
        text = json.dumps(values, default=str)
    except (ValueError, RecursionError):
        raise ConfigError("a setting contains itself") from None
    try:
        return cls.model_validate_json(text)
    except ValidationError as error:
        _require_project(cls, error)
        raise ConfigError(_all_problems(cls, error), hint=_hint(cls)) from None


def _require_project(cls: type[VerbConfig], error: ValidationError) -> None:
    """Return unless all that is wrong is what the project's table would hold, and there is none."""
    is_missing = all(item["type"] == "missing" for item in error.errors(include_url=False))
    if cls.project_begins and is_missing and not project_table(cls.project_table)[1]:
        raise ConfigError(
            f"there is no {cls.project_table}'s project here: no {PROJECT_NAME} with [{cls.project_table}] in this "
            "folder or above it",
            hint=f"{cls.project_begins} makes one here; or cd to the folder that has one",
        )


def _take_from_project(cls: type[BaseModel], values: dict[str, Any]) -> None:
    """What was not given stands in `values` as the project's file names it."""
    wanted = [name for name, field in cls.model_fields.items() if declared(field).get("project")]
    missing = [name for name in wanted if name not in values]
    if missing:
        values |= {name: str(path) for name, path in project_folders().items() if name in missing}
    if issubclass(cls, VerbConfig) and cls.project_table:
        place, stated = project_table(cls.project_table)
        for name, value in stated.items():
            if name not in cls.model_fields:
                raise ConfigError(
                    f"{PROJECT_NAME}: [{cls.project_table}] names {name[:40]!r}{meant(name, cls.model_fields)}",
                    hint=f"offsite {cls.verb} --help tells its settings",
                )
            is_path = isinstance(value, str) and _holds_path(cls.model_fields[name].annotation)
            values.setdefault(name, str(_in_project(place, value)) if is_path else value)


def project_file(folder: Path | None = None) -> Path | None:
    """Return the nearest project file, in `folder` (the working one) or above it; None where there is none."""
    start = Path.cwd() if folder is None else folder.absolute()
    return next(
        (path for path in (place / PROJECT_NAME for place in (start, *start.parents)) if os.path.lexists(path)), None
    )


def project_folders(folder: Path | None = None) -> dict[str, Path]:
    """Return the folders that the nearest project file names, absolute, by their settings; none where there is none.

    Raises:
        ConfigError: as `_read_project`.
    """
    path, values = _read_project(folder)
    return {name: _in_project(path.parent, values[name]) for name in PROJECT_FOLDERS if name in values}


def project_table(name: str, folder: Path | None = None) -> tuple[Path, dict[str, Any]]:
    """Return the folder of the nearest project file, and the settings in that table of it; none where there is none.

    Raises:
        ConfigError: as `_read_project`.
    """
    path, values = _read_project(folder)
    return path.parent, values.get(name, {})


def _read_project(folder: Path | None) -> tuple[Path, dict[str, Any]]:
    """Return the nearest project file and what it holds; of none, where it would be and nothing.

    Who can write it can have commands use other keys, so that one which others may write or own is refused.

    Raises:
        ConfigError: when others may write the file or own it, it is not TOML, or names anything else.
    """
    path = project_file(folder)
    if path is None:
        return (Path.cwd() if folder is None else folder.absolute()) / PROJECT_NAME, {}
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(
                f"{PROJECT_NAME} is not a file", hint=f"it names {' and '.join(PROJECT_FOLDERS)} of this project"
            )
        if found.st_uid not in (os.getuid(), 0) or found.st_mode & 0o022:
            raise ConfigError(
                f"{PROJECT_NAME} can be written by others", hint=f"chmod go-w {PROJECT_NAME}, if it is yours"
            )
        if found.st_size > _PROJECT_LIMIT_BYTES:
            raise ConfigError(f"{PROJECT_NAME} is larger than {_PROJECT_LIMIT_BYTES} bytes")
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{PROJECT_NAME} cannot be read: {(error.strerror or 'i/o error').lower()}") from None
    except (ValueError, RecursionError):  # what is not UTF-8 or not TOML
        raise ConfigError(f"{PROJECT_NAME} is not valid TOML", hint='as: keys = "keys"') from None
    for name, value in values.items():
        if name in PROJECT_TABLES and isinstance(value, dict):
            continue
        if name not in PROJECT_FOLDERS:
            raise ConfigError(f"{PROJECT_NAME} names {name[:40]!r}, expected some of: {', '.join(PROJECT_FOLDERS)}")
        if not isinstance(value, str) or not value or "\0" in value:
            raise ConfigError(f"{PROJECT_NAME}: {name} is not the path of a folder", hint=f'as: {name} = "{name}"')
    return path, values


def _in_project(place: Path, value: str) -> Path:
    """Return a path of the project's file, which is relative to the file's folder."""
    try:
        return place / Path(value).expanduser()
    except RuntimeError:  # nobody of that name has a home here
        raise ConfigError(f"{PROJECT_NAME} names the home of somebody unknown", hint='as: keys = "keys"') from None


def _holds_path(kind: Any) -> bool:
    return kind is Path or any(_holds_path(part) for part in get_args(kind))


def flag_name(field_name: str) -> str:
    """Return the command-line spelling of a field."""
    return "--" + field_name.replace("_", "-")


def is_positional(field: FieldInfo) -> bool:
    """Tell whether the field is given as a word rather than a flag."""
    return bool(declared(field).get("positional"))


def panel_of(field: FieldInfo) -> str:
    """Return the panel of ``--help`` that shows the field."""
    return str((NEEDED if field.is_required() else USUAL | declared(field))["panel"])


def declared(field: FieldInfo) -> JsonDict:
    """Return what a field says of itself: how it is typed, and its panel."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def model_in(kind: Any) -> type[BaseModel] | None:
    """Return the model that a setting holds, by itself or as an alternative to none."""
    parts = (part for part in (kind, *get_args(kind)) if isinstance(part, type) and get_origin(part) is None)
    return next((part for part in parts if issubclass(part, BaseModel)), None)


def _put_flag(cls: type[BaseModel], values: dict[str, Any], name: str, given: object) -> None:
    """Put a flag's value; settings inside one setting are typed as ``--outer inner=1,other=2``."""
    words = [word.strip() for word in given.split(",")] if isinstance(given, str) else []
    is_model = model_in(cls.model_fields[name].annotation) is not None
    if not (is_model and words and all("=" in word for word in words)):
        values[name] = _json_value(cls.model_fields[name], given)
        return
    keys = [word.partition("=")[0] for word in words]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise ConfigError(f"{flag_name(name)}: {twice} is given twice", hint="one of the two has to go")
    for word in words:
        key, _, text = word.partition("=")
        _put(cls, values, [name, *key.split(".")], text)


def _put(cls: type[BaseModel], values: dict[str, Any], keys: list[str], text: str) -> None:
    field = cls.model_fields.get(keys[0])
    if len(keys) == 1 or field is None:
        values[".".join(keys)] = text if field is None else _json_value(field, text)
        return
    inner, nested = model_in(field.annotation), values.get(keys[0], {})
    if isinstance(nested, dict) and get_origin(field.annotation) is dict:
        values[keys[0]] = {**nested, ".".join(keys[1:]): text}
    elif isinstance(nested, dict) and inner is not None:
        _put(inner, values.setdefault(keys[0], {}), keys[1:], text)
    else:
        values[".".join(keys)] = text  # no setting has that name, and the model's own error says so


def _json_value(field: FieldInfo, given: object) -> object:
    """Return the JSON form of a typed value, or `given` unchanged for the model's own error to name."""
    kind: Any = field.annotation
    many = next((part for part in (kind, *get_args(kind)) if get_origin(part) in (list, tuple, dict)), None)
    if many is None:
        return _item(kind, given) if isinstance(given, str) else given
    words = [word.strip() for word in given.split(",")] if isinstance(given, str) else given
    if isinstance(given, str) and get_args(many)[0] is Path and Path(given).exists():
        words = [given]  # a name may hold a comma
    if not isinstance(words, list):
        return given
    words = [word for word in words if word.strip()]  # a repeated flag's words keep their spaces and line ends
    if get_origin(many) is not dict:
        return [_item(get_args(many)[0], word) for word in words]
    if not all("=" in word for word in words):
        return given
    pairs = [word.split("=", 1) for word in words]
    if twice := next((key for key, _ in pairs if [one for one, _ in pairs].count(key) > 1), None):
        raise ConfigError(f"{twice} is given twice", hint="one of the two has to go")
    return dict(pairs)


def _item(kind: Any, text: str) -> object:
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    try:
        return adapter.dump_python(adapter.validate_strings(text), mode="json")
    except ValidationError:
        return text


def _read_yaml(file: Path) -> dict[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.2 floats: ``1e-3`` is a number, not a word; ``yes`` is a setting's name; and none is given twice."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[object] = set()
            for key, _ in node.value:
                if key.tag == "tag:yaml.org,2002:bool":
                    key.tag = "tag:yaml.org,2002:str"
                name = self.construct_object(key)  # type: ignore[no-untyped-call]
                if isinstance(name, str) and name in seen:
                    raise ConfigError(f"configuration {file.name!r} gives {name!r} twice")
                seen.add(name if isinstance(name, str) else id(key))
            return super().construct_mapping(node, deep)

    number = re.compile(r"^[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?$")
    whole = re.compile(r"^[-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789."))
    Loader.add_implicit_resolver("tag:yaml.org,2002:int", whole, list("-+0123456789"))
    for start in "-+0123456789":
        resolvers = Loader.yaml_implicit_resolvers[start]
        resolvers.sort(key=lambda pair: pair[1] is not whole)
    try:
        text = file.read_text(encoding="utf-8")
        found = yaml.load(text, Loader)  # noqa: S506 - a SafeLoader subclass
    except OSError as error:
        raise ConfigError(f"cannot read configuration {file.name!r}: {(error.strerror or '').lower()}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"configuration {file.name!r} is not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(f"configuration {file.name!r} is not YAML{where}") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(f"configuration {file.name!r} holds a {type(found).__name__}, expected a mapping of settings")
    return {str(key): value for key, value in found.items()}


def _all_problems(cls: type[BaseModel], error: ValidationError) -> str:
    problems = []
    for item in error.errors(include_url=False):
        names = [str(part) for part in item["loc"]]
        name = ".".join(names)
        field = cls.model_fields.get(names[0]) if names else None
        first, dot, inner = name.partition(".")  # settings inside one are typed as they are named
        spelled = name.upper() if field is not None and is_positional(field) else flag_name(first) + dot + inner
        if not names:
            problems.append(item["msg"].removeprefix("Value error, "))
        elif item["type"] == "extra_forbidden":
            *outer, last = names
            problems.append(f"unknown setting {name!r}{_meant(cls, outer, last)}")
        elif item["type"] == "missing":
            problems.append(f"{spelled} is missing")
        else:
            inside = model_in(field.annotation) if field is not None and len(names) == 1 else None
            if item["type"] == "string_pattern_mismatch" and field is not None and field.description:
                problems.append(f"{spelled}: expected {field.description}, found {item['input']!r}")
            elif inside is None:
                problems.append(f"{spelled}: {expected(item)}, found {item['input']!r}{guess(item)}")
            else:
                problems.append(f"{spelled}: {_pairs(spelled, inside, item['input'])}")
    return "; ".join(problems)


def _meant(cls: type[BaseModel], outer: Sequence[str], last: str) -> str:
    """Return which setting was most likely meant, named as it would be typed as a key."""
    known: type[BaseModel] | None = cls
    for name in outer:
        field = known.model_fields.get(name) if known is not None else None
        known = None if field is None else model_in(field.annotation)
    if known is None:
        return ""
    return meant(".".join((*outer, last)), [".".join((*outer, name)) for name in known.model_fields])


def _pairs(spelled: str, inside: type[BaseModel], found: object) -> str:
    """Return how settings inside one are given; a lone number is most likely meant for the first of them."""
    names = list(inside.model_fields)
    wanted = f"expected NAME=VALUE,... of {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}, found {found!r}"
    is_number = isinstance(found, int | float) or (isinstance(found, str) and re.fullmatch(r"[0-9.e-]+", found))
    return f"{wanted}; did you mean {spelled} {names[0]}={found}?" if is_number else wanted


def _hint(cls: type[VerbConfig]) -> str:
    verb = getattr(cls, "verb", None)
    return f"offsite {verb} --help lists every setting" if verb else "see --help for every setting"
