"""An asynchronous client as if it were the blocking one, so that the same tests are asked of both."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from anyio.from_thread import BlockingPortal, start_blocking_portal

from service.client import AsyncClient, AsyncImage, AsyncJob, AsyncTraining, Client

Kind = Literal["blocking", "asynchronous"]
Connect = Callable[..., Any]
"""Makes a client as `Client` is made; whichever kind it is, it is called like the blocking one."""

_HANDLES = (AsyncClient, AsyncJob, AsyncImage, AsyncTraining)


class Awaited:
    """Its methods return when they are done; what they give is wrapped likewise."""

    def __init__(self, portal: BlockingPortal, target: Any) -> None:
        self._portal = portal
        self._target = target

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if not inspect.ismethod(value):
            return self._wrap(value)

        def call(*arguments: Any, **options: Any) -> Any:
            result = value(*arguments, **options)
            if isinstance(result, AsyncIterator):
                return self._each(result)
            return self._wrap(self._portal.call(_finish, result))

        return call

    def _each(self, values: AsyncIterator[Any]) -> Iterator[Any]:
        while (value := self._portal.call(_next, values)) is not StopAsyncIteration:
            yield self._wrap(value)

    def _wrap(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self._wrap(entry) for entry in value)
        return Awaited(self._portal, value) if isinstance(value, _HANDLES) else value


async def _finish(result: Any) -> Any:
    return await result


async def _next(values: AsyncIterator[Any]) -> Any:
    return await anext(values, StopAsyncIteration)


@contextmanager
def connecting(kind: Kind) -> Generator[Connect]:
    """Clients of one kind, which hang up in the end."""
    with ExitStack() as stack:
        if kind == "blocking":
            yield lambda *arguments, **options: stack.enter_context(Client(*arguments, **options))
            return
        portal = stack.enter_context(start_blocking_portal())

        def make(*arguments: Any, **options: Any) -> Any:
            client = AsyncClient(*arguments, **options)
            stack.callback(portal.call, client.aclose)
            return Awaited(portal, client)

        yield make
