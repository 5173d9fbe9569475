"""The client for threads: every call returns when its answer is there."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, TypeVar, Unpack

import httpx2

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


class Client:
    """The service, for as many threads as like. Calls are made again while what stops them may pass.

    Every method raises `DreamserveError`; `errors` has the tree.
    """

    def __init__(
        self, url: str = DEFAULT_URL, api_key: str | None = None, *, timeout: float = 30.0, retry_for: float = 60.0
    ) -> None:
        """
        Args:
            timeout: seconds for connecting, and for each pause in an answer.
            retry_for: seconds in which a call is begun again, beside those that it was asked to wait; 0: only once.
                Where the service asks for more patience, its answer is the error at once, `retry_after_s` in it.

        Raises:
            ValueError: not an http or https URL, or a key that no header can hold.
        """
        self._http = httpx2.Client(**options(url, api_key, timeout))
        self._timeout = timeout
        self._retry_for = retry_for

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._http.close()

    def customize(
        self,
        prompt: str,
        references: Sequence[Reference | None] = (),
        *,
        idempotency_key: str | None = None,
        wait: float | None = None,
        start_within: float | None = None,
        **options: Unpack[CustomizeOptions],
    ) -> Job:
        """Have a picture made.

        Args:
            prompt: `[ref#i]` binds a word to reference i, counted from 1.
            references: None keeps a slot empty.
            idempotency_key: the same key and request within 24 hours are the same job, also from another process;
                without one only this call's own tries are.
            wait: seconds, 60 at most, to wait for the end; the job comes back as it is then.
            start_within: seconds after which it expires, if no step is made by then.
        """
        call = calls.customize(
            prompt, references, options, idempotency_key=idempotency_key, wait=wait, start_within=start_within
        )
        return _job(self, self.ask(call))

    def job(self, job_id: str) -> Job:
        return _job(self, self.ask(calls.job(job_id)))

    def jobs(self, status: str | None = None) -> Iterator[Job]:
        """All that are still known, newest first, a page at a time; `status`: only those in this state."""
        cursor: str | None = None
        while True:
            page = self.ask(calls.jobs(status, cursor))
            yield from (_job(self, job) for job in page.jobs)
            if (cursor := page.next_cursor) is None:
                return

    def delete(self, job_id: str) -> None:
        """Drop a job that has ended, and its pictures."""
        self.ask(calls.delete(job_id))

    def upload(self, picture: bytes | Source) -> UploadedReference:
        """A picture, or the file it is in, to be named in many requests; the same picture has one id.

        Raises:
            OSError: it cannot be read. ValueError: not a PNG, JPEG or WebP.
        """
        return self.ask(calls.upload(picture_of(picture)))

    def reference(self, reference_id: str) -> UploadedReference:
        return self.ask(calls.reference(reference_id))

    def delete_reference(self, reference_id: str) -> None:
        """Drop an uploaded picture, and all that was made of it."""
        self.ask(calls.delete_reference(reference_id))

    def train(self, recipe: str, *, idempotency_key: str | None = None, **options: Unpack[TrainingOptions]) -> Training:
        """Train an adapter by a recipe of the service."""
        return _training(self, self.ask(calls.train(recipe, options, idempotency_key=idempotency_key)))

    def training(self, training_id: str) -> Training:
        return _training(self, self.ask(calls.training(training_id)))

    def trainings(self, status: str | None = None) -> Iterator[Training]:
        """As `jobs`."""
        cursor: str | None = None
        while True:
            page = self.ask(calls.trainings(status, cursor))
            yield from (_training(self, training) for training in page.trainings)
            if (cursor := page.next_cursor) is None:
                return

    def models(self) -> tuple[Model, ...]:
        """What is served, with its limits and defaults."""
        return self.ask(calls.models())

    def adapters(self, name: str | None = None) -> tuple[Adapter, ...]:
        """Adapters that jobs may name, newest first; `name`: only versions of this one."""
        return self.ask(calls.adapters(name))

    def ask(self, call: Call[T], deadline: Deadline | None = None) -> T:
        """Make a call until it is answered, or up to the deadline."""
        tries, request_id = Tries(self._retry_for, call.wait_s, deadline), fresh_id()
        while True:
            send = outgoing(call, self._timeout, request_id, tries.begin())
            try:
                response = self._http.request(call.method, call.path, **send)
            except httpx2.RequestError as error:
                pause = tries.failed(error, request_id)
            else:
                pause = tries.answered(response, request_id, call.undone)
                if pause is None:
                    return call.read(response)
            time.sleep(pause)

    def events(self, job_id: str, after: str | None = None) -> Generator[Event]:
        """What happens to a job, as it happens, up to its end, over as many connections as it takes.

        Args:
            after: id of the last event that is known.
        """
        return self.follow(calls.events_path(job_id), after)

    def training_events(self, training_id: str, after: str | None = None) -> Generator[Event]:
        """What happens to a training; as `events`."""
        return self.follow(calls.training_events_path(training_id), after)

    def follow(self, path: str, after: str | None) -> Generator[Event]:
        """The events that a path tells, as `events`."""
        following, request_id = Following(self._retry_for, after), fresh_id()
        while not following.over:
            broken: httpx2.RequestError | None = None
            try:
                with self._http.stream(
                    "GET",
                    path,
                    headers=following.headers() | {calls.REQUEST_ID: request_id},
                    timeout=streaming(self._timeout),
                ) as response:
                    if not response.is_success:
                        response.read()
                    pause = following.tries.answered(response, request_id)
                    if pause is None:
                        following.opened(response)
                    if pause is None and not following.over:
                        for said in httpx2.EventSource(response):
                            if event := following.told(said, request_id):
                                yield event
                            if following.over:
                                return
            except httpx2.RequestError as error:
                broken, pause = error, None
            if not following.over:
                time.sleep(following.broke(broken, request_id) if pause is None else pause)


@dataclass(frozen=True, slots=True, kw_only=True)
class Image(ImageState):
    """A finished picture, which lies with the service."""

    client: Client = field(repr=False, compare=False)
    job_id: str
    index: int

    def read(self) -> bytes:
        """Its file, checked against its sha256.

        Raises:
            DamagedImageError: it is not the one that the job names.
        """
        return self.client.ask(calls.image(self.job_id, self.index, self.sha256))

    def save(self, path: Source) -> Path:
        """Write its file, once all of it is there and checked.

        Raises:
            DamagedImageError: as `read`. OSError: it cannot be written.
        """
        data = self.read()
        Path(path).write_bytes(data)
        return Path(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(JobState[Image]):
    """A job as it was when it was asked for; `refresh` and `wait` give a newer one."""

    client: Client = field(repr=False, compare=False)

    def refresh(self) -> Job:
        return self.client.job(self.id)

    def wait(self, timeout: float | None = None) -> Job:
        """The job once it has succeeded.

        Args:
            timeout: seconds; until then the service may be away for as long as `retry_for`.

        Raises:
            JobFailedError: it failed, was canceled or expired.
            JobTimeoutError: it is not known to have ended; it goes on.
        """
        waiting, job = Waiting(timeout), self
        while not job.ended:
            call = calls.job(self.id, waiting.ask(job))
            job = _job(self.client, self.client.ask(call, waiting.deadline(job)))
            if not job.ended:
                time.sleep(waiting.pause_s())
        judged(job)
        return job

    def events(self, after: str | None = None) -> Generator[Event]:
        """As `Client.events`."""
        return self.client.events(self.id, after)

    def preview(self) -> bytes | None:
        """The newest small picture of how far it is; None if there is none."""
        try:
            return self.client.ask(calls.preview(self.id))
        except NotFoundError:
            return None

    def cancel(self) -> Job:
        """At once while it is queued, at its next step while it runs; what has ended stays as it is."""
        return _job(self.client, self.client.ask(calls.cancel(self.id)))

    def delete(self) -> None:
        """As `Client.delete`."""
        self.client.delete(self.id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Training(TrainingState):
    """A training as it was when it was asked for."""

    client: Client = field(repr=False, compare=False)

    def refresh(self) -> Training:
        return self.client.training(self.id)

    def wait(self, timeout: float | None = None) -> Training:
        """As `Job.wait`."""
        waiting, training = Waiting(timeout, TRAINING_POLL_S), self
        while not training.ended:
            waiting.ask(training)
            asked = self.client.ask(calls.training(self.id), waiting.deadline(training))
            training = _training(self.client, asked)
            if not training.ended:
                time.sleep(waiting.pause_s())
        judged(training)
        return training

    def events(self, after: str | None = None) -> Generator[Event]:
        """As `Client.training_events`."""
        return self.client.training_events(self.id, after)

    def cancel(self) -> Training:
        """At once while it is queued, after its step while it runs."""
        return _training(self.client, self.client.ask(calls.cancel_training(self.id)))


def _job(client: Client, state: JobState[ImageState]) -> Job:
    images = tuple(
        Image(**shallow(image), client=client, job_id=state.id, index=index) for index, image in enumerate(state.images)
    )
    return Job(**shallow(state, images=images), client=client)


def _training(client: Client, state: TrainingState) -> Training:
    return Training(**shallow(state), client=client)
