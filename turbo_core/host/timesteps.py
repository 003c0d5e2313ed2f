"""Timesteps as TurboDiffusion's weights know them: rounded to bf16, 987.65 to 988."""

import torch


def round_timesteps(executor, x, timestep, *args, **kwargs):
    """A DIFFUSION_MODEL wrapper: the original feeds bf16 timesteps, in training too."""
    return executor(x, round_to_bf16(timestep), *args, **kwargs)


def round_to_bf16(x: torch.Tensor) -> torch.Tensor:
    """x, of any float dtype and shape, rounded to the nearest bf16, ties to even; dtype kept.

    Where torch.compile traces on the bits, because it leaves a cast to bf16 and back out: adding
    just under half of the 16 bits that go, and the last bit that stays, carries over exactly where
    rounding goes up.
    """
    if not torch.compiler.is_compiling():
        return x.to(torch.bfloat16).to(x.dtype)
    wide = x.float()
    bits = wide.view(torch.int32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF
    rounded = torch.where(wide.isnan(), wide, bits.view(torch.float32)).to(x.dtype)
    # Gradients pass as through the cast: bits have none.
    return x + (rounded - x).detach() if x.requires_grad else rounded
