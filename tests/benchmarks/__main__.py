"""`python -m tests.benchmarks [--device cpu|cuda] [--rounds N] [SUITE …]`: measure and write JSON rows."""

from __future__ import annotations

import argparse

from tests.benchmarks import line, routing, step, stickerworld
from tests.benchmarks.measure import publish

SUITES = {"step": step.run, "line": line.run, "routing": routing.run, "stickerworld": stickerworld.run}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("suites", nargs="*", choices=[*SUITES, []], help="default: all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    for name in args.suites or SUITES:
        print(f"== {name}")
        print(f"wrote {publish(name, SUITES[name](args.device, args.rounds), args.device)}")


if __name__ == "__main__":
    main()
