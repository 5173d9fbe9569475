"""Logging as the processes have it, for a test in this one."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager

import structlog

from workers.telemetry.logs import configure_logging


@contextmanager
def deployed_logging() -> Generator[None]:
    """Lines go to standard error as they do in a service; afterwards all is as before."""
    before, root = structlog.get_config(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        configure_logging("info")
        yield
    finally:
        structlog.configure(**before)
        root.handlers = handlers
        root.setLevel(level)
