"""The folders are what they say: few modules each, faces that are true, tests beside them, an order that is checked.

Imports are read from the syntax trees of all five packages, so that one inside a function counts like any other.
"""

from __future__ import annotations

import ast
import re
import tomllib
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("adapters", "client", "emulator", "offsite", "server")
ROLES = {"client", "emulator", "server"}  # their modules lie in folders, none beside them
FEWEST, MOST = 3, 16
NAMING = {  # modules that name others in strings
    ROOT / "offsite" / "cli.py",
    ROOT / "offsite" / "commands" / "verbs.py",
    ROOT / "offsite" / "inspection" / "inspect.py",
}


@cache
def modules() -> frozenset[str]:
    """Return the dotted names of all modules of the five packages; a folder is a module too."""
    paths = [path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return frozenset(".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths)


@cache
def folders() -> tuple[str, ...]:
    """Return the dotted names of the folders that hold modules, the five packages among them."""
    inits = [path.parent for package in PACKAGES for path in (ROOT / package).rglob("__init__.py")]
    return tuple(sorted(".".join(path.relative_to(ROOT).parts) for path in inits))


def inside(folder: str) -> set[str]:
    """Return the names of the modules that lie in `folder` itself."""
    return {path.stem for path in (ROOT / folder.replace(".", "/")).glob("*.py")} - {"__init__"}


def imported(tree: ast.Module) -> set[str]:
    """Return the modules of the five packages that a syntax tree imports."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.add(str(node.module))
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found & modules()


def named(tree: ast.Module) -> set[str]:
    """Return the modules that stand in "module:function" strings, as the tables have them."""
    words = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return {word.partition(":")[0] for word in words if re.fullmatch(r"[a-z_.]+:\w+", word)}


@cache
def uses() -> dict[str, frozenset[str]]:
    """Return for each module the folders that use it."""
    found: dict[str, set[str]] = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            folder = ".".join(path.parent.relative_to(ROOT).parts)
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for module in imported(tree) | (named(tree) if path in NAMING else set()):
                found.setdefault(module, set()).add(folder)
    return {module: frozenset(users) for module, users in found.items()}


def face(folder: str) -> tuple[str, list[str]]:
    """Return a folder's docstring and its ``__all__``, without importing it."""
    tree = ast.parse((ROOT / folder.replace(".", "/") / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and [getattr(target, "id", "") for target in node.targets] == ["__all__"]:
            return ast.get_docstring(tree) or "", ast.literal_eval(node.value)
    return ast.get_docstring(tree) or "", []


def contracts() -> list[dict]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]


def test_the_modules_were_found() -> None:
    assert {"offsite.cli", "adapters.kinds", "client.tuning.tune", "server.registry"} <= modules()
    assert {"client", "offsite.sealed", "server.registry"} <= set(folders())
    assert "client.tuning.verb" in uses(), "the command line's table counts"


@pytest.mark.parametrize("folder", folders())
def test_a_folder_holds_three_to_sixteen_modules(folder: str) -> None:
    if folder in ROLES:
        assert inside(folder) == set()
    else:
        assert FEWEST <= len(inside(folder)) <= MOST


@pytest.mark.parametrize("folder", folders())
def test_a_face_says_what_is_inside_and_lists_what_others_import(folder: str) -> None:
    told, listed = face(folder)
    assert told
    assert listed == sorted(set(listed))
    defined = {"OFFSITE_ROLE", "__version__"} & set(listed)  # what the packages themselves say; no module
    users = {name: uses().get(f"{folder}.{name}", frozenset()) - {folder} for name in inside(folder)}
    assert set(listed) - defined == {name for name, others in users.items() if others}


def test_names_are_imported_from_where_they_are_defined() -> None:
    """No module hands on what it imported itself: a reader finds a name in the file that an import names."""
    brought: dict[str, set[str]] = {}  # what a module has from others of the five packages
    taken: list[tuple[str, str, str]] = []
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module in modules():
                    brought.setdefault(module, set()).update(alias.asname or alias.name for alias in node.names)
                    taken += [(module, node.module, alias.name) for alias in node.names]
    assert [each for each in taken if each[2] in brought.get(each[1], ())] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_lies_deeper_than_one_folder(package: str) -> None:
    deeper = [path for path in (ROOT / package).rglob("*.py") if len(path.relative_to(ROOT).parts) > 3]
    assert deeper == []


@pytest.mark.parametrize("package", PACKAGES)
def test_tests_lie_where_their_modules_do(package: str) -> None:
    there = {path.name for path in (ROOT / "tests" / package).iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert {f"{package}.{name}" for name in there} <= set(folders())
    flat = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / package).glob("test_*.py")}
    assert flat <= inside(package)


@pytest.mark.parametrize("package", sorted({folder.partition(".")[0] for folder in folders() if "." in folder}))
def test_the_import_contract_places_every_folder_of_a_package(package: str) -> None:
    found = [each for each in contracts() if each["type"] == "layers" and each.get("containers") == [package]]
    assert len(found) == 1
    assert found[0]["exhaustive"] is True
    assert not {"ignore_imports", "exhaustive_ignores"} & set(found[0])
    placed = [name for layer in found[0]["layers"] for name in re.split(r"\s*[|:]\s*", layer)]
    children = inside(package) | {folder.partition(".")[2] for folder in folders() if folder.startswith(f"{package}.")}
    assert sorted(placed) == sorted(children)


def test_the_import_contract_orders_the_packages_and_forbids_circles() -> None:
    roles, *rest = next(each["layers"] for each in contracts() if "containers" not in each and "layers" in each)
    assert set(roles.split(" | ")) == ROLES
    assert rest == ["adapters", "offsite"]
    circles = next(each for each in contracts() if each["type"] == "acyclic_siblings")
    assert set(circles["ancestors"]) == set(PACKAGES)
    assert "ignore_imports" not in circles


def layers(package: str) -> dict[str, int]:
    """Return for each folder the line of the contract that it stands on; greater is lower."""
    (found,) = (each for each in contracts() if each.get("containers") == [package])
    lines = [re.split(r"\s*[|:]\s*", layer) for layer in found["layers"]]
    return {name: number for number, names in enumerate(lines) for name in names}


def arrows(drawing: str) -> set[tuple[str, str]]:
    """Return the pairs of names that the arrows of a Mermaid flowchart connect, chains and ``&`` taken apart."""
    found = set()
    for line in drawing.splitlines():
        chain = [re.findall(r"(\w+)(?:\[[^]]*\])?(?: &|$)", part.strip()) for part in line.split("-->")]
        found |= {(a, b) for left, right in pairwise(chain) for a in left for b in right}
    return found


def test_the_map_draws_every_folder_and_no_arrow_back() -> None:
    drawing = re.findall(r"^```mermaid\n(.*?)^```$", (ROOT / "docs" / "architecture.md").read_text(), re.M | re.S)[0]
    drawn = {name for arrow in arrows(drawing) for name in arrow}
    assert drawn == {folder.replace(".", "_") for folder in folders()}
    order = dict.fromkeys(ROLES, 0) | {"adapters": 1, "offsite": 2}
    for upper, lower in arrows(drawing):
        if "_" in upper:
            package, _, name = upper.partition("_")
            assert lower.startswith(f"{package}_")
            assert layers(package)[name] < layers(package)[lower.partition("_")[2]], (upper, lower)
        else:
            assert order[upper] < order[lower]


def test_the_readme_names_every_folder() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for package in PACKAGES:
        (told,) = re.findall(rf"^\| `{package}/` \|.*$", text, re.M)
        within = {folder.partition(".")[2] for folder in folders() if folder.startswith(f"{package}.")}
        assert set(re.findall(r"`(\w+)`", told)) == within, package
