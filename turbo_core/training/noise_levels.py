"""How noisy the samples of a training step are: rectified-flow levels s in (0, 1).

Each function takes a torch.Generator and returns float64 [count] on the generator's device; angles
are trigflow.angle_of of them.
"""

import torch


def log_normal(count: int, mean: float, std: float, generator: torch.Generator) -> torch.Tensor:
    """s = sigma / (1 + sigma) with ln sigma ~ N(mean, std^2).

    SLA is tuned with (1.5, 1.6), as TurboDiffusion's trainer does. rCM's consistency loss has std
    1.6 and mean -0.8 + ln sqrt T for T latent frames (rCM, table 4): neighbouring frames tell of
    each other, so longer videos need more noise to be as hard.
    """
    normal = torch.randn(count, generator=generator, device=generator.device, dtype=torch.float64)
    return torch.sigmoid(mean + std * normal)


def shifted_uniform(count: int, shift: float, generator: torch.Generator) -> torch.Tensor:
    """s = shift u / (1 + (shift - 1) u) with u uniform: rCM's DMD loss, with shift 5 (table 4)."""
    uniform = torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64)
    return shifted(uniform, shift)


def shifted(level: torch.Tensor, shift: float) -> torch.Tensor:
    """s -> shift s / (1 + (shift - 1) s): sigma = s / (1 - s) becomes shift times as large."""
    return shift * level / (1 + (shift - 1) * level)
