"""Reading a checkpoint takes next to no memory; 1.1 times the file's size is promised."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peak_memory import can_measure
from safetensors.torch import save_file
from zero_checkpoint import official_zeros

pytestmark = pytest.mark.skipif(not can_measure(), reason="needs /proc/self/status")

TESTS = Path(__file__).resolve().parent.parent
MIB = 2**20

# A fresh process, so that no memory freed earlier hides what the work takes.
CHILD = """
import sys
sys.path.append(sys.argv[1])
import conftest
import torch
from peak_memory import peak_anonymous
from turbodiffusion_pack.turbo_core.checkpoint import read_checkpoint
torch.set_num_threads(1)
path = sys.argv[2]
with peak_anonymous() as peak:
    {work}
sys.stdout.write(str(peak.bytes))
"""


def peak_of(work: str, path: Path) -> int:
    """Peak anonymous bytes of the statement `work`, in which `path` is the file."""
    command = [sys.executable, "-c", CHILD.format(work=work), str(TESTS), str(path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


@pytest.fixture(params=[".pth", ".safetensors"])
def small_file(request, tmp_path):
    path = tmp_path / f"small{request.param}"
    (torch.save if request.param == ".pth" else save_file)(official_zeros(num_layers=3), path)
    assert path.stat().st_size > 200 * MIB
    yield path
    path.unlink()


@pytest.fixture
def big_file(tmp_path):
    path = tmp_path / "big.pth"
    torch.save(official_zeros(num_layers=12), path)
    yield path
    path.unlink()


def test_a_big_checkpoint_is_not_read_into_memory(big_file):
    assert big_file.stat().st_size > 12 * 64 * MIB
    peak = peak_of("checkpoint = read_checkpoint(path)", big_file)
    assert peak < 64 * MIB, f"memory-mapped, it takes less than one block; got {peak} bytes"


def test_both_formats_are_memory_mapped(small_file):
    assert peak_of("checkpoint = read_checkpoint(path)", small_file) < 64 * MIB


def test_a_loader_that_reads_the_file_would_be_seen(small_file):
    size = small_file.stat().st_size
    read = "tensors = {n: t + 0 for n, t in read_checkpoint(path).tensors.items()}"
    assert peak_of(read, small_file) > 0.9 * size


def test_memory_that_is_freed_again_is_seen(tmp_path):
    work = "x = torch.ones(200 * 2**20, dtype=torch.int8); del x"
    assert peak_of(work, tmp_path) > 190 * MIB
