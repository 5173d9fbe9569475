"""`dreamserve fuse`: write the transformer with DreamO fused in, once, so that workers start fast."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from model.errors import ModelError
from model.weights.checkpoints import SHIPPED, ModelSource, settings_of, write_fused


class FuseDtype(StrEnum):
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class DreamoVersion(StrEnum):
    V1 = "v1"
    V1_1 = "v1.1"
    MAIN = "main"


app = typer.Typer(add_completion=False)


@app.command()
def fuse(
    out: Annotated[Path, typer.Option(help="New directory to write; pass it on as DREAMSERVE_FUSED.")],
    base: Annotated[
        str,
        typer.Option(
            envvar="DREAMSERVE_BASE_MODEL",
            help="FLUX.1-dev in diffusers layout, or its hub id.",
            show_default="the shipped model",
        ),
    ] = str(SHIPPED),
    dreamo: Annotated[
        Path | None,
        typer.Option(envvar="DREAMSERVE_DREAMO", help="Released DreamO files; default BASE/dreamo."),
    ] = None,
    version: Annotated[
        DreamoVersion | None,
        typer.Option(
            envvar="DREAMSERVE_VERSION", help="Released stack; main: dreamo.safetensors alone. Default: the base's own."
        ),
    ] = None,
    turbo: Annotated[
        bool, typer.Option(envvar="DREAMSERVE_TURBO", help="Include the Turbo adapter (12 steps).")
    ] = True,
    dtype: Annotated[FuseDtype, typer.Option(help="Dtype to fuse and store in.")] = FuseDtype.BFLOAT16,
) -> None:
    """Fuse the released DreamO adapters into FLUX.1-dev and write the result.

    Fusing follows the released rule bit for bit: adapter by adapter, each change rounded to DTYPE, then added.
    FLUX.1-dev needs 24 GB of memory and as much disk for this in bfloat16.
    """
    source = ModelSource(
        base_model=base,
        dreamo=dreamo,
        version=None if version is None else version.value,
        turbo=turbo,
        dtype=dtype.value,
        device="cpu",
    )
    try:
        write_fused(source, out)
    except ModelError as error:
        print(f"{error.code}: {error.message}", file=sys.stderr)
        raise typer.Exit(2) from error
    stack = settings_of(source.served_version, turbo=turbo)
    print(f"wrote {out}\nstart everything with DREAMSERVE_BASE_MODEL={base} DREAMSERVE_FUSED={out} {stack}")


if __name__ == "__main__":
    app(prog_name="dreamserve fuse")
