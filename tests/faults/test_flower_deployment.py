"""Flower's deployment engine on loopback: a SuperLink, nodes of clients, TLS, known keys only, offline.

Another app, sent by the SuperLink's operator, and a node whose key nobody registered, are refused.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from server.http.certificates import write_certificate

WAIT_SECONDS = 90.0
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "flower-deployment"
NAMES = ("anna", "bert")


@pytest.fixture
def processes(tmp_path, federation_lab):
    made = federation_lab.Processes(tmp_path, wait_seconds=WAIT_SECONDS)
    bin_folder = Path(sys.executable).parent
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    made.env |= {
        "PATH": f"{bin_folder}:{made.env['PATH']}",
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "FLWR_HOME": str(tmp_path / "flower-home"),
        "TLS": str(tmp_path / "tls"),
        "HF_HUB_OFFLINE": "1",
    }
    yield made
    made.close()


@pytest.fixture
def lab(tmp_path, federation_lab, make_party, whole_package, llama_folder):
    made = federation_lab.build(tmp_path, make_party, whole_package, llama_folder, names=NAMES, rounds=2)
    not_flowers = ("outbox", "port", "linger_seconds")
    shutil.copy(made.edit(made.owner, drop=not_flowers, deadline_seconds=60.0), tmp_path / "federation.yaml")
    write_certificate(tmp_path / "tls", ["127.0.0.1"], days=1)
    return made


def node_key(path: Path) -> Path:
    key = ec.generate_private_key(ec.SECP384R1())
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    )
    path.chmod(0o600)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.with_suffix(".pub").write_bytes(public)
    return path


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_rounds_another_app_and_an_unknown_node(processes, lab, federation_lab, tmp_path):
    owner = f". {EXAMPLE}/flower.sh; "

    def flwr(name, words, app=EXAMPLE):
        processes.start_program(name, "bash", "-euc", f"{owner}APP={app}; {words}")
        return processes.output(name)

    def node(name, key):
        settings = tmp_path / f"{name}-home" / "member.json"
        shutil.copy(lab.edit(lab.clients[name], drop=("poll_seconds", "patience_seconds")), settings)
        processes.start(
            f"{name}-{key.name}", "federate", "node", f"127.0.0.1:{processes.env['PORT']}", "--client", settings,
            "--app", digest, "--node-key", key, "--root-certificate", tmp_path / "tls" / "certificate.pem",
        )  # fmt: skip

    def connected(name):
        return "SuperNode ID" in processes.log(f"{name}-key")

    processes.start_program("superlink", EXAMPLE / "superlink.sh", merged=True)
    other = tmp_path / "other-app"
    shutil.copytree(EXAMPLE, other)
    settings = other / "pyproject.toml"
    settings.write_text(settings.read_text().replace("client.federation.flower:app", "evil:app"))
    mark = tmp_path / "evil-was-here"
    (other / "evil.py").write_text(
        f"open({str(mark)!r}, 'a').write(__name__)\nfrom flwr.clientapp import ClientApp\napp = ClientApp()\n"
    )
    digest = flwr("digest", f"{EXAMPLE}/digest.sh").strip()
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert flwr("other-digest", f"{EXAMPLE}/digest.sh {other}").strip() != digest
    processes.until(lambda: "Uvicorn running" in processes.log("superlink"), "superlink")
    for name in NAMES:
        key = node_key(tmp_path / f"{name}-home" / "key")
        flwr(f"register-{name}", f"flwr supernode register {key}.pub owner")
        node(name, key)
    processes.until(lambda: all(connected(name) for name in NAMES), "superlink")

    # A node whose key nobody registered does not get in.
    node("bert", node_key(tmp_path / "bert-home" / "unknown"))
    unknown = processes.running["bert-unknown"]
    processes.until(lambda: unknown.poll() is not None, "superlink", "anna-key", "bert-key")
    assert unknown.returncode == 5
    assert "Exit Code: 305" in processes.log("bert-unknown")
    assert "offsite: error: Flower's SuperNode ended" in processes.log("bert-unknown")

    # Another app is refused by both, and nothing of it is run on their side. The run that sent it comes to nothing.
    flwr("other-run", 'flwr run "$APP" owner --stream', app=other)
    for name in NAMES:
        assert f"{digest[:12]} is pinned; nothing of it was installed or run" in processes.log(f"{name}-key")
        assert not (tmp_path / f"{name}-home" / "work" / "round-0001").exists()
    assert not (tmp_path / "result" / "results.json").exists()
    assert not mark.exists()

    # The pinned app runs to its end.
    print(flwr("run", 'flwr run "$APP" owner --stream'))
    found = json.loads((tmp_path / "result" / "results.json").read_text())
    assert [sorted(one["used"]) for one in found["rounds"]] == [list(NAMES)] * 2
    for name in NAMES:
        assert found["plugged_in"][name] < found["zero_shot"][name]
        processes.running[f"{name}-key"].terminate()
        assert processes.end(f"{name}-key")["answered"] == 3  # a hello and two rounds
    processes.running["superlink"].terminate()
    processes.running["superlink"].communicate(timeout=30)
    processes.until(lambda: not processes.left())
    everything = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert not any(word in everything for word in federation_lab.WORDS.values())
