"""Outputs of the original TurboDiffusion on tiny random models: what parity is measured against."""

import functools
import lzma
import tarfile
from pathlib import Path

import torch
from safetensors.torch import load_file

DATA = Path(__file__).resolve().parent.parent / "data"


@functools.cache
def load(name: str) -> dict[str, torch.Tensor]:
    """All tensors of tests/data/`name`.safetensors; callers must not write to them."""
    return load_file(DATA / f"{name}.safetensors")


def unpack_checkpoint(name: str, folder: Path) -> Path:
    """Write the golden checkpoint `name` (such as "t2v-quant.pth") into `folder`."""
    with lzma.open(DATA / "checkpoints.tar.xz") as packed, tarfile.open(fileobj=packed) as archive:
        folder.joinpath(name).write_bytes(archive.extractfile(name).read())
    return folder / name


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """|out - expected| / |expected| in float64; NaN counts as infinite."""
    out, expected = out.detach().double().cpu(), expected.detach().double().cpu()
    error = ((out - expected).norm() / expected.norm()).item()
    return error if error == error else float("inf")
