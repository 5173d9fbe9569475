"""What a run tells: losses, speed and time left, in a progress bar or in lines; TensorBoard where it is installed."""

from __future__ import annotations

import importlib
import math
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from workers.training.reports import StepReport
from workers.training.stderr import say

_LINE_EVERY_S: Final = 30.0


class TrainingLog:
    """Follows a run; a context manager. A terminal gets a progress bar; a file or a pipe a line for the first step of a
    stage, for the last of all, and every 30 s.

    Args:
        directory: TensorBoard's files go to `log/` in it.
        total: steps of the run.
    """

    def __init__(self, directory: Path, total: int) -> None:
        self._writer = _writer(directory / "log")
        console = Console(stderr=True)
        moving = sys.stderr.isatty() and not console.is_dumb_terminal
        self._view = _Bar(console, total) if moving else _Lines(total)
        self._last = time.monotonic()
        self._rate = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._view.close()
        if self._writer is not None:
            self._writer.close()

    def step(self, report: StepReport) -> None:
        """One step's losses, and its sheet if there is one."""
        now = time.monotonic()
        if report.sheet is None or self._rate == 0:  # else the time went into pictures
            rate = report.samples / max(now - self._last, 1e-9)
            self._rate = rate if self._rate == 0 else 0.9 * self._rate + 0.1 * rate
        self._last = now
        parts = "  ".join(f"{name} {value:.4f}" for name, value in report.losses.items() if not math.isnan(value))
        self._view.show(report.step, report.stage, f"{parts}  {self._rate:.1f}/s")
        if self._writer is not None:
            self._writer.add_scalar("loss/total", report.loss, report.step)
            for name, value in report.losses.items():
                if not math.isnan(value):
                    self._writer.add_scalar(f"loss/{name}", value, report.step)
            self._writer.add_scalar("samples_per_second", self._rate, report.step)
            if report.sheet is not None:
                self._writer.add_image("samples", report.sheet, report.step, dataformats="HWC")


class _Bar:
    def __init__(self, console: Console, total: int) -> None:
        columns = (
            TextColumn("{task.fields[stage]:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, refresh_per_second=2)
        self._task = self._bar.add_task("", total=total, stage="", note="")
        self._bar.start()

    def show(self, step: int, stage: str, note: str) -> None:
        self._bar.update(self._task, completed=step, stage=stage, note=note)

    def close(self) -> None:
        self._bar.stop()


class _Lines:
    def __init__(self, total: int) -> None:
        self._total = total
        self._stage = ""
        self._said: tuple[int, float] | None = None
        """Step and time of the last line."""

    def show(self, step: int, stage: str, note: str) -> None:
        now = time.monotonic()
        if self._said is None or stage != self._stage:
            left = ""
        elif step == self._total or now - self._said[1] >= _LINE_EVERY_S:
            pace = (now - self._said[1]) / max(step - self._said[0], 1)
            left = f"  {timedelta(seconds=round(pace * (self._total - step)))} left"
        else:
            return
        self._stage, self._said = stage, (step, now)
        say(f"{stage} {step}/{self._total}  {note}{left}")

    def close(self) -> None:
        pass


def _writer(directory: Path) -> Any | None:
    try:
        return importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(directory))
    except ImportError:
        return None
