"""SLA fine-tuning (arXiv 2512.16093, section 1.2): regression on the frozen dense network."""

import torch

from .batches import Batch, Data, Draws
from .initial_weights import still_time_features
from .learner import Learner, falling_at_last
from .losses import sla_regression
from .noise_levels import log_normal
from .presets import SLA
from .recorded import Backward
from .slots import Values, accumulated, own_slots
from .teacher import teacher_samples
from .velocity import mixed, velocity_of

COLUMNS = ("loss", "gradient_norm", "lr")


class SLATraining:
    """Step by step; the student, which attends sparsely, learns in place.

    All its parameters learn, with the prompts as they are: no guidance, no dropout.
    """

    def __init__(
        self,
        student: torch.nn.Module,
        teacher: torch.nn.Module,
        data: Data,
        settings: SLA,
        seed: int,
        recorded: bool = False,
    ):
        self.teacher, self.data, self.settings, self.seed = teacher, data, settings, seed
        adam = (settings.betas, settings.weight_decay)
        still = still_time_features(student)
        self.learner = Learner(student, *adam, settings.ema_length, still)
        self.slots = own_slots(settings.batch, settings.micro_batch)
        self.learn = Backward(self._loss, self.learner.weights, recorded)

    def step(self, n: int) -> Values:
        """Update number n, from 0."""
        settings = self.settings
        values = accumulated(
            self.slots, lambda slot, share: self.learn(share, *self._drawn(n, slot))
        )
        lr = falling_at_last(settings.lr, n, settings.warmup, settings.steps, settings.fall)
        return {**values, "gradient_norm": self.learner.update(lr, n), "lr": lr}

    def _drawn(self, n: int, slot: int) -> tuple[torch.Tensor | None, ...]:
        """What _loss takes."""
        settings, draws = self.settings, Draws(self.seed, n, slot, self.data.device)
        batch = draws.batch(self.data, settings.micro_batch)
        level = log_normal(
            settings.micro_batch, settings.level_mean, settings.level_std, draws.generator("level")
        )
        x = mixed(batch.latents, draws.normal("noise", batch.latents), level)
        return x, level, batch.context, batch.image

    def _loss(self, x, level, context, image) -> tuple[torch.Tensor, Values]:
        batch = Batch(x, context, image)
        with torch.no_grad():
            wanted = velocity_of(self.teacher, batch)(x, level)
        loss = sla_regression(velocity_of(self.learner.network, batch)(x, level), wanted)
        return loss, {"loss": loss.detach()}

    def exported(self) -> dict[str, torch.Tensor]:
        """The averaged weights by parameter name."""
        return self.learner.average()

    def state(self) -> dict:
        """What a checkpoint holds."""
        return self.learner.state("student")

    def sample(self, batch: Batch, noise: torch.Tensor) -> torch.Tensor:
        """Latents of the batch's prompts with the weights as they are now."""
        network, guidance = self.learner.network, self.settings.guidance
        return teacher_samples(network, batch, self.data.unconditional, noise, guidance)
