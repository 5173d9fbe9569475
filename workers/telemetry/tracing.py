"""One trace from a request to its webhook, over all processes; nothing at all unless an exporter is configured.

    POST /v1/customize ─▶ accept ─┬▶ fetch
                                  ├▶ queue
                                  ├▶ job ─▶ prepare, denoise, decode, commit
                                  └▶ webhook
    POST /v1/trainings ─▶ accept ─▶ likewise, without a fetch; job ─▶ prepare, train, publish, commit

The context travels in the job (its `traceparent`, as W3C has it). With OTEL_EXPORTER_OTLP_ENDPOINT set and the
extra `traces` installed spans go there by OTLP over HTTP; else the API's own spans that do nothing are used, which
still hand a caller's context on. Attributes say how much and how long: no prompt, URL, key or tenant. No torch.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import structlog
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import INVALID_SPAN, NoOpTracerProvider, Span, SpanKind, Tracer, TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from workers.jobs import CustomizeJob, JobRecord, TrainingJob

Attribute = str | int | float | bool

_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PROPAGATOR: Final = TraceContextTextMapPropagator()
_PHASES: Final = {"load": "prepare", "preprocess": "prepare", "encode": "prepare"}
_LOG = structlog.stdlib.get_logger("workers.telemetry.tracing")


@dataclass(frozen=True, slots=True)
class Tracing:
    """Where this process' spans go. `on`: anywhere; `flush` sends what is left, as the process ends."""

    tracer: Tracer
    on: bool
    flush: Callable[[], None] = field(default=lambda: None)

    @classmethod
    def over(cls, provider: TracerProvider, flush: Callable[[], None] = lambda: None) -> Tracing:
        """Spans to this provider."""
        return cls(provider.get_tracer("dreamserve"), not isinstance(provider, NoOpTracerProvider), flush)

    @classmethod
    def off(cls) -> Tracing:
        """No spans."""
        return cls.over(NoOpTracerProvider())

    @contextmanager
    def span(self, name: str, traceparent: str | None, **attributes: Attribute) -> Generator[Span]:
        """A span within the trace that `traceparent` names; by its error's type, if it ends by one."""
        span = self.tracer.start_span(name, context=context_of(traceparent), attributes=attributes)
        with trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            try:
                yield span
            except BaseException as error:
                span.set_attribute("error.type", type(error).__name__)
                raise


def open_tracing(process: str) -> Tracing:
    """As the environment says. `process`: `gateway`, `worker` …"""
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        return Tracing.off()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 - optional
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 - as above
        from opentelemetry.sdk.trace import TracerProvider as SdkProvider  # noqa: PLC0415 - as above
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415 - as above
    except ImportError:
        _LOG.warning("no traces: pip install 'dreamserve[traces]'")
        return Tracing.off()
    resource = Resource.create({"service.namespace": "dreamserve", "service.name": f"dreamserve-{process}"})
    provider = SdkProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing.over(provider, provider.shutdown)


def context_of(traceparent: str | None) -> Context:
    """The context that a traceparent names, and nothing else; an empty one if it is none."""
    return _PROPAGATOR.extract({"traceparent": traceparent} if traceparent else {}, Context())


def traceparent_of(span: Span) -> str | None:
    """What names this span to another process; None if there is no trace."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, trace.set_span_in_context(span, Context()))
    return carrier.get("traceparent")


class JobTrace:
    """A job's spans in a worker, one phase after the other, in whatever threads they are."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracer = tracing.tracer
        self._job = self._phase = INVALID_SPAN
        self._name = ""
        self._ended = False
        self._lock = threading.Lock()

    def begin(self, record: JobRecord[CustomizeJob, Any, Any] | JobRecord[TrainingJob, Any, Any]) -> None:
        """The job is claimed and read: how long it has waited is known."""
        job, started = record.job, record.started_at or record.created_at
        context = context_of(job.traceparent)
        if record.attempt == 1:
            self._tracer.start_span("queue", context, start_time=_ns(record.created_at)).end(_ns(started))
        self._job = self._tracer.start_span(
            "job",
            context,
            SpanKind.CONSUMER,
            start_time=_ns(started),
            attributes={"dreamserve.job_id": job.id, "dreamserve.attempt": record.attempt, **_size(job)},
        )

    def phase(self, phase: str) -> None:
        """The phase before ends, this one begins."""
        name = _PHASES.get(phase, phase)
        with self._lock:
            if self._ended or name == self._name or self._job is INVALID_SPAN:
                return
            self._phase.end()
            self._name = name
            self._phase = self._tracer.start_span(name, trace.set_span_in_context(self._job, Context()))

    def note(self, **attributes: Attribute) -> None:
        """Say something of the phase at hand."""
        self._phase.set_attributes({f"dreamserve.{name}": value for name, value in attributes.items()})

    def end(self, state: str) -> None:
        """The job has ended here."""
        with self._lock:
            self._ended = True
        self._phase.end()
        self._job.set_attribute("dreamserve.state", state)
        self._job.end()


def _size(job: CustomizeJob | TrainingJob) -> dict[str, Attribute]:
    """How much was asked for."""
    if isinstance(job, TrainingJob):
        return {}
    return {
        "dreamserve.priority": job.priority,
        "dreamserve.images": job.num_images,
        "dreamserve.steps": job.sampling.num_inference_steps,
        "dreamserve.references": len(job.references),
    }


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
