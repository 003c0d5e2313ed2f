"""Worker processes, over gloo: what they do together, how they fail, and that none is left."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import worker_jobs
from turbodiffusion_pack.turbo_core.parallel.workers import WorkerError, Workers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are for Linux")
SUPPORT = Path(__file__).resolve().parents[1] / "support"
JOB = "worker_jobs:"


@pytest.fixture(scope="module")
def workers():
    found = Workers(3, paths=[str(SUPPORT)], seconds=60)
    yield found
    found.stop()


def total(workers, value: int) -> int:
    """The sum of what ranks 1 and 2 have."""
    own = torch.zeros(1, dtype=torch.int64)

    def add(ranks):
        dist.all_reduce(own, group=ranks.group)

    workers.together(JOB + "add_up", (value,), add)
    return int(own)


def meet(ranks):
    dist.barrier(ranks.group)


def test_workers_stay_from_job_to_job(workers):
    assert total(workers, 5) == 15
    processes = list(workers.processes)
    assert total(workers, 7) == 21 and workers.processes == processes


def test_ranks_can_meet_again_after_the_start(workers):
    """As NCCL does, at its first exchange."""
    workers.together(JOB + "meet_in_another_group", (), worker_jobs.meet_in_another_group)
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
        workers.together(JOB + job, (), meet)
    assert all(process.poll() is not None for process in processes)
    assert total(workers, 2) == 6


def test_an_error_here_ends_workers_that_wait(workers):
    def out_of_memory(ranks):
        raise torch.cuda.OutOfMemoryError("here")

    total(workers, 1)
    processes, start = list(workers.processes), time.monotonic()
    with pytest.raises(torch.cuda.OutOfMemoryError, match="here"):
        workers.together(JOB + "wait", (), out_of_memory)
    assert time.monotonic() - start < 10
    assert all(process.poll() is not None for process in processes)


def test_a_worker_that_cannot_start_says_so(workers, tmp_path):
    workers.stop()  # a process is in one group
    (tmp_path / "torch.py").write_text("raise ImportError('no torch for workers')")
    broken = Workers(2, paths=[str(tmp_path)], seconds=60)
    start = time.monotonic()
    with pytest.raises(WorkerError, match="is gone"):
        broken.together(JOB + "add_up", (1,), meet)
    assert broken.processes == [] and time.monotonic() - start < 20


def test_a_worker_that_does_not_answer_is_given_up(workers):
    workers.stop()
    slow = Workers(2, paths=[str(SUPPORT)], seconds=6)
    with pytest.raises(WorkerError, match="a worker has not answered for 6 s"):
        slow.together(JOB + "wait", (), lambda ranks: None)
    assert slow.processes == []


PARENT = """
import sys
sys.path.append({support!r})
import pack
from turbodiffusion_pack.turbo_core.parallel.workers import Workers
workers = Workers(2, paths=[{support!r}], seconds=60)
def own(ranks):
    print(workers.processes[0].pid, flush=True)
    {own}
workers.together("worker_jobs:{job}", {arguments}, own)
import time; time.sleep(600)
"""


@pytest.mark.parametrize(
    "parts",
    [
        {"job": "wait", "arguments": "()", "own": "import torch; torch.distributed.barrier()"},
        {"job": "wait", "arguments": "()", "own": "pass"},
    ],
    ids=["in an exchange", "in a job"],
)
def test_no_worker_outlives_a_parent_that_is_killed(parts):
    code = PARENT.format(support=str(SUPPORT), **parts)
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        assert running(pid)
        parent.kill()
    deadline = time.monotonic() + 20
    while running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(pid)


def running(pid: int) -> bool:
    """Whether a process is there, other than one that nobody has waited for yet."""
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
