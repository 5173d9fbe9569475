"""Events over connections that may drop: where to go on, and when to come back. Reads and sends nothing."""

from __future__ import annotations

import json
import time
from typing import Any, Final, cast

import httpx2

from service.client.errors import UnexpectedAnswerError
from service.client.retries import Tries
from service.client.values import Event

SILENCE_S: Final = 30.0
"""A stream that says nothing for so long has been lost: the service says something every ten seconds."""
CALM_S: Final = 10.0
"""A connection that lasted so long was a good one, even if nothing happened meanwhile."""
RETURN_S: Final = 1.0


class Following:
    """One follower of one job or training.

    Attributes:
        after: id of the last event that was told.
        over: there is nothing more to come.
        tries: since the last good connection.
    """

    def __init__(self, retry_for_s: float, after: str | None) -> None:
        self.after = after
        self.over = False
        self.tries = Tries(retry_for_s)
        self._retry_for_s = retry_for_s
        self._opened_at: float | None = None

    def headers(self) -> dict[str, str]:
        """What the next connection asks for."""
        return {"Accept": "text/event-stream"} | ({} if self.after is None else {"Last-Event-ID": self.after})

    def opened(self, response: httpx2.Response) -> None:
        """An answer has begun that is no refusal."""
        self._opened_at = time.monotonic()
        self.over = response.status_code == 204

    def told(self, said: httpx2.ServerSentEvent, request_id: str) -> Event | None:
        """The event in what was said, if it is one.

        Raises:
            UnexpectedAnswerError: it is not written as the service writes them.
        """
        if not said.data:
            return None
        try:
            data: object = json.loads(said.data)
        except ValueError:
            data = None
        if not isinstance(data, dict):
            raise UnexpectedAnswerError("unexpected_answer", "an event without JSON", request_id=request_id)
        event = Event(said.id, said.event, cast("dict[str, Any]", data))
        self.after, self.over = event.id, event.ends
        self.tries = Tries(self._retry_for_s)
        return event

    def broke(self, error: httpx2.RequestError | None, request_id: str) -> float:
        """Seconds until the next connection; `error`: None if the stream only ended.

        Raises:
            NoAnswerError, UnexpectedAnswerError: it has been broken for too long.
        """
        if self._opened_at is not None and time.monotonic() - self._opened_at > CALM_S:
            self.tries = Tries(self._retry_for_s)
        self._opened_at = None
        pause = self.tries.failed(error or httpx2.RemoteProtocolError("the stream ended early"), request_id)
        return max(pause, RETURN_S)
