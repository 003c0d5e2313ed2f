"""SLA fine-tuning (arXiv 2512.16093, section 1.2): regression on the frozen dense network."""

from collections.abc import Callable, Sequence

import torch

from .batches import Batch, Data, Draws
from .initial_weights import still_time_features
from .learner import Learner, falling_at_last
from .losses import sla_regression
from .noise_levels import log_normal
from .presets import SLA
from .recorded import Backward
from .samplers import few_steps
from .slots import Values, accumulated, own_slots
from .teacher import teacher_samples
from .trigflow import level_of, over_axes
from .velocity import mixed, velocity_of

COLUMNS = ("loss", "gradient_norm", "lr")
LEAST_LOSS = 1e-6  # whose power still is a weight


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
        values = accumulated(self.slots, lambda slot, share: self._learn(n, slot, share))
        lr = falling_at_last(settings.lr, n, settings.warmup, settings.steps, settings.fall)
        return {**values, "gradient_norm": self.learner.update(lr, n), "lr": lr}

    def _learn(self, n: int, slot: int, share: float) -> Values:
        settings, draws = self.settings, Draws(self.seed, n, slot, self.data.device)
        batch = draws.batch(self.data, settings.micro_batch)
        level = log_normal(
            settings.micro_batch, settings.level_mean, settings.level_std, draws.generator("level")
        )
        x = mixed(batch.latents, draws.normal("noise", batch.latents), level)
        return self.learn(share, x, level, batch.context, batch.image)

    def _loss(self, x, level, context, image) -> tuple[torch.Tensor, Values]:
        _, loss = self._compared(x, level, context, image)
        return loss, {"loss": loss.detach()}

    def _compared(self, x, level, context, image) -> tuple[torch.Tensor, torch.Tensor]:
        """The student's velocity and the loss at points x with noise `level`."""
        batch = Batch(x, context, image)
        with torch.no_grad():
            wanted = velocity_of(self.teacher, batch)(x, level)
        answer = velocity_of(self.learner.network, batch)(x, level)
        return answer, sla_regression(answer, wanted)

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


class SampledSLATraining(SLATraining):
    """SLA tuned on rCM's student, at the points that its samples in few steps go through.

    There the merged model will be asked, and nowhere else. An SLA that learnt to make good what the
    teacher's attention loses does not make good what the student's loses, which draws in one pass
    what the teacher draws in many. The points are the sparse network's own: each step starts from
    what it made of the one before, so that it learns to mend its own mistakes.

    What is written is base + (tuned - student). So the merge keeps its formula: base + (SLA - base)
    + (rCM - base) is the tuned student.

    Args:
        network: attends sparsely, starts as the student.
        student: dense and frozen.
        base: makes the network that the student was distilled from.
        angles: of the student's sampler, falling, without the last one, 0.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        student: torch.nn.Module,
        base: Callable[[], torch.nn.Module],
        angles: Sequence[float],
        data: Data,
        settings: SLA,
        seed: int,
        recorded: bool = False,
    ):
        super().__init__(network, student, data, settings, seed, recorded)
        self.base, self.angles = base, torch.tensor(angles, dtype=torch.float64)
        # As FSDP2 split them: after a forward pass alone, what is outside of blocks stays whole.
        self.starts = dict(student.named_parameters())

    def _learn(self, n: int, slot: int, share: float) -> Values:
        """Gradients at every point of the samples' ways."""
        draws, count = Draws(self.seed, n, slot, self.data.device), self.settings.micro_batch
        batch = draws.batch(self.data, count)
        x0, told = torch.zeros_like(batch.latents), []
        for place, level in enumerate(level_of(self.angles).tolist()):
            noise = draws.normal(f"noise {place}", x0)
            levels = torch.full((count,), level, dtype=torch.float64, device=x0.device)
            x = mixed(x0, noise, levels)
            values = self.learn(share / len(self.angles), x, levels, batch.context, batch.image)
            x0 = values.pop("x0")
            told.append(values["loss"])
        return {"loss": torch.stack(told).mean()}

    def _loss(self, x, level, context, image) -> tuple[torch.Tensor, Values]:
        answer, loss = self._compared(x, level, context, image)
        x0 = x - over_axes(level, x).to(x.dtype) * answer.detach()
        told = loss.detach()
        weight = told.clamp(min=LEAST_LOSS) ** -self.settings.balance
        return weight * loss, {"loss": told, "x0": x0}

    @torch.no_grad()
    def exported(self) -> dict[str, torch.Tensor]:
        """base + (tuned - student) by parameter name; SLA's projections as they are."""
        base = dict(self.base().named_parameters())
        return {
            name: base[name] + (average - self.starts[name]) if name in base else average
            for name, average in super().exported().items()
        }

    @torch.no_grad()
    def sample(self, batch: Batch, noise: torch.Tensor) -> torch.Tensor:
        """Latents of the batch's prompts in the student's steps, with the weights as they are."""
        between = torch.Generator(noise.device).manual_seed(self.seed)
        return few_steps(velocity_of(self.learner.network, batch), noise, self.angles, between)
