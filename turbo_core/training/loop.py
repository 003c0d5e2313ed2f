"""The loop of a stage: the steps that remain, each logged, checkpoints and samples in between."""

import contextlib
import math
import signal
from collections.abc import Callable, Iterator

import torch

from .error import TrainingError
from .processes import count, say
from .report import STEP, Report
from .run_folder import RunFolder

MOST_BAD = 10  # steps in a row without a finite gradient, after which training is over
Values = dict[str, torch.Tensor | float]


class Stopped(TrainingError):  # noqa: N818 - nothing went wrong
    """The user stopped the run (Ctrl-C, SIGTERM); its checkpoint is written."""


def train(
    folder: RunFolder,
    report: Report,
    state: dict,
    step: Callable[[int], Values],
    save_every: int,
    sample: Callable[[], torch.Tensor] | None = None,
    sample_every: int = 500,
) -> None:
    """Do the steps that remain, from the newest checkpoint on.

    Args:
        state: all that the steps change, see step_checkpoints.save.
        step: step(n) for n = 0, 1, ...: one update; what it draws depends on n alone, so that a
            resumed run is the same run. Returns values of the report's columns, each a scalar. One
            that is not finite tells of a batch that was dropped (Learner.update).
        save_every: steps between two checkpoints.
        sample: videos [N, T, H, W, 3] of the state as it is, every `sample_every` steps.

    Raises:
        Stopped: by the user.
        TrainingError: batches are dropped one after the other, or a checkpoint could not be
            written or read.
    """
    start, steps = folder.load(state), report.steps
    report.resume(start)
    if start:
        say(f"{folder.path}: going on from step {start} of {steps}")
    bad, due = Bad(folder), False
    with _stop_asked() as stop:
        for n in range(start, steps):
            bad.look(report.log(n + 1, **step(n)))
            if sample and ((n + 1) % sample_every == 0 or n + 1 == steps):
                report.grid(n + 1, sample())
            due = due or (n + 1) % save_every == 0 or n + 1 == steps or bool(stop)
            if due:
                bad.look(report.flush())
                if not bad.in_a_row or n + 1 == steps or stop:  # else once a step was sound
                    folder.save(n + 1, state)
                    report.draw()
                    due = False
            if stop:
                raise Stopped(f"stopped at step {n + 1}: the same command goes on from there")


class Bad:
    """Steps whose values were not finite: each is told, too many in a row are the end."""

    def __init__(self, folder: RunFolder):
        self.folder, self.in_a_row = folder, 0

    def look(self, rows: list[dict[str, float]]) -> None:
        """Look at rows of the report in the order of their steps."""
        for row in rows:
            wrong = [name for name, value in row.items() if not math.isfinite(value)]
            self.in_a_row = self.in_a_row + 1 if wrong else 0
            if wrong:
                named = ", ".join(f"{name} {row[name]}" for name in wrong)
                say(f"step {row[STEP]}: {named}, the batch was dropped")
            if self.in_a_row == MOST_BAD:
                raise TrainingError(
                    f"the last {MOST_BAD} batches, up to step {row[STEP]}, gave {named}: look for "
                    "numbers that are not finite in the data, or use a lower lr with another "
                    f"--out; {self.folder.path / 'checkpoints'} has the state of before",
                    everywhere=True,
                )


@contextlib.contextmanager
def _stop_asked() -> Iterator[list[int]]:
    """A list that gets the number of the first SIGINT or SIGTERM; the second one ends at once.

    Only in a process that trains alone: several would have to agree on the step at every step, so
    there a stopped run goes on from its last checkpoint.
    """
    asked, before = [], {}

    def ask(number: int, _) -> None:
        asked.append(number)
        say("stopping after this step, once its checkpoint is written")
        signal.signal(number, before[number])

    if count() == 1:
        before = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
