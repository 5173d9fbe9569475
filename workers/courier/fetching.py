"""References at URLs: fetched by the guarded way out, checked, stored, and put into the job in place of the URL.

Only headers are read of what came: the process that may speak to the outside runs no picture decoder. What does not
decode fails its job in the worker, with the same code.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from dataclasses import dataclass, field, replace
from typing import Final

import structlog

from workers import pictures
from workers.artifacts import ArtifactError, ArtifactStore, Incoming
from workers.courier.egress import Budget, Caps, Egress, EgressError, TooLargeError
from workers.jobs import CustomizeJob, JobError
from workers.pictures import PictureError, PictureLimits

_ACCEPT: Final = "image/png, image/jpeg, image/webp"
_LOG = structlog.stdlib.get_logger("workers.courier.fetching")


class FetchError(Exception):
    """A reference that cannot be had; `error` is what its job fails with."""

    def __init__(self, error: JobError) -> None:
        super().__init__(error.code)
        self.error = error


@dataclass(frozen=True, slots=True)
class ReferenceFetcher:
    """Fetches for one job after the other.

    Attributes:
        caps: of each picture. job_bytes: of all pictures of a job together.
    """

    egress: Egress
    store: ArtifactStore
    limits: PictureLimits = field(default_factory=PictureLimits)
    caps: Caps = field(default_factory=Caps)
    job_bytes: int = 64 * 2**20

    async def fetch(self, job: CustomizeJob) -> CustomizeJob:
        """The job with keys in place of URLs; all of them are fetched at once, each URL once.

        Raises:
            FetchError: one of them cannot be had; the others are not waited for.
        """
        slots = {reference.url: reference.slot for reference in reversed(job.references) if reference.url}
        budget = Budget(self.job_bytes)
        failed: FetchError | None = None
        keys: dict[str, asyncio.Task[str]] = {}
        try:
            async with asyncio.TaskGroup() as group:
                for url, slot in slots.items():
                    keys[url] = group.create_task(self._store(job, slot, url, budget))
        except* FetchError as errors:
            failed = next(error for error in errors.exceptions if isinstance(error, FetchError))
        if failed is not None:
            raise failed
        return replace(
            job,
            references=tuple(
                replace(reference, image=keys[reference.url].result(), url=None) if reference.url else reference
                for reference in job.references
            ),
        )

    async def _store(self, job: CustomizeJob, slot: int, url: str, budget: Budget) -> str:
        """The key of one picture."""
        log = _LOG.bind(job_id=job.id, slot=slot, url=digest(url))
        began = time.monotonic()
        try:
            with self.store.receive(job.tenant) as incoming:
                await self.egress.get(job.tenant, url, _ACCEPT, self.caps, incoming.write, budget)
                key = await asyncio.to_thread(self._keep, incoming)
        except EgressError as error:
            log.warning("reference not fetched", reason=error.reason)
            raise FetchError(self._error(slot, error)) from None
        except (PictureError, ArtifactError) as error:
            log.warning("reference not taken", code=error.code)
            message = f"Reference {slot}: {error.message}"
            raise FetchError(JobError(error.code, message, error.code == "storage_unavailable")) from None
        log.info("reference fetched", bytes=incoming.size, seconds=round(time.monotonic() - began, 3))
        return key

    def _keep(self, incoming: Incoming) -> str:
        """Store what has come, if its header is a picture's."""
        pictures.inspect(incoming.read(), self.limits)
        return incoming.keep()

    def _error(self, slot: int, error: EgressError) -> JobError:
        """One answer for all that goes wrong on the way, so that it tells nothing of this network."""
        if isinstance(error, TooLargeError):
            most = f"{self.caps.max_bytes >> 20} MiB, or {self.job_bytes >> 20} MiB for a whole job"
            return JobError("image_too_large", f"Reference {slot} has more than {most}: scale the picture down.")
        return JobError(
            "reference_unreachable",
            f"Reference {slot} could not be fetched: its URL must be public and answer with status 200 and the "
            f"picture itself within {self.caps.total_s:g} s, over at most {self.caps.redirects} redirects.",
            retryable=True,
        )


def digest(url: str) -> str:
    """What stands for a URL in the log: signed ones are secrets."""
    return hashlib.sha256(url.encode()).hexdigest()[:16]
