"""What the caller of a failed job may know: a code and a remedy."""

from __future__ import annotations

from model.errors import ModelError
from workers.artifacts import ArtifactError
from workers.engine import is_out_of_memory
from workers.jobs import JobError
from workers.ledger import DamagedRecordError
from workers.pictures import PictureError
from workers.registry import RegistryError


def job_error(error: Exception) -> JobError:
    """What the caller may know of a failure: a code and a remedy, nothing of the exception's own text."""
    match error:
        case ModelError():
            return JobError(error.code, error.message)
        case ArtifactError() | RegistryError():
            return JobError(error.code, error.message, retryable=error.code == "storage_unavailable")
        case PictureError():
            return JobError(error.code, error.message)
        case DamagedRecordError():
            return JobError("internal", "The job's record is damaged: submit it again.")
        case _ if is_out_of_memory(error):
            return JobError(
                "out_of_memory",
                "The worker ran out of memory: try again, or ask for a smaller size or fewer references.",
                retryable=True,
            )
        case _:
            return JobError("internal", f"The worker failed with {type(error).__name__}.")
