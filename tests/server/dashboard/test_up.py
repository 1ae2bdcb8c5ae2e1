"""``offsite owner up`` as a process: two addresses, TLS on both, one end."""

from __future__ import annotations

import datetime
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from owners_desk import submit

from offsite import cli
from offsite.errors import ConfigError, RunFailed
from server.dashboard import up
from server.dashboard.up import run
from server.http.certificates import write_certificate


def test_without_a_certificate_nothing_is_served(desk):
    with pytest.raises(ConfigError, match="no --certificate"):
        run(desk.settings())
    with pytest.raises(ConfigError, match="can be reached from other machines"):
        run(desk.settings(host="0.0.0.0"))


@pytest.mark.slow
def test_a_client_hands_in_and_the_owner_accepts_in_one_process_on_two_addresses(
    desk, make_job, live_exchange, tmp_path, monkeypatch, capfd, llama_like
):
    job = desk.add_job(make_job())
    sealed = live_exchange.seal(tmp_path / "sealed", job)
    monkeypatch.chdir(desk.folder)
    monkeypatch.setenv("OFFSITE_PASSPHRASE", "correct horse")
    (desk.folder / "offsite.toml").write_text(f'keys = "{desk.owner.keys}"\nregistry = "registry"\n')
    assert cli.run(["owner", "init", str(llama_like)]) == 0, "in a project that was begun before"
    assert desk.token not in capfd.readouterr().err
    words = [sys.executable, "-m", "offsite", "owner", "up", "--port", "0", "--dashboard-port", "0"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        said = ""
        while "Ctrl-C ends both" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        assert desk.token not in said, "a token that is there is not shown again"
        exchange, board = re.findall(r"https://127\.0\.0\.1:\d+(?!.*; it listens)", said)
        certificate = desk.folder / "tls" / "certificate.pem"
        with httpx.Client(verify=ssl.create_default_context(cafile=certificate)) as browser:
            for url, path, status in (
                (board, "/login", 200), (board, "/", 303), (board, "/v1/sealed", 303),
                (exchange, "/login", 404), (exchange, "/", 404), (exchange, "/v1/sealed", 401),
            ):  # fmt: skip
                assert browser.get(url + path).status_code == status, (url, path)
            with pytest.raises(httpx.TransportError):
                browser.get(board.replace("https", "http") + "/login")
            push = ["exchange", "push", exchange, str(sealed), "--certificate", str(certificate)]
            assert cli.run([*push, *desk.client.flags]) == 0
            (arrived,) = [path.name for path in (desk.folder / "registry" / "bundles").iterdir()]
            browser.base_url = board
            assert submit(browser, "/login", "/login", token=desk.token).status_code == 303
            confirm = f"/submissions/{arrived}/accept"
            assert submit(browser, confirm, confirm).status_code == 303
            assert cli.run(["exchange", "status", exchange, str(sealed), "--certificate", str(certificate),
                            *desk.client.flags]) == 0  # fmt: skip
        assert json.loads(capfd.readouterr().out.splitlines()[-1])["state"] == "accepted"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, err
    told = json.loads(out.splitlines()[-1])
    assert (told["exchange"], told["dashboard"], told["num_denied"]) == (exchange, board, 1)
    assert told["num_bundles_taken_in"] == 1
    assert desk.state(arrived) == "accepted"


def test_a_port_that_is_taken_is_said_before_the_keys_are_opened(desk, tmp_path):
    write_certificate(tmp_path / "tls", ("127.0.0.1",), days=1)
    tls = {
        "certificate": tmp_path / "tls" / "certificate.pem",
        "certificate_key": tmp_path / "tls" / "certificate-key.pem",
    }
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = desk.settings(port=0, dashboard_port=taken.getsockname()[1], passphrase_file=tmp_path / "none", **tls)
        with pytest.raises(RunFailed, match="is in use"):
            run(config)


def test_a_certificate_that_ends_soon_is_told(capsys):
    for days, told in ((40, ""), (12, "ends in 12 day(s)"), (-3, "has ended")):
        up._warn_of_end(datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days, hours=1))
        said = capsys.readouterr().err
        assert told in said
        assert bool(said) == bool(told)
