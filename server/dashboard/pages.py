"""Pages of the dashboard: templates filled in, as answers."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import HTMLResponse

from offsite.inspection.words import shown
from offsite.report.engine import render

SECTIONS = (
    ("/", "Overview"),
    ("/submissions", "Arrived"),
    ("/invitations", "Invitations"),
    ("/federations", "Federations"),
    ("/reports", "Reports"),
    ("/log", "Log"),
)
"""The navigation, in its order."""


def page(
    template: str, values: Mapping[str, object], *, here: str = "", form_token: str = "", status: int = 200
) -> HTMLResponse:
    """Return a page; `here` is the section it belongs to, and without a `form_token` it offers no way to act."""
    frame = {"sections": SECTIONS, "here": here, "form_token": form_token}
    return HTMLResponse(render(template, {**frame, **values}, package="server.dashboard"), status_code=status)


def problem_page(status: int, message: str, hint: str = "", *, form_token: str = "") -> HTMLResponse:
    """Return the page that says what was not done, and why."""
    values = {"message": shown(message), "hint": shown(hint)}
    return page("problem.html.jinja", values, form_token=form_token, status=status)
