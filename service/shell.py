"""The outermost shell of a request: its id, its trace, its line in the log, and the last net under every route."""

from __future__ import annotations

import logging
import re
import secrets
import time
from contextlib import AbstractContextManager, nullcontext

import structlog
from opentelemetry.trace import INVALID_SPAN, Span
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from service.headers import checked_traceparent
from service.metrics import GatewayMetrics
from service.problems import TABLE, ProblemDetails, problem_response
from workers.telemetry.tracing import Tracing, traceparent_of

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_QUIET = frozenset({"/livez", "/readyz"})
"""Asked every few seconds by who watches; logged at debug only."""
_NO_SNIFFING = (b"x-content-type-options", b"nosniff")
_LOG = structlog.stdlib.get_logger("service")


class RequestShell:
    """ASGI layer that gives each request an id and turns any escaped exception into a problem.

    Of a request it logs, counts and traces the route's template, never the path or the query. Of an exception only the
    type is logged: its message may hold a prompt, a path or a piece of a picture.
    """

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics, tracing: Tracing) -> None:
        self.app = app
        self.metrics = metrics
        self.tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        began = time.perf_counter()
        with bound_contextvars(request_id=request_id), self._span(scope, headers) as span:
            state["traceparent"] = traceparent_of(span) or checked_traceparent(headers)
            status = await self._answer(scope, receive, send, request_id)
            self._tell(scope, span, status, time.perf_counter() - began)

    def _span(self, scope: Scope, headers: Headers) -> AbstractContextManager[Span]:
        """Around the request, if traces go anywhere; whoever only watches over the service is no part of one."""
        if not self.tracing.on or scope["path"] in _QUIET:
            return nullcontext(INVALID_SPAN)
        return self.tracing.span("request", checked_traceparent(headers))

    async def _answer(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> int:
        """Have the application answer; the status that was sent."""
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode()), _NO_SNIFFING]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:  # noqa: BLE001 - the outermost shell: nothing may pass it
            _LOG.error("request failed", exception=type(error).__name__)
            if not status:  # a half-sent answer can only be cut off, which returning does
                details = ProblemDetails("internal", TABLE["internal"].meaning)
                scope["state"]["problem"] = details.code
                await problem_response(details, request_id)(scope, receive, send_with_id)
        return status

    def _tell(self, scope: Scope, span: Span, status: int, seconds: float) -> None:
        route, method, code = getattr(scope.get("route"), "path", None), scope["method"], scope["state"].get("problem")
        self.metrics.answered(method, route, status, seconds)
        if code is not None:
            self.metrics.rejected(code)
        level = logging.DEBUG if route in _QUIET else logging.INFO
        said = {"code": code} if code else {}
        _LOG.log(level, "request", method=method, route=route, status=status, seconds=round(seconds, 4), **said)
        if span.is_recording():
            span.update_name(f"{method} {route}" if route else method)
            span.set_attributes({"http.request.method": method, "http.response.status_code": status})
            if route:
                span.set_attribute("http.route", route)


def _request_id(headers: Headers) -> str:
    """The caller's id if it is harmless in a log line, else a fresh one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
