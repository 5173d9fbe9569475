"""Judges a history by what is promised. It knows nothing but the history.

| | promise |
|---|---|
| I1 | every accepted job reaches a terminal state; none fails but by losing all its workers |
| I2 | at most one commit is taken per job, by its record's token; its pictures are there and the right ones |
| I3 | a terminal state never changes, and attempts only grow |
| I4 | nothing is claimed that was not submitted, and no token is given twice |
| I5 | what polls and cancels were answered agrees with the record in the end, and lists with records; the events are a
walk that ends there, and webhooks are to be told just that |
| I6 | no lease, delivery, entry of a line or an outbox, temporary file or picture without a record is left |
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from tests.faults.history import Event

TERMINAL = ("succeeded", "failed", "canceled", "expired")


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken promise; `job` is empty if it is not about one."""

    promise: str
    job: str
    says: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a history shows.

    Attributes:
        lost: accepted jobs that have not ended. twice: jobs with more than one commit taken.
        reclaims: seconds from a kill to the next claim of each job that the worker held.
        ends: how many jobs ended how, failures by their code.
        faults: how many there were, by event and by the failpoint.
        debris: what lost workers left in the store, to be swept.
    """

    violations: tuple[Violation, ...]
    accepted: int
    lost: int
    twice: int
    ends: dict[str, int]
    faults: dict[str, int]
    reclaims: tuple[float, ...]
    debris: dict[str, int]


def check(events: Sequence[Event]) -> Verdict:
    """The verdict on a whole history, in order of time."""
    by_kind: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        by_kind[event["event"]].append(event)
    final = {event["job"]: event for event in by_kind["final"]}
    accepted = {event["job"] for event in by_kind["accepted"]}
    committed = taken_commits(by_kind["commit"], final)
    violations = [
        *_ends(accepted, final),
        *_commits(committed, final),
        *_stays(by_kind["observed"] + by_kind["cancel"], final),
        *_stories(final),
        *_claims(by_kind["claim"], {event["job"] for event in by_kind["submit"]}),
        *_drained(by_kind["drained"]),
    ]
    return Verdict(
        violations=tuple(violations),
        accepted=len(accepted),
        lost=sum(final.get(job, {}).get("status") not in TERMINAL for job in accepted),
        twice=sum(len(tokens) > 1 for tokens in committed.values()),
        ends=dict(Counter(f"{one['status']} {one.get('code') or ''}".strip() for one in final.values())),
        faults=dict(Counter(_fault(event) for kind in ("kill", "stop", "redis_kill") for event in by_kind[kind])),
        reclaims=tuple(reclaims(events)),
        debris={
            name: number for event in by_kind["swept"] for name, number in event.items() if name not in ("at", "event")
        },
    )


def taken_commits(commits: Sequence[Event], final: dict[str, Event]) -> dict[str, set[int]]:
    """The tokens by which each job was committed: those that were told so, and that of the pictures in its record."""
    tokens: dict[str, set[int]] = defaultdict(set)
    for event in commits:
        if event.get("taken"):
            tokens[event["job"]].add(event["token"])
    for job, record in final.items():
        for name, _sha256 in record["images"] or ():
            tokens[job].add(int(name.split(".")[1]))
    return tokens


def reclaims(events: Sequence[Event]) -> list[float]:
    """Seconds from each kill to the next claim of each job that the worker held and that was claimed again."""
    held: dict[int, set[str]] = defaultdict(set)
    orphans: dict[str, float] = {}
    found: list[float] = []
    for event in events:
        match event["event"]:
            case "claim":
                if event["job"] in orphans:
                    found.append(event["at"] - orphans.pop(event["job"]))
                held[event["pid"]].add(event["job"])
            case "commit" if event.get("taken"):
                held[event["pid"]].discard(event["job"])
            case "kill":
                died: float = event["at"]
                orphans |= dict.fromkeys(held.pop(event["pid"], set()), died)
            case _:
                pass
    return found


def table(verdict: Verdict) -> str:
    """The verdict for a terminal."""
    times = sorted(verdict.reclaims)
    rows = [
        ("accepted", str(verdict.accepted)),
        ("ended", ", ".join(f"{number} {end}" for end, number in sorted(verdict.ends.items()))),
        ("faults", ", ".join(f"{number} {fault}" for fault, number in sorted(verdict.faults.items()))),
        ("debris", ", ".join(f"{number} {name}" for name, number in verdict.debris.items())),
        ("lost", str(verdict.lost)),
        ("twice", str(verdict.twice)),
        ("violations", str(len(verdict.violations))),
        (
            "claimed again",
            f"{len(times)}, median {median(times):.2f} s, longest {times[-1]:.2f} s after the kill" if times else "0",
        ),
    ]
    lines = [f"{name:<14}{value}" for name, value in rows]
    return "\n".join(lines + [f"  {one.promise} {one.job}: {one.says}" for one in verdict.violations[:20]])


def _ends(accepted: set[str], final: dict[str, Event]) -> list[Violation]:
    found: list[Violation] = []
    for job in sorted(accepted):
        status = final[job]["status"] if job in final else "absent"
        if status not in TERMINAL:
            found.append(Violation("I1", job, f"accepted, and {status} in the end"))
        elif status == "failed" and final[job]["code"] != "worker_lost":
            found.append(Violation("I1", job, f"failed by {final[job]['code']}, though nothing is wrong with it"))
    found += [Violation("I4", job, "has a record, and was never accepted") for job in sorted(final.keys() - accepted)]
    return found


def _commits(committed: dict[str, set[int]], final: dict[str, Event]) -> list[Violation]:
    found: list[Violation] = []
    for job, tokens in sorted(committed.items()):
        record = final.get(job)
        if len(tokens) > 1:
            found.append(Violation("I2", job, f"committed by the tokens {sorted(tokens)}"))
        if record is None or record["status"] != "succeeded":
            found.append(Violation("I2", job, "committed, and not succeeded in the end"))
        elif tokens != {record["token"]}:
            found.append(Violation("I2", job, f"committed by {sorted(tokens)}, its record has {record['token']}"))
    for job, record in sorted(final.items()):
        if record["status"] == "succeeded" and not record["images"]:
            found.append(Violation("I2", job, "succeeded without a picture"))
        for fault in ("missing", "wrong"):
            if record[fault]:
                found.append(Violation("I2", job, f"{fault} pictures: {', '.join(record[fault])}"))
    return found


def _stays(answers: Sequence[Event], final: dict[str, Event]) -> list[Violation]:
    """What each observer was shown of a job, each view held against the next one and the last against the record.

    Two observers' views are not compared: who asked first may note it last.
    """
    shown: dict[tuple[str, str], list[Event]] = defaultdict(list)
    for event in answers:
        shown[event["job"], event["event"]].append(event)
    found: list[Violation] = []
    for (job, _), views in sorted(shown.items()):
        record = final.get(job)
        if record is None:
            found.append(Violation("I5", job, "was shown, and has no record in the end"))
            continue
        for view, after in zip(views, [*views[1:], record], strict=True):
            promise = "I5" if after is record else "I3"
            if view["status"] in TERMINAL and _face(view) != _face(after):
                found.append(Violation(promise, job, f"was {view['status']} and then another {after['status']}"))
            if after["attempt"] < view["attempt"]:
                found.append(Violation(promise, job, f"attempt {view['attempt']} and then {after['attempt']}"))
    return found


def _stories(final: dict[str, Event]) -> list[Violation]:
    """Events and messages of each job, held against the record."""
    found: list[Violation] = []
    for job, record in sorted(final.items()):
        story, last = record["story"], [record["status"], record["attempt"]]
        if not story or story[0] != ["queued", 1] or story[-1] != last:
            found.append(Violation("I5", job, f"is {last}, and its events are {story}"))
            continue
        for before, after in pairwise(story):
            if after[0] not in _NEXT.get(before[0], ()) or after[1] - before[1] not in _CHARGES.get(after[0], (0,)):
                found.append(Violation("I5", job, f"went from {before} to {after}"))
        wanted = {"status": story, "terminal": story[-1:]}.get(record["asked"] or "", [])
        if record["messages"] != wanted:
            found.append(Violation("I5", job, f"its webhook is told {record['messages']} instead of {wanted}"))
    return found


_NEXT = {"queued": ("running", "canceled", "expired", "failed"), "running": ("queued", *TERMINAL)}
_CHARGES = {"queued": (0, 1)}


def _claims(claims: Sequence[Event], submitted: set[str]) -> list[Violation]:
    found = [
        Violation("I4", one["job"], "claimed, and never submitted") for one in claims if one["job"] not in submitted
    ]
    tokens = Counter(one["token"] for one in claims)
    found += [Violation("I4", "", f"token {token} given {times} times") for token, times in tokens.items() if times > 1]
    return found


def _drained(drained: Sequence[Event]) -> list[Violation]:
    if len(drained) != 1:
        return [Violation("I6", "", "the history does not say what was left")]
    left = {name: number for name, number in drained[0].items() if name not in ("at", "event") and number}
    return [Violation("I6", "", f"{number} {name} left") for name, number in left.items()]


def _face(view: Event) -> tuple[object, ...]:
    return view["status"], view["finished_at"], view["images"], view["code"]


def _fault(event: Event) -> str:
    plan = event.get("plan") or "of itself"
    return event["event"] if event["event"] == "redis_kill" else f"{event['event']} {plan.split('=')[0]}"
