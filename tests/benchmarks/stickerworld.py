"""How many StickerWorld records one core makes: prompt, target, references and masks, none of them seen before."""

from __future__ import annotations

from itertools import count

from tests.benchmarks.measure import Figure, figure, interleaved
from workers.training.stickerworld.settings import DREAMO_MIXTURE, Settings
from workers.training.stickerworld.world import sample

RECORDS = 1000


def run(device: str, rounds: int) -> list[Figure]:
    """Records per second of one process, whatever the device: numpy on one core."""
    two = (("multi_subject", 1.0),)
    worlds = {
        "two references, 64 px": Settings(size=64, reference_size=20, mixture=two, max_subjects=2),
        "two references, 72 px": Settings(mixture=two, max_subjects=2),
        "two references, free places, named sizes, 72 px": Settings(
            mixture=two, max_subjects=2, placement="free", sizes="named"
        ),
        "all tasks, 72 px": Settings(mixture=DREAMO_MIXTURE),
    }
    starts = count(step=RECORDS)

    def make(settings: Settings) -> None:
        start = next(starts)
        for index in range(start, start + RECORDS):
            sample(0, index, settings)

    seconds = interleaved(
        {name: lambda settings=settings: make(settings) for name, settings in worlds.items()},
        rounds=rounds,
        device=device,
    )
    return [figure(name, "1/s", [RECORDS / s for s in values], records=RECORDS) for name, values in seconds.items()]
