"""`python -m tests.golden [--assets DIR] [--version v1|v1.1] [--no-turbo] FILE…`: compare with recordings.

Prints a row per checked tensor with its largest absolute error, ends with `worst=…`, exits 1 above 1e-4.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from model.errors import ModelError
from tests.golden.recording import Assets, check, read_recording

TOLERANCE = 1e-4
HERE = Path(__file__).parent / "assets"


def main(arguments: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("--assets", type=Path, default=HERE, help="directory with tiny_flux/ and lora/")
    parser.add_argument("--version", choices=["v1", "v1.1"], default="v1.1")
    parser.add_argument("--no-turbo", action="store_true")
    parser.add_argument("files", type=Path, nargs="*", help="recordings; all of the assets when none is named")
    args = parser.parse_args(arguments)
    assets = Assets(args.assets, args.version, turbo=not args.no_turbo)
    worst = 0.0
    for path in args.files or sorted(args.assets.glob("*.safetensors")):
        print(f"== {path.name}")
        try:
            for row in check(read_recording(path), assets):
                print(f"{row.error:12.3e}  {row.name}{'' if row.error <= TOLERANCE else '   <<<'}")
                worst = max(worst, row.error)
        except (ModelError, OSError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 2
    print(f"worst={worst:.3e}")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
