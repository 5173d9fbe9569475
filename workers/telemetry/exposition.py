"""Where a process tells how it is: `/metrics`, `/livez` and `/readyz` on a port of their own. No torch.

Not on the gateway's port: to it a proxy on the same machine is a neighbour, and whatever is shown to neighbours would
be shown to the world. A port that nothing forwards to needs no rules, and workers have no other one.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from workers.settings import QueueSettings

Checks = Callable[[], Mapping[str, str]]
"""What is wrong at the moment, by the name of the check; empty: nothing."""

_TIMEOUT_S: Final = 5.0
_LOG = structlog.stdlib.get_logger("workers.telemetry.exposition")


def open_exposition(
    settings: QueueSettings, registry: CollectorRegistry, *, alive: Checks, ready: Checks
) -> Exposition | None:
    """As the settings say, and started; None where they name no port.

    Raises:
        PortTakenError: see there.
    """
    if settings.metrics_port is None:
        return None
    exposition = Exposition(settings.metrics_host, settings.metrics_port, registry, alive=alive, ready=ready)
    exposition.start()
    return exposition


class PortTakenError(Exception):
    """Nobody can ask for metrics here; the message says what to do."""


class Exposition:
    """A small HTTP server in threads of its own, from `start` to `close`.

    Args:
        port: 0 is any free one.
        alive: no answer but a new process mends what this names. ready: what keeps work from being sent here.

    Raises:
        PortTakenError: see there.
    """

    def __init__(self, host: str, port: int, registry: CollectorRegistry, *, alive: Checks, ready: Checks) -> None:
        try:
            self._server = _Server((host, port), _Handler)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise PortTakenError(f"DREAMSERVE_METRICS_PORT: port {port} cannot be listened on ({reason})") from None
        self._server.registry = registry
        self._server.checks = {"/livez": alive, "/readyz": ready}
        self._thread = threading.Thread(target=self._server.serve_forever, name="exposition", daemon=True)

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return self._server.server_port

    def start(self) -> None:
        self._thread.start()
        _LOG.info("metrics", port=self.port)

    def close(self) -> None:
        """Stop listening."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    registry: CollectorRegistry
    checks: Mapping[str, Checks]


class _Handler(BaseHTTPRequestHandler):
    timeout = _TIMEOUT_S
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]  # the only one that uses this handler

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        check = self.server.checks.get(path)
        if path == "/metrics":
            encode, media_type = choose_encoder(self.headers.get("Accept", ""))
            self._answer(200, media_type, encode(self.server.registry))
        elif check is not None:
            failed = check()
            body = {"status": "failed", "failed": dict(failed)} if failed else {"status": "ok"}
            self._answer(503 if failed else 200, "application/json", json.dumps(body).encode())
        else:
            self._answer(404, "text/plain", b"")

    def _answer(self, status: int, media_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def version_string(self) -> str:
        return "dreamserve"

    def log_message(self, format: str, *args: object) -> None:
        """Who asks how it is asks often."""
