"""`dreamserve keys`: who may call. It works on the Redis of a running service, or on its data if none runs."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from workers.tenants import TenantBook

keys = typer.Typer(no_args_is_help=True, help="API keys of tenants.")


@keys.command()
def create(
    tenant: Annotated[str, typer.Argument(help="Whose key: lowercase letters, digits, `.`, `_`, `-`.")],
    share: Annotated[
        float | None,
        typer.Option(min=0.0, help="Estimated GPU-seconds that the tenant may have waiting and running."),
    ] = None,
) -> None:
    """Make a key and print it, this once: only its hash is kept."""
    with _book() as book:
        try:
            key = book.create_key(tenant)
        except ValueError as error:
            _fail(str(error))
        if share is not None:
            book.set_share(tenant, share)
    print(key)


@keys.command("list")
def list_keys() -> None:
    """Show ids, tenants and shares; the keys themselves are nowhere."""
    with _book() as book:
        entries, shares = book.entries(), book.shares()
    table = Table("id", "tenant", "share (GPU-s)", "made", "revoked", box=None)
    for entry in entries:
        share = f"{shares[entry.tenant]:g}" if entry.tenant in shares else "default"
        revoked = "" if entry.revoked_at is None else _day(entry.revoked_at)
        table.add_row(entry.id, entry.tenant, share, _day(entry.created_at), revoked)
    Console().print(table, highlight=False)


@keys.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="Of `keys list`; a key has it in its middle.")],
) -> None:
    """Close a key for good; gateways refuse it within 5 seconds."""
    with _book() as book:
        if not book.revoke(key_id):
            _fail("there is no key of this id: see `dreamserve keys list`")


@keys.command()
def share(
    tenant: Annotated[str, typer.Argument(help="Whose: it need not have a key yet.")],
    seconds: Annotated[float, typer.Argument(min=0.0)],
) -> None:
    """Set the estimated GPU-seconds that a tenant may have waiting and running.

    Whoever has nothing open may always have one job, whatever it costs: to shut a tenant out, revoke its keys.
    """
    with _book() as book:
        try:
            book.set_share(tenant, seconds)
        except ValueError as error:
            _fail(str(error))


@contextmanager
def _book() -> Generator[TenantBook]:
    """The tenants of the configured Redis, of the running private one, or of the private one started for this."""
    from pydantic import ValidationError  # noqa: PLC0415 - keeps the other commands quick
    from redis.exceptions import RedisError  # noqa: PLC0415 - as above

    from service.settings import GatewaySettings  # noqa: PLC0415 - as above
    from workers import queues  # noqa: PLC0415 - as above
    from workers.redis_process import RedisUnavailableError, find_redis, start_redis  # noqa: PLC0415 - as above
    from workers.settings import describe_bad_settings  # noqa: PLC0415 - as above
    from workers.tenants import TenantBook  # noqa: PLC0415 - as above

    try:
        settings = GatewaySettings()
        url = settings.redis_url or find_redis(settings.state_dir)
        private = None if url else start_redis(settings.state_dir)
    except ValidationError as error:
        _fail(describe_bad_settings(error))
    except RedisUnavailableError as error:
        _fail(str(error))
    try:
        with queues.connect(url or (private.url if private else "")) as client:
            yield TenantBook(client)
    except RedisError as error:
        _fail(f"Redis does not answer ({type(error).__name__}): check DREAMSERVE_REDIS_URL")
    except ValueError as error:
        _fail(str(error))
    finally:
        if private:
            private.stop()


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def _fail(message: str) -> NoReturn:
    print(f"dreamserve: {message}", file=sys.stderr)
    raise SystemExit(2)
