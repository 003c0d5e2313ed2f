"""What ops ask of their tensors, checked before any work starts."""

import torch

BLOCK = 128  # rows and columns that share a scale of int8_quant
HEAD_DIMS = (64, 128)
BLOCK_SIZES = (64, 128)
BLOCK_SHAPES = ((128, 64), (64, 64), (64, 128))  # what the attention kernels fit into every card
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_dtype(op: str, x: torch.Tensor) -> None:
    """Require float32, float16 or bfloat16.

    Raises:
        TypeError: it is another dtype.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"{op} takes fp32, fp16 or bf16, got {x.dtype}: convert x first")


def check_heads(**tensors: torch.Tensor) -> None:
    """Require [B, L, H, D] tensors of one shape, dtype and device, D 64 or 128.

    Raises:
        ValueError: a shape or device does not fit.
        TypeError: a dtype is not float32, float16 or bfloat16, or the dtypes differ.
    """
    first_name, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        if x is first and name != first_name:
            continue
        shape = x.shape
        if len(shape) != 4 or 0 in shape:
            raise ValueError(f"{name} must be [B, L, H, D] and not empty, got {list(shape)}")
        if shape[3] not in HEAD_DIMS:
            raise ValueError(f"{name} must have a head dim of 64 or 128, got {shape[3]}")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, float16 or bfloat16, got {x.dtype}")
        if shape != first.shape or x.device != first.device:
            raise ValueError(
                f"{name} must match {first_name}, {list(first.shape)} on {first.device}, "
                f"got {list(shape)} on {x.device}"
            )
        if x.dtype != first.dtype:
            raise TypeError(f"{name} must be {first.dtype} like {first_name}, got {x.dtype}")


def check_block_size(block: int) -> None:
    """Require a block size that the kernels are made for."""
    if block not in BLOCK_SIZES:
        raise ValueError(f"block must be 64 or 128, got {block}")


def check_block_shape(block_q: int, block_k: int) -> None:
    """Require a block shape that the attention kernels are made for."""
    if (block_q, block_k) not in BLOCK_SHAPES:
        raise ValueError(
            f"block_q x block_k must be 128x64, 64x64 or 64x128, got {block_q}x{block_k}"
        )


def check_shape(name: str, x: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Require that `x` has `shape`."""
    if x.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(x.shape)}")


class Remembered(dict):
    """What was found out once, by what decides it; forgets all once there is too much of it."""

    MOST = 4096  # a new resolution adds a dozen

    def put(self, key: object, value: object) -> object:
        """Remember `value`, and return it."""
        if len(self) >= self.MOST:
            self.clear()
        self[key] = value
        return value


def layouts(*tensors: torch.Tensor | None) -> tuple:
    """All that checks look at, to look it up: what was checked once need not be again."""
    found, together = [], 0
    for x in tensors:
        if x is None:
            found.append(None)
            continue
        found += x.shape, x.stride(), x.dtype, x.device
        together |= x.data_ptr()
    if together % 16:
        found += [0 if x is None else x.data_ptr() % 16 for x in tensors]
    return tuple(found)


def in_steps_of_16_bytes(x: torch.Tensor) -> bool:
    """Whether all rows of x [..., columns] begin at a multiple of 16 bytes, each at its own.

    The copy engine (TMA) asks for that, and loads of 16 bytes. Columns must be side by side.
    """
    steps, size = x.stride()[:-1], x.itemsize
    together = x.data_ptr()  # the bits of all steps: they end in four zeros where each does
    for stride in steps:
        together |= stride * size
    return together % 16 == 0 and min(steps, default=1) > 0


def not_contiguous(*tensors: torch.Tensor) -> str | None:
    """Why Triton cannot read these tensors; None where it can."""
    strided = [list(x.stride()) for x in tensors if x.stride(-1) != 1]
    return f"the head dim is not contiguous, got strides {strided[0]}" if strided else None


def float32_on_gpu(x: torch.Tensor) -> str | None:
    """Why Triton cannot take `x`; None where it can."""
    if x.is_cuda and x.dtype == torch.float32:
        return "float32 tiles do not fit the GPU's shared memory, float16 and bfloat16 do"
    return None
