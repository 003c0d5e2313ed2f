"""Worker processes, over gloo: what they do together, how they fail, and that none is left."""

import importlib.util
import os
import signal
import socket
import sys
import threading
import time
import types
from multiprocessing import Pipe
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import worker_jobs
import zygote
from processes import ended, listening, running
from turbodiffusion_pack.turbo_core.parallel import exchange, parcels
from turbodiffusion_pack.turbo_core.parallel import workers as module
from turbodiffusion_pack.turbo_core.parallel.parcels import UnsendableError, unwrap, wrap
from turbodiffusion_pack.turbo_core.parallel.workers import WorkerError, Workers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are for Linux")
SUPPORT = Path(__file__).resolve().parents[1] / "support"


@pytest.fixture(scope="module", autouse=True)
def known():
    with mock.patch.object(parcels, "KNOWN", parcels.KNOWN | {"worker_jobs"}):
        yield


@pytest.fixture(scope="module")
def start():
    with zygote.forking(module, "worker_imports") as start:
        yield start


@pytest.fixture(scope="module")
def workers(start):
    found = Workers(3, paths=[str(SUPPORT)], seconds=60)
    yield found
    found.stop()


def total(workers, value: int) -> int:
    """The sum of what ranks 1 and 2 have."""
    own = torch.zeros(1, dtype=torch.int64)

    def add(ranks):
        dist.all_reduce(own, group=ranks.group)

    workers.together(worker_jobs.add_up, (value,), add)
    return int(own)


def meet(ranks):
    dist.barrier(ranks.group)


def test_workers_stay_from_job_to_job(workers):
    assert total(workers, 5) == 15
    processes = list(workers.processes)
    assert total(workers, 7) == 21 and workers.processes == processes


@pytest.mark.parametrize("value", [None, "3"])
@pytest.mark.parametrize("name", exchange.SETTINGS)
def test_torch_alone_is_told_that_ranks_are_here(tmp_path, monkeypatch, name, value):
    """And that it shall not end this process; while a group is made, and the environment stays."""
    seen = []
    monkeypatch.delenv(name, raising=False)
    if value:
        monkeypatch.setenv(name, value)
    dist = types.SimpleNamespace(FileStore=lambda *_: None, group=mock.Mock())
    dist.init_process_group = lambda *_, **__: seen.append(os.environ[name])
    monkeypatch.setattr(exchange, "dist", dist)
    exchange.join("gloo", str(tmp_path / "store"), 0, 1, 1)
    assert seen == [exchange.SETTINGS[name]] and os.environ.get(name) == value


def test_nobody_else_reaches_a_rank(workers, monkeypatch):
    workers.stop()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", [name for _, name in socket.if_nameindex()][-1])
    total(workers, 1)
    assert {address for address, _ in listening(os.getpid())} == {"0100007F"}  # 127.0.0.1


def test_ranks_can_meet_again_after_the_start(workers):
    """As NCCL does, at its first exchange."""
    workers.together(worker_jobs.meet_in_another_group, (), worker_jobs.meet_in_another_group)
    folder = Path(workers.folder.name)
    assert folder.exists()
    workers.stop()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("job", "message"), [("fail", "MemoryError: rank 1 is out of memory"), ("end", "is gone")]
)
def test_a_failure_ends_all_and_the_next_job_works(workers, job, message):
    assert total(workers, 1) == 3
    processes = list(workers.processes)
    with pytest.raises(WorkerError, match=message):
        workers.together(getattr(worker_jobs, job), (), meet)
    assert all(process.poll() is not None for process in processes)
    assert total(workers, 2) == 6


def test_nothing_starts_once_exchanges_are_given_up(workers):
    """In torch's coalescing, which does not get over it."""

    def carry_on(ranks):
        workers.processes[0].kill()
        while not ranks.way.closed:
            time.sleep(0.01)
        exchange.gather(ranks, [torch.zeros(1, 1)], [[slice(r, r + 1) for r in range(3)]])

    total(workers, 1)
    with (
        mock.patch.object(dist, "batch_isend_irecv") as started,
        pytest.raises(WorkerError, match="is gone"),
    ):
        workers.together(worker_jobs.wait, (), carry_on)
    assert not started.called


@pytest.mark.parametrize(("moment", "patient"), [(60, True), (0.01, False)])
def test_exchanges_are_given_up_between_two(monkeypatch, moment, patient):
    """Not while one starts; but that it starts is not waited for longer than a moment."""
    monkeypatch.setattr(exchange, "A_MOMENT", moment)
    way, closed = exchange.Way(), []

    def start():
        closing = threading.Thread(target=way.close)
        closing.start()
        closing.join(0.05 if patient else 60)
        closed.append(way.closed)
        return closing

    way.start(start).join()
    assert closed == [not patient] and way.closed
    with pytest.raises(RuntimeError, match="other ranks are gone"):
        way.start(start)


def test_an_error_here_ends_workers_that_wait(workers):
    def out_of_memory(ranks):
        raise torch.cuda.OutOfMemoryError("here")

    total(workers, 1)
    processes, start = list(workers.processes), time.monotonic()
    with pytest.raises(torch.cuda.OutOfMemoryError, match="here"):
        workers.together(worker_jobs.wait, (), out_of_memory)
    assert time.monotonic() - start < 10
    assert all(process.poll() is not None for process in processes)


def test_a_worker_that_is_killed_between_two_jobs_is_noticed(workers):
    assert total(workers, 1) == 3
    workers.notes["model"] = "known"
    workers.processes[0].kill()
    workers.check()
    assert workers.notes == {} and total(workers, 2) == 6


def test_tensors_arrive(workers):
    """Of any kind, in any place, and what they are part of."""
    given = {
        "bf16": torch.randn(3, 5).bfloat16(),
        "turned": torch.arange(6).view(2, 3).T,
        "list": [torch.tensor(True), torch.empty(0, 4), torch.tensor(2.5, dtype=torch.float64)],
        "a slice": slice(1, 2),
    }
    assert workers.together(worker_jobs.add_up_all, (given,), worker_jobs.total_of(given)) is None


def test_what_others_do_not_know_is_not_sent(workers):
    assert unwrap(*wrap((torch.nn.Linear, Workers, len))) == (torch.nn.Linear, Workers, len)
    quantized = torch.zeros(1).as_subclass(type("QuantizedTensor", (torch.Tensor,), {}))
    for unknown in (total, lambda: None, quantized):
        with pytest.raises(UnsendableError):
            wrap({"job": unknown})
    with pytest.raises(UnsendableError, match=f"of {__name__} is unknown elsewhere"):
        workers.together(worker_jobs.add_up, (total,), meet)


def test_a_worker_that_cannot_start_says_so(workers, tmp_path):
    workers.stop()  # a process is in one group
    first = ".turbo_core.parallel.shares:token_shares", [(1, 2)]
    broken = Workers(2, first=first, seconds=60)
    with pytest.raises(WorkerError, match="too few for 2 ranks"):
        broken.together(worker_jobs.add_up, (1,), meet)
    assert broken.processes == []


def test_a_rank_that_has_no_memory_to_meet_others_keeps_nobody_waiting(workers):
    workers.stop()
    first = "worker_jobs:have_no_memory_to_meet", [()]
    poor = Workers(2, paths=[str(SUPPORT)], first=first, seconds=60)
    start = time.monotonic()
    with pytest.raises(WorkerError, match="MemoryError: for NCCL"):
        poor.together(worker_jobs.add_up, (1,), meet)
    assert poor.processes == [] and time.monotonic() - start < 20


@pytest.mark.parametrize("own", [lambda ranks: None, meet], ids=["done", "in an exchange"])
def test_a_worker_that_does_not_answer_is_given_up(workers, own):
    workers.stop()
    slow = Workers(2, paths=[str(SUPPORT)], seconds=60)
    slow.together(worker_jobs.add_up, (1,), worker_jobs.add_up_one)
    slow.seconds = 0.3
    with pytest.raises(WorkerError, match=r"a worker has not answered for 0.3 s"):
        slow.together(worker_jobs.wait, (), own)
    assert slow.processes == []


def test_a_stopped_worker_is_ended_before_a_run_asks_for_it(workers, monkeypatch):
    workers.stop()
    monkeypatch.setattr(module, "ANSWER", 0.3)
    still = Workers(2, paths=[str(SUPPORT)], seconds=60)
    still.together(worker_jobs.add_up, (1,), worker_jobs.add_up_one)
    os.kill(still.processes[0].pid, signal.SIGSTOP)
    start = time.monotonic()
    still.check()
    assert still.processes == [] and time.monotonic() - start < 20


def test_an_answer_that_cannot_be_read_is_a_failure():
    ours, theirs = Pipe()
    theirs.send_bytes(b"no pickle")
    ended = []
    watch = module._Watch([ours], lambda: ended.append(True), 5)
    assert not watch.wait()
    assert "a worker's answer cannot be read" in watch.failure and ended


def test_a_torch_without_processes_imports_the_pack():
    """Some builds are without; then all of torch.distributed is a name or two."""
    bare = types.ModuleType("torch.distributed")
    names = [f"turbodiffusion_pack.turbo_core.parallel.{n}" for n in ("exchange", "workers")]
    with (
        mock.patch.dict(sys.modules, {"torch.distributed": bare}),
        mock.patch.object(torch, "distributed", bare),
    ):
        for name in names:
            spec = importlib.util.find_spec(name)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            assert module.dist is bare


def test_no_worker_outlives_a_parent_that_is_killed(start):
    """In an exchange."""
    ours, theirs = Pipe()
    with theirs:
        parent = start(str(SUPPORT / "parent.py"), theirs.fileno())
    worker = ours.recv()
    assert running(worker)
    parent.kill()
    assert ended([worker])
