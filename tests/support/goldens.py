"""Outputs of the original TurboDiffusion on tiny random models: what parity is measured against."""

import functools
import lzma
import tarfile
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

DATA = Path(__file__).resolve().parent.parent / "data"


@functools.cache
def load(name: str) -> dict[str, torch.Tensor]:
    """All tensors of tests/data/`name`*.safetensors; callers must not write to them."""
    files = sorted(DATA.glob(f"{name}*.safetensors"))
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def unpack_checkpoint(name: str, folder: Path) -> Path:
    """Write the golden checkpoint `name` (such as "t2v-quant.pth") into `folder`."""
    packed = "checkpoints_i2v.tar.xz" if name.startswith("i2v") else "checkpoints.tar.xz"
    folder.joinpath(name).write_bytes(_checkpoints(packed)[name])
    return folder / name


@functools.cache
def checkpoint_file(name: str) -> Path:
    """The golden checkpoint `name` as a file that is there until this process ends."""
    return unpack_checkpoint(name, Path(_folder().name))


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(ignore_cleanup_errors=True)


@functools.cache
def _checkpoints(packed: str) -> dict[str, bytes]:
    """The contents of all files of an archive, as it has to be read from its start for each."""
    with lzma.open(DATA / packed) as file, tarfile.open(fileobj=file) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """|out - expected| / |expected| in float64; NaN counts as infinite."""
    out, expected = out.detach().double().cpu(), expected.detach().double().cpu()
    error = ((out - expected).norm() / expected.norm()).item()
    return error if error == error else float("inf")
