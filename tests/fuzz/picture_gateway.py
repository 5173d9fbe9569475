"""A gateway process for hostile pictures; prints its port. `--unlimited`: pictures of any size, as a control."""

from __future__ import annotations

import socket
import sys
from dataclasses import replace

import uvicorn

from service.app import create_app
from service.commands.serving import http_config
from service.settings import GatewaySettings
from workers.picture_process import PictureProver
from workers.pictures import PictureLimits
from workers.telemetry.logs import configure_logging


def main() -> None:
    configure_logging("warning")  # to standard error: nobody reads on where the port has been printed
    app = create_app(GatewaySettings())
    if "--unlimited" in sys.argv:
        limits = PictureLimits(2**30, max_pixels=2**62, max_webp_pixels=2**62, max_side=2**31)
        gateway = app.state.gateway
        app.state.gateway = replace(gateway, admission=replace(gateway.admission, prover=PictureProver(limits)))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        uvicorn.Server(http_config(app)).run(sockets=[listener])


if __name__ == "__main__":
    main()
