"""A gateway on a real socket that asks for keys, and callers of three tenants."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import httpx2
from fastapi import FastAPI

from tests.service.gates import Gate


@dataclass
class House:
    """A gateway that asks for keys, and callers of three tenants."""

    gate: Gate
    app: FastAPI
    keys: dict[str, dict[str, str]]
    closing: ExitStack = field(default_factory=ExitStack)

    def ask(self, tenant: str, method: str, path: str, **options: Any) -> httpx2.Response:
        headers = self.keys[tenant] | options.pop("headers", {})
        return httpx2.request(method, self.gate.url + path, headers=headers, timeout=240, **options)

    def submit(self, tenant: str) -> httpx2.Response:
        return self.ask(tenant, "POST", "/v1/customize", json={"prompt": "a toy"})

    def half_sent(self, tenant: str, path: str, framing: str = "Content-Length: 1000") -> socket.socket:
        """A connection with the head of a request, and of its body nothing."""
        peer = self.closing.enter_context(socket.create_connection(self.gate.address, timeout=240))
        kind = "image/png" if path.endswith("references") else "application/json"
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n{framing}\r\n"
        peer.sendall(f"{head}Authorization: {self.keys[tenant]['Authorization']}\r\n\r\n".encode())
        return peer


OpenHouse = Callable[..., House]
"""Opens one with changed settings."""
