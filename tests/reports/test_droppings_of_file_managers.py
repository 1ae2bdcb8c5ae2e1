"""People look into a folder with a file manager before they send it, and the file manager leaves files there.

What was met: a package in which the Finder had left `.DS_Store` was refused as holding "1 file(s)" too many, without
saying which. Such files are overlooked now and never cross; any other file that does not belong is named, in printable
ASCII whatever its name holds.
"""

from __future__ import annotations

import shutil

import pytest

from offsite.artefacts.bundle import open_bundle
from offsite.artefacts.job import write_job
from offsite.artefacts.package import open_package
from offsite.errors import WrongNames
from offsite.exchange.verbs import open_run, rewrap_run, seal_run
from offsite.folders import is_dropping
from offsite.sealed.config import OpenConfig, RewrapConfig, SealConfig
from offsite.sealed.folder import read_sealed

DROPPINGS = [".DS_Store", "Thumbs.db", "THUMBS.DB", "desktop.ini", "Desktop.ini", "._offsite.json", ".directory"]
FOREIGN = {
    "notes.txt": "'notes.txt'",
    "späti": r"'sp\xe4ti'",
    "line\nbreak": r"'line\nbreak'",
    "\x1b[31mred": r"'\x1b[31mred'",
    "\u202etxt.exe": r"'\u202etxt.exe'",
    ".DS_Store2": "'.DS_Store2'",
    "DS_Store": "'DS_Store'",
    "x" * 200: "'" + "x" * 80 + "'",
}


def litter(folder):
    """Leave what file managers leave, in the folder and one below; return the folder."""
    for place in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        for name in DROPPINGS:
            (place / name).write_bytes(b"host, user and window positions")
        (place / "__MACOSX").mkdir(exist_ok=True)
        (place / "__MACOSX" / "._x").write_bytes(b"more of it")
    return folder


def names_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def config(cls, party, **values):
    return cls(**{**values, "keys": party.keys, "passphrase_file": party.passphrase})


@pytest.fixture
def sides(parties, make_job, tmp_path):
    """Owner and client, and a job's folder; every folder a test uses lies in the test's own."""
    write_job(tmp_path / "job", make_job())
    return parties


def test_packages_and_bundles_open_all_the_same(dropped_package, tiny_bundle, tmp_path):
    package = litter(shutil.copytree(dropped_package.path, tmp_path / "package"))
    bundle = litter(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))
    assert open_package(package).digest == dropped_package.digest
    assert open_bundle(bundle).digest == tiny_bundle.digest


def test_nothing_of_it_crosses(sides, dropped_package, make_party, tmp_path):
    """Job, package and report: littered, sealed, littered again, rewrapped, opened."""
    owner, client = sides
    new = make_party("client-new")
    from offsite.keys.trust import TrustStore

    TrustStore(new.keys).add(owner.identity.public.card, owner.fingerprint)
    plain = {"job": tmp_path / "job", "package": shutil.copytree(dropped_package.path, tmp_path / "package")}
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text('{"figure": 1}')
    plain["report"] = tmp_path / "report"
    expected = {name: names_below(folder) for name, folder in plain.items()}
    for name, folder in plain.items():
        job = {} if name == "job" else {"job": tmp_path / "job"}
        sealed, out = tmp_path / f"{name}.sealed", tmp_path / f"{name}.opened"
        seal_run(config(SealConfig, owner, input=litter(folder), output=sealed, **job))
        clean = names_below(sealed)
        assert not [path for path in clean if is_dropping(path.rpartition("/")[2])]
        moved = tmp_path / f"{name}.moved"
        rewrap_run(config(RewrapConfig, client, sealed=litter(sealed), to=new.keys, output=moved,
                          to_passphrase_file=new.passphrase))  # fmt: skip
        assert names_below(moved) == clean
        open_run(config(OpenConfig, client, sealed=sealed, output=out))
        assert names_below(out) == expected[name]
        open_run(config(OpenConfig, new, sealed=litter(moved), output=tmp_path / f"{name}.new"))
        assert names_below(tmp_path / f"{name}.new") == expected[name]


@pytest.mark.parametrize("name", FOREIGN)
def test_any_other_file_is_named_in_printable_ascii(name, sides, dropped_package, tmp_path):
    package = shutil.copytree(dropped_package.path, tmp_path / "package")
    seal_run(config(SealConfig, sides[0], input=tmp_path / "job", output=tmp_path / "job.sealed"))
    (package / name).write_text("x")
    (tmp_path / "job.sealed" / name).write_text("x")
    (tmp_path / "job" / name).write_text("x")
    with pytest.raises(WrongNames) as of_package:
        open_package(package)
    with pytest.raises(WrongNames) as of_sealed:
        read_sealed(tmp_path / "job.sealed")
    with pytest.raises(WrongNames) as of_job:
        seal_run(config(SealConfig, sides[0], input=tmp_path / "job", output=tmp_path / "out"))
    for caught in (of_package, of_sealed, of_job):
        message = str(caught.value)
        assert FOREIGN[name] in message
        assert message.isascii()
        assert message.isprintable()


def test_many_are_counted(dropped_package, tmp_path):
    package = shutil.copytree(dropped_package.path, tmp_path / "package")
    for number in range(9):
        (package / f"extra-{number}").write_text("x")
    with pytest.raises(WrongNames, match=r"'extra-0', 'extra-1', 'extra-2' and 6 more$"):
        open_package(package)
