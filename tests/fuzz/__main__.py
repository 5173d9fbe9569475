"""The command line of the fuzzers.

python -m tests.fuzz pictures --seed 1 --rounds 12
python -m tests.fuzz sockets --sockets 1000 --requests 200
python -m tests.fuzz lost-replies --number 10000
python -m tests.fuzz contract --examples 500 --processes 2
"""

from __future__ import annotations

import sys

from tests.fuzz import contract, lost_replies, picture_run, slow_sockets

RUNS = {
    "pictures": picture_run.main,
    "sockets": slow_sockets.main,
    "lost-replies": lost_replies.main,
    "contract": contract.main,
}


def main() -> int:
    """Run the one that is named; it says what it takes with `--help`."""
    if len(sys.argv) < 2 or sys.argv[1] not in RUNS:
        print(f"usage: python -m tests.fuzz {{{','.join(RUNS)}}} ...", file=sys.stderr)
        return 2
    return RUNS[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
