"""Reading a checkpoint takes next to no memory; 1.1 times the file's size is promised."""

import fresh_process
import memory_work
import pytest
import torch
from memory_work import MIB
from peak_memory import can_measure
from safetensors.torch import save_file
from zero_checkpoint import official_zeros

pytestmark = pytest.mark.skipif(not can_measure(), reason="needs /proc/self/status")


def peak_of(work, *args) -> int:
    """Peak anonymous bytes of it, in a fresh process, so that no memory freed earlier hides any."""
    return fresh_process.call(memory_work.peak_of, work, *args)


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
    peak = peak_of(memory_work.read, big_file)
    assert peak < 64 * MIB, f"memory-mapped, it takes less than one block; got {peak} bytes"


def test_both_formats_are_memory_mapped(small_file):
    assert peak_of(memory_work.read, small_file) < 64 * MIB


def test_a_loader_that_reads_the_file_would_be_seen(small_file):
    size = small_file.stat().st_size
    assert peak_of(memory_work.read_into_memory, small_file) > 0.9 * size


def test_memory_that_is_freed_again_is_seen():
    assert peak_of(memory_work.take_and_give_back, 200) > 190 * MIB
