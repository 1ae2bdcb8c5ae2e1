from __future__ import annotations

import subprocess
import sys

import pytest

from offsite.errors import ConfigError
from offsite.guard import ROLES, check_install


@pytest.fixture
def home(tmp_path):
    for role in ROLES:
        (tmp_path / role).mkdir()
        (tmp_path / role / "__init__.py").write_text(f'"""Ours."""\n\nOFFSITE_ROLE = "{role}"\n')
    return tmp_path


def test_this_install_is_ours():
    check_install()


def test_a_missing_package(home, monkeypatch):
    monkeypatch.syspath_prepend(home)
    (home / "adapters" / "__init__.py").unlink()
    with pytest.raises(ConfigError, match="package 'adapters' of offsite-tuning is missing") as caught:
        check_install(home)
    assert "virtual environment of its own" in caught.value.hint


@pytest.mark.parametrize("text", ["", "__version__ = '1.0'\n", 'OFFSITE_ROLE = "client"\n', '# OFFSITE_ROLE = "x"\n'])
def test_a_foreign_package_in_our_place(home, monkeypatch, text):
    monkeypatch.syspath_prepend(home)
    (home / "adapters" / "__init__.py").write_text(text)
    with pytest.raises(ConfigError, match="package 'adapters' belongs to another distribution"):
        check_install(home)


def test_a_package_that_hides_ours(home, tmp_path_factory, monkeypatch):
    other = tmp_path_factory.mktemp("other")
    (other / "client").mkdir()
    (other / "client" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(home)
    monkeypatch.syspath_prepend(other)
    with pytest.raises(ConfigError, match="another package named 'client' hides the one of offsite-tuning"):
        check_install(home)


@pytest.mark.parametrize("name", ["client.py", "server.py"])
def test_a_users_own_module_is_never_imported(tmp_path, name):
    (tmp_path / name).write_text("raise SystemExit('the user module ran')\n")
    line = "from offsite.guard import check_install; check_install()"
    done = subprocess.run([sys.executable, "-c", line], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "the user module ran" not in done.stderr
    assert f"another package named '{name[:-3]}' hides the one of offsite-tuning" in done.stderr
