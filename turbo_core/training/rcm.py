"""rCM (arXiv 2510.08431): a few-step student, by consistency and by its own samples' scores."""

import math

import torch

from .batches import Batch, Data, Draws
from .initial_weights import still_time_features
from .learner import Learner, falling_at_last
from .losses import (
    consistency_difference,
    consistency_gradient,
    consistency_loss,
    consistency_tangent,
    dmd_gradient,
    dmd_loss,
    fake_score_loss,
    normalised,
    warmup_share,
)
from .noise_levels import log_normal, shifted_uniform
from .presets import RCM
from .samplers import falling, few_steps
from .slots import Values, accumulated, own_slots
from .trigflow import LARGEST_ANGLE, angle_of, denoise, noised, predict
from .velocity import guided_velocity, velocity_of

COLUMNS = (
    "consistency",
    "tangent",
    "g",
    "dmd",
    "score_gap",
    "fake",
    "gradient_norm",
    "fake_gradient_norm",
    "lr",
)
LATER_ANGLES = (1.5, 1.4, 1.0)  # of its samples while training, after the first


class RCMTraining:
    """Iteration by iteration; student and fake score learn in place, and in turn.

    Args:
        student, fake: start as the teacher.
        teacher: frozen.
    """

    def __init__(
        self,
        student: torch.nn.Module,
        fake: torch.nn.Module,
        teacher: torch.nn.Module,
        data: Data,
        settings: RCM,
        seed: int,
    ):
        self.teacher, self.data, self.settings, self.seed = teacher, data, settings, seed
        adam = (settings.betas, settings.weight_decay)
        self.student = Learner(student, *adam, settings.ema_length, still_time_features(student))
        self.fake = Learner(fake, *adam, still=still_time_features(fake))
        self.slots = own_slots(settings.batch, settings.micro_batch)

    def step(self, n: int) -> Values:
        """Iteration number n, from 0: an update of the student or of the fake score."""
        settings = self.settings
        updates = student_updates(n, settings)
        if student_updates(n + 1, settings) == updates:
            return self._teach_fake(n, n - updates)
        values = accumulated(self.slots, lambda slot: self._consistency(n, slot))
        if n >= settings.consistency_only:
            turn = updates - settings.consistency_only
            values |= accumulated(self.slots, lambda slot: self._dmd(n, slot, turn))
        lr = self._rate(settings.lr, updates, student_updates(settings.steps, settings))
        return {**values, "gradient_norm": self.student.update(lr, updates), "lr": lr}

    def _teach_fake(self, n: int, updates: int) -> Values:
        settings = self.settings
        values = accumulated(self.slots, lambda slot: self._fake(n, slot, updates))
        all_updates = settings.steps - student_updates(settings.steps, settings)
        lr = self._rate(settings.fake_lr, updates, all_updates)
        return {**values, "fake_gradient_norm": self.fake.update(lr, updates)}

    def _rate(self, lr: float, updates: int, all_updates: int) -> float:
        return falling_at_last(lr, updates, self.settings.warmup, all_updates, self.settings.fall)

    def _consistency(self, n: int, slot: int) -> tuple[torch.Tensor, Values]:
        """The consistency loss (section 3) at points of the data."""
        settings, draws = self.settings, Draws(self.seed, n, slot, self.data.device)
        batch = draws.batch(self.data, settings.micro_batch)
        level = log_normal(
            settings.micro_batch, settings.level_mean, settings.level_std, draws.generator("level")
        )
        angle = angle_of(level)
        x = noised(batch.latents, draws.normal("noise", batch.latents), angle)
        with torch.no_grad():
            teacher = predict(self._guided(batch), x, angle)
        velocity = velocity_of(self.student.network, batch)
        tangent = self._tangent(velocity, x, angle, teacher)
        prediction = predict(velocity, x, angle)
        r = warmup_share(n, settings.consistency_only)
        g = consistency_gradient(prediction.detach(), teacher, x, tangent, angle, r)
        loss = consistency_loss(prediction, normalised(g))
        told = {"consistency": loss.detach(), "tangent": _size(tangent), "g": _size(g)}
        return loss, told

    def _tangent(self, velocity, x, angle, teacher) -> torch.Tensor:
        """The student's tangent, its products in fp32: in bf16 it would be mostly rounding."""
        network = self.student.network
        rounded = network.bf16_timesteps
        by_difference = self.settings.tangent == "difference"
        network.full_precision = True
        network.bf16_timesteps = rounded and not by_difference  # steps of 4 would hide the step
        try:
            tangent_of = consistency_difference if by_difference else consistency_tangent
            return tangent_of(velocity, x, angle, teacher)
        finally:
            network.full_precision, network.bf16_timesteps = False, rounded

    def _dmd(self, n: int, slot: int, turn: int) -> tuple[torch.Tensor, Values]:
        """The reverse divergence (section 3) at the student's own samples."""
        batch, draws = self._own_batch(n, slot)
        x0 = self._rollout(batch, draws, turn)
        x, angle, _ = self._noised_again(x0.detach(), draws)
        with torch.no_grad():
            fake = denoise(x, predict(velocity_of(self.fake.network, batch), x, angle), angle)
            teacher = denoise(x, predict(self._guided(batch), x, angle), angle)
        loss = dmd_loss(x0, dmd_gradient(x0, fake, teacher))
        gap = (x0.detach() - teacher).abs().mean()
        return self.settings.dmd_weight * loss, {"dmd": loss.detach(), "score_gap": gap}

    def _fake(self, n: int, slot: int, turn: int) -> tuple[torch.Tensor, Values]:
        """The fake score's flow matching (section 3) on the student's samples."""
        batch, draws = self._own_batch(n, slot)
        with torch.no_grad():
            x0 = self._rollout(batch, draws, turn)
        x, angle, noise = self._noised_again(x0, draws)
        prediction = predict(velocity_of(self.fake.network, batch), x, angle)
        loss = fake_score_loss(prediction, x0, noise, angle)
        return loss, {"fake": loss.detach() / x0[0].numel()}

    def _own_batch(self, n: int, slot: int) -> tuple[Batch, Draws]:
        """Prompts and pictures; the latents are there for their shape alone."""
        draws = Draws(self.seed, n, slot, self.data.device)
        return draws.batch(self.data, self.settings.micro_batch, "prompts"), draws

    def _rollout(self, batch: Batch, draws: Draws, turn: int) -> torch.Tensor:
        """The student's samples in 1 to `rollout` steps, in turn, down from pure noise."""
        steps, count = 1 + turn % self.settings.rollout, len(batch.latents)
        angles = draws.generator("angles")
        levels = shifted_uniform((steps - 1) * count, self.settings.shift, angles)
        first = torch.full((1, count), LARGEST_ANGLE, dtype=torch.float64, device=levels.device)
        angles = falling(torch.cat([first, angle_of(levels).reshape(steps - 1, count)]))
        noise = draws.normal("start", batch.latents)
        velocity = velocity_of(self.student.network, batch)
        return few_steps(velocity, noise, angles, draws.generator("between"))

    def _noised_again(self, x0, draws: Draws) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Where both scores are asked: the point, its angle, its noise."""
        angle = angle_of(shifted_uniform(len(x0), self.settings.shift, draws.generator("score")))
        noise = draws.normal("score noise", x0)
        return noised(x0, noise, angle), angle, noise

    def _guided(self, batch: Batch):
        return guided_velocity(self.teacher, batch, self.data.unconditional, self.settings.guidance)

    def exported(self) -> dict[str, torch.Tensor]:
        """The averaged weights by parameter name."""
        return self.student.average()

    def state(self) -> dict:
        """What a checkpoint holds."""
        return {**self.student.state("student"), **self.fake.state("fake")}

    @torch.no_grad()
    def sample(self, batch: Batch, noise: torch.Tensor) -> torch.Tensor:
        """Latents of the batch's prompts in four steps, with the weights as they are now."""
        first = math.atan(self.settings.sigma_max)
        angles = torch.tensor([first, *LATER_ANGLES], dtype=torch.float64)
        between = torch.Generator(noise.device).manual_seed(self.seed)
        return few_steps(velocity_of(self.student.network, batch), noise, angles, between)


def student_updates(n: int, settings: RCM) -> int:
    """How many of the iterations before number n were the student's: all of the first, then one in
    `every`."""
    alone = settings.consistency_only
    return n if n <= alone else alone + math.ceil((n - alone) / settings.every)


def _size(x: torch.Tensor) -> torch.Tensor:
    """Mean over the samples of the norm over their elements, of x [B, ...]."""
    return x.flatten(1).norm(dim=1).mean()
