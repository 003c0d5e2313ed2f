"""What tests measure the memory of, for processes of their own, see fresh_process.py."""

from pathlib import Path

import pack  # noqa: F401
import torch
from peak_memory import peak_anonymous
from turbodiffusion_pack.turbo_core.checkpoint import read_checkpoint
from turbodiffusion_pack.turbo_core.convert import convert

MIB = 2**20


def peak_of(work, *args) -> int:
    """Peak anonymous bytes of work(*args); its result is kept until then."""
    torch.set_num_threads(1)
    with peak_anonymous() as peak:
        result = work(*args)
    del result
    return peak.bytes


def read(path: Path):
    return read_checkpoint(path)


def read_into_memory(path: Path):
    return {name: tensor + 0 for name, tensor in read_checkpoint(path).tensors.items()}


def take_and_give_back(mib: int):
    torch.ones(mib * MIB, dtype=torch.int8)


def convert_file(source: Path, target: Path):
    convert(source, target)
