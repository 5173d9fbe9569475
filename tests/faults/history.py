"""What happened, one JSON object a line: `at` (the machine's monotonic clock, the same in every process), `event`, …

| event | by | says |
|---|---|---|
| `begin` | campaign | its parameters, the seed among them |
| `submit`, `accepted` | client | an id is sent; it was answered as a 202 answers |
| `cancel` | client | a cancel was answered; `status` as it was then |
| `observed` | poller | a record as the gateway would show it; only what is new |
| `spawn`, `exit`, `kill`, `arm`, `stop`, `resume` | crew | of the worker `pid` |
| `redis_kill`, `redis_up` | crew | |
| `claim`, `commit` | worker `pid` | what the ledger answered; `commit` without `taken` is one that begins |
| `final` | campaign | each record in the end; `missing`, `wrong`: pictures not to be read, of other pixels |
| | | `story`: its status events; `messages`: what its webhook is to be told, which `asked` for that |
| `swept` | campaign | files that lost workers left |
| `drained` | campaign | what is left of leases, deliveries, lines, temporary files and pictures that no record names |
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Event = dict[str, Any]


class History:
    """A file to which any thread of any process may add lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def note(self, event: str, **fields: Any) -> None:
        """Add a line; one write, so lines of several processes do not mix."""
        line = json.dumps({"at": round(time.monotonic(), 4), "event": event, **fields})
        os.write(self._file, line.encode() + b"\n")

    def read(self) -> list[Event]:
        """All lines so far, by time."""
        return ordered(json.loads(line) for line in self.path.read_text().splitlines())


def ordered(events: Iterable[Event]) -> list[Event]:
    """By time; what is noted at the same moment stays as it was written."""
    return sorted(events, key=lambda event: event["at"])
