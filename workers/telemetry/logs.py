"""Log lines of every process: JSON, or key=value on a terminal; nothing that a user sent. No torch.

Both escape line ends. What `structlog.contextvars` binds (`request_id`, `job_id`) is in each line of its context.
"""

from __future__ import annotations

import logging
import sys

import structlog
from structlog.typing import EventDict, WrappedLogger


def configure_logging(level: str) -> None:
    """Send structlog's and the libraries' records to stderr, in one format."""
    shared = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _name_exception,
    ]
    renderer = (
        structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"])
        if sys.stderr.isatty()
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    # RQ narrates every heartbeat and job; what matters is logged by us.
    logging.getLogger("rq").setLevel(logging.WARNING)
    logging.getLogger("rq.worker").setLevel(logging.WARNING)


def _name_exception(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Keep only an exception's type: its message and traceback may hold a prompt, a path or a key."""
    info = event.pop("exc_info", None)
    error = info[1] if isinstance(info, tuple) else info
    if isinstance(error, BaseException):
        event["exception"] = type(error).__name__
    elif info:
        current = sys.exc_info()[0]
        event["exception"] = current.__name__ if current else "unknown"
    record = event.get("_record")
    if isinstance(record, logging.LogRecord):
        record.exc_info = None
        record.exc_text = None
    return event
