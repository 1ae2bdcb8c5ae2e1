"""What a stranger installs: the wheel, in an empty environment, used from a folder that has modules of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"adapters", "client", "emulator", "offsite", "server"}
PROMISED = {
    *("zero_shot", "emulator_zero_shot", "emulator_tuned", "plugged_in", "lora_full"),
    *("recovery_vs_lora", "gap", "adapter_bytes", "package_bytes", "seconds"),
}


def clean_environment() -> dict[str, str]:
    """This process's, without what would let the new environment see this one; its number of threads stays."""
    ours = ("PYTHON", "VIRTUAL_ENV", "COVERAGE", "PYTEST", "HF_HUB_OFFLINE")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


def call(*command: object, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=clean_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == code, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (built,) = out.iterdir()
    return built


def test_the_wheel_holds_five_packages_and_their_data(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [Path(name) for name in archive.namelist()]
        metadata = archive.read(next(str(name) for name in names if name.name == "METADATA")).decode()
        scripts = archive.read(next(str(name) for name in names if name.name == "entry_points.txt")).decode()
    tops = {name.parts[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == PACKAGES
    assert len(tops) == len(PACKAGES) + 1
    tracked = call("git", "ls-files", *sorted(PACKAGES), cwd=ROOT).stdout.splitlines()
    assert {Path(line) for line in tracked} <= set(names)
    assert {"LICENSE", "NOTICE"} <= {name.name for name in names if name.parts[0] not in PACKAGES}
    for name in ("public", "private", "heldout"):
        assert Path("offsite", "data", f"{name}.jsonl.gz") in names
    assert Path("offsite", "data", "README.md") in names  # the attribution travels with the text
    strays = [name for name in names if name.suffix in {".pyc", ".jsonl", ".safetensors"} or "tests" in name.parts]
    assert strays == []
    assert "Name: offsite-tuning" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert "offsite = offsite.cli:main" in scripts


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The bin folder of a new environment that holds the wheel and what it needs, in the versions of this release."""
    home = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(home, with_pip=True)
    pip = [home / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    constraints = ROOT / "constraints.txt"
    (torch,) = [line for line in constraints.read_text().splitlines() if line.startswith("torch==")]
    call(*pip, torch, cwd=home)  # first and alone, as `make setup` does
    call(*pip, "-c", constraints, wheel, cwd=home)
    yield home / "bin"
    shutil.rmtree(home)  # two gigabytes, which pytest would keep for three runs


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder with a user's own modules under our names."""
    for name in ("client", "server", "adapters", "emulator"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('the user\\'s {name}.py ran')\n")
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_it_runs_from_a_folder_with_modules_of_the_same_names(installed, elsewhere):
    call(installed / "python", "-m", "pip", "check", cwd=elsewhere)
    shown = call(installed / "offsite", "--help", cwd=elsewhere).stdout
    for verb in ("fetch", "distill", "inspect", "tune", "plug-in", "evaluate", "serve", "report", "demo"):
        assert verb in shown
    seconds = []
    for _ in range(3):  # processor's: other tests run beside this one
        began = os.times()
        call(installed / "offsite", "--help", cwd=elsewhere)
        ended = os.times()
        seconds.append(sum(ended[2:4]) - sum(began[2:4]))
    assert min(seconds) < 0.5
    where = "import client, offsite, server; print(client.__file__, offsite.__file__, server.__file__)"
    for path in call(installed / "python", "-P", "-c", where, cwd=elsewhere).stdout.split():
        assert Path(path).is_relative_to(installed.parent)
    (elsewhere / "x.txt").write_text("text")
    refused = call(installed / "offsite", "tune", "nothing", "--data", "x.txt", "-o", "out", cwd=elsewhere, code=3)
    assert refused.stderr.splitlines() == [
        "tune: loading",
        "offsite: error: no package folder named 'nothing'",
        "offsite: hint: check the path",
    ]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_short_demo_runs_from_there(installed, elsewhere, llama_like):
    """On a tiny model: `make demo` runs it on the real one."""
    shutil.copytree(llama_like, elsewhere / "tiny-llama")
    done = call(installed / "offsite", "demo", "--short", "--model", "tiny-llama", "-o", "out", cwd=elsewhere)
    told = json.loads(done.stdout.splitlines()[-1])
    assert told.keys() >= PROMISED
    assert all(isinstance(told[name], int | float) for name in PROMISED)
    assert told["plugged_in"] < told["zero_shot"]
    assert (elsewhere / "out" / "report.html").stat().st_size > 10_000
    print(json.dumps(told))
