"""The three people's walk-throughs, run as they stand.

The ``sh`` blocks of ``docs/owner.md``, ``docs/client.md`` and ``docs/auditor.md`` are run in order by bash, with an
``offsite`` on the path whose processes find torch loaded, the owner's (and the auditor's) in one folder and the
client's in another. Between them this test carries the two cards, reads each party's fingerprint to the other, carries
``job.sealed`` and ``package.sealed`` one way and ``bundle.sealed`` and ``privacy.sealed`` the other, and nothing else.
`SHORTER` lists every textual substitution that is made.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import offsite_script

from offsite import cli
from offsite.config import flag_name
from offsite.keys.identity import read_card

DOCS = Path(__file__).parent.parent.parent / "docs"
ROOT = DOCS.parent
CARDS = "<!-- cards cross here -->"
PAUSE = "<!-- the client's walk-through happens here -->"
SHORTER = {
    "--steps 300": "--steps 2 --batch-size 1 --block-tokens 64 --calibration-tokens 512 --evaluation-tokens 128",
    # of few sampled answers all may earn the same; weights of a later step than the first are looked at, too
    "--rloo-samples 8 --steps 200": "--rloo-samples 8 --steps 4 --evaluate-every 4 --batch-size 1 --block-tokens 64 "
    "--validation 0.002",
    "--steps 200": "--steps 2 --batch-size 1 --block-tokens 64 --validation 0.002",
    "--count 30 -o": "--count 8 --tokens 16 --secrets 2 --candidates 8 -o",
    "--canaries canaries -o audit": "--canaries canaries --rows 40 --tokens-per-row 32 --secrets-samples 2 -o audit",
    "--audit audit --keys": "--audit audit --accept-leakage --keys",  # after two steps; test_client.py plays it without
    "--limit-tokens 20000": "--limit-tokens 256 --block-tokens 64",
    "steps=200": "steps=2",
    "block_tokens=256, batch_size=4, validation=0.1": "block_tokens=64, batch_size=1, validation=0.002",
}
PAGES = [*sorted(DOCS.glob("**/*.md")), *sorted(ROOT.glob("*.md"))]
PAGES += [page for name in ("benchmarks", "examples", "tests") for page in sorted((ROOT / name).glob("**/README.md"))]


def fenced(text: str, language: str) -> list[str]:
    """Return the contents of the fenced blocks of that language, in order."""
    return [found.group(1) for found in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)]


def run_blocks(text: str, folder: Path, port: int, scripts: Path, **told: str) -> str:
    """Run the text's ``sh`` blocks in `folder` and return what they printed; the first that fails fails the test."""
    path = os.pathsep.join([str(scripts), str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env |= {"OFFSITE_PASSPHRASE": f"of the {folder.name}", **told}
    printed = []
    for block in fenced(text, "sh"):
        if "curl" in block and shutil.which("curl") is None:
            continue
        for long, short in {**SHORTER, "--port 8000": f"--port {port}", ":8000/": f":{port}/"}.items():
            block = block.replace(long, short)
        block = _once(block, " --block-tokens 64")
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=folder,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=900,
            check=False,
        )
        printed.append(done.stdout)
        assert done.returncode == 0, f"{block}\nended with {done.returncode}:\n{done.stdout}"
    return "\n".join(printed)


def _once(block: str, words: str) -> str:
    """Return the block with `words` at most once in each command, which may go on over several lines."""
    kept = []
    for command in re.split(r"(?<!\\)\n", block):
        before, found, after = command.partition(words)
        kept.append(before + found + after.replace(words, ""))
    return "\n".join(kept)


def fingerprint(party: Path) -> str:
    return read_card((party / "keys" / "card.json").read_bytes()).fingerprint


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def scripts() -> Iterator[Path]:
    with offsite_script() as folder:
        yield folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_three_walkthroughs(tmp_path: Path, scripts: Path) -> None:
    owner, client = tmp_path / "owner", tmp_path / "client"
    owner.mkdir()
    client.mkdir()
    first, rest = (DOCS / "owner.md").read_text().split(CARDS)
    before, after = rest.split(PAUSE)
    for_client = (DOCS / "client.md").read_text()
    keys, work = for_client.split(CARDS)

    run_blocks(first, owner, free_port(), scripts)
    run_blocks(keys, client, free_port(), scripts)
    assert (owner / "unmarked.owner.json").is_file()
    shutil.copy(owner / "keys" / "card.json", client / "owner.card.json")
    shutil.copy(client / "keys" / "card.json", owner / "client.card.json")
    told = {name.upper(): fingerprint(folder) for name, folder in (("owner", owner), ("client", client))}
    run_blocks(before, owner, free_port(), scripts, **told)
    for name in ("job.sealed", "package.sealed"):
        shutil.copytree(owner / name, client / name)

    run_blocks(work, client, free_port(), scripts, **told)
    script = fenced(for_client, "python")[0]
    for long, short in SHORTER.items():
        script = script.replace(long, short)
    (client / "client_tune.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "client_tune.py"], cwd=client, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "nats per token after 2 steps" in done.stdout
    assert (client / "bundle-from-python" / "offsite.json").is_file()
    assert not list(client.glob("*owner.json"))
    for name in ("bundle.sealed", "privacy.sealed"):
        shutil.copytree(client / name, owner / name)

    printed = run_blocks(after, owner, free_port(), scripts, **told)
    assert '"object":"text_completion"' in printed.replace(" ", "")
    assert "adapter_model.safetensors" not in [path.name for path in (owner / "adapted").iterdir()]  # whole blocks
    assert "<html" in (owner / "report.html").read_text()
    printed = run_blocks((DOCS / "auditor.md").read_text(), owner, free_port(), scripts, **told)
    assert "the bundle was made for this package" in printed
    assert "the same figures again" in printed
    assert "NOT DIFFERENTIALLY PRIVATE" in printed
    assert "accepted leakage: True" in printed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_block_is_one_that_bash_or_python_reads(page: Path) -> None:
    for block in fenced(page.read_text(), "sh"):
        subprocess.run(["bash", "-n", "-c", block], check=True)
    for block in fenced(page.read_text(), "python"):
        compile(block, page.name, "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_flag_in_a_command_is_one_of_its_verbs(page: Path) -> None:
    text = page.read_text().replace("\\\n", " ")
    commands = re.findall(r"(?:^|[`$( ])offsite ([a-z-]+)((?: [^`\n|&;]*)?)", text, re.M)
    for verb, rest in commands:
        name = " ".join([verb, *rest.split()[:1]])
        name = name if name in cli.VERBS else verb
        if name not in cli.VERBS:
            continue
        fields = cli._resolve(cli.VERBS[name].settings).model_fields
        known = {flag_name(field) for field in fields} | {"--config", "--help"}
        known |= {f"--no-{flag[2:]}" for flag in known}
        unknown = set(re.findall(r"(?<=\s)--[a-z][a-z-]*", rest)) - known
        assert not unknown, f"offsite {name}{rest}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_and_path_is_there(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith(("http://", "https://")) or (page.parent / target).exists(), target
    named = r"`((?:offsite|emulator|adapters|client|server|configs|docs|tests|benchmarks)/[\w./-]+)`"
    for target in re.findall(named, text):
        if re.search(r"/\d+$", target):  # a format's name and number
            continue
        assert (ROOT / target).exists(), target


def test_every_substitution_is_needed() -> None:
    text = "".join(path.read_text() for path in DOCS.glob("*.md"))
    assert [long for long in SHORTER if long not in text] == []
