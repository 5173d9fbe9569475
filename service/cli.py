"""`dreamserve`: start it, use it, try it, check it. What needs torch runs in a process of its own."""

from __future__ import annotations

import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from service.commands.keys import keys
from service.commands.submit import SubmitError

if TYPE_CHECKING:
    from service.client import Job
    from service.client.calls import CustomizeOptions
    from service.settings import GatewaySettings

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
dataset = typer.Typer(no_args_is_help=True, help="Look at training data.")
app.add_typer(dataset, name="dataset")
app.add_typer(keys, name="keys")
_OUT = Console()
_ERR = Console(stderr=True)
_PASS_ON: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
}

Url = Annotated[str, typer.Option(envvar="DREAMSERVE_URL", help="Where the service runs.")]


def main() -> None:
    """Entry point of the `dreamserve` command."""
    app(prog_name="dreamserve")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"dreamserve {version('dreamserve')}")
        raise typer.Exit


@app.callback()
def dreamserve(
    _version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and end.")
    ] = False,
) -> None:
    """Start it, use it, try it, check it."""


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Default: DREAMSERVE_HOST, else 127.0.0.1.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="0: a free one. Default: DREAMSERVE_PORT, else 8080.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes, each with the model loaded.")] = 1,
    training_workers: Annotated[int, typer.Option(min=0, help="Processes that run trainings.")] = 0,
    state_dir: Annotated[
        Path | None, typer.Option(help="Jobs and pictures. Default: DREAMSERVE_STATE_DIR, else .state.")
    ] = None,
) -> None:
    """Start everything: a private Redis unless DREAMSERVE_REDIS_URL is set, workers, the courier and the gateway."""
    from service.callers.auth import exposed  # noqa: PLC0415 - keeps the other commands quick
    from service.commands.process_tree import TreeFailedError  # noqa: PLC0415 - as above
    from service.commands.serving import OpenToOthersError, Serving  # noqa: PLC0415 - as above
    from service.commands.serving import serve as run  # noqa: PLC0415 - as above
    from workers.redis_process import RedisUnavailableError  # noqa: PLC0415 - as above

    settings = _settings()
    serving = Serving(
        host=host or settings.host,
        port=settings.port if port is None else port,
        workers=workers,
        training_workers=training_workers,
        state_dir=state_dir or settings.state_dir,
        redis_url=settings.redis_url,
        auth=settings.auth,
        metrics_port=settings.metrics_port,
    )
    if settings.auth == "off" and exposed(serving.host):
        _warn("DREAMSERVE_AUTH is off: whoever reaches this address can use it")
    try:
        run(
            serving,
            report=_warn,
            ready=lambda address: print(f"dreamserve is ready: {address}", flush=True),
        )
    except (OpenToOthersError, TreeFailedError, RedisUnavailableError) as error:
        _fail(str(error), 2)
    except OSError as error:
        _fail(f"cannot start: {error}", 2)


@app.command()
def gateway(
    host: Annotated[str | None, typer.Option(help="Default: DREAMSERVE_HOST, else 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Default: DREAMSERVE_PORT, else 8080.")] = None,
    fd: Annotated[int | None, typer.Option(hidden=True, help="An inherited listening socket.")] = None,
) -> None:
    """Start the gateway alone, on DREAMSERVE_REDIS_URL or the Redis of a running `serve` on the same state."""
    from redis.exceptions import RedisError  # noqa: PLC0415 - keeps the other commands quick

    from model.errors import WeightsError  # noqa: PLC0415 - as above
    from service.app import create_app  # noqa: PLC0415 - as above
    from service.commands.serving import OpenToOthersError, refuse_open, run_gateway  # noqa: PLC0415 - as above
    from workers.redis_process import find_redis  # noqa: PLC0415 - as above
    from workers.telemetry.logs import configure_logging  # noqa: PLC0415 - as above

    settings = _settings()
    url = settings.redis_url or find_redis(settings.state_dir)
    settings = settings.model_copy(update={"redis_url": url, "host": host or settings.host})
    configure_logging(settings.log_level)
    try:
        application = create_app(settings)
        refuse_open(settings.auth, settings.host, url or "")
    except OpenToOthersError as error:
        _fail(str(error), 2)
    except RedisError as error:
        _fail(f"Redis does not answer ({type(error).__name__})", 1)
    except WeightsError as error:
        _fail(f"{error.message} ({error.code})", 2)
    except ValueError as error:
        _fail(str(error), 2)
    run_gateway(application, settings.host, settings.port if port is None else port, fd)


@app.command(**_PASS_ON)
def worker(context: typer.Context) -> None:
    """Start one worker alone (python -m workers.inference), on the same Redis as `gateway`."""
    _become("workers.inference", context.args)


@app.command(**_PASS_ON)
def training_worker(context: typer.Context) -> None:
    """Start one training worker alone (python -m workers.training.worker), on the same Redis as `gateway`."""
    _become("workers.training.worker", context.args)


@app.command(**_PASS_ON)
def courier(context: typer.Context) -> None:
    """Start one courier alone (python -m workers.courier), on the same Redis as `gateway`: it speaks to the outside."""
    _become("workers.courier", context.args)


@app.command(**_PASS_ON)
def fuse(context: typer.Context) -> None:
    """Fold DreamO's adapters into a FLUX checkpoint (python -m model.weights.fuse)."""
    _become("model.weights.fuse", context.args)


@app.command(**_PASS_ON)
def adapters(context: typer.Context) -> None:
    """Register adapter files that jobs may name, and list them (python -m workers.adapters)."""
    _become("workers.adapters", context.args)


@app.command(**_PASS_ON)
def train(context: typer.Context) -> None:
    """Train an adapter by a recipe (python -m workers.training)."""
    _become("workers.training", context.args)


@app.command(**_PASS_ON)
def doctor(context: typer.Context) -> None:
    """Say what this machine has and what is missing (python -m workers.doctor)."""
    _become("workers.doctor", context.args)


@dataset.command(**_PASS_ON)
def check(context: typer.Context) -> None:
    """Say what is wrong with a dataset, row by row (python -m workers.training.datasets.check)."""
    _become("workers.training.datasets.check", context.args)


@app.command()
def submit(
    prompt: Annotated[str, typer.Option(help="Write \\[ref#1] where the first reference is meant.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write: .png, .jpg or .webp.")],
    reference: Annotated[
        list[str] | None, typer.Option(help="ROLE=FILE, once for each slot; 'none' leaves a slot empty.")
    ] = None,
    url: Url = "http://127.0.0.1:8080",
    key: Annotated[str | None, typer.Option(envvar="DREAMSERVE_KEY", help="API key, where one is asked for.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoise steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same picture.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Distilled guidance.")] = None,
    num_images: Annotated[int, typer.Option(min=1, help="Written as NAME-0, NAME-1, ...")] = 1,
    adapter: Annotated[str | None, typer.Option(help="NAME or NAME:SCALE.")] = None,
) -> None:
    """Make a picture over HTTP and write it to a file."""
    from service.commands import submit as calls  # noqa: PLC0415 - keeps the other commands quick

    try:
        calls.check_room(output)
        references = [calls.reference(text) for text in reference or ()]
        width, height = calls.size(size)
        options: CustomizeOptions = {
            "width": width,
            "height": height,
            "num_images": num_images,
            "format": calls.output_format(output),
            "num_inference_steps": steps,
            "seed": seed,
            "guidance": guidance,
            "adapter": calls.adapter(adapter),
        }
        with _bar() as bar, calls.service_at(url, key) as client:
            task = bar.add_task("sending", total=None, note="")
            submitted = client.customize(prompt, references, **options)
            job = calls.follow(submitted, lambda job: _show(bar, task, job))
            pictures = [image.read() for image in job.images]
        for file in calls.write(job, output, pictures):
            _OUT.print(f"wrote {file}", markup=False, highlight=False)
    except SubmitError as error:
        _fail("\n".join([error.message, *(f"  {fault}" for fault in error.faults)]), 1)
    _summarize(job)


@app.command()
def demo(out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("out")) -> None:
    """Serve privately, submit two references, write the result and a contact sheet, stop everything."""
    from service.commands.demo import run_demo  # noqa: PLC0415 - keeps the other commands quick

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that everything is stopped
    try:
        job = run_demo(out, lambda text: _OUT.print(text, markup=False, highlight=False))
    except SubmitError as error:
        _fail("\n".join([error.message, *(f"  {fault}" for fault in error.faults)]), 1)
    _summarize(job)
    _OUT.print(f"wrote {out / 'demo.png'} and {out / 'contact-sheet.png'}", markup=False, highlight=False)


@app.command()
def openapi() -> None:
    """Print the OpenAPI document; it is the same for every model."""
    import json  # noqa: PLC0415 - keeps the other commands quick

    from service.app import create_app  # noqa: PLC0415 - as above

    settings = _settings().model_copy(update={"redis_url": "redis://nowhere"})  # which is never asked
    print(json.dumps(create_app(settings).openapi(), indent=1, ensure_ascii=False))


def _settings() -> GatewaySettings:
    from service.settings import GatewaySettings  # noqa: PLC0415 - keeps the other commands quick
    from workers.settings import describe_bad_settings  # noqa: PLC0415 - as above

    try:
        return GatewaySettings()
    except ValidationError as error:
        _fail(describe_bad_settings(error), 2)


def _become(module: str, arguments: list[str]) -> NoReturn:
    """Replace this process, so that signals and the exit status are the module's own."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])  # noqa: S606 - no shell is the point


def _bar() -> Progress:
    columns = (TextColumn("{task.description:<12}"), BarColumn(), TextColumn("{task.fields[note]}"))
    return Progress(*columns, TimeElapsedColumn(), console=_ERR, transient=True)


def _show(bar: Progress, task: Any, job: Job) -> None:
    progress = job.progress
    if job.queue:
        bar.update(task, description="queued", note=f"{job.queue.position} ahead")
    elif progress:
        note = f"step {progress.step} of {progress.total}"
        bar.update(task, description=progress.phase, completed=progress.step, total=progress.total, note=note)


def _summarize(job: Job) -> None:
    seeds = ", ".join(str(image.seed) for image in job.images)
    timings = "  ".join(f"{name.removesuffix('_s')} {seconds:.2f} s" for name, seconds in job.timings.items())
    for line in (f"job {job.id}", f"seed {seeds}", timings):
        _OUT.print(line, markup=False, highlight=False)


def _warn(message: str) -> None:
    _ERR.print(f"dreamserve: {message}", markup=False, highlight=False, soft_wrap=True)


def _fail(message: str, status: int) -> NoReturn:
    _warn(message)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
