"""The teacher of a toy: flow matching from random weights."""

import torch

from .batches import Batch, Data, Draws, drop_prompts
from .initial_weights import still_time_features
from .learner import Learner, cosine
from .losses import flow_matching
from .noise_levels import log_normal
from .presets import Teacher
from .recorded import Backward
from .samplers import euler, shifted_levels
from .slots import Values, accumulated, own_slots
from .velocity import guided_velocity, mixed, velocity_of

COLUMNS = ("loss", "gradient_norm", "lr")
GUIDANCE, SHIFT, STEPS, SIGMA_MAX = 2.5, 3.0, 50, 80.0  # of its samples


class TeacherTraining:
    """Step by step; the network learns in place."""

    def __init__(
        self,
        network: torch.nn.Module,
        data: Data,
        settings: Teacher,
        seed: int,
        recorded: bool = False,
    ):
        self.data, self.settings, self.seed = data, settings, seed
        adam = (settings.betas, settings.weight_decay)
        still = still_time_features(network)
        self.learner = Learner(network, *adam, settings.ema_length, still)
        self.slots = own_slots(settings.batch, settings.micro_batch)
        self.learn = Backward(self._loss, self.learner.weights, recorded)

    def step(self, n: int) -> Values:
        """Update number n, from 0."""
        settings = self.settings
        values = accumulated(
            self.slots, lambda slot, share: self.learn(share, *self._drawn(n, slot))
        )
        lr = cosine(settings.lr, n, settings.warmup, settings.steps)
        return {**values, "gradient_norm": self.learner.update(lr, n), "lr": lr}

    def _drawn(self, n: int, slot: int) -> tuple[torch.Tensor | None, ...]:
        """What _loss takes."""
        settings, draws = self.settings, Draws(self.seed, n, slot, self.data.device)
        batch = draws.batch(self.data, settings.micro_batch)
        context = drop_prompts(
            batch.context, self.data.unconditional, settings.dropout, draws.generator("dropout")
        )
        level = log_normal(
            settings.micro_batch, settings.level_mean, settings.level_std, draws.generator("level")
        )
        noise = draws.normal("noise", batch.latents)
        return batch.latents, noise, level, context, batch.image

    def _loss(self, latents, noise, level, context, image) -> tuple[torch.Tensor, Values]:
        velocity = velocity_of(self.learner.network, Batch(latents, context, image))
        answer = velocity(mixed(latents, noise, level), level)
        loss = flow_matching(answer, latents, noise)
        return loss, {"loss": loss.detach()}

    def exported(self) -> dict[str, torch.Tensor]:
        """The averaged weights by parameter name."""
        return self.learner.average()

    def state(self) -> dict:
        """What a checkpoint holds."""
        return self.learner.state("teacher")

    def sample(self, batch: Batch, noise: torch.Tensor) -> torch.Tensor:
        """Latents of the batch's prompts with the weights as they are now."""
        return teacher_samples(self.learner.network, batch, self.data.unconditional, noise)


@torch.no_grad()
def teacher_samples(
    network: torch.nn.Module,
    batch: Batch,
    unconditional: torch.Tensor,
    noise: torch.Tensor,
    guidance: float = GUIDANCE,
    steps: int = STEPS,
) -> torch.Tensor:
    """Euler samples [B, 16, T, H, W] with guidance, from `noise` of that shape."""
    velocity = guided_velocity(network, batch, unconditional, guidance)
    return euler(velocity, noise, shifted_levels(steps, SHIFT, SIGMA_MAX))
