"""Deliveries by RQ: one per job, brought again when lost, and never anything but the one function."""

from __future__ import annotations

import json
import pickle
import threading
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
from rq import Queue, SimpleWorker
from rq.exceptions import NoSuchJobError, StopRequested
from rq.serializers import JSONSerializer

from workers import queues
from workers.delivery import DeliveryWorker
from workers.jobs import CUSTOMIZE, TRAINING
from workers.queues import DreamJob


class PlainWorker(SimpleWorker):
    def _install_signal_handlers(self) -> None:
        """Leave pytest's alone."""


@dataclass
class Room:
    """Room for so many deliveries more."""

    left: int = 1000
    broken: bool = False

    def wait_for_room(self, timeout_s: float) -> bool:  # noqa: ARG002
        self.left -= 1
        return self.left >= 0


def waiting(client: redis.Redis) -> list[str]:
    return queues.queue(client, CUSTOMIZE).get_job_ids()


def forge(client: redis.Redis, job_id: str, data: bytes, **fields: str) -> None:
    """Put a job hash and its delivery into Redis as an intruder would."""
    mapping: dict[str, str | bytes] = {"data": data, "status": "queued", "origin": "customize", **fields}
    client.hset(f"rq:job:{job_id}", mapping=mapping)  # pyright: ignore[reportArgumentType]  # bytes are fine
    client.rpush("rq:queue:customize", job_id)


def serve(client: redis.Redis) -> DeliveryWorker:
    """Work off what is in the queue."""
    worker = DeliveryWorker(client, CUSTOMIZE, "w", threading.Event(), Room())
    worker.work(burst=True)
    return worker


def call(function: object, arguments: object, keywords: object | None = None, instance: object = None) -> bytes:
    return zlib.compress(json.dumps([function, instance, arguments, keywords or {}]).encode())


def test_ring_is_unique_and_small(client: redis.Redis) -> None:
    """Ringing twice leaves one delivery; what lies in Redis is JSON, and under a kilobyte."""
    queues.ring(client, CUSTOMIZE, "job_1")
    queues.ring(client, CUSTOMIZE, "job_1")
    assert waiting(client) == ["job_1"]
    hash_: dict[bytes, bytes] = client.hgetall("rq:job:job_1")  # pyright: ignore[reportAssignmentType]  # sync client
    assert json.loads(zlib.decompress(hash_[b"data"])) == [CUSTOMIZE.function, None, ["job_1"], {}]
    assert sum(len(name) + len(value) for name, value in hash_.items()) < 1024
    assert client.ttl("rq:job:job_1") == -1, "a delivery waits as long as its job"


def test_fetched_delivery_names_the_one_function(client: redis.Redis) -> None:
    """The honest case of what the forged ones are held against."""
    queues.ring(client, CUSTOMIZE, "job_1")
    job = queues.queue(client, CUSTOMIZE).fetch_job("job_1")
    assert isinstance(job, DreamJob)
    assert (job.func.__name__, job.args, job.kwargs) == ("customize", ("job_1",), {})


@pytest.mark.parametrize("left_over", ["in the queue", "popped", "acknowledged", "never rung"])
def test_ring_again_whatever_is_left(client: redis.Redis, left_over: str) -> None:
    """A worker may die with the delivery anywhere: afterwards there is exactly one, at the front."""
    queues.ring(client, CUSTOMIZE, "job_other")
    if left_over != "never rung":
        queues.ring(client, CUSTOMIZE, "job_1")
    if left_over in ("popped", "acknowledged"):
        client.lrem("rq:queue:customize", 0, "job_1")
        client.rpush("rq:queue:customize:intermediate", "job_1")
    if left_over == "acknowledged":
        queues.acknowledge(client, CUSTOMIZE, "job_1")
        assert client.exists("rq:job:job_1") == 0
    queues.ring_again(client, CUSTOMIZE, "job_1")
    assert waiting(client) == ["job_1", "job_other"]
    assert client.llen("rq:queue:customize:intermediate") == 0
    assert client.exists("rq:job:job_1") == 1


def test_ring_missing_rings_only_the_missing(client: redis.Redis) -> None:
    """Jobs that RQ holds are left where they are in the line, and one that is being taken is not delivered twice."""
    for job_id in ("job_1", "job_2", "job_taken"):
        queues.ring(client, CUSTOMIZE, job_id)
    client.lrem("rq:queue:customize", 0, "job_taken")
    client.rpush("rq:queue:customize:intermediate", "job_taken")
    assert queues.ring_missing(client, CUSTOMIZE, ["job_1", "job_2", "job_3", "job_taken"]) == ["job_3"]
    assert sorted(waiting(client)) == ["job_1", "job_2", "job_3"]


def forgeries(mark: Path) -> dict[str, bytes]:
    """Calls that no gateway makes; the dangerous ones would leave `mark` behind."""
    return {
        "os.system": call("os.system", [f"touch {mark}"]),
        "instance": call(CUSTOMIZE.function, ["job_1"], instance=["x"]),
        "keywords": call(CUSTOMIZE.function, ["job_1"], {"job_id": "job_1"}),
        "two arguments": call(CUSTOMIZE.function, ["job_1", "job_2"]),
        "odd id": call(CUSTOMIZE.function, ["../../x"]),
        "no list": call(CUSTOMIZE.function, 5),
        "other shape": zlib.compress(b'{"a": 1}'),
        "function is a list": call([CUSTOMIZE.function], ["job_1"]),
        "not zlib": b"\x00\x01",
        "bomb": zlib.compress(b" " * 50_000_000 + b"[]"),
        "deep": zlib.compress(b"[" * 4000),
        "pickle": zlib.compress(pickle.dumps(("os.system", None, (f"touch {mark}",), {}))),
    }


@pytest.mark.parametrize("kind", forgeries(Path("mark")))
def test_forged_deliveries_never_run(client: redis.Redis, tmp_path: Path, kind: str) -> None:
    """Whoever can write to Redis still cannot make a worker call anything, nor end its loop."""
    mark = tmp_path / "ran"
    forge(client, "forged", forgeries(mark)[kind])
    forge(client, "forged_too", forgeries(mark)[kind])
    worker = serve(client)
    assert not mark.exists()
    assert worker.successful_job_count == worker.failed_job_count == 0
    assert client.llen("rq:queue:customize") == 0, "both were taken and passed over"


def test_plain_rq_would_have_run_it(client: redis.Redis, tmp_path: Path) -> None:
    """The negative control: RQ's own job class with the JSON serializer does run the forged call."""
    mark = tmp_path / "ran"
    forge(client, "forged", call("os.system", [f"touch {mark}"]), timeout="60")
    line = Queue("customize", connection=client, serializer=JSONSerializer)
    PlainWorker([line], connection=client, serializer=JSONSerializer).work(burst=True)
    assert mark.exists()


def test_callbacks_webhooks_and_meta_stay_unread(client: redis.Redis) -> None:
    """An otherwise valid hash cannot smuggle in anything else that RQ would act upon."""
    forge(
        client,
        "forged",
        call(CUSTOMIZE.function, ["job_1"]),
        success_callback_name="os.abort",
        failure_callback_name="os.abort",
        stopped_callback_name="os.abort",
        webhooks='[{"url": "http://127.0.0.1:1/", "job_status": "finished"}]',
        meta='{"a": 1}',
        dependency_ids='["x"]',
        retries_left="5",
        repeats_left="5",
        timeout="1",
        status="nonsense",
    )
    job = queues.queue(client, CUSTOMIZE).fetch_job("forged")
    assert job is not None
    assert job.success_callback is job.failure_callback is job.stopped_callback is None
    assert (job.webhooks, job.meta, job.retries_left, job.repeats_left) == ([], {}, None, None)
    assert job.timeout == -1, "no alarm signal in the model's thread"


def test_popped_delivery_is_handed_back_on_a_stop(client: redis.Redis) -> None:
    """The signal may come right after the pop: the job goes back to the front, unclaimed, for another worker."""
    queues.ring(client, CUSTOMIZE, "job_1")
    queues.ring(client, CUSTOMIZE, "job_2")
    stop = threading.Event()
    worker = DeliveryWorker(client, CUSTOMIZE, "w", stop, Room())
    popped = worker.dequeue_job_and_maintain_ttl(1)
    assert popped is not None
    stop.set()
    worker.heartbeat()  # RQ's last one before it hands the job over: it must not drop the job
    worker.execute_job(*popped)
    assert waiting(client) == ["job_1", "job_2"]
    assert client.llen("rq:queue:customize:intermediate") == 0
    with pytest.raises(StopRequested):
        worker.heartbeat()


def test_a_full_worker_pops_nothing(client: redis.Redis) -> None:
    """Without room a delivery stays in the queue, for others; a stop or a lost device ends the wait."""
    queues.ring(client, CUSTOMIZE, "job_1")
    stop = threading.Event()
    room = Room(left=0)
    worker = DeliveryWorker(client, CUSTOMIZE, "w", stop, room)
    threading.Timer(0.2, stop.set).start()
    with pytest.raises(StopRequested):
        worker.dequeue_job_and_maintain_ttl(1)
    assert room.left < -1, "it has asked again"
    assert waiting(client) == ["job_1"]
    broken = DeliveryWorker(client, CUSTOMIZE, "w2", threading.Event(), Room(left=0, broken=True))
    with pytest.raises(StopRequested):
        broken.heartbeat()


def test_rqs_upkeep_leaves_deliveries_alone(client: redis.Redis) -> None:
    """What RQ saw popped over a minute ago, of whatever delivery, is not failed by it: its hash would stay for ever."""
    queues.ring(client, CUSTOMIZE, "job_1")
    worker = DeliveryWorker(client, CUSTOMIZE, "w", threading.Event(), Room())
    assert worker.dequeue_job_and_maintain_ttl(1) is not None
    popped = queues.queue(client, CUSTOMIZE).intermediate_queue
    client.set(popped.get_first_seen_key("job_1"), time.time() - 61)
    worker.clean_registries()
    assert popped.get_job_ids() == ["job_1"]
    assert client.hget("rq:job:job_1", "status") == b"queued"
    SimpleWorker([queues.queue(client, CUSTOMIZE)], connection=client, serializer=JSONSerializer).clean_registries()
    assert client.hget("rq:job:job_1", "status") == b"failed", "RQ's own worker, the control, fails it"


def test_function_is_checked_again_when_it_is_looked_up(client: redis.Redis) -> None:
    """A job object whose function was changed after reading is refused too."""
    job = DreamJob("job_1", connection=client)
    job.func_name = "os.system"
    with pytest.raises(NoSuchJobError):
        _ = job.func


def test_worker_cards(client: redis.Redis) -> None:
    """Cards are listed by name, replaced by later ones, gone when withdrawn or no longer refreshed."""
    assert queues.workers(client, CUSTOMIZE) == []
    queues.announce(client, CUSTOMIZE, "b", {"state": "loading"}, ttl_s=60)
    queues.announce(client, CUSTOMIZE, "a", {"state": "ready", "device": "cpu"}, ttl_s=60)
    queues.announce(client, CUSTOMIZE, "b", {"state": "ready"}, ttl_s=60)
    queues.announce(client, CUSTOMIZE, "late", {"state": "ready"}, ttl_s=60)
    assert [card["name"] for card in queues.workers(client, CUSTOMIZE)] == ["a", "b", "late"]
    assert queues.workers(client, CUSTOMIZE)[0] == {"state": "ready", "device": "cpu", "name": "a"}
    client.delete(f"{CUSTOMIZE.cards}:late")
    queues.withdraw(client, CUSTOMIZE, "a")
    assert queues.workers(client, CUSTOMIZE) == [{"state": "ready", "name": "b"}]
    assert client.smembers(CUSTOMIZE.cards) == {b"b"}


def test_deliveries_of_another_kind_are_dropped(client: redis.Redis) -> None:
    """A training smuggled into the customize queue makes an inference worker call nothing."""
    forge(client, "forged", call(TRAINING.function, ["train_1"]))
    serve(client)
    assert waiting(client) == []
    assert client.exists("rq:job:forged") == 0
