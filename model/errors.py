"""Everything this package refuses, as one small tree.

    ModelError                  code, message: safe to show to the caller
    ├── WeightsError            a file, key or shape that loading needs is missing or wrong (the operator's to mend)
    ├── AdapterError            an adapter that a job names cannot be used
    ├── DrawingError            what was drawn is no picture
    └── UnusableReferenceError  a reference that cannot be prepared (the caller's to mend); names its slot

Imports only the standard library: the gateway maps these codes to its own.
"""


class ModelError(Exception):
    """Base of the tree.

    Attributes:
        code: stable, documented, machine-readable.
        message: one sentence that names the remedy and holds no user content.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class WeightsError(ModelError):
    """Codes: `model_not_found`, `weights_missing`, `weights_key_missing`, `weights_shape`, `weights_format`,
    `device_unavailable`, `precision_unavailable`, `adapter_attached`, `output_exists`, `cache_unsafe`,
    `compile_failed`, `not_finite`, `fused_mismatch`.
    """


class AdapterError(ModelError):
    """Codes: `adapter_corrupt`, `adapter_mismatch`, `adapter_base_missing`."""


class DrawingError(ModelError):
    """Codes: `not_finite`."""


class UnusableReferenceError(ModelError):
    """Codes: `no_face`, `empty_cutout`, `reference_too_thin`."""

    def __init__(self, code: str, message: str, *, slot: int) -> None:
        super().__init__(code, message)
        self.slot = slot
