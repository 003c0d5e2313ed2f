"""rCM (arXiv 2510.08431): a few-step student, by consistency and by its own samples' scores."""

import math

import torch

from ..rcm import rcm_angles
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
from .recorded import Backward, Recorded
from .samplers import falling, few_steps, last_point
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
        recorded: bool = False,
    ):
        self.teacher, self.data, self.settings, self.seed = teacher, data, settings, seed
        adam = (settings.betas, settings.weight_decay)
        self.student = Learner(student, *adam, settings.ema_length, still_time_features(student))
        self.fake = Learner(fake, *adam, still=still_time_features(fake))
        self.slots = own_slots(settings.batch, settings.micro_batch)
        angles = rcm_angles(settings.rollout, settings.sigma_max)[:-1]
        self.angles = torch.tensor(angles, dtype=torch.float64, device=data.device)
        weights = self.student.weights
        self.learn_consistency = Backward(self._consistency, weights, recorded)
        self.learn_from_scores = Backward(self._dmd, weights, recorded)
        self.learn_score = Backward(self._fake, self.fake.weights, recorded)
        self.student_velocity = Recorded(self._student) if recorded else self._student

    def step(self, n: int) -> Values:
        """Iteration number n, from 0: an update of the student or of the fake score."""
        settings = self.settings
        updates = student_updates(n, settings)
        if student_updates(n + 1, settings) == updates:
            return self._teach_fake(n, n - updates)
        values = accumulated(
            self.slots, lambda slot, share: self.learn_consistency(share, *self._at_data(n, slot))
        )
        if n >= settings.consistency_only:
            turn = updates - settings.consistency_only
            values |= accumulated(
                self.slots,
                lambda slot, share: self.learn_from_scores(share, *self._at_samples(n, slot, turn)),
            )
        lr = self._rate(settings.lr, updates, student_updates(settings.steps, settings))
        return {**values, "gradient_norm": self.student.update(lr, updates), "lr": lr}

    def _teach_fake(self, n: int, updates: int) -> Values:
        settings = self.settings
        values = accumulated(
            self.slots,
            lambda slot, share: self.learn_score(share, *self._at_samples(n, slot, updates)),
        )
        all_updates = settings.steps - student_updates(settings.steps, settings)
        lr = self._rate(settings.fake_lr, updates, all_updates)
        return {**values, "fake_gradient_norm": self.fake.update(lr, updates)}

    def _rate(self, lr: float, updates: int, all_updates: int) -> float:
        return falling_at_last(lr, updates, self.settings.warmup, all_updates, self.settings.fall)

    def _at_data(self, n: int, slot: int) -> tuple[torch.Tensor | None, ...]:
        """What _consistency takes: noised points of the data, and how far the tangent's warm-up
        is."""
        settings, draws = self.settings, Draws(self.seed, n, slot, self.data.device)
        batch = draws.batch(self.data, settings.micro_batch)
        level = log_normal(
            settings.micro_batch, settings.level_mean, settings.level_std, draws.generator("level")
        )
        angle = angle_of(level)
        x = noised(batch.latents, draws.normal("noise", batch.latents), angle)
        r = angle.new_full((), warmup_share(n, settings.consistency_only))
        return x, angle, r, batch.context, batch.image

    def _consistency(self, x, angle, r, context, image) -> tuple[torch.Tensor, Values]:
        """The consistency loss (section 3)."""
        batch = Batch(x, context, image)
        with torch.no_grad():
            teacher = predict(self._guided(batch), x, angle)
        velocity = velocity_of(self.student.network, batch)
        tangent = self._tangent(velocity, x, angle, teacher)
        prediction = predict(velocity, x, angle)
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

    def _at_samples(self, n: int, slot: int, turn: int) -> tuple[torch.Tensor | None, ...]:
        """What _dmd and _fake take: where the student's samples in 1 to `rollout` steps, in turn,
        take their last one, and where both scores are asked."""
        settings, draws = self.settings, Draws(self.seed, n, slot, self.data.device)
        batch = draws.batch(self.data, settings.micro_batch, "prompts")  # latents for their shape
        steps, count = 1 + turn % settings.rollout, settings.micro_batch
        angles = self._angles(steps, count, draws.generator("angles"))
        noise = draws.normal("start", batch.latents)

        def velocity(x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
            return self.student_velocity(x, level, batch.context, batch.image)[0]

        x, angle = last_point(velocity, noise, angles, draws.generator("between"))
        level = shifted_uniform(count, settings.shift, draws.generator("score"))
        return (
            x, angle, angle_of(level), draws.normal("score noise", batch.latents),
            batch.context, batch.image,
        )  # fmt: skip

    def _angles(self, steps: int, count: int, generator: torch.Generator) -> torch.Tensor:
        """Falling angles [steps, count] of the student's samples, down from pure noise."""
        if self.settings.sampler_angles:
            return self.angles[:steps, None].expand(-1, count)
        levels = shifted_uniform((steps - 1) * count, self.settings.shift, generator)
        first = torch.full((1, count), LARGEST_ANGLE, dtype=torch.float64, device=levels.device)
        return falling(torch.cat([first, angle_of(levels).reshape(steps - 1, count)]))

    @torch.no_grad()
    def _student(self, x, level, context, image) -> list[torch.Tensor]:
        return [velocity_of(self.student.network, Batch(x, context, image))(x, level)]

    def _dmd(self, x, angle, score_angle, noise, context, image) -> tuple[torch.Tensor, Values]:
        """The reverse divergence (section 3) at the student's own samples."""
        batch = Batch(x, context, image)
        x0 = self._sample(batch, angle)
        x = noised(x0.detach(), noise, score_angle)
        with torch.no_grad():
            fake = predict(velocity_of(self.fake.network, batch), x, score_angle)
            teacher = predict(self._guided(batch), x, score_angle)
        fake, teacher = (denoise(x, prediction, score_angle) for prediction in (fake, teacher))
        loss = dmd_loss(x0, dmd_gradient(x0, fake, teacher))
        gap = (x0.detach() - teacher).abs().mean()
        return self.settings.dmd_weight * loss, {"dmd": loss.detach(), "score_gap": gap}

    def _fake(self, x, angle, score_angle, noise, context, image) -> tuple[torch.Tensor, Values]:
        """The fake score's flow matching (section 3) on the student's samples."""
        batch = Batch(x, context, image)
        with torch.no_grad():
            x0 = self._sample(batch, angle)
        x = noised(x0, noise, score_angle)
        prediction = predict(velocity_of(self.fake.network, batch), x, score_angle)
        loss = fake_score_loss(prediction, x0, noise, score_angle)
        return loss, {"fake": loss.detach() / x0[0].numel()}

    def _sample(self, batch: Batch, angle: torch.Tensor) -> torch.Tensor:
        """What the student makes of the batch's points, float32."""
        x = batch.latents
        return denoise(
            x, predict(velocity_of(self.student.network, batch), x, angle), angle
        ).float()

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
        """Latents of the batch's prompts in `rollout` steps, with the weights as they are now."""
        between = torch.Generator(noise.device).manual_seed(self.seed)
        return few_steps(velocity_of(self.student.network, batch), noise, self.angles, between)


def student_updates(n: int, settings: RCM) -> int:
    """How many of the iterations before number n were the student's: all of the first, then one in
    `every`."""
    alone = settings.consistency_only
    return n if n <= alone else alone + math.ceil((n - alone) / settings.every)


def _size(x: torch.Tensor) -> torch.Tensor:
    """Mean over the samples of the norm over their elements, of x [B, ...]."""
    return x.flatten(1).norm(dim=1).mean()
