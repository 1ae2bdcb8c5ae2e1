"""The dashboard's routes, as an ASGI application behind its guard.

A page that decides is asked for first and confirmed by a form; every form carries out one verb, and one at a time.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from offsite.console import say
from offsite.errors import ConfigError, OffsiteError
from offsite.inspection.words import shown
from offsite.report.engine import render
from server.dashboard.access import TOKEN_LIMIT_CHARACTERS, Gatekeeper, LoginForms, Sessions
from server.dashboard.actions import Actions
from server.dashboard.guard import LOGIN, LOGIN_COOKIE, SESSION_COOKIE, STYLE, Guard, admitted
from server.dashboard.pages import page, problem_page
from server.dashboard.shapes import NAME_CHARACTERS
from server.dashboard.shelf import Shelf
from server.dashboard.views import Views
from server.registry.registry import Registry
from server.registry.rows import Entry

_DIGEST = re.compile(r"[0-9a-f]{64}")
_NUMBER = re.compile(r"[1-9][0-9]{0,11}")
_DONE = {
    "accept": "Accepted.",
    "refuse": "Refused; its files are gone.",
    "withdraw": "Withdrawn, and signed: the statement is listed under Log, for the client.",
}


@dataclass(frozen=True)
class Dashboard:
    """The routes over one registry and one project's folders.

    Args:
        note: one line more is in the owner's log; what was tried at the login is told there.
    """

    registry: Registry
    shelf: Shelf
    views: Views
    actions: Actions
    gatekeeper: Gatekeeper
    sessions: Sessions
    note: Callable[..., None]

    def application(self, hosts: Collection[str]) -> ASGIApp:
        """Return the ASGI application, which answers at these hosts alone."""
        login_forms = LoginForms()
        app = _routes(self, login_forms)
        return Guard(app, sessions=self.sessions, login_forms=login_forms, hosts=hosts)


def _routes(board: Dashboard, login_forms: LoginForms) -> FastAPI:
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    turn = asyncio.Lock()

    def show(template: str, request: Request, values: dict[str, object], here: str) -> Response:
        return page(template, values, here=here, form_token=admitted(request).form_token)

    def entry_of(bundle_id: str) -> Entry:
        try:
            return board.registry.entry(bundle_id)
        except ConfigError:
            raise HTTPException(404) from None

    async def carry_out(verb: Callable[[], object]) -> object:
        async with turn:
            return await asyncio.to_thread(verb)

    @app.get(STYLE, response_model=None)
    def style() -> Response:
        text = render("base.css", {}) + render("dashboard.css", {}, package="server.dashboard")
        return Response(text, media_type="text/css")

    @app.get(LOGIN, response_model=None)
    def login_form(request: Request) -> Response:
        return _login_page(request, login_forms, "", 200)

    @app.post(LOGIN, response_model=None)
    async def login(request: Request) -> Response:
        address = request.client.host if request.client else ""
        verdict = board.gatekeeper.judge(admitted(request).one("token", TOKEN_LIMIT_CHARACTERS), address)
        await asyncio.to_thread(board.note, verdict=verdict, address=address)
        if verdict == "too many":
            return _login_page(request, login_forms, "Five wrong tokens in a minute. Wait a minute.", 429)
        if verdict == "wrong":
            return _login_page(request, login_forms, "That is not the token.", 401)
        board.sessions.end(admitted(request).secret)
        answer = RedirectResponse("/", status_code=303)
        _set_cookie(answer, SESSION_COOKIE, board.sessions.begin())
        answer.delete_cookie(LOGIN_COOKIE, secure=True, httponly=True, samesite="strict")
        return answer

    @app.post("/logout", response_model=None)
    async def logout(request: Request) -> Response:
        board.sessions.end(admitted(request).secret)
        answer = RedirectResponse(LOGIN, status_code=303)
        answer.delete_cookie(SESSION_COOKIE, secure=True, httponly=True, samesite="strict")
        return answer

    @app.get("/", response_model=None)
    def overview(request: Request) -> Response:
        return show("overview.html.jinja", request, board.views.overview(), "/")

    @app.get("/packages/{digest}", response_model=None)
    def package(request: Request, digest: str) -> Response:
        found = board.views.package(digest) if _DIGEST.fullmatch(digest) else None
        if found is None:
            raise HTTPException(404)
        return show("package.html.jinja", request, found, "/")

    @app.get("/submissions", response_model=None)
    def submissions(request: Request) -> Response:
        return show("submissions.html.jinja", request, board.views.submissions(), "/submissions")

    @app.get("/submissions/{bundle_id}", response_model=None)
    def submission(request: Request, bundle_id: str) -> Response:
        one = board.views.submission(entry_of(bundle_id))
        done = _DONE.get(request.query_params.get("done", ""), "")
        return show("submission.html.jinja", request, {"one": one, "done": done}, "/submissions")

    @app.get("/submissions/{bundle_id}/{verb}", response_model=None)
    def confirm(request: Request, bundle_id: str, verb: str) -> Response:
        entry, verdict = entry_of(bundle_id), board.actions.verdicts.get(verb)
        if verdict is None:
            raise HTTPException(404)
        one = board.views.submission(entry)
        folders = board.shelf.adapted(entry.id) if verb == "withdraw" else {}
        named = [(digest, shown(path.name, NAME_CHARACTERS)) for digest, path in folders.items()]
        values = {"one": one, "verdict": verdict, "folders": named}
        return show("confirm.html.jinja", request, values, "/submissions")

    @app.post("/submissions/{bundle_id}/{verb}", response_model=None)
    async def decide(request: Request, bundle_id: str, verb: str) -> Response:
        entry, verdict = await asyncio.to_thread(entry_of, bundle_id), board.actions.verdicts.get(verb)
        if verdict is None:
            raise HTTPException(404)
        adapted = admitted(request).form.get("adapted", [])
        await carry_out(lambda: verdict.carry_out(entry.id, adapted))
        return RedirectResponse(f"/submissions/{entry.id}?done={verb}", status_code=303)

    @app.get("/invitations", response_model=None)
    def invitations(request: Request) -> Response:
        values = {**board.views.invitations(), "done": request.query_params.get("done", "") == "1"}
        return show("invitations.html.jinja", request, values, "/invitations")

    @app.post("/invitations", response_model=None)
    async def invite(request: Request) -> Response:
        given = admitted(request)
        what, title = given.one("what"), given.one("title")
        ticked = {name: given.one(name) == "yes" for name in ("by_exchange", "seals")}
        await carry_out(lambda: board.actions.invite(what, title=title, **ticked))
        return RedirectResponse("/invitations?done=1", status_code=303)

    @app.get("/invitations/{digest}", response_model=None)
    def invitation(digest: str) -> Response:
        return _file(board.shelf, "invitation", digest)

    @app.get("/withdrawals/{digest}", response_model=None)
    def withdrawal(digest: str) -> Response:
        return _file(board.shelf, "withdrawal", digest)

    @app.get("/federations", response_model=None)
    def federations(request: Request) -> Response:
        return show("federations.html.jinja", request, {"found": board.views.federations()}, "/federations")

    @app.get("/reports", response_model=None)
    def reports(request: Request) -> Response:
        return show("reports.html.jinja", request, {"found": board.views.reports()}, "/reports")

    @app.get("/log", response_model=None)
    def log(request: Request) -> Response:
        before = request.query_params.get("before", "")
        values = board.views.log(int(before) if _NUMBER.fullmatch(before) else None)
        values["done"] = request.query_params.get("done", "") == "1"
        return show("log.html.jinja", request, values, "/log")

    @app.post("/log/verify", response_model=None)
    async def verify_log() -> Response:
        await carry_out(board.actions.verify_log)
        return RedirectResponse("/log?done=1", status_code=303)

    async def failed(request: Request, error: Exception) -> Response:
        form_token = admitted(request).form_token
        if isinstance(error, HTTPException):
            told = "there is nothing at this address" if error.status_code == 404 else "this page takes no such request"
            return problem_page(error.status_code, told, form_token=form_token)
        if isinstance(error, OffsiteError):
            say(f"dashboard: {type(error).__name__}: {error}")
            return problem_page(409, str(error), error.hint or "", form_token=form_token)
        return problem_page(500, "the dashboard failed at this request; its terminal says how", form_token=form_token)

    for kind in (HTTPException, OffsiteError, Exception):
        app.add_exception_handler(kind, failed)
    return app


def _login_page(request: Request, login_forms: LoginForms, problem: str, status: int) -> Response:
    cookie = request.cookies.get(LOGIN_COOKIE) or login_forms.begin()
    values = {"problem": problem, "login_token": login_forms.token(cookie)}
    answer = page("login.html.jinja", values, status=status)
    _set_cookie(answer, LOGIN_COOKIE, cookie)
    return answer


def _set_cookie(answer: Response, name: str, value: str) -> None:
    answer.set_cookie(name, value, secure=True, httponly=True, samesite="strict", path="/")


def _file(shelf: Shelf, kind: str, digest: str) -> Response:
    found = shelf.file(kind, digest) if _DIGEST.fullmatch(digest) else None
    if found is None:
        raise HTTPException(404)
    name, raw = found
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:100]
    headers = {"Content-Disposition": f'attachment; filename="{safe}"'}
    return Response(raw, media_type="application/octet-stream", headers=headers)
