"""How a command that trains is asked to leave."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from typing import Final

_STDERR: Final = 2
_LEAVING: Final = b"\nstopping after the step at hand; Ctrl-C again stops at once\n"


def heed_signals(stop: threading.Event) -> None:
    """SIGTERM and Ctrl-C set `stop`, and say what comes of it; Ctrl-C after either is a KeyboardInterrupt at once.

    For the main thread. What a step or a checkpoint had begun is lost then; the checkpoint before it is whole.
    """

    def leave(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if not stop.is_set():
            stop.set()
            with suppress(OSError):  # the same Ctrl-C may have ended who reads it
                os.write(_STDERR, _LEAVING)  # not print: it may have interrupted one

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
