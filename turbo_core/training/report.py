"""What a person sees of a stage: a progress line, a CSV, its curves, and videos every so often.

RUN/sla/log.csv            a row per step; after a resume none is there twice and none is lost
RUN/sla/curves.png         the same, drawn
RUN/sla/samples/           step-00000500.webp, ...
"""

import csv
import math
import os
import sys
import time
from pathlib import Path

import torch

from .curves import draw_curves
from .error import TrainingError, writing
from .processes import agreed, mean_over_processes, rank
from .video_grid import save_grid

STEP, SECONDS = "step", "seconds"
PATIENCE = 10.0  # seconds between progress lines where the terminal cannot overwrite one


class Report:
    """Rows of numbers by step, and what is made of them.

    Args:
        folder: RUN/<stage>.
        columns: names of all values that `log` will get, in the order of the CSV.
        steps: how many there will be, for the remaining time.
        every: steps between two looks at the numbers, which are where the GPU has to be waited for.
    """

    def __init__(self, folder: Path, columns: list[str], steps: int, every: int = 20):
        self.folder, self.columns, self.steps, self.every = folder, columns, steps, every
        self.rows: list[dict[str, float]] = []  # all that the CSV has
        self.waiting: list[tuple[int, dict[str, torch.Tensor | float]]] = []
        self.spoke = 0.0

    def resume(self, step: int) -> None:
        """Start behind `step`: rows of later steps, which will be made again, are dropped.

        Raises:
            TrainingError: the CSV has other columns or cannot be written.
        """
        self.rows = agreed(lambda: self._rows_until(step))
        self.first, self.started = step, time.monotonic()
        self.before = self.rows[-1][SECONDS] if self.rows else 0.0

    def log(self, step: int, **values: torch.Tensor | float) -> list[dict[str, float]]:
        """Note the values of a step. Tensors stay where they are until every so many steps.

        Returns:
            The rows that were looked at now: mostly none.
        """
        unknown = values.keys() - set(self.columns)
        if unknown:
            raise ValueError(f"{min(unknown)} is no column, those are {', '.join(self.columns)}")
        self.waiting.append((step, values))
        return self.flush() if step % self.every == 0 else []

    def flush(self) -> list[dict[str, float]]:
        """Bring the noted values to the CPU and into the CSV, and show where the run is."""
        if not self.waiting:
            return []
        flat = [value for _, values in self.waiting for value in values.values()]
        numbers = iter(mean_over_processes(_together(flat)).tolist())
        seconds = round(self.before + time.monotonic() - self.started, 3)
        rows = [
            {STEP: step, **{name: next(numbers) for name in values}, SECONDS: seconds}
            for step, values in self.waiting
        ]
        self.waiting.clear()
        agreed(lambda: self._append(rows))
        self.rows += rows
        self._show(rows[-1])
        return rows

    def draw(self) -> None:
        """Draw curves.png."""
        if rank() == 0:
            draw_curves(self.folder / "curves.png", self.rows, self.columns)

    def grid(self, step: int, videos: torch.Tensor) -> None:
        """Write samples as one animated picture.

        Args:
            videos: float in 0 to 1 or uint8 [N, T, H, W, 3]; of the first process.
        """
        if rank() == 0:
            save_grid(self.folder / "samples" / f"step-{step:08}", videos)

    def _header(self) -> list[str]:
        return [STEP, *self.columns, SECONDS]

    def _rows_until(self, step: int) -> list[dict[str, float]]:
        """Rows of the CSV up to `step`; it is written anew with only those."""
        path = self.folder / "log.csv"
        rows = []
        if path.exists() and step > 0:
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                if reader.fieldnames != self._header():
                    raise TrainingError(
                        f"{path} has columns {reader.fieldnames}, expected {self._header()}: move "
                        "it away"
                    )
                for row in reader:
                    if not (rows[-1][STEP] if rows else 0) < int(row[STEP]) <= step:
                        break  # the last line may be half of one
                    rows.append(_numbers(row))
        part = path.with_name(path.name + ".part")
        with writing(path):
            with part.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self._header(), restval="")
                writer.writeheader()
                writer.writerows(rows)
            os.replace(part, path)
        return rows

    def _append(self, rows: list[dict[str, float]]) -> None:
        path = self.folder / "log.csv"
        with writing(path), path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._header(), restval="").writerows(rows)
            file.flush()
            os.fsync(file.fileno())  # before the checkpoint that counts on these rows

    def _show(self, row: dict[str, float]) -> None:
        now = time.monotonic()
        last = row[STEP] == self.steps
        terminal = sys.stderr.isatty()
        if rank() or not (terminal or last or now - self.spoke > PATIENCE):
            return
        self.spoke = now
        rate = (row[STEP] - self.first) / (now - self.started)
        values = ", ".join(f"{name} {row[name]:.4g}" for name in self.columns if name in row)
        left = _duration((self.steps - row[STEP]) / rate)
        line = f"step {row[STEP]} of {self.steps}, {rate:.3g} steps/s, {left} left, {values}"
        sys.stderr.write(f"\r\x1b[K{line}" + "\n" * last if terminal else line + "\n")
        sys.stderr.flush()


def _together(values: list[torch.Tensor | float]) -> torch.Tensor:
    """Scalars of any device as one float64 tensor [N], with one wait for the GPU."""
    tensors = [v.detach().double() if isinstance(v, torch.Tensor) else None for v in values]
    on_device = [t.reshape(()) for t in tensors if t is not None]
    brought = iter(torch.stack(on_device).tolist() if on_device else [])
    return torch.tensor(
        [float(v) if t is None else next(brought) for v, t in zip(values, tensors, strict=True)],
        dtype=torch.float64,
    )


def _numbers(row: dict[str, str]) -> dict[str, float]:
    return {name: int(text) if name == STEP else float(text) for name, text in row.items() if text}


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "unknown time"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
