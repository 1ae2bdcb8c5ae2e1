"""Who gets past the door: the token, sessions and their end, forms of other pages, other hosts, large bodies."""

from __future__ import annotations

import json
import stat

import pytest
from owners_desk import HOST, Hidden, submit

from offsite.errors import BadKey, WrongBinding
from server.dashboard.access import TOKEN_NAME, Gatekeeper, Sessions, make_token
from server.dashboard.guard import LOGIN_COOKIE, SESSION_COOKIE
from server.dashboard.up import hosts_of


def test_the_token_opens_and_is_nowhere_on_the_disk(desk, capsys):
    browser = desk.open()
    assert submit(browser, "/login", "/login", token="offsite-owner-" + "x" * 43).status_code == 401
    assert browser.get("/").status_code == 303
    answer = submit(browser, "/login", "/login", token=desk.token)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = next(value for value in answer.headers.get_list("set-cookie") if value.startswith(SESSION_COOKIE))
    parts = {part.strip().lower() for part in cookie.split(";")[1:]}
    assert parts == {"httponly", "secure", "samesite=strict", "path=/"}
    assert browser.get("/").status_code == 200
    secret = cookie.partition("=")[2].partition(";")[0]
    for path in (*desk.folder.rglob("*"), *desk.owner.keys.rglob("*")):
        if path.is_file():
            assert desk.token.encode() not in path.read_bytes(), path.name
            assert secret.encode() not in path.read_bytes(), path.name
    assert stat.S_IMODE((desk.owner.keys / TOKEN_NAME).stat().st_mode) == 0o600
    assert desk.token not in capsys.readouterr().err
    log = (desk.folder / "registry" / "registry.log").read_text()
    assert [json.loads(line)["fields"]["verdict"] for line in log.splitlines() if "dashboard-login" in line] == [
        "wrong",
        "right",
    ]


def test_five_wrong_tokens_close_the_door_for_a_minute_to_that_address(desk):
    now = [0.0]
    browser = desk.open()
    keeper = Gatekeeper(desk.owner.keys, clock=lambda: now[0])
    object.__setattr__(desk.board, "gatekeeper", keeper)
    browser, other = desk.browser(), desk.browser(address="127.0.0.2")
    for _ in range(5):
        assert submit(browser, "/login", "/login", token="wrong").status_code == 401
    assert submit(browser, "/login", "/login", token="wrong").status_code == 429
    assert submit(browser, "/login", "/login", token=desk.token).status_code == 429, "what is too much is not looked at"
    assert submit(other, "/login", "/login", token=desk.token).status_code == 303
    now[0] = 60.0
    assert submit(browser, "/login", "/login", token=desk.token).status_code == 303
    for number in range(3000):
        keeper.judge("wrong", str(number))
    assert len(keeper._tries) <= 1024


def test_a_new_token_ends_the_one_before_and_damage_is_told(desk):
    before = desk.token
    after = make_token(desk.owner.keys)
    keeper = Gatekeeper(desk.owner.keys)
    assert (keeper.judge(before, "a"), keeper.judge(after, "a")) == ("wrong", "right")
    path = desk.owner.keys / TOKEN_NAME
    path.write_text('{"format": "offsite/dashboard/1", "sha256": "x"}')
    with pytest.raises(BadKey):
        Gatekeeper(desk.owner.keys)
    path.write_text('{"format": "offsite/dashboard/2"}')
    with pytest.raises(WrongBinding):
        Gatekeeper(desk.owner.keys)
    path.chmod(0o644)
    with pytest.raises(BadKey, match="others"):
        Gatekeeper(desk.owner.keys)


def test_sessions_end_idle_old_and_by_number():
    now = [0.0]
    sessions = Sessions(idle_seconds=100, clock=lambda: now[0])
    first = sessions.begin()
    for now[0] in (99.0, 198.0):
        assert sessions.find(first) is not None
    now[0] = 298.0
    assert sessions.find(first) is None
    second = sessions.begin()
    began = now[0]
    while now[0] < began + 12 * 3600 - 50:
        assert sessions.find(second) is not None
        now[0] += 50
    now[0] = began + 12 * 3600
    assert sessions.find(second) is None
    many = [sessions.begin() for _ in range(17)]
    assert sessions.find(many[0]) is None
    assert sessions.find(many[1]) is not None
    sessions.end(many[1])
    assert sessions.find(many[1]) is None


def test_logout_ends_the_session_for_whoever_copied_the_cookie(desk):
    browser = desk.logged_in()
    copied, other = browser.cookies[SESSION_COOKIE], desk.browser()
    other.cookies.set(SESSION_COOKIE, copied)
    assert other.get("/").status_code == 200
    token = Hidden(browser.get("/").text).found["form_token"]
    assert browser.post("/logout", data={"form_token": token}).headers["location"] == "/login"
    assert other.get("/").status_code == 303


def test_forms_of_another_session_or_page_do_nothing(desk, arrived):
    browser, other = desk.logged_in(), desk.browser()
    submit(other, "/login", "/login", token=desk.token)
    path = f"/submissions/{arrived}/refuse"
    token = Hidden(browser.get(path).text).found["form_token"]
    foreign = Hidden(other.get(path).text).found["form_token"]
    assert token != foreign
    good = {"form_token": token}
    tampered = [
        ({"x": "y"}, {}, 403),
        ({}, {}, 415),
        ({"form_token": ""}, {}, 403),
        ({"form_token": foreign}, {}, 403),
        ({"form_token": [token, token]}, {}, 403),
        (good, {"origin": "https://evil.example"}, 403),
        (good, {"origin": "null"}, 403),
        (good, {"origin": f"http://{HOST}"}, 403),
        (good, {"sec-fetch-site": "cross-site"}, 403),
        (good, {"sec-fetch-site": "same-site"}, 403),
        (good, {"host": "evil.example"}, 421),
        (good, {"host": "127.0.0.1:9999"}, 421),
        (good, {"content-type": "text/plain"}, 415),
        (good, {"content-type": "application/json"}, 415),
        ({"form_token": token, "x": "y" * 70_000}, {}, 413),
        ({"form_token": token, **{f"x{number}": "y" for number in range(300)}}, {}, 400),
    ]
    for data, headers, status in tampered:
        assert browser.post(path, data=data, headers=headers).status_code == status, (list(data), headers)
    assert browser.request("PUT", path, data=good).status_code == 405
    assert browser.request("DELETE", "/").status_code == 405
    assert browser.get("/", headers={"host": "evil.example"}).status_code == 421
    assert desk.state(arrived) == "verified"
    assert browser.post(path, data=good, headers={"origin": f"https://{HOST}"}).status_code == 303
    assert desk.state(arrived) == "refused", "the same form, untampered, is taken"


def test_the_login_form_needs_its_own_cookie(desk):
    browser, other = desk.open(), desk.browser()
    token = Hidden(browser.get("/login").text).found["form_token"]
    other.get("/login")
    assert other.post("/login", data={"form_token": token, "token": desk.token}).status_code == 403
    browser.cookies.delete(LOGIN_COOKIE)
    assert browser.post("/login", data={"form_token": token, "token": desk.token}).status_code == 403


def test_hosts_are_those_of_the_certificate_and_the_address_with_the_port():
    assert hosts_of(("localhost", "::1"), "127.0.0.1", 8444) == ["localhost:8444", "[::1]:8444", "127.0.0.1:8444"]
    assert hosts_of(("a",), "a", 443) == ["a:443", "a"]
