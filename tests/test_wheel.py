"""The wheel: what is in it, and that it is enough to run the demo in an environment that has nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"adapters", "client", "emulator", "offsite", "server"}
FIGURES = ["zero_shot", "emulator_zero_shot", "emulator_tuned", "plugged_in", "lora_full", "recovery_vs_lora", "gap"]
FIGURES += ["adapter_bytes", "package_bytes", "seconds"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (found,) = out.glob("offsite_tuning-*-py3-none-any.whl")
    return found


def test_the_wheel_holds_the_packages_their_data_and_the_licences(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [name for name in names if name.endswith("METADATA")]
        described = archive.read(metadata).decode()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == PACKAGES
    for needed in ("public", "private", "heldout"):
        assert f"offsite/data/{needed}.jsonl.gz" in names
    assert {"LICENSE", "NOTICE"} <= {Path(name).name for name in names if "dist-info" in name}
    tracked = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(tracked.stdout.split()) <= set(names)
    assert "License-Expression: Apache-2.0" in described
    assert "Requires-Python: >=3.11" in described


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_short_demo_runs_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    torch = next(line for line in pins if line.startswith("torch=="))
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, torch], check=True)
    subprocess.run([*install, "-c", str(ROOT / "constraints.txt"), str(wheel)], check=True)
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_HUB_OFFLINE")}
    done = subprocess.run(
        [str(tmp_path / "venv" / "bin" / "offsite"), "demo", "--short", "-o", "demo"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        env=env,
        check=False,
    )
    assert done.returncode == 0
    figures = json.loads(done.stdout.decode().splitlines()[-1])
    assert [name for name in FIGURES if name not in figures] == []
    assert figures["plugged_in"] < figures["zero_shot"]
    assert "<html" in (tmp_path / "demo" / "report.html").read_text()
