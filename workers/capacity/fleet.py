"""Workers in simulated time: what happens to each job of a trace, with the planner that real workers use.

    queue ─▶ intake (while there is room) ─▶ prepare ─▶ forward after forward ─▶ finish

As in `workers.inference.runner`, a worker prepares and finishes as many jobs at a time as it has hands, beside its
forwards. Whether they hold each other up is a question of the device: `Device` shares out as many lanes as there are.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

try:
    import simpy
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("the simulator runs on simpy, which is not installed: pip install '.[plan]'") from error

from workers.capacity.arrivals import Arrival
from workers.capacity.costs import Costs
from workers.pace import Pace
from workers.planner import Account, Budget, Seat, next_forward

_HEARD_S = 0.05
"""A real engine waits no longer for its beats."""
Process = Generator[simpy.Event, Any, None]


@dataclass(frozen=True, slots=True)
class Fleet:
    """Workers that are alike, each on a device of its own, and what each may have at a time."""

    workers: int
    jobs_in_hand: int
    budget: Budget


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of a job. Seconds from the trace's begin.

    Attributes:
        taken: by a worker. stepped: its first forward began. ended: all of its pictures were there.
        steps: made, of all pictures.
    """

    arrival: Arrival
    worker: int
    taken: float
    stepped: float
    ended: float
    steps: int

    @property
    def latency(self) -> float:
        return self.ended - self.arrival.second

    @property
    def queued(self) -> float:
        """Before a worker took it."""
        return self.taken - self.arrival.second


@dataclass(frozen=True, slots=True)
class Outcome:
    """A whole trace.

    Attributes:
        jobs: in the trace's order. stepping: seconds that each worker's forwards took.
        forwards: of all workers, `runs` of pictures in them.
        end: second at which the last job ended.
    """

    jobs: tuple[Ended, ...]
    stepping: tuple[float, ...]
    forwards: int
    runs: int
    end: float

    @property
    def utilisation(self) -> float:
        """The share of the time in which a worker's forwards run."""
        return sum(self.stepping) / (len(self.stepping) * self.end) if self.end else 0.0


def simulate(arrivals: Sequence[Arrival], costs: Costs, fleet: Fleet) -> Outcome:
    """Run a trace until its last job has ended."""
    env = simpy.Environment()
    queue: simpy.Store = simpy.Store(env)
    tickets = [_Ticket(number, arrival, arrival.images) for number, arrival in enumerate(arrivals)]
    done = env.event()
    left = [len(tickets)]

    def ended() -> None:
        left[0] -= 1
        if not left[0]:
            done.succeed()

    workers = [_Worker(env, number, queue, costs, fleet, ended) for number in range(fleet.workers)]
    env.process(_arrive(env, queue, tickets))
    if tickets:
        env.run(until=done)
    return Outcome(
        jobs=tuple(ticket.result() for ticket in tickets),
        stepping=tuple(worker.stepping for worker in workers),
        forwards=sum(worker.forwards for worker in workers),
        runs=sum(ticket.steps for ticket in tickets),
        end=float(env.now),
    )


def _arrive(env: simpy.Environment, queue: simpy.Store, tickets: Sequence[_Ticket]) -> Process:
    for ticket in tickets:
        yield env.timeout(max(0.0, ticket.arrival.second - env.now))
        queue.put(ticket)


class Device:
    """Work at full speed while there is a lane for each piece, and equally slower when there are more."""

    def __init__(self, env: simpy.Environment, lanes: float) -> None:
        self._env = env
        self._lanes = lanes
        self._left: dict[simpy.Event, float] = {}
        self._since = 0.0
        self._turn = 0

    def work(self, seconds: float) -> simpy.Event:
        """An event that comes when work of so many seconds at full speed is done."""
        self._catch_up()
        done = self._env.event()
        self._left[done] = seconds
        self._look_ahead()
        return done

    def _speed(self) -> float:
        return min(1.0, self._lanes / len(self._left))

    def _catch_up(self) -> None:
        if self._left:
            passed = (self._env.now - self._since) * self._speed()
            self._left = {work: seconds - passed for work, seconds in self._left.items()}
        self._since = self._env.now

    def _look_ahead(self) -> None:
        """Wake when the next piece is done, unless something comes before."""
        self._turn += 1
        if self._left:
            delay = max(0.0, min(self._left.values())) / self._speed()
            timer = self._env.timeout(delay, value=self._turn)
            timer.callbacks.append(self._woken)

    def _woken(self, timer: simpy.Event) -> None:
        if timer.value == self._turn:
            self._catch_up()
            least = min(self._left.values())
            for work in [work for work, seconds in self._left.items() if seconds <= least + 1e-12]:
                del self._left[work]
                work.succeed()
            self._look_ahead()


@dataclass(slots=True, eq=False)
class _Ticket:
    """A job on its way. `missing`: pictures."""

    number: int
    arrival: Arrival
    missing: int
    worker: int = -1
    taken: float = 0.0
    stepped: float | None = None
    ended: float = 0.0
    steps: int = 0
    room: Any = None

    @property
    def place(self) -> tuple[bool, int, int]:
        """In the lines to be prepared and finished."""
        arrival = self.arrival
        return not arrival.interactive, arrival.tokens * arrival.steps * arrival.images, self.number

    def result(self) -> Ended:
        stepped = self.ended if self.stepped is None else self.stepped
        return Ended(self.arrival, self.worker, self.taken, stepped, self.ended, self.steps)


@dataclass(slots=True)
class _Waiting:
    """Seats that the next forward lets in, and whom to wake for them."""

    seats: list[tuple[Seat, _Ticket]] = field(default_factory=list[tuple[Seat, _Ticket]])
    bell: simpy.Event | None = None


class _Worker:
    """One worker's processes."""

    def __init__(
        self, env: simpy.Environment, number: int, queue: simpy.Store, costs: Costs, fleet: Fleet, ended: Any
    ) -> None:
        self.stepping, self.forwards = 0.0, 0
        self._env, self._number, self._queue, self._costs, self._budget = env, number, queue, costs, fleet.budget
        self._ended = ended
        self._device = Device(env, costs.lanes)
        self._room = simpy.Resource(env, fleet.jobs_in_hand)
        self._to_prepare, self._to_finish = simpy.PriorityStore(env), simpy.PriorityStore(env)
        self._ready = _Waiting()
        self._coming: dict[_Ticket, float] = {}
        hands = [act() for _ in range(costs.hands) for act in (self._prepare, self._finish)]
        for process in (self._intake(), self._engine(), *hands):
            env.process(process)

    def _intake(self) -> Process:
        while True:
            room = self._room.request()
            yield room
            ticket: _Ticket = yield self._queue.get()
            ticket.worker, ticket.taken, ticket.room = self._number, self._env.now, room
            self._to_prepare.put(simpy.PriorityItem(ticket.place, ticket))

    def _prepare(self) -> Process:
        while True:
            item: simpy.PriorityItem = yield self._to_prepare.get()
            ticket = cast("_Ticket", item.item)
            arrival = ticket.arrival
            self._coming[ticket] = self._env.now
            yield self._device.work(self._costs.prepare(arrival.references))
            del self._coming[ticket]
            for image in range(arrival.images):
                seat = Seat(
                    f"{ticket.number:08d}/{image}",
                    arrival.tokens,
                    arrival.steps,
                    self._env.now,
                    arrival.tenant,
                    arrival.interactive,
                    size=arrival.tokens * arrival.steps,
                )
                self._ready.seats.append((seat, ticket))
            if self._ready.bell is not None:
                self._ready.bell.succeed()
                self._ready.bell = None

    def _engine(self) -> Process:
        account, pace = Account(), Pace()
        seats: dict[str, Seat] = {}
        tickets: dict[str, _Ticket] = {}
        while True:
            if not seats and not self._ready.seats:
                self._ready.bell = self._env.event()
                yield self._ready.bell
            for seat, ticket in self._ready.seats:
                seats[seat.key], tickets[seat.key] = seat, ticket
            self._ready.seats.clear()
            budget = replace(self._budget, light_tokens=pace.light_tokens)
            if self._somebody_is_coming(tickets.values(), self._env.now - 2 * pace.usual_s):
                budget = budget.brief()
            chosen, began = next_forward(list(seats.values()), budget, account, self._env.now), self._env.now
            yield from self._forward(chosen, tickets)
            pace = pace.after(sum(seat.tokens for seat in chosen), self._env.now - began)
            account = account.charged(chosen, list(seats.values()), self._budget)
            moved = {seat.key: replace(seat, steps=seat.steps - 1, waiting_since=self._env.now) for seat in chosen}
            for key, seat in moved.items():
                if seat.steps:
                    seats[key] = seat
                else:
                    ticket = tickets.pop(key)
                    self._to_finish.put(simpy.PriorityItem(ticket.place, ticket))
                    del seats[key]
            beats = len({seat.key.partition("/")[0] for seat in chosen})
            yield self._env.timeout(min(_HEARD_S, self._costs.beat_s * beats))

    def _somebody_is_coming(self, present: Iterable[_Ticket], since: float) -> bool:
        """See `workers.inference.runner`."""
        first = min(ticket.place for ticket in present)
        return any(ticket.place < first and begun > since for ticket, begun in self._coming.items())

    def _forward(self, chosen: Sequence[Seat], tickets: dict[str, _Ticket]) -> Process:
        began = self._env.now
        for seat in chosen:
            ticket = tickets[seat.key]
            ticket.steps += 1
            ticket.stepped = began if ticket.stepped is None else ticket.stepped
        yield self._device.work(self._costs.step.seconds([seat.tokens for seat in chosen]))
        self.stepping += self._env.now - began
        self.forwards += 1

    def _finish(self) -> Process:
        while True:
            item: simpy.PriorityItem = yield self._to_finish.get()
            ticket = cast("_Ticket", item.item)
            yield self._device.work(self._costs.finish_s)
            ticket.missing -= 1
            if not ticket.missing:
                ticket.ended = self._env.now
                self._room.release(ticket.room)
                self._ended()
