"""Averages of a model's weights over training, of a length that grows with it."""

import torch

from .gradients import own

TOGETHER = 32  # weights to a kernel, as torch.optim has it; their products need memory


def power_of(length: float) -> float:
    """The power gamma of the average whose standard deviation is `length` of the training so far.

    A weight of u^gamma over the training's course u in [0, 1] has the variance
    (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (EDM2, arXiv 2312.02696, appendix C). Set to length^2
    that is a cubic, whose largest root is meant: 6.94 for length 0.1, 16.97 for 0.05.

    Raises:
        ValueError: `length` is not between 0 and 0.288, where there is such an average.
    """
    if not 0 < length < 12**-0.5:
        raise ValueError(f"the EMA length must be between 0 and 0.288, got {length}: take 0.1")
    square = length**-2
    gamma = 1 / length  # right of the root, where the cubic is convex: Newton falls onto it
    for _ in range(60):
        value = ((gamma + 7) * gamma + 16 - square) * gamma + 12 - square
        gamma -= value / ((3 * gamma + 14) * gamma + 16 - square)
    return gamma


def decay(updates: int, length: float) -> float:
    """What share of the average stays when weights number `updates` (from 0) join it.

    (1 - 1 / (updates + 1))^(gamma + 1): the first weights replace it.
    """
    return (1 - 1 / (updates + 1)) ** (power_of(length) + 1)


class PowerEMA:
    """Power-function average of a model's weights (EDM2, arXiv 2312.02696, section 3), in float32.

    rCM counts the student's updates only, and exports the average (length 0.1 in its
    configurations, 0.05 in its table 4).

    Attributes:
        tensors: the averages, float32, in the order of the weights.
    """

    def __init__(self, weights: list[torch.Tensor], length: float):
        power_of(length)  # raises where there is none
        self.length = length
        self.tensors = [weight.detach().float().clone() for weight in weights]

    @torch.no_grad()
    def update(self, weights: list[torch.Tensor], updates: int, sound: torch.Tensor) -> None:
        """Take in `weights`, which `updates` updates came before, where `sound`, bool [], is true.

        It is asked on its device, so that nothing waits for it.
        """
        stays = torch.where(sound, decay(updates, self.length), 1.0)
        averages, weights = map(own, self.tensors), map(own, weights)
        pairs = list(zip(averages, weights, strict=True))
        for at in range(0, len(pairs), TOGETHER):
            some, joining = map(list, zip(*pairs[at : at + TOGETHER], strict=True))
            joining = torch._foreach_mul([weight.float() for weight in joining], 1 - stays)
            torch._foreach_mul_(some, stays)
            torch._foreach_add_(some, joining)
