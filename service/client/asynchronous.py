"""The client for event loops, asyncio's: as `blocking`, with every call awaited."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, TypeVar, Unpack

import anyio
import httpx2
from anyio import to_thread

from service.client import calls
from service.client.calls import Call, CustomizeOptions, TrainingOptions
from service.client.connection import (
    DEFAULT_URL,
    TRAINING_POLL_S,
    Waiting,
    fresh_id,
    judged,
    options,
    outgoing,
    picture_of,
    shallow,
    streaming,
)
from service.client.errors import NotFoundError
from service.client.following import Following
from service.client.references import Reference, Source
from service.client.retries import Deadline, Tries
from service.client.values import Adapter, Event, ImageState, JobState, Model, TrainingState, UploadedReference

T = TypeVar("T")


class AsyncClient:
    """The service, for as many tasks of one event loop as like; everything as `Client` has it."""

    def __init__(
        self, url: str = DEFAULT_URL, api_key: str | None = None, *, timeout: float = 30.0, retry_for: float = 60.0
    ) -> None:
        """As `Client`."""
        self._http = httpx2.AsyncClient(**options(url, api_key, timeout))
        self._timeout = timeout
        self._retry_for = retry_for

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Hang up."""
        await self._http.aclose()

    async def customize(
        self,
        prompt: str,
        references: Sequence[Reference | None] = (),
        *,
        idempotency_key: str | None = None,
        wait: float | None = None,
        start_within: float | None = None,
        **options: Unpack[CustomizeOptions],
    ) -> AsyncJob:
        """As `Client.customize`."""
        call = calls.customize(
            prompt, references, options, idempotency_key=idempotency_key, wait=wait, start_within=start_within
        )
        return _job(self, await self.ask(call))

    async def job(self, job_id: str) -> AsyncJob:
        return _job(self, await self.ask(calls.job(job_id)))

    async def jobs(self, status: str | None = None) -> AsyncGenerator[AsyncJob]:
        """As `Client.jobs`."""
        cursor: str | None = None
        while True:
            page = await self.ask(calls.jobs(status, cursor))
            for job in page.jobs:
                yield _job(self, job)
            if (cursor := page.next_cursor) is None:
                return

    async def delete(self, job_id: str) -> None:
        """As `Client.delete`."""
        await self.ask(calls.delete(job_id))

    async def upload(self, picture: bytes | Source) -> UploadedReference:
        """As `Client.upload`."""
        return await self.ask(calls.upload(await to_thread.run_sync(picture_of, picture)))

    async def reference(self, reference_id: str) -> UploadedReference:
        return await self.ask(calls.reference(reference_id))

    async def delete_reference(self, reference_id: str) -> None:
        """As `Client.delete_reference`."""
        await self.ask(calls.delete_reference(reference_id))

    async def train(
        self, recipe: str, *, idempotency_key: str | None = None, **options: Unpack[TrainingOptions]
    ) -> AsyncTraining:
        """As `Client.train`."""
        return _training(self, await self.ask(calls.train(recipe, options, idempotency_key=idempotency_key)))

    async def training(self, training_id: str) -> AsyncTraining:
        return _training(self, await self.ask(calls.training(training_id)))

    async def trainings(self, status: str | None = None) -> AsyncGenerator[AsyncTraining]:
        """As `Client.jobs`."""
        cursor: str | None = None
        while True:
            page = await self.ask(calls.trainings(status, cursor))
            for training in page.trainings:
                yield _training(self, training)
            if (cursor := page.next_cursor) is None:
                return

    async def models(self) -> tuple[Model, ...]:
        """As `Client.models`."""
        return await self.ask(calls.models())

    async def adapters(self, name: str | None = None) -> tuple[Adapter, ...]:
        """As `Client.adapters`."""
        return await self.ask(calls.adapters(name))

    async def ask(self, call: Call[T], deadline: Deadline | None = None) -> T:
        """Make a call until it is answered, or up to the deadline."""
        tries, request_id = Tries(self._retry_for, call.wait_s, deadline), fresh_id()
        while True:
            send = outgoing(call, self._timeout, request_id, tries.begin())
            try:
                response = await self._http.request(call.method, call.path, **send)
            except httpx2.RequestError as error:
                pause = tries.failed(error, request_id)
            else:
                pause = tries.answered(response, request_id, call.undone)
                if pause is None:
                    return call.read(response)
            await anyio.sleep(pause)

    def events(self, job_id: str, after: str | None = None) -> AsyncGenerator[Event]:
        """As `Client.events`; close it (`contextlib.aclosing`) if you leave before its end."""
        return self.follow(calls.events_path(job_id), after)

    def training_events(self, training_id: str, after: str | None = None) -> AsyncGenerator[Event]:
        """As `Client.training_events`, and `events`."""
        return self.follow(calls.training_events_path(training_id), after)

    async def follow(self, path: str, after: str | None) -> AsyncGenerator[Event]:
        """As `Client.follow`."""
        following, request_id = Following(self._retry_for, after), fresh_id()
        while not following.over:
            broken: httpx2.RequestError | None = None
            try:
                async with self._http.stream(
                    "GET",
                    path,
                    headers=following.headers() | {calls.REQUEST_ID: request_id},
                    timeout=streaming(self._timeout),
                ) as response:
                    if not response.is_success:
                        await response.aread()
                    pause = following.tries.answered(response, request_id)
                    if pause is None:
                        following.opened(response)
                    if pause is None and not following.over:
                        async with aclosing(_said(response)) as told:
                            async for said in told:
                                if event := following.told(said, request_id):
                                    yield event
                                if following.over:
                                    return
            except httpx2.RequestError as error:
                broken, pause = error, None
            if not following.over:
                await anyio.sleep(following.broke(broken, request_id) if pause is None else pause)


@dataclass(frozen=True, slots=True, kw_only=True)
class AsyncImage(ImageState):
    """A finished picture, which lies with the service."""

    client: AsyncClient = field(repr=False, compare=False)
    job_id: str
    index: int

    async def read(self) -> bytes:
        """As `Image.read`."""
        return await self.client.ask(calls.image(self.job_id, self.index, self.sha256))

    async def save(self, path: Source) -> Path:
        """As `Image.save`."""
        data = await self.read()
        await anyio.Path(path).write_bytes(data)
        return Path(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class AsyncJob(JobState[AsyncImage]):
    """A job as it was when it was asked for; `refresh` and `wait` give a newer one."""

    client: AsyncClient = field(repr=False, compare=False)

    async def refresh(self) -> AsyncJob:
        return await self.client.job(self.id)

    async def wait(self, timeout: float | None = None) -> AsyncJob:
        """As `Job.wait`."""
        waiting, job = Waiting(timeout), self
        while not job.ended:
            call = calls.job(self.id, waiting.ask(job))
            job = _job(self.client, await self.client.ask(call, waiting.deadline(job)))
            if not job.ended:
                await anyio.sleep(waiting.pause_s())
        judged(job)
        return job

    def events(self, after: str | None = None) -> AsyncGenerator[Event]:
        """As `AsyncClient.events`."""
        return self.client.events(self.id, after)

    async def preview(self) -> bytes | None:
        """As `Job.preview`."""
        try:
            return await self.client.ask(calls.preview(self.id))
        except NotFoundError:
            return None

    async def cancel(self) -> AsyncJob:
        """As `Job.cancel`."""
        return _job(self.client, await self.client.ask(calls.cancel(self.id)))

    async def delete(self) -> None:
        """As `Client.delete`."""
        await self.client.delete(self.id)


@dataclass(frozen=True, slots=True, kw_only=True)
class AsyncTraining(TrainingState):
    """A training as it was when it was asked for."""

    client: AsyncClient = field(repr=False, compare=False)

    async def refresh(self) -> AsyncTraining:
        return await self.client.training(self.id)

    async def wait(self, timeout: float | None = None) -> AsyncTraining:
        """As `Job.wait`."""
        waiting, training = Waiting(timeout, TRAINING_POLL_S), self
        while not training.ended:
            waiting.ask(training)
            asked = await self.client.ask(calls.training(self.id), waiting.deadline(training))
            training = _training(self.client, asked)
            if not training.ended:
                await anyio.sleep(waiting.pause_s())
        judged(training)
        return training

    def events(self, after: str | None = None) -> AsyncGenerator[Event]:
        """As `AsyncClient.training_events`."""
        return self.client.training_events(self.id, after)

    async def cancel(self) -> AsyncTraining:
        """As `Training.cancel`."""
        return _training(self.client, await self.client.ask(calls.cancel_training(self.id)))


async def _said(response: httpx2.Response) -> AsyncGenerator[httpx2.ServerSentEvent]:
    async for said in httpx2.EventSource(response):
        yield said


def _job(client: AsyncClient, state: JobState[ImageState]) -> AsyncJob:
    images = tuple(
        AsyncImage(**shallow(image), client=client, job_id=state.id, index=index)
        for index, image in enumerate(state.images)
    )
    return AsyncJob(**shallow(state, images=images), client=client)


def _training(client: AsyncClient, state: TrainingState) -> AsyncTraining:
    return AsyncTraining(**shallow(state), client=client)
