"""The bundled Redis: data survive it, its directory has one owner, its absence has a clear message."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from workers import queues, redis_process
from workers.redis_process import RedisUnavailableError, find_redis, start_redis


def test_data_survive_a_kill(tmp_path: Path) -> None:
    """What was acknowledged before `kill -9` is there after the next start, and settings are as promised."""
    first = start_redis(tmp_path)
    with queues.connect(first.url) as client:
        client.set("key", "value")
        config: dict[str, str] = client.config_get("append*")  # pyright: ignore[reportAssignmentType]  # sync client
        assert (config["appendonly"], config["appendfsync"]) == ("yes", "always")
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    first.process.kill()
    first.process.wait()
    first.lock.close()
    second = start_redis(tmp_path)
    try:
        with queues.connect(second.url) as client:
            assert client.get("key") == b"value"
    finally:
        second.stop()
    assert find_redis(tmp_path) is None


def test_one_owner_per_directory(tmp_path: Path) -> None:
    """A second service on the same directory is refused; the first one's Redis stays up."""
    first = start_redis(tmp_path)
    try:
        with pytest.raises(RedisUnavailableError, match="another service"):
            start_redis(tmp_path)
        assert find_redis(tmp_path) == first.url
    finally:
        first.stop()


def test_a_killed_owner_takes_its_server_along(tmp_path: Path) -> None:
    """kill -9 of the service leaves no Redis behind, and the next start has all data."""
    script = (
        "import sys, os; from pathlib import Path; from workers import queues;"
        "from workers.redis_process import start_redis;"
        "started = start_redis(Path(sys.argv[1]));"
        "queues.connect(started.url).set('key', 'value'); os._exit(9)"
    )
    owner = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, check=False)
    assert owner.returncode == 9, owner.stderr.decode()
    successor = start_redis(tmp_path)
    try:
        with queues.connect(successor.url) as client:
            assert client.get("key") == b"value"
            assert client.info("server")["process_id"] == successor.process.pid  # pyright: ignore[reportIndexIssue]  # sync client
    finally:
        successor.stop()


def test_a_leftover_is_taken_over(tmp_path: Path) -> None:
    """A server on our socket whose owner is gone is stopped, and its data kept."""
    first = start_redis(tmp_path)
    with queues.connect(first.url) as client:
        client.set("key", "value")
    first.lock.close()
    successor = start_redis(tmp_path)
    try:
        assert first.process.wait(10) == 0
        with queues.connect(successor.url) as client:
            assert client.get("key") == b"value"
    finally:
        successor.stop()


def test_long_and_odd_paths(tmp_path: Path) -> None:
    """A state directory too deep for a unix socket, with characters that mean something in a URL."""
    deep = tmp_path / ("d" * 90) / "ä b%20c?d#e"
    started = start_redis(deep)
    try:
        assert len(started.url) < 200
        assert find_redis(deep) == started.url
        assert (deep / "redis").is_dir()
    finally:
        started.stop()
    odd = tmp_path / "b%20c?d#e"
    if len(str(odd / "redis/redis.sock")) <= 100:
        started = start_redis(odd)
        try:
            assert find_redis(odd) == started.url
        finally:
            started.stop()


def test_nothing_to_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any server the message says what to do; an unusable directory is named as such."""
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    with pytest.raises(RedisUnavailableError, match="state directory"):
        start_redis(blocked / "state")
    monkeypatch.setattr(redis_process, "find_server", lambda: None)
    with pytest.raises(RedisUnavailableError, match="DREAMSERVE_REDIS_URL"):
        start_redis(tmp_path)
