"""The doctor and the settings: exit codes, remedies, and no traceback whatever is set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import redis
from pydantic import ValidationError

from tests.workers.conftest import MakeJob
from workers import doctor
from workers.doctor import check_dreamo, check_model, check_redis, check_state, check_tools, expected_files
from workers.inference.worker import describe_bad_settings
from workers.redis_process import RedisProcess
from workers.settings import SHIPPED_MODEL, QueueSettings, WorkerSettings


def test_shipped_configuration_is_fine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without any setting the service would start: everything that it needs is in the package."""
    for name in [name for name in os.environ if name.startswith("DREAMSERVE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DREAMSERVE_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    assert doctor.main() == 0
    said = capsys.readouterr().out
    for word in ("Python", "torch", "device", "Redis", "base model", "DreamO", "state directory", "faces"):
        assert word in said
    assert "problem" not in said


def test_bad_configuration_names_the_variable_not_its_value(tmp_path: Path) -> None:
    """Exit code 1, one line, no traceback, and no value: it may be a password."""
    environment = {**os.environ, "DREAMSERVE_DTYPE": "secret", "DREAMSERVE_JOB_TTL_S": "never"}
    for module in ("workers.doctor", "workers.inference"):
        ran = subprocess.run(
            [sys.executable, "-m", module], env=environment, capture_output=True, text=True, check=False
        )
        assert ran.returncode == (1 if module == "workers.doctor" else 2)
        said = ran.stdout + ran.stderr
        assert "DREAMSERVE_DTYPE" in said and "DREAMSERVE_JOB_TTL_S" in said
        assert "secret" not in said and "Traceback" not in said


def test_every_problem_has_a_remedy(tmp_path: Path) -> None:
    """What is wrong is found by its own check, and the row says what to do."""
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    settings = WorkerSettings(
        redis_url="redis://:password@127.0.0.1:1/0",
        state_dir=blocked / "state",
        base_model=str(tmp_path / "absent"),
        cutout="ben2:/absent",
        faces="facexlib:/absent",
    )
    for check in (check_redis, check_model, check_dreamo, check_state, check_tools):
        rows = list(check(settings))
        assert {row.verdict for row in rows} == {"problem"}, check.__name__
        assert all(row.remedy and "password" not in row.found + row.remedy for row in rows)


def test_missing_adapter_files_are_named(tmp_path: Path) -> None:
    """Each version has its own list; one file away is one name in the remedy."""
    released = WorkerSettings(version="v1.1", dreamo=tmp_path)
    expected = expected_files(released)
    assert expected != expected_files(WorkerSettings(version="v1"))
    assert len(expected_files(WorkerSettings(version="v1.1", turbo=False))) == len(expected) - 1
    assert expected_files(WorkerSettings()) == ["dreamo.safetensors"]
    for name in expected[1:]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (row,) = check_dreamo(released)
    assert row.verdict == "problem" and expected[0] in row.remedy and expected[1] not in row.remedy
    (tmp_path / expected[0]).write_bytes(b"")
    (row,) = check_dreamo(released)
    assert row.verdict == "ok"


def test_a_base_that_names_no_stack_is_told(tmp_path: Path) -> None:
    """Its `dreamserve.json` is read for the stack; nonsense there is a row, not a crash."""
    (tmp_path / "dreamserve.json").write_text('{"version": "v9"}')
    (row,) = check_dreamo(WorkerSettings(base_model=str(tmp_path)))
    assert row.verdict == "problem" and "no version 'v9'" in row.remedy


def test_running_redis_is_found(server: RedisProcess, client: redis.Redis, make_job: MakeJob) -> None:
    """An external server is asked for its version."""
    (row,) = check_redis(WorkerSettings(redis_url=server.url))
    assert row.verdict == "ok" and row.found.startswith("answers, ")


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefix, empty values, unknown names, immutability, and messages without values."""
    monkeypatch.setenv("DREAMSERVE_TURBO", "false")
    monkeypatch.setenv("DREAMSERVE_STATE_DIR", "")
    monkeypatch.setenv("DREAMSERVE_DEVICE", "cuda:1")
    monkeypatch.setenv("DREAMSERVE_UNKNOWN", "1")
    settings = WorkerSettings()
    assert (settings.turbo, settings.state_dir, settings.device) == (False, Path(".state"), "cuda:1")
    assert settings.base_model == SHIPPED_MODEL
    assert settings.artifact_root == Path(".state/artifacts")
    with pytest.raises(ValidationError):
        settings.turbo = True
    with pytest.raises(ValidationError) as error:
        QueueSettings(version="v9", lease_s=0)  # pyright: ignore[reportArgumentType]  # wrong on purpose
    said = describe_bad_settings(error.value)
    assert "DREAMSERVE_VERSION" in said and "DREAMSERVE_LEASE_S" in said and "v9" not in said
