"""Words for whoever reads standard error, if anybody does."""

from __future__ import annotations

import os
import sys


def say(line: str) -> None:
    """Write a line. If whoever read it is gone (`2>&1 | tee log`: a Ctrl-C ends `tee` as well) nobody is told, and the
    run goes on to its checkpoint and its exit status."""
    try:
        print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stderr.fileno())  # else the interpreter's last flush fails, which is its exit status then
        os.close(nowhere)
