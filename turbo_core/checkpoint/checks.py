"""Checks on named tensors: shape, dtype and value, each one clear error."""

from collections.abc import Callable

import torch

from .error import CheckpointError
from .names import PROJ_L

Tensors = dict[str, torch.Tensor]
Pairs = tuple[tuple[torch.Tensor, torch.Tensor], ...]

CHUNK = 2**20  # values that are looked at together


def describe(tensor: torch.Tensor) -> str:
    """ "int8 [256, 256]" and the like, for messages."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def check_shapes(tensors: Tensors, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError at the first tensor that is missing or has another shape."""
    for name, shape in shapes.items():
        if name not in tensors:
            raise CheckpointError(f"{name} is missing: download or convert the file again")
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{name} must be {list(shape)}, got {describe(tensors[name])}: download or "
                "convert the file again"
            )


def check_dtypes(tensors: Tensors, int8_modules: Tensors) -> None:
    """Raise CheckpointError at the first integer tensor that is not an INT8 weight with scales."""
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part == "weight" and module in int8_modules:
            continue
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{name} must be floating point, or int8_weight with a scale, got "
                f"{describe(tensor)}: take TurboDiffusion's plain or -quant file"
            )


def small_tensors(tensors: Tensors, scales: Tensors, proj_l: Pairs) -> Tensors:
    """The tensors that are cheap to look through: all but the big, memory-mapped weights."""
    small = {n: t for n, t in tensors.items() if t.ndim == 1 or n.endswith("modulation")}
    small.update({f"{module}.scale": scale for module, scale in scales.items()})
    for index, (weight, bias) in enumerate(proj_l):
        small[f"blocks.{index}.{PROJ_L}.weight"] = weight
        small[f"blocks.{index}.{PROJ_L}.bias"] = bias
    return small


def check_values(small: Tensors, progress: Callable[[int, int], None] | None = None) -> None:
    """Raise CheckpointError at the first value that is not finite, or a scale not above 0."""
    for done, (name, tensor) in enumerate(small.items(), start=1):
        positive = name.endswith(".scale")
        count, first = _wrong_values(tensor, positive)
        if count:
            raise CheckpointError(
                f"{name} has {count} of {tensor.numel()} values that are not finite"
                f"{' and positive' if positive else ''}, got {first}: the file is damaged, "
                "download or convert it again"
            )
        if progress:
            progress(done, len(small))


def _wrong_values(tensor: torch.Tensor, positive: bool) -> tuple[int, float | None]:
    """How many of the values are not finite (and positive), and the first of them."""
    count, first = 0, None
    for chunk in tensor.reshape(-1).split(CHUNK):
        values = chunk.float()
        wrong = ~torch.isfinite(values)
        if positive:
            wrong |= values <= 0
        found = values[wrong]
        count += found.numel()
        first = found[0].item() if first is None and found.numel() else first
    return count, first
