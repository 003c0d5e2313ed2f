"""The linear branch's sums over keys by mma.sync, for GeForce cards and A100: mma.cu, and of keys
in int8 int8_keys.cu; parts.cu joins what their programs leave."""

from pathlib import Path

import torch

from .. import nvrtc
from ..checks import in_steps_of_16_bytes
from ..dispatch import capability
from ..sparse_attention.mma import VALUE_LIMIT
from .triton import room_for_sums

SOURCE = Path(__file__).with_suffix(".cu")
INT8_SOURCE, PARTS_SOURCE = (SOURCE.with_name(name) for name in ("int8_keys.cu", "parts.cu"))
HEAD_DIM = 128
THREADS = 256
STAGES = 3  # two programs share a multiprocessor, which has 100 KB
SHARED_BYTES = STAGES * 2 * 32 * HEAD_DIM * 2  # mma.cu's Shared
VALUES = torch.float8_e4m3fn, torch.float16  # what v may become beside keys in int8
TILE, BLOCK = 32, 64  # keys of a step, and that share a scale, in int8
# int8_keys.cu's Shared: keys, values and weights of two tiles, and a center.
INT8_SHARED_BYTES = 2 * 5 * TILE * HEAD_DIM + 4 * HEAD_DIM + 16
Operands = nvrtc.operands(
    pointers="k v state normalizer maxima",
    integers="length heads heads_in_all rows k_b k_l k_h v_b v_l v_h",
)
PartsOperands = nvrtc.operands(
    pointers="state normalizer maxima state_sum normalizer_sum maximum",
    integers="parts states channels",
)
Int8Operands = nvrtc.operands(
    pointers="k k_scale center values bound v state normalizer maxima",
    integers="length heads heads_in_all rows k_heads k_blocks v_b v_l v_h",
)


def unfit(k: torch.Tensor, v: torch.Tensor, feature_map: str) -> str | None:
    """Why the kernel cannot sum over these keys; None where it can."""
    if k.shape[-1] != HEAD_DIM:
        return f"the head dim is {k.shape[-1]}, not {HEAD_DIM}"
    # The only one that models were trained with.
    if feature_map != "softmax":
        return f"the feature map is {feature_map}"
    if not (in_steps_of_16_bytes(k) and in_steps_of_16_bytes(v)):
        return "rows do not begin at multiples of 16 bytes"
    if max(*k.stride(), *v.stride()) >= 2**31:
        return "strides exceed int32"
    return None


def key_value_state(
    k: torch.Tensor, v: torch.Tensor, feature_map: str, of_heads: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`key_value_state` of the Triton file, of what is not `unfit`."""
    return key_value_state_and_maximum(k, v, feature_map, of_heads)[:2]


def key_value_state_and_maximum(
    k: torch.Tensor, v: torch.Tensor, feature_map: str, of_heads: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`key_value_state_and_maximum` of the Triton file, of what is not `unfit`."""
    batch, length, heads, _ = k.shape
    rows, state, normalizer = room_for_sums(k, of_heads)
    maximum = torch.empty_like(normalizer)
    operands = Operands(
        *map(nvrtc.address, (k, v, state, normalizer, maximum)),
        length, heads, batch * heads, rows, *k.stride()[:3], *v.stride()[:3],
    )  # fmt: skip
    _kernel(k).launch(state.shape[0] * batch * heads, THREADS, operands)
    return _joined(state, normalizer, maximum)


def state_of_int8_keys(
    integers: torch.Tensor,
    scale: torch.Tensor,
    center: torch.Tensor,
    v: torch.Tensor,
    values: torch.Tensor,
    bound: torch.Tensor,
    of_heads: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `state_of_int8_keys` of the package."""
    batch, length, heads, _ = v.shape
    k_heads = integers.stride(0) // integers.stride(1) if batch > 1 else heads
    rows, state, normalizer = room_for_sums(v, of_heads, BLOCK)
    maximum = torch.empty_like(normalizer)
    operands = Int8Operands(
        *map(nvrtc.address, (integers, scale, center, values, bound)),
        *map(nvrtc.address, (v, state, normalizer, maximum)),
        length, heads, batch * heads, rows, k_heads, scale.shape[2], *v.stride()[:3],
    )  # fmt: skip
    kernel = nvrtc.load(
        INT8_SOURCE, "key_value_state", nvrtc.target_of(capability(v.device), v.device),
        INT8_SHARED_BYTES, Int8Operands, v.device.index, BF16=int(v.dtype == torch.bfloat16),
        FP8=int(values.dtype == torch.float8_e4m3fn), VALUE_LIMIT=int(VALUE_LIMIT),
    )  # fmt: skip
    kernel.launch(state.shape[0] * batch * heads, THREADS, operands)
    return _joined(state, normalizer, maximum)


def _joined(
    state: torch.Tensor, normalizer: torch.Tensor, maxima: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums over parts of state [S, B, H, D, D] and normalizer [S, B, H, D], and the largest of
    maxima [S, B, H, D]."""
    given = state, normalizer, maxima
    joined = tuple(torch.empty_like(x[0]) for x in given)
    operands = PartsOperands(
        *map(nvrtc.address, (*given, *joined)), len(state), state[0].numel(), maxima[0].numel()
    )
    target = nvrtc.target_of(capability(state.device), state.device)
    kernel = nvrtc.load(PARTS_SOURCE, "join_parts", target, 0, PartsOperands, state.device.index)
    numbers = sum(x.numel() for x in joined)
    kernel.launch(-(-numbers // (4 * THREADS)), THREADS, operands)
    return joined


def _kernel(k: torch.Tensor) -> nvrtc.Kernel:
    target = nvrtc.target_of(capability(k.device), k.device)
    return nvrtc.load(
        SOURCE, "key_value_state", target, SHARED_BYTES, Operands, k.device.index,
        STAGES=STAGES, BF16=int(k.dtype == torch.bfloat16),
    )  # fmt: skip
