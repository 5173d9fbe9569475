"""Several forwards side by side on one CPU: small matrices leave cores idle, small forwards beside each other do not.

A product of a small model is too small to share out among threads, so a forward over eight requests uses two cores
little better than one. Two forwards over four of them, each with a core of its own, do (decision 16 has the figures).
On a GPU there is one lane: its products fill it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import torch

from model.sampling import Denoising, Sampler


class Lanes:
    """Moves runs, in as many forwards at once as there are samplers.

    Args:
        open_sampler: makes a lane's own; a sampler serves one thread at a time.
        count: of lanes.
    """

    def __init__(self, open_sampler: Callable[[], Sampler], count: int = 1) -> None:
        self.samplers = tuple(open_sampler() for _ in range(count))
        threads = max(1, torch.get_num_threads() // count)
        # The number of threads is OpenMP's, which keeps one for each thread that asks.
        self._pool = ThreadPoolExecutor(count, "lane", initializer=lambda: torch.set_num_threads(threads))

    def advance(self, runs: Sequence[Denoising], tokens: Sequence[int]) -> tuple[Denoising, ...]:
        """All runs one step further, in their order, by the network that all of them were begun with.

        Args:
            tokens: of each run, by which they are shared out.

        Raises:
            ValueError: they belong to several networks.
            Exception: whatever a forward raises, once all have ended; then nothing has changed.
        """
        if not runs:
            return ()
        network = runs[0].network
        if any(run.network != network for run in runs):
            raise ValueError("runs of several networks cannot share a forward")
        shares = shared_out(tokens, len(self.samplers))
        if len(shares) < 2:
            return self.samplers[0].advance(runs, network)
        forwards = [
            self._pool.submit(sampler.advance, [runs[i] for i in share], network)
            for sampler, share in zip(self.samplers, shares, strict=False)
        ]
        errors = [error for forward in forwards if (error := forward.exception()) is not None]
        if errors:
            raise errors[0]
        moved = dict(zip(chain(*shares), chain(*(forward.result() for forward in forwards)), strict=True))
        return tuple(moved[i] for i in range(len(runs)))


def shared_out(tokens: Sequence[int], lanes: int) -> list[list[int]]:
    """The positions of runs by lane, none empty: the largest first, each to the lane that has least."""
    shares: list[list[int]] = [[] for _ in range(min(lanes, len(tokens)))]
    filled = [0] * len(shares)
    for position in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        lane = filled.index(min(filled))
        shares[lane].append(position)
        filled[lane] += tokens[position]
    return [sorted(share) for share in shares]


def lanes_of(device: torch.device, *, compiles: bool) -> int:
    """How many there are on a device: one for each core of a CPU that torch may use.

    Compiled graphs have one lane: torch.compile serves one thread at a time.
    """
    return torch.get_num_threads() if device.type == "cpu" and not compiles else 1
