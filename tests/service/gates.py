"""The gateway on real sockets, served as `run_gateway` serves it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Generator
from dataclasses import dataclass

import uvicorn
from fastapi import FastAPI

from service.callers.connections import Deadlines
from service.commands.serving import http_config

Address = tuple[str, int]


@dataclass(frozen=True)
class Gate:
    """A running server, and where it listens."""

    address: Address
    server: uvicorn.Server
    app: FastAPI

    @property
    def url(self) -> str:
        return f"http://{self.address[0]}:{self.address[1]}"


def serve(app: FastAPI, deadlines: Deadlines | None = None) -> Generator[Gate]:
    """The application on a loopback port, in a thread, until the generator goes on."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    server = uvicorn.Server(http_config(app, deadlines=deadlines))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield Gate(listener.getsockname(), server, app)
    finally:
        app.state.gateway.let_go()
        server.should_exit = True
        thread.join()
