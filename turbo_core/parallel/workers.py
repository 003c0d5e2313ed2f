"""Worker processes that take part in what this one computes, as ranks 1 and up of a group.

This process is rank 0 and says what is to be done: a job is a function and its arguments, of which
tensors go through the group. A worker waits for a job without using a core. Between two jobs
nothing is under way, so that is where a run may be cancelled. A worker ends as soon as its
connection does: no other end of this process, however sudden, leaves one behind. If a job fails
anywhere, all workers are ended and the next job starts new ones.
"""

import contextlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import Pipe, connection
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from . import exchange
from .exchange import Ranks
from .parcels import wrap

GONE = "a worker is gone: it was ended, or out of memory"
IN_STEP = 300  # seconds, far more than one rank is ahead of another
ANSWER = 20  # seconds in which a worker that has nothing to do answers
A_MOMENT = 0.1  # seconds in which a failure's cause may be heard of after its effects
WORKER = Path(__file__).with_name("worker.py")

T = TypeVar("T")


class WorkerError(Exception):
    """A worker failed or is gone; the message has its traceback, if it left one."""


def nothing(ranks: Ranks) -> None:
    """A job that is done as soon as a worker has heard of it."""


class Workers:
    """Processes 1 to count - 1 of a group that this process is the first of.

    Args:
        count: how many processes, this one included.
        backend: "gloo", or "cpu:gloo,cuda:nccl" between GPUs.
        paths: where workers import from besides the pack.
        first: function of the pack, "module:function", and for each worker what it is called with
            before anything else is imported.
        seconds: after which a job has failed: a pass, a video's decoding, a model's loading.

    Attributes:
        notes: whoever gives jobs writes here what workers keep; empty again after each start.
    """

    def __init__(
        self,
        count: int,
        backend: str = "gloo",
        paths: Sequence[str] = (),
        first: tuple[str, list[tuple]] | None = None,
        seconds: float = 1800,
    ):
        self.count, self.backend, self.seconds = count, backend, seconds
        self.paths, self.first = list(paths), first
        self.processes: list[subprocess.Popen] = []
        self.connections: list[connection.Connection] = []
        self.ranks: Ranks | None = None
        self.folder: tempfile.TemporaryDirectory | None = None  # where they meet
        self.notes = {}
        self.given_up = False  # whether this process has left all exchanges
        self.ending = threading.Lock()  # a watch and whoever gave the job may end them at once

    @property
    def running(self) -> bool:
        """Whether all of them are there and wait for jobs."""
        return self.ranks is not None and all(p.poll() is None for p in self.processes)

    @property
    def known(self) -> dict:
        """The notes of what workers keep at this moment: nothing, where one is gone."""
        return self.notes if self.running else {}

    def together(self, job: Callable, arguments: tuple, own: Callable[[Ranks], T]) -> T:
        """own(ranks) here while every worker does job(ranks, *arguments).

        Tensors among the arguments arrive on the CPU or the worker's GPU, as they are here.

        Args:
            job: a function that other processes know too, see parcels.py.

        Raises:
            UnsendableError: of the job or its arguments, before anything is done.
            WorkerError: a worker failed or is gone. This, and whatever `own` raises, ends them all.
        """
        parcel = wrap((job, arguments))
        if not self.running:
            self.stop()
            self._start()
        return self._together(*parcel, own, self.seconds)

    def _together(
        self, parcel: bytes, tensors: list[Tensor], own: Callable[[Ranks], T], seconds: float
    ) -> T:
        told = parcel, [(tuple(x.shape), x.dtype, x.is_cuda) for x in tensors]
        watch = _Watch(self.connections, self._let_go, seconds)
        try:
            for end in self.connections:
                end.send(told)
            exchange.give(self.ranks, tensors)
            result = own(self.ranks)
        except BaseException as error:
            # An exchange may notice that a worker is gone before the watch does.
            exchanging = type(error) is RuntimeError or isinstance(error, (dist.DistError, OSError))
            watch.failed.wait(2 if exchanging else 0)
            failure = watch.failure
            self._stop_watched(watch)
            if failure is None:
                raise
            raise WorkerError(failure) from error
        if not watch.wait():
            self._stop_watched(watch)
            raise WorkerError(watch.failure)
        return result

    def check(self, job: Callable = nothing) -> None:
        """Find out whether all still answer, by a `job` that takes no time. If not, all are ended,
        and the next job starts new ones."""
        if not self.running:
            self.stop()
            return
        with contextlib.suppress(WorkerError):
            self._together(*wrap((job, ())), nothing, min(self.seconds, ANSWER))

    def stop(self) -> None:
        """End all workers; the next job starts new ones."""
        self._let_go()
        for end in self.connections:
            end.close()
        ranks, folder = self.ranks, self.folder
        self.processes, self.connections, self.ranks, self.folder = [], [], None, None
        self.notes, self.given_up = {}, False
        if ranks is not None:
            exchange.leave(ranks)
        if folder is not None:
            folder.cleanup()

    def _stop_watched(self, watch: "_Watch") -> None:
        """End all workers, and so the watch, before the connections it waits for are closed."""
        self._let_go()
        watch.thread.join()
        self.stop()

    def _start(self) -> None:
        # There as long as the group: NCCL asks there at its first exchanges only.
        self.folder = tempfile.TemporaryDirectory()
        group = {"backend": self.backend, "store": str(Path(self.folder.name) / "ranks")}
        group |= {"count": self.count, "seconds": min(self.seconds, IN_STEP)}
        try:
            for rank in range(1, self.count):
                self._start_one(rank, {**group, "rank": rank})
            ready = _Watch(self.connections, self._let_go, self.seconds)
            if not ready.wait():
                raise WorkerError(ready.failure)
            self.ranks = exchange.join(**group, rank=0)
            self._together(*wrap((exchange.meet, ())), exchange.meet, self.seconds)
        except BaseException:
            self.stop()
            raise

    def _start_one(self, rank: int, group: dict) -> None:
        first = self.first and (self.first[0], self.first[1][rank - 1])
        ours, theirs = Pipe()
        with theirs:
            command = [sys.executable, str(WORKER), str(theirs.fileno())]
            self.processes.append(
                subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
            )
        self.connections.append(ours)
        ours.send({"paths": self.paths, "first": first, "group": group})

    def _let_go(self) -> None:
        """End all workers, and whatever exchange with them this process is in."""
        with self.ending:
            for process in self.processes:
                process.kill()
            for process in self.processes:
                process.wait()
            if self.ranks is not None and not self.given_up:
                self.given_up = True
                exchange.give_up(self.ranks)


class _Watch:
    """Waits for one answer of every worker, in a thread; at the first failure calls `end`.

    Whoever is in an exchange with a worker that has failed is let go by the end of all of them. To
    not answer for so many seconds is to fail.
    """

    def __init__(
        self, connections: list[connection.Connection], end: Callable[[], None], seconds: float
    ):
        self.failure: str | None = None
        self.failed = threading.Event()
        self.waiting, self.end, self.seconds = list(connections), end, seconds
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.thread.start()

    def wait(self) -> bool:
        """Whether all have answered well."""
        self.thread.join()
        return self.failure is None

    def _listen(self) -> None:
        deadline = time.monotonic() + self.seconds
        while self.waiting and not self.failure:
            ready = connection.wait(self.waiting, max(0, deadline - time.monotonic()))
            if not ready:
                self.failure = f"a worker has not answered for {self.seconds:g} s"
            self._hear(ready)
        if self.failure:
            self._hear(connection.wait(self.waiting, A_MOMENT))
            self.failed.set()
            self.end()

    def _hear(self, connections: list[connection.Connection]) -> None:
        for ready in connections:
            self.waiting.remove(ready)
            try:
                well, answer = ready.recv()
            except (EOFError, OSError):
                self.failure = GONE  # which is why others fail, whoever tells it first
                continue
            except Exception as error:
                self.failure = f"a worker's answer cannot be read: {error}"
                continue
            if not well:
                self.failure = self.failure or answer
