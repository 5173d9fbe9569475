"""Processes of a service, words to send to them, and everything that they leave behind to look for the words in."""

from __future__ import annotations

import base64
import io
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
from PIL import Image, PngImagePlugin

from tests.waiting import wait_for
from tests.workers.courier.hosts import AUTHORITY, Host
from workers.redis_process import RedisProcess

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
WORDS = {
    name: f"c4n{name}{number:04d}x"
    for number, name in enumerate(
        (
            "prompt",
            "negative",
            "image",
            "metadata",
            "refurl",
            "hookurl",
            "idem",
            "wrongkey",
            "path",
            "query",
            "header",
            "tenant",
        ),
        start=1371,
    )
}
BODIES = ("prompt", "negative", "metadata", "refurl", "hookurl")
"""What a job's record holds, since a worker or the courier needs it."""


def forms(word: str) -> list[bytes]:
    """A word as it is, and as it looks within base64, wherever it begins there."""
    raw = word.encode()
    return [raw, *(base64.b64encode(b"\0" * shift + raw + b"\0" * 3)[4:-8] for shift in range(3))]


def found(words: Mapping[str, str], sinks: Mapping[str, bytes]) -> list[str]:
    """Which word is in which sink."""
    return [
        f"{name} in {where}"
        for name, word in words.items()
        for where, content in sinks.items()
        if any(form in content for form in forms(word))
    ]


def picture(word: str) -> bytes:
    """A picture with the word in its bytes."""
    note = PngImagePlugin.PngInfo()
    note.add_text("Comment", word)
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (1, 2, 3)).save(buffer, "PNG", pnginfo=note)
    return buffer.getvalue()


class Collector(ThreadingHTTPServer):
    """Takes what is exported to it, byte for byte."""

    daemon_threads = True

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                collector.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


@dataclass
class House:
    """The processes of a service, and what they say."""

    home: Path
    server: RedisProcess
    host: Host
    collector: Collector
    port: int
    key: str
    client: httpx2.Client = field(default_factory=lambda: httpx2.Client(timeout=240, trust_env=False))
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict[str, subprocess.Popen[bytes]])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def logs(self) -> dict[str, bytes]:
        return {f"log of {path.stem}": path.read_bytes() for path in self.home.glob("*.log")}

    def start(self, name: str, *command: str) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("DREAMSERVE_", "OTEL_"))} | {
            "DREAMSERVE_REDIS_URL": self.server.url,
            "DREAMSERVE_STATE_DIR": str(self.home / "state"),
            "DREAMSERVE_AUTH": "keys",
            "DREAMSERVE_LOG_LEVEL": "debug",
            "DREAMSERVE_METRICS_PORT": "0",
            "DREAMSERVE_METRICS_TENANTS": "false",
            "DREAMSERVE_EGRESS_PORTS": f"443,{self.host.port}",
            "DREAMSERVE_EGRESS_NETWORKS": "127.0.0.0/8,::1/128",
            "DREAMSERVE_EGRESS_AUTHORITIES": str(AUTHORITY),
            "DREAMSERVE_WEBHOOK_SECRETS": SECRET,
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self.collector.server_port}",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            "FASTAPI_OTEL_AUTO_CONFIGURE": "true",  # FastAPI's own spans and records would hold paths and queries
            "STANDIN_DIR": str(self.home),
        }
        with (self.home / f"{name}.log").open("ab") as log:
            command = (sys.executable, "-m", *command)
            self.processes[name] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def ask(self, method: str, path: str, key: str | None = None, **more: Any) -> httpx2.Response:
        headers = {"Authorization": f"Bearer {self.key if key is None else key}"} | more.pop("headers", {})
        return self.client.request(method, f"{self.url}{path}", headers=headers, **more)

    def ended(self, job_id: str) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            body = self.ask("GET", f"/v1/jobs/{job_id}").json()
            return body if body["status"] not in ("queued", "running") else None

        return wait_for(look, "the end of a job")

    def metrics(self) -> dict[str, bytes]:
        """What each process shows on its port."""
        pages: dict[str, bytes] = {}
        for name, log in self.logs.items():
            ports = re.findall(rb'"port": (\d+), "event": "metrics"', log)
            pages[f"metrics by {name}"] = httpx2.get(f"http://127.0.0.1:{int(ports[-1])}/metrics").content
        return pages

    def end(self) -> None:
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            assert process.wait(240) == 0 or process is self.processes.get("gateway")


def redis_of(client: Any) -> dict[str, bytes]:
    """Everything in Redis, by key and field; the names of keys and fields too."""
    sinks: dict[str, bytes] = {}
    for key in client.scan_iter("*"):
        name, kind = key.decode(), client.type(key).decode()
        if kind == "hash":
            for field_, content in client.hgetall(key).items():
                sinks[f"redis {name} {field_.decode()}"] = field_ + b" " + content
        else:
            read = {
                "none": lambda: b"",  # it ended after it was listed
                "string": lambda key=key: client.get(key) or b"",
                "list": lambda key=key: b" ".join(client.lrange(key, 0, -1)),
                "set": lambda key=key: b" ".join(client.smembers(key)),
                "zset": lambda key=key: b" ".join(client.zrange(key, 0, -1)),
                "stream": lambda key=key: repr(client.xrange(key)).encode(),
            }
            sinks[f"redis {name}"] = key + b" " + read[kind]()
    return sinks


def disk_of(root: Path) -> dict[str, bytes]:
    """Every file but Redis' own, its name too."""
    files = [path for path in root.rglob("*") if path.is_file() and path.relative_to(root).parts[0] != "redis"]
    return {f"disk {path.relative_to(root)}": str(path).encode() + b" " + path.read_bytes() for path in files}
