"""A network that learns: its optimizer, its learning rate and the average of its weights."""

import math

import torch

from .ema import PowerEMA
from .gradients import gradient_norm, own
from .trained import Trained


class Learner:
    """One update after the other, in AdamW.

    Attributes:
        network: fp32 parameters, sharded by FSDP2 or not.
        ema: the average that is exported; None for a network that nobody exports.
        still: by parameter name where weights do not learn, bool, of a shape that broadcasts.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        betas: tuple[float, float],
        weight_decay: float,
        ema_length: float | None = None,
        still: dict[str, torch.Tensor] | None = None,
    ):
        self.network = network
        self.still = still or {}
        self.names, weights = zip(*network.named_parameters(), strict=True)
        self.weights = list(weights)
        self.optimizer = torch.optim.AdamW(
            self.weights,
            lr=0.0,
            betas=betas,
            weight_decay=weight_decay,
            fused=True,  # this one can leave an update out on the GPU, see update
        )
        _give_state(self.optimizer)
        self.ema = None if ema_length is None else PowerEMA(self.weights, ema_length)

    def update(self, lr: float, updates: int) -> torch.Tensor:
        """Step with the gradients there are; `updates` came before.

        Where one of them is not finite, in any process, nothing changes: no weight, moment,
        average, nor AdamW's count of its steps. `updates` still counts such a batch, and so do the
        schedules. Nothing waits for the GPU: the norm stays there, and the report finds the dropped
        batch in it. (TD zeroes single numbers, which leaves the rest of a broken gradient in.)

        Returns:
            The gradients' norm, float32 [].
        """
        for name, where in self.still.items():
            own(self.network.get_parameter(name).grad).masked_fill_(where, 0.0)
        norm = gradient_norm(self.weights)
        sound = norm.isfinite()
        self.optimizer.found_inf = sound.logical_not().float()  # torch's word to fused optimizers
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.weights, updates, sound)
        return norm

    def state(self, name: str) -> dict:
        """All that update changes, for step_checkpoints.save and load, which want it flat."""
        state = {name: Trained(self.network, self.optimizer)}
        return {**state, f"{name}_average": self.average()} if self.ema else state

    def average(self) -> dict[str, torch.Tensor]:
        """The average by parameter name, fp32; sharded as the network is."""
        return dict(zip(self.names, self.ema.tensors, strict=True))


def _give_state(optimizer: torch.optim.Optimizer) -> None:
    """Moments and counts of before the first update, which a checkpoint may have to hold.

    torch.distributed.checkpoint would make them itself, and count that as an update.
    """
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.grad = torch.zeros_like(weight)
    optimizer.step()  # at a learning rate of 0
    optimizer.zero_grad()
    for state in optimizer.state.values():
        state["step"].zero_()


def warmed_up(lr: float, step: int, warmup: int) -> float:
    """The learning rate of a step: it rises linearly over `warmup` steps, then stays."""
    return lr * min(1.0, (step + 1) / max(1, warmup))


def falling_at_last(lr: float, step: int, warmup: int, steps: int, fall: float) -> float:
    """As warmed_up, and over the last share `fall` of the steps it falls linearly to 0."""
    left = (steps - step) / max(1, fall * steps)
    return warmed_up(lr, step, warmup) * min(1.0, left)


def cosine(lr: float, step: int, warmup: int, steps: int) -> float:
    """As warmed_up, and falls to 0 at `steps` along a cosine."""
    return warmed_up(lr, step, warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
