"""Jobs under random faults by a seed, paced by how many jobs have ended, so that each run has all of its faults."""

from __future__ import annotations

import json
import os
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.faults.clients import HEIGHT, WIDTH, Clients, Load, seen
from tests.faults.crew import Crew
from tests.faults.history import Event, History
from tests.waiting import wait_for
from tests.workers.standin import picture
from workers import pictures, queues
from workers.artifacts import ArtifactError
from workers.failpoints import POINTS
from workers.jobs import CUSTOMIZE, CustomizeRecord, JobStatus
from workers.ledger import CustomizeLedger

_OVERDUE_S = 5.0
"""A fault that has not happened by then is made to happen from outside."""
_TICK_S = 0.01
_BOXES = ("calling", "to_ring", "turns:fetches", "deadlines")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to happen. `patience_s`: without a job ending for so long, the campaign gives up."""

    jobs: int
    kills: int
    redis_kills: int
    stops: int
    seed: int
    workers: int = 3
    lease_s: float = 10.0
    patience_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Fault:
    """Due once `after` jobs have ended. `point`: at that failpoint, on its `hit`-th time; None: at once, anywhere."""

    after: int
    action: str
    point: str | None
    hit: int


def schedule(plan: Plan) -> list[Fault]:
    """The faults of a seed in order, spread over the first nine tenths of the jobs. Half of them are at failpoints."""
    draw = random.Random(f"faults {plan.seed}")
    actions = ["kill"] * plan.kills + ["stop"] * plan.stops + ["redis"] * plan.redis_kills
    faults = [
        Fault(
            draw.randrange(plan.jobs * 9 // 10),
            action,
            draw.choice(POINTS) if action != "redis" and draw.random() < 0.5 else None,
            draw.randint(1, 8),
        )
        for action in actions
    ]
    return sorted(faults, key=lambda fault: fault.after)


def run_campaign(plan: Plan, home: Path, report: Callable[[str], None] = lambda _line: None) -> list[Event]:
    """The history of a campaign, which also lies in `home`/history.jsonl."""
    history = History(home / "history.jsonl")
    history.note("begin", **asdict(plan))
    draw = random.Random(f"victims {plan.seed}")
    faults = deque(schedule(plan))
    with Crew(home, history, size=plan.workers, lease_s=plan.lease_s) as crew:
        # What lost workers held waits for its leases; the others must have enough to do meanwhile.
        clients = Clients(crew.url, history, Load(plan.jobs, waiting=int(40 + 20 * plan.lease_s)), plan.seed)
        clients.start()
        last, moved_at = -1, time.monotonic()
        while faults or not clients.done.is_set() or clients.ended < plan.jobs or _pending(crew):
            crew.tend()
            while faults and faults[0].after <= clients.ended and _strike(crew, faults[0], draw):
                faults.popleft()
            _hurry(crew)
            if clients.ended != last:
                if last // 500 != clients.ended // 500:
                    report(f"{clients.ended} jobs, {crew.kills} kills, {crew.redis_kills} of Redis, {crew.stops} stops")
                last, moved_at = clients.ended, time.monotonic()
            elif time.monotonic() - moved_at > plan.patience_s:
                break
            time.sleep(_TICK_S)
        clients.close()
        conclude(crew)
    return history.read()


def conclude(crew: Crew) -> None:
    """Let the line empty and the workers leave, then note each record and what is left of everything else."""

    def empty() -> bool:
        crew.tend()
        return not (queues.pending(crew.client, CUSTOMIZE) or queues.popped(crew.client, CUSTOMIZE))

    wait_for(empty, "the last deliveries")
    crew.leave()
    ids = [str(member, "ascii") for member in crew.client.zrange(f"{CUSTOMIZE.root}jobs", 0, -1)]
    records = [record for job_id in ids if (record := crew.ledger.get(job_id)) is not None]
    messages = _messages(crew.ledger)
    for record in records:
        token = crew.client.hget(f"{CUSTOMIZE.root}job:{record.job.id}", "token")
        note_final(crew, record, int(token) if token else None, messages.get(record.job.id, []))
    crew.history.note("drained", **_left(crew, records))


def _messages(ledger: CustomizeLedger) -> dict[str, list[list[Any]]]:
    """What webhooks would be told of each job, in order."""
    found: dict[str, list[tuple[int, list[Any]]]] = {}
    while due := ledger.due_webhooks(200):
        for message in due:
            change = [*json.loads(message.data).values()]
            found.setdefault(message.job_id, []).append((int(message.id.rpartition("_")[2]), change))
    return {job_id: [change for _, change in sorted(changes)] for job_id, changes in found.items()}


def note_final(crew: Crew, record: CustomizeRecord, token: int | None, messages: list[list[Any]]) -> None:
    """A record, what was told of it, and what is wrong with its pictures."""
    missing, wrong = [], []
    sampling = record.job.sampling
    for image in record.result.images if record.result else ():
        try:
            data = crew.store.read_picture(image.name, image.sha256)
        except ArtifactError:
            missing.append(image.name)
            continue
        drawn = picture(record.job.prompt, image.seed, sampling.num_inference_steps, HEIGHT, WIDTH)
        if data != pictures.encode(drawn, "png"):
            wrong.append(image.name)
    events, gap = crew.ledger.events(record.job.id, limit=1000)
    story = [[*json.loads(event.data).values()] for event in events if event.kind == "status"]
    told = {"story": None if gap else story, "messages": messages, "asked": _asked(record)}
    crew.history.note("final", **seen(record), token=token, missing=missing, wrong=wrong, **told)


def _asked(record: CustomizeRecord) -> str | None:
    """Of what a webhook is to be told."""
    return record.job.webhook.events[0] if record.job.webhook else None


def _strike(crew: Crew, fault: Fault, draw: random.Random) -> bool:
    """Make a fault happen, or see to it that it will; False if no worker is there for it."""
    if fault.action == "redis":
        crew.kill_redis()
        return True
    ready = crew.ready()
    if not ready:
        return False
    victim = draw.choice(ready)
    if fault.point is not None:
        crew.arm(victim, f"{fault.point}={fault.action}@{fault.hit}")
    elif fault.action == "kill":
        crew.kill(victim, "anywhere=kill")
    else:
        crew.stop(victim)
    return True


def _pending(crew: Crew) -> bool:
    return any(member.armed or member.resume_at for member in crew.members)


def _hurry(crew: Crew) -> None:
    """A worker that does not come to its failpoint fails where it is."""
    for member in crew.members:
        late = member.armed is not None and time.monotonic() - member.armed_at > _OVERDUE_S
        if (
            late
            and member.resume_at is None
            and member.process.poll() is None
            and "anywhere" not in (member.armed or "")
        ):
            if "stop" in (member.armed or ""):
                crew.stop(member)
            else:
                crew.kill(member, "anywhere=kill")


def _left(crew: Crew, records: list[CustomizeRecord]) -> dict[str, int]:
    """What should be nothing. Files are swept as a store that is an hour older would be."""
    deliveries = queues.queue(crew.client, CUSTOMIZE)
    filed = {
        (status, str(member, "ascii"))
        for status in JobStatus
        for member in crew.client.zrange(f"{CUSTOMIZE.root}status:{status}", 0, -1)
    }
    named = {image.name for record in records if record.result for image in record.result.images}
    return {
        "leases": crew.client.zcard(f"{CUSTOMIZE.root}leases"),
        "deliveries": deliveries.count + len(queues.popped(crew.client, CUSTOMIZE)),
        "hashes of deliveries": len(list(crew.client.scan_iter("rq:job:*"))),
        **{f"entries in {box}": int(crew.client.zcard(f"{CUSTOMIZE.root}{box}")) for box in _BOXES},
        "lines and windows": sum(1 for _ in crew.client.scan_iter(f"{CUSTOMIZE.root}[lw]in[ed]*:*")),
        "misfiled records": len(filed ^ {(record.status, record.job.id) for record in records}),
        **_sweep(crew, named),
    }


def _sweep(crew: Crew, named: set[str]) -> dict[str, int]:
    """Unfinished files and pictures that no record names: as many as the store leaves lying for a day."""

    def strays() -> list[Path]:
        return [path for path in crew.store.root.rglob("*") if path.is_file() and path.name not in named]

    found = strays()
    crew.history.note("swept", files=len(found))
    for path in found:
        os.utime(path, (0, 0))
    crew.store.sweep(86_400)
    left = strays()
    parts = sum(path.suffix == ".part" for path in left)
    return {"temporary files": parts, "pictures without a record": len(left) - parts}
