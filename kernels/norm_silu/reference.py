"""RMS norm and SiLU in torch, which differentiates them itself."""

import torch
from torch import Tensor
from torch.nn import functional

LEAST = 1e-12  # that is divided by, as torch's normalize has it


def norm_silu(x: Tensor, gamma: Tensor, before: int) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = functional.normalize(x.to(wide), dim=-1, eps=LEAST) * x.shape[-1] ** 0.5
    y = functional.silu(normed * gamma.to(wide)).to(x.dtype)
    return functional.pad(y, (0, 0) * 3 + (before, 0)) if before else y.contiguous()
