"""How long a device's forwards take, learnt from those it has made: a part for each forward, a part for each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_MEMORY: Final = 0.98
"""What a forward still counts for after the next one: the last fifty or so."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Sums over forwards, old ones fading: of 1, tokens, seconds, tokens² and tokens · seconds."""

    forwards: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    squares: float = 0.0
    products: float = 0.0

    def after(self, tokens: int, seconds: float) -> Pace:
        """With one forward more."""
        return Pace(
            _MEMORY * self.forwards + 1,
            _MEMORY * self.tokens + tokens,
            _MEMORY * self.seconds + seconds,
            _MEMORY * self.squares + tokens * tokens,
            _MEMORY * self.products + tokens * seconds,
        )

    @property
    def usual_s(self) -> float:
        """Seconds of a forward, on average; 0 before the first."""
        return self.seconds / self.forwards if self.forwards else 0.0

    @property
    def light_tokens(self) -> int:
        """Tokens at which a forward's own part of the time equals theirs: up to there, company costs little.

        By least squares of seconds = base + token · tokens: base / token. 0 where forwards of one size say nothing.
        """
        spread = self.forwards * self.squares - self.tokens**2
        if spread <= 1e-6 * self.forwards * self.squares:
            return 0
        token = (self.forwards * self.products - self.tokens * self.seconds) / spread
        base = (self.seconds - token * self.tokens) / self.forwards
        return int(min(base / token, 1e9)) if token > 0 and base > 0 else 0
