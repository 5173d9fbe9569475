"""The outermost shell of a request: its id, and the last net under every route."""

from __future__ import annotations

import re
import secrets

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.problems import TABLE, ProblemDetails, problem_response

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LOG = structlog.stdlib.get_logger("service")


class RequestShell:
    """ASGI layer that gives each request an id and turns any escaped exception into a problem.

    Only the exception's type is logged: its message may hold a prompt, a path or a piece of a picture.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope))
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:  # noqa: BLE001 - the outermost shell: nothing may pass it
            _LOG.error("request failed", request_id=request_id, exception=type(error).__name__)
            if not started:  # a half-sent answer can only be cut off, which returning does
                details = ProblemDetails("internal", TABLE["internal"].meaning)
                await problem_response(details, request_id)(scope, receive, send_with_id)


def _request_id(headers: Headers) -> str:
    """The caller's id if it is harmless in a log line, else a fresh one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
