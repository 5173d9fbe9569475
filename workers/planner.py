"""Which runs take part in the next forward: pure, and decided anew before each one.

A run between two steps is a frozen value, so any set of them may step next, and leaving one out for a step costs
nothing. A forward is filled up to a budget of tokens; beyond it a larger one is no faster per token. Who comes first:

1. Every second time, the run that has waited longest, if that is longer than `patience_s`: nobody starves, and the
   others keep half of the device at least.
2. The class that has had least of the device for its share: interactive work gets `interactive_share` while batch work
   waits too.
3. The tenant of that class who has had least.
4. The smallest run as it was asked for, and of equal ones that with the least work left: a short one is not held up by
   long ones, not even by those that are almost done.

The first one's company are those next in line, but for runs of more than twice its size: it would wait for them at each
of its steps. They join as far as the forward stays so small that they cost it little (`Budget.light_tokens`).

Only runs of one group (model, adapters and their scales, precision) share a forward. Work is counted in tokens of text,
target and references, times the steps left: what they cost, apart from the square in attention.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TypeVar

Share = tuple[bool, str]
"""A class and one of its tenants: (interactive, tenant)."""
K = TypeVar("K", bool, Share)
_COMPANY = 2
"""Times a run's size that its company may have."""


@dataclass(frozen=True, slots=True)
class Seat:
    """One picture of a job, between two steps.

    Attributes:
        key: names it for the engine.
        tokens: of its part of a forward; the negative branch of true CFG counts too.
        steps: left.
        waiting_since: second at which its last step ended, or it arrived.
        group: only runs of the same one share a forward.
        size: its work as it began; 0: what is left of it.
    """

    key: str
    tokens: int
    steps: int
    waiting_since: float
    tenant: str = "default"
    interactive: bool = True
    group: str = ""
    size: int = 0

    @property
    def share(self) -> Share:
        return self.interactive, self.tenant

    @property
    def work(self) -> int:
        """Tokens of all its steps."""
        return self.tokens * self.steps

    @property
    def whole(self) -> int:
        """Its size."""
        return self.size or self.work


@dataclass(frozen=True, slots=True)
class Budget:
    """What a forward may hold.

    Attributes:
        tokens: of all its runs; a run alone may exceed it. runs: how many.
        interactive_share: of the device, for interactive work while batch work waits too.
        patience_s: how long a run may go without a step before it jumps the queue.
        light_tokens: a forward of so many costs hardly more than a smaller one.
    """

    tokens: int
    runs: int
    interactive_share: float = 0.8
    patience_s: float = 10.0
    light_tokens: int = 0

    def brief(self) -> Budget:
        """Of a forward that is to be over soon: one run, and company that costs it little."""
        return replace(self, tokens=min(self.tokens, max(1, self.light_tokens)))

    def weight(self, *, interactive: bool) -> float:
        """The share of a class."""
        return max(self.interactive_share if interactive else 1 - self.interactive_share, 1e-6)


@dataclass(frozen=True, slots=True)
class Account:
    """What each class and each tenant has had of the device, less what the last of its kind has had.

    Attributes:
        classes: tokens over the class's share. tenants: tokens.
        turn: forwards so far.
    """

    classes: Mapping[bool, float] = field(default_factory=lambda: MappingProxyType[bool, float]({}))
    tenants: Mapping[Share, float] = field(default_factory=lambda: MappingProxyType[Share, float]({}))
    turn: int = 0

    def charged(self, seats: Sequence[Seat], present: Sequence[Seat], budget: Budget) -> Account:
        """After a forward of `seats`.

        Who is not `present` is forgotten and comes back level with the one who has had least: time that somebody did
        not use is no claim on the time to come.
        """
        classes = _levelled(self.classes, (seat.interactive for seat in present))
        tenants: dict[Share, float] = {}
        for kind in classes:
            tenants |= _levelled(self.tenants, (seat.share for seat in present if seat.interactive == kind))
        for seat in seats:
            classes[seat.interactive] += seat.tokens / budget.weight(interactive=seat.interactive)
            tenants[seat.share] += seat.tokens
        return Account(MappingProxyType(classes), MappingProxyType(tenants), self.turn + 1)


def next_forward(seats: Sequence[Seat], budget: Budget, account: Account, now: float) -> tuple[Seat, ...]:
    """The runs of the next forward, all of one group; at least one, if there is any."""
    if not seats:
        return ()
    account = replace(account.charged((), seats, budget), turn=account.turn)
    order = sorted(seats, key=lambda seat: _rank(seat, account))
    longest = min(seats, key=lambda seat: (seat.waiting_since, seat.key))
    if account.turn % 2 and now - longest.waiting_since > budget.patience_s:
        order.remove(longest)
        order.insert(0, longest)
    first = order[0]
    chosen, tokens = [first], first.tokens
    for seat in order[1:]:
        after = tokens + seat.tokens
        fits = after <= budget.tokens and len(chosen) < budget.runs and seat.group == first.group
        if fits and (seat.whole <= _COMPANY * first.whole or after <= budget.light_tokens):
            chosen.append(seat)
            tokens = after
    return tuple(chosen)


def _rank(seat: Seat, account: Account) -> tuple[float, float, int, int, float, str]:
    """The smaller, the sooner."""
    spent = account.classes[seat.interactive], account.tenants[seat.share]
    return *spent, seat.whole, seat.work, seat.waiting_since, seat.key


def _levelled(spent: Mapping[K, float], present: Iterable[K]) -> dict[K, float]:
    """What those present have had, the least of them nothing."""
    keys = dict.fromkeys(present)
    least = min((spent[key] for key in keys if key in spent), default=0.0)
    return {key: spent.get(key, least) - least for key in keys}
