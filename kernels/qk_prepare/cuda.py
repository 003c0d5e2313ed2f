"""What prepares q and k in CUDA C++, on Hopper and on cards of mma.sync: see cuda.cu."""

import functools
from pathlib import Path

import torch

from .. import nvrtc
from ..checks import in_steps_of_16_bytes
from ..dispatch import HOPPER, capability
from ..linear_attention import LinearBranch
from ..linear_attention.triton import SUMS, project_state, project_state_and_sums
from ..tape import constant
from ..tuning import PREPARE_HEADS, of_card
from .triton import block_outputs, given_or_own_norms, mean_of_some

SOURCE = Path(__file__).with_suffix(".cu")
TARGET = "sm_90a"
HEAD_DIM = 128
ROWS = 128  # of a program, at most
KEY_BLOCK = 64  # rows that share a scale where attention reads keys
MOST_HEADS = 8  # of a program
# Of cuda.cu's Shared: weights and bias; cosines and sines, which on other cards stay in the cache.
WEIGHT_BYTES = (MOST_HEADS + 1) * 128 * 4
HOPPER_BYTES = 128 * 128 * 4
LINEAR_BYTES = 128 * 136 * 2 + 128 * 4  # what its linear branch adds
HOPPER_LINEAR_BYTES = 128 * (128 + SUMS) * 2 + 1024 + 8
CENTER_BYTES = MOST_HEADS * 128 * 2
Operands = nvrtc.operands(
    pointers="x norms weight cos sin out means integers scales mix normalizer bias center",
    integers="x_b x_l x_h cos_b cos_l sin_b sin_l length heads blocks heads_each",
)


def unfit(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    out: torch.Tensor,
    branch: LinearBranch | None,
) -> str | None:
    """Why the kernel cannot prepare x [B, L, H, D]; None where it can."""
    if x.shape[-1] != HEAD_DIM:
        return f"the head dim is {x.shape[-1]}, not {HEAD_DIM}"
    if x.dtype == torch.float32:
        return "q and k are float32"
    # The only one that models were trained with.
    if branch is not None and branch.feature_map != "softmax":
        return f"the feature map is {branch.feature_map}"
    # Sums are scaled by the keys' number alone there: a channel's that few keys use get lost.
    if branch is not None and x.dtype == torch.float16 and capability(x.device) == HOPPER:
        return "float16 has no room for the linear branch's sums"
    if not (in_steps_of_16_bytes(x) and (out is x or in_steps_of_16_bytes(out))):
        return "rows do not begin at multiples of 16 bytes"
    if max(*x.stride(), *cos.stride(), *sin.stride()) >= 2**31:
        return "strides exceed int32"
    return None


def aligned_copy(x: torch.Tensor) -> torch.Tensor:
    """x in float32, contiguous, where 16 bytes can be read at once."""
    x = x.float().contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def aligned_pairs(angles: torch.Tensor) -> torch.Tensor:
    """cos or sin [B, L, D / 2] with its pairs side by side, where 16 bytes can be read at once."""
    if angles.stride(-1) == 1 and in_steps_of_16_bytes(angles):
        return angles
    return angles.clone(memory_format=torch.contiguous_format)


def angle_strides(angles: torch.Tensor) -> tuple[int, int]:
    """Between samples and rows of cos or sin [1 or B, L, D / 2]."""
    sample, row, _ = angles.stride()
    return sample if angles.shape[0] > 1 else 0, row


@functools.cache
def order(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the linear branch's products [D (out), D (in)]: the channel at each of their 128 columns,
    [D, 1], and at each of their 128 summands, [D], on `device`.

    Of 32 channels thread t of four holds 8 t + {0 .. 7}, of x as of what comes out. A product of 16
    takes of it the summands 2 t, 2 t + 1, 2 t + 8 and 2 t + 9, and leaves it of each 8 columns
    2 t and 2 t + 1.
    """
    place = torch.arange(HEAD_DIM, device=device)
    tile, pair, odd = place // 32 * 32, place // 2 % 4 * 8, place % 2
    columns = tile + pair + place // 8 % 4 * 2 + odd
    summands = tile + pair + place // 16 % 2 * 4 + place // 8 % 2 * 2 + odd
    return columns[:, None], summands


@constant
def places(device: torch.device) -> torch.Tensor:
    """Where in the linear branch's products [D (out), D (in)], both in `order`, the numbers of
    [D (in), D (out)] lie, int32 [D * D] on `device`."""
    columns, summands = order(device)
    return (summands * HEAD_DIM + columns).flatten().argsort().to(torch.int32)


@constant
def places_in_halves(device: torch.device) -> torch.Tensor:
    """The same on Hopper, and then where the sums [D (in), SUMS] lie beside them, int32
    [D * (D + SUMS)].

    There are two halves of the summands, each with 64 columns of channels, those of the sums, and
    64 columns again; of a column chunks of 8 summands are swizzled as wgmma reads them.
    """
    columns, summands = (x.flatten().argsort() for x in order(device))  # by channel
    columns += (columns >= 64) * SUMS
    sums = 64 + torch.arange(SUMS, device=device)
    half, place = summands[:, None] // 64, summands[:, None] % 64

    def lie(column: torch.Tensor) -> torch.Tensor:
        chunk = place // 8 ^ column % 8
        return ((half * (HEAD_DIM + SUMS) + column) * 64 + chunk * 8 + place % 8).flatten()

    return torch.cat((lie(columns), lie(sums))).to(torch.int32)


def prepare(
    x: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    block: int,
    quantize: bool,
    out: torch.Tensor,
    branch: LinearBranch | None,
    row_norms: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """`prepare` of the Triton file, of what is not `unfit`."""
    norms, weight = given_or_own_norms(x, eps, row_norms), aligned_copy(weight)
    means, integers, scales = block_outputs(x, block, quantize)
    mixed = None, None, None
    if branch is not None:
        mixed = *_mix(branch, x.dtype, x.shape[1]), aligned_copy(branch.proj_bias)
    made = out, means, integers, scales
    _launch(x, norms, weight, cos, sin, made, (*mixed, None), block, LINEAR=branch is not None)
    return means, integers, scales


def prepare_keys(
    k: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    row_norms: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Means of k's blocks, its int8 blocks with their scales, laid out as attention in CUDA C++
    reads them, and what was subtracted from all rows, in k's dtype [B, H, D]."""
    norms, weight = given_or_own_norms(k, eps, row_norms), aligned_copy(weight)
    center = mean_of_some(k, norms, weight, cos, sin)
    made = means, integers, scales = block_outputs(k, KEY_BLOCK, True)
    inputs = k, norms, weight, cos, sin
    _launch(*inputs, (None, *made), (None, None, None, center), KEY_BLOCK, CENTERED=True)
    return means, integers, scales, center


def _launch(
    x: torch.Tensor,
    norms: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    made: tuple[torch.Tensor | None, ...],
    others: tuple[torch.Tensor | None, ...],
    block: int,
    **flags: bool,
) -> None:
    """What is `made` of x, with the `others` that its kernel takes."""
    batch, length, heads, _ = x.shape
    card, means, integers = capability(x.device), made[1], made[2]
    cos, sin = aligned_pairs(cos), aligned_pairs(sin)
    groups = -(-heads // of_card(PREPARE_HEADS, card))
    operands = Operands(
        *map(nvrtc.address, (x, norms, weight, cos, sin, *made, *others)),
        *x.stride()[:3], *angle_strides(cos), *angle_strides(sin),
        length, heads, means.shape[2], -(-heads // groups),
    )  # fmt: skip
    rows = rows_of_program(card, block)
    kernel = _kernel(x, rows, block, QUANTIZE=integers is not None, **flags)
    kernel.launch(groups * -(-length // rows) * batch, 2 * rows, operands)


def _mix(
    branch: LinearBranch, dtype: torch.dtype, length: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The projected state as the card's products read it, and the normalizer if not among it."""
    sums = branch.state, branch.normalizer, branch.proj_weight
    device = branch.state.device
    if capability(device) == HOPPER:
        return project_state_and_sums(*sums, dtype, places_in_halves(device), length), None
    return project_state(*sums, dtype, places(device)), aligned_copy(branch.normalizer)


def rows_of_program(card: tuple[int, int], block: int) -> int:
    """As few as a block where cosines and sines need not be kept: fewer warps wait for another."""
    return ROWS if card == HOPPER else block


def shared_bytes(rows: int, hopper: bool, linear: bool, centered: bool = False) -> int:
    """cuda.cu's Shared: weights, norms, sums and maxima, what waits there on Hopper, the linear
    branch, centers."""
    told = 1 if linear and not hopper else 2
    own = WEIGHT_BYTES + rows * 4 + told * rows // 16 * (HEAD_DIM + 9) * 4
    own += centered * CENTER_BYTES
    if hopper:
        return own + HOPPER_BYTES + linear * HOPPER_LINEAR_BYTES
    return own + linear * LINEAR_BYTES


def _kernel(x: torch.Tensor, rows: int, block: int, **flags: bool) -> nvrtc.Kernel:
    card = capability(x.device)
    hopper, bf16 = card == HOPPER, x.dtype == torch.bfloat16
    flags = {"LINEAR": False, "CENTERED": False, "HOPPER": hopper, "BF16": bf16} | flags
    shared = shared_bytes(rows, hopper, flags["LINEAR"], flags["CENTERED"])
    flags = {name: int(flag) for name, flag in flags.items()}
    target = TARGET if hopper else nvrtc.target_of(card, x.device)
    return nvrtc.load(
        SOURCE, "prepare", target, shared, Operands, x.device.index,
        ROWS=rows, BLOCK=block, **flags,
    )  # fmt: skip
