"""`python -m tests.benchmarks [--device cpu|cuda] [--rounds N] [SUITE …]`: measure and write JSON rows."""

from __future__ import annotations

import argparse
from importlib import import_module

from tests.benchmarks.measure import publish

SUITES = ("ops", "step", "precision", "training", "line", "engine", "scaling", "stickerworld", "gateway")
"""In this order, so that what follows `ops` runs on the backends it found to be the fastest."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("suites", nargs="*", choices=[*SUITES, []], help="default: all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--write-table", action="store_true", help="let ops write kernels/dispatch_table.json; CUDA only"
    )
    args = parser.parse_args()
    if args.write_table and args.device != "cuda":
        parser.error("--write-table needs --device cuda: on a CPU torch's own backends run")
    for name in args.suites or SUITES:
        print(f"== {name}")
        # Imported one by one: `ops` needs no model library.
        suite = import_module(f"tests.benchmarks.{name}")
        figures = suite.run(args.device, args.rounds)
        print(f"wrote {publish(name, figures, args.device)}")
        if name == "ops" and args.write_table:
            suite.write_table(figures)


if __name__ == "__main__":
    main()
