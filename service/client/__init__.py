"""The typed client of the service, for threads (`Client`) and for event loops (`AsyncClient`).

    with Client("http://127.0.0.1:8080") as client:
        job = client.customize("the toy [ref#1] on a table", [Reference.file("toy.png", role="subject")])
        job.wait().images[0].save("out.png")

    call ─▶ tries (again while it may pass) ─▶ answer ─▶ frozen value, or one error of the tree

Neither torch nor the gateway's own modules are imported.
"""

from service.client.asynchronous import AsyncClient, AsyncImage, AsyncJob, AsyncTraining
from service.client.blocking import Client, Image, Job, Training
from service.client.errors import (
    BusyError,
    DamagedImageError,
    DreamserveError,
    Fault,
    GoneError,
    InvalidRequestError,
    JobFailedError,
    JobTimeoutError,
    NoAnswerError,
    NotFoundError,
    RefusedError,
    UnauthenticatedError,
    UnexpectedAnswerError,
    WebhookError,
)
from service.client.references import AdapterUse, Reference, Webhook
from service.client.values import Adapter, Event, Model, UploadedReference
from service.client.webhooks import WebhookMessage, verify_webhook

__all__ = [
    "Adapter",
    "AdapterUse",
    "AsyncClient",
    "AsyncImage",
    "AsyncJob",
    "AsyncTraining",
    "BusyError",
    "Client",
    "DamagedImageError",
    "DreamserveError",
    "Event",
    "Fault",
    "GoneError",
    "Image",
    "InvalidRequestError",
    "Job",
    "JobFailedError",
    "JobTimeoutError",
    "Model",
    "NoAnswerError",
    "NotFoundError",
    "Reference",
    "RefusedError",
    "Training",
    "UnauthenticatedError",
    "UnexpectedAnswerError",
    "UploadedReference",
    "Webhook",
    "WebhookError",
    "WebhookMessage",
    "verify_webhook",
]
