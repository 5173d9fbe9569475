"""The adapter that a request names: which version of it, and how much."""

from __future__ import annotations

from service.problems import Fault
from service.schemas import AdapterBody
from workers.jobs import AdapterUse
from workers.registry import Registry, RegistryError

LARGEST_SCALE = 2.0


def adapter_use(body: AdapterBody | None, registry: Registry, faults: list[Fault]) -> AdapterUse | None:
    """The version that a job will use, the newest unless the request names one; None if there is none, or with a fault.

    Args:
        registry: as the job's tenant sees it.
    """
    if body is None:
        return None
    if abs(body.scale) > LARGEST_SCALE:
        detail = f"Use {-LARGEST_SCALE:g} to {LARGEST_SCALE:g}."
        faults.append(Fault("/adapter/scale", "adapter_scale_out_of_range", detail))
    try:
        adapter = registry.locate(body.name, body.version)
    except RegistryError as error:
        known = body.version is not None and registry.versions(body.name)
        faults.append(Fault("/adapter/version" if known else "/adapter/name", error.code, error.message))
        return None
    return AdapterUse(adapter.name, adapter.version, body.scale)
