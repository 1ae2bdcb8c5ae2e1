"""What every request to the dashboard passes before a route sees it, and every answer on its way back.

In this order: the host it was sent to, the method, the session, and of a form its size, its origin and its token. No
route can forget one of these, for none is asked before all of them were.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.dashboard.access import LoginForms, Session, Sessions
from server.dashboard.pages import problem_page
from server.http.bodies import declared_bytes
from server.http.refusals import Refusal

SESSION_COOKIE, LOGIN_COOKIE = "__Host-offsite-session", "__Host-offsite-login"
LOGIN, STYLE = "/login", "/style.css"
PUBLIC = frozenset({LOGIN, STYLE})
"""What is answered without a session."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with no-referrer, browsers send forms from the origin "null"
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}
"""On every answer, also on refusals."""

_BODY_LIMIT_BYTES, _BODY_SECONDS, _MAX_FIELDS = 64 * 2**10, 10.0, 200


@dataclass(frozen=True)
class Admitted:
    """What a route is told of a request. `form` holds every field's values, without the token; empty of a GET."""

    session: Session | None
    secret: str
    form: Mapping[str, list[str]] = field(default_factory=dict)

    @property
    def form_token(self) -> str:
        """What stands in every form of this session; nothing where there is none."""
        return "" if self.session is None else self.session.form_token

    def one(self, name: str, limit_characters: int = 1000) -> str:
        """Return a field's one value, empty where there is none, or it is too long to be meant."""
        found = self.form.get(name, [])
        return found[0].strip() if len(found) == 1 and len(found[0]) <= limit_characters else ""


class Guard:
    """The application, and what stands before it.

    Args:
        hosts: what the header ``Host`` may say, each with its port.
    """

    def __init__(self, app: ASGIApp, *, sessions: Sessions, login_forms: LoginForms, hosts: Collection[str]) -> None:
        self._app, self._sessions, self._login_forms = app, sessions, login_forms
        self._hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; the server's own start and end are passed on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            answer = await self._refused_or_admitted(scope, receive)
        except Refusal as refusal:
            answer = problem_page(refusal.status, refusal.message)
        except ClientDisconnect:
            answer = Response(status_code=400)  # nobody reads this
        await (answer or self._app)(scope, receive, send_with_headers)

    async def _refused_or_admitted(self, scope: Scope, receive: Receive) -> Response | None:
        """Return an answer that ends the request; None, once the scope's state says who asks and what.

        Raises:
            Refusal: when the request is not in order.
        """
        request = Request(scope, receive)
        self._check_host(request.headers)
        if request.method not in ("GET", "HEAD", "POST"):
            raise Refusal(405, "BadSchema", "this page takes no such request")
        secret = request.cookies.get(SESSION_COOKIE, "")
        session = self._sessions.find(secret) if secret else None
        path = scope["path"]
        if session is None and path not in PUBLIC:
            return RedirectResponse(LOGIN, status_code=303)
        form = {}
        if request.method == "POST":
            self._check_origin(request.headers)
            form = await _form(request)
            given = form.pop("form_token", [""])
            expected = self._expected_token(request, session if path != LOGIN else None)
            if len(given) != 1 or not expected or not hmac.compare_digest(given[0].encode(), expected.encode()):
                raise Refusal(403, "Untrusted", "this form is not one of this session: load the page again, and repeat")
        scope.setdefault("state", {})["admitted"] = Admitted(session, secret, form)
        return None

    def _expected_token(self, request: Request, session: Session | None) -> str:
        if session is not None:
            return session.form_token
        cookie = request.cookies.get(LOGIN_COOKIE, "")
        return self._login_forms.token(cookie) if cookie else ""

    def _check_host(self, headers: Headers) -> None:
        given = headers.getlist("host")
        if len(given) != 1 or given[0].lower() not in self._hosts:
            raise Refusal(421, "WrongBinding", "this is not the address of the dashboard")

    def _check_origin(self, headers: Headers) -> None:
        """A browser says from which page a form comes; what says nothing is no browser of today, and has the token."""
        origin = headers.get("origin")
        if origin is not None and origin.lower() != f"https://{headers['host'].lower()}":
            raise Refusal(403, "Untrusted", "this form was sent from another page")
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            raise Refusal(403, "Untrusted", "this form was sent from another page")


def admitted(request: Request) -> Admitted:
    """Return what the guard found of the request."""
    found: Admitted = request.scope["state"]["admitted"]
    return found


async def _form(request: Request) -> dict[str, list[str]]:
    """Return the fields of a form, in the one encoding that a plain form has.

    Raises:
        Refusal: 400, 408, 411, 413 or 415.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise Refusal(415, "BadSchema", "expected a form")
    if declared_bytes(request) > _BODY_LIMIT_BYTES:
        raise Refusal(413, "TooLarge", f"a form has at most {_BODY_LIMIT_BYTES} bytes")
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            raw = bytearray()
            async for part in request.stream():
                raw += part  # no longer than declared: the HTTP parser sees to that
                if len(raw) > _BODY_LIMIT_BYTES:
                    raise Refusal(413, "TooLarge", f"a form has at most {_BODY_LIMIT_BYTES} bytes")
    except TimeoutError:
        raise Refusal(408, "TooLarge", "the form came too slowly") from None
    try:
        fields = parse_qsl(
            raw.decode("ascii"), keep_blank_values=True, strict_parsing=bool(raw), errors="strict",
            max_num_fields=_MAX_FIELDS,
        )  # fmt: skip
    except ValueError:
        raise Refusal(400, "BadSchema", "this is no form") from None
    form: dict[str, list[str]] = {}
    for name, value in fields:
        form.setdefault(name, []).append(value)
    return form
