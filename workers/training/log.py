"""What a run tells: a progress bar with losses, speed and time left; TensorBoard where it is installed, sheets too."""

from __future__ import annotations

import importlib
import math
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from workers.training.trainer import StepReport


class TrainingLog:
    """Follows a run; a context manager.

    Args:
        directory: TensorBoard's files go to `log/` in it.
    """

    def __init__(self, directory: Path, total: int) -> None:
        columns = (
            TextColumn("{task.fields[stage]:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=Console(stderr=True), refresh_per_second=2)
        self._task = self._bar.add_task("", total=total, stage="", note="")
        self._writer = _writer(directory / "log")
        self._last = time.monotonic()
        self._rate = 0.0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()
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
        note = f"{parts}  {self._rate:.1f}/s"
        self._bar.update(self._task, completed=report.step, stage=report.stage, note=note)
        if self._writer is not None:
            self._writer.add_scalar("loss/total", report.loss, report.step)
            for name, value in report.losses.items():
                if not math.isnan(value):
                    self._writer.add_scalar(f"loss/{name}", value, report.step)
            self._writer.add_scalar("samples_per_second", self._rate, report.step)
            if report.sheet is not None:
                self._writer.add_image("samples", report.sheet, report.step, dataformats="HWC")


def _writer(directory: Path) -> Any | None:
    try:
        return importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(directory))
    except ImportError:
        return None
