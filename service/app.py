"""The gateway as an ASGI application. Imports no torch: it validates, stores, records and rings."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version

import structlog
from anyio import to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException

from service.gateway import open_gateway
from service.headers import REMEDIES
from service.openapi import install_openapi
from service.problems import (
    TABLE,
    Fault,
    Problem,
    answer_http,
    answer_problem,
)
from service.routes.jobs import open_router, router
from service.routes.pictures import router as picture_router
from service.routes.references import router as reference_router
from service.routes.trainings import router as training_router
from service.settings import GatewaySettings
from service.shell import RequestShell
from workers.artifacts import ArtifactError
from workers.telemetry.exposition import open_exposition
from workers.telemetry.logs import configure_logging
from workers.telemetry.tracing import Tracing, open_tracing

_LOG = structlog.stdlib.get_logger("service")


def create_app(settings: GatewaySettings, tracing: Tracing | None = None) -> FastAPI:
    """The application over `settings`; touches neither Redis nor the disk yet.

    Args:
        tracing: where spans go; None: as the environment says.

    Raises:
        ValueError: no Redis is configured.
        WeightsError: the model's configuration is missing or wrong.
    """
    gateway = open_gateway(settings, tracing or open_tracing("gateway"))
    readiness, metrics = gateway.readiness, gateway.metrics

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        exposition = open_exposition(settings, metrics.registry, alive=dict[str, str], ready=readiness.failed)
        yield
        gateway.let_go()
        if exposition is not None:
            await to_thread.run_sync(exposition.close)
        await to_thread.run_sync(gateway.admission.prover.close)
        await to_thread.run_sync(gateway.tracing.flush)
        await to_thread.run_sync(gateway.redis.close)

    app = FastAPI(
        title="dreamserve",
        version=_version(),
        description="Images made from images: DreamO customization behind one call.",
        lifespan=lifespan,
        openapi_url=None,  # `install_openapi` serves it
        docs_url=None,  # the stock page loads scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # its answer is built from the Host header
        # Its spans and records hold paths, queries and what was refused; ours are those of `RequestShell`.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.gateway = gateway
    app.include_router(router)
    app.include_router(open_router)
    app.include_router(picture_router)
    app.include_router(reference_router)
    app.include_router(training_router)
    app.add_exception_handler(Problem, answer_problem)  # pyright: ignore[reportArgumentType] - starlette types handlers by Exception
    app.add_exception_handler(HTTPException, answer_http)  # pyright: ignore[reportArgumentType] - as above
    app.add_exception_handler(RequestValidationError, _answer_validation)  # pyright: ignore[reportArgumentType] - as above
    app.add_exception_handler(RedisError, _answer_redis)
    app.add_exception_handler(ArtifactError, _answer_artifact)  # pyright: ignore[reportArgumentType] - as above
    app.add_middleware(RequestShell, metrics=metrics, tracing=gateway.tracing)
    install_openapi(app)
    return app


def app_factory() -> FastAPI:
    """For `uvicorn --factory service.app:app_factory`: settings from the environment."""
    settings = GatewaySettings()
    configure_logging(settings.log_level)
    return create_app(settings)


async def _answer_validation(request: Request, error: RequestValidationError) -> JSONResponse:
    """Path and query parameters and headers; a path that cannot be an id is simply not there."""
    faults: list[Fault] = []
    for item in error.errors():
        place, *names = item["loc"]
        if place == "path":
            return await answer_problem(request, Problem("not_found"))
        name = ".".join(str(name) for name in names)
        pointer = f"{name.title()}:" if place == "header" else f"?{name}"
        faults.append(Fault(pointer, "invalid_value", REMEDIES.get(pointer, f"{item['msg']}.")))
    return await answer_problem(request, Problem.of_faults(faults))


async def _answer_redis(request: Request, error: Exception) -> JSONResponse:
    _LOG.warning("redis failed", exception=type(error).__name__)
    return await answer_problem(request, Problem("queue_unavailable"))


async def _answer_artifact(request: Request, error: ArtifactError) -> JSONResponse:
    code = error.code if error.code in TABLE else "storage_unavailable"
    _LOG.warning("artifact store failed", code=code)
    return await answer_problem(request, Problem(code))


def _version() -> str:
    try:
        return version("dreamserve")
    except PackageNotFoundError:  # run from a checkout
        return "0"
