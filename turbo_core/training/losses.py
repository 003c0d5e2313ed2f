"""The losses of TurboDiffusion's two trainings: SLA's fine-tuning and rCM's distillation.

Shapes are [B, ...] for points, answers and velocities, [B] for angles; everything of rCM is
computed in float64. A sample with a value that is not finite counts as zero, in the loss and in its
gradient towards the network's answer. (What led to such an answer inside the network can still
make the weights' gradients NaN, which the training loop looks at.)

"rCM" is arXiv 2510.08431, "sCM" 2410.11081, "SLA" 2509.24006, "TurboDiffusion" 2512.16093. Numbers
of equations stand where they could be checked, else the section that has the formula.
"""

import torch
from torch.autograd import forward_ad

from .trigflow import LARGEST_ANGLE, Velocity, level_of, over_axes, predict

Dual = tuple[torch.Tensor, torch.Tensor]  # a value and its tangent

CONSISTENCY_SCALE = 100.0  # of the consistency loss, beside 1 of the DMD loss
TANGENT_FLOOR = 0.1  # sCM's c, which keeps small tangents small
SMALLEST_DISTANCE = 1e-5
DIFFERENCE = 1e-2  # radians, of the central difference


def sla_regression(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean of (v_sla - v_dense)^2 over all elements, in float32 (TurboDiffusion, section 1.2).

    The velocities of the network with SLA and of the frozen one with dense attention, at the same
    noisy latents. It asks for nothing that the data must know, unlike flow_matching.
    """
    return _squared(student.float() - teacher.float()).mean()


def flow_matching(velocity: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Mean of (v - (noise - x0))^2, in float32: how Wan was trained.

    The SLA paper fine-tunes with it (SLA, section on fine-tuning); here the toy's teacher learns
    by it.
    """
    return _squared(velocity.float() - (noise.float() - x0.float())).mean()


@torch.no_grad()
def consistency_tangent(
    velocity: Velocity, x: torch.Tensor, angle: torch.Tensor, teacher: torch.Tensor
) -> torch.Tensor:
    """cos t sin t dF/dt of the student along the teacher's ODE, float64 [B, ...].

    dx/dt = F_teacher on that ODE. The factor is part of the tangents that go in, as sCM, section
    5.1, rearranges the product, so that they stay small at both ends. Only the network itself is
    differentiated in forward mode; the wrapper's part is written out.

    Args:
        velocity: the student, of operations that know forward mode.
        x: the point at `angle`.
        angle: [B].
        teacher: F of the teacher there, with guidance.
    """
    t = over_axes(angle, x)
    both, apart, product = t.cos() + t.sin(), t.cos() - t.sin(), t.cos() * t.sin()
    along = product * teacher  # the tangent of x
    point, level = x / both, level_of(angle)
    point_tangent = along / both - x * product * apart / both**2
    level_tangent = (product / both**2).reshape(level.shape)  # ds/dt = 1 / C^2
    v, v_tangent = _with_tangent(velocity, (point, point_tangent), (level, level_tangent))
    student = (apart * x + v) / both
    tangent = apart * along - both * product * x + v_tangent - student * product * apart
    return tangent / both


def _with_tangent(velocity: Velocity, point: Dual, level: Dual) -> Dual:
    """The velocity and its tangent, of a point and a level with theirs.

    By dual tensors and not torch.func.jvp, whose wrappers FSDP2's hooks of older torch cannot take.
    """
    with forward_ad.dual_level():
        v, tangent = forward_ad.unpack_dual(
            velocity(forward_ad.make_dual(*point), forward_ad.make_dual(*level))
        )
    return v, torch.zeros_like(v) if tangent is None else tangent


@torch.no_grad()
def consistency_difference(
    velocity: Velocity,
    x: torch.Tensor,
    angle: torch.Tensor,
    teacher: torch.Tensor,
    step: float = DIFFERENCE,
) -> torch.Tensor:
    """consistency_tangent by a central difference, for a network without forward mode.

    The point turns by +-`step` radians along F_teacher, and not beyond [0, pi/2]. The network has
    to compute in float32 at least, with unrounded timesteps and one and the same block map.
    """
    t = over_axes(angle, x)
    later = (angle.double() + step).clamp(max=LARGEST_ANGLE)
    earlier = (angle.double() - step).clamp(min=0)

    def at(other: torch.Tensor) -> torch.Tensor:
        turn = over_axes(other, x) - t
        return predict(velocity, turn.cos() * x + turn.sin() * teacher, other)

    change = (at(later) - at(earlier)) / over_axes(later - earlier, x)
    return t.cos() * t.sin() * change


def consistency_gradient(
    student: torch.Tensor,
    teacher: torch.Tensor,
    x: torch.Tensor,
    tangent: torch.Tensor,
    angle: torch.Tensor,
    warmup: float | torch.Tensor,
) -> torch.Tensor:
    """cos t df/dt of the student's denoised f = cos t x - sin t F, float64 (rCM, equation 5).

    g = -cos t sqrt(1 - r^2 sin^2 t) (F_student - F_teacher) - (r cos t sin t x + tangent), which is
    sCM's equation 6 at r = 1.

    Args:
        student: F of the student, without gradient.
        teacher: F of the teacher, with guidance.
        x: the point at `angle`.
        tangent: what consistency_tangent returns.
        angle: [B].
        warmup: r, see warmup_share; a tensor [] of it in a recorded pass.
    """
    t = over_axes(angle, x)
    pull = t.cos() * (1 - (warmup * t.sin()) ** 2).sqrt() * (student - teacher)
    return -pull - (warmup * t.cos() * t.sin() * x + tangent)


def warmup_share(iteration: int, length: int) -> float:
    """r = min(1, iteration / length), 1 without a warm-up (sCM, section 4.2: tangent warm-up)."""
    return min(1.0, iteration / length) if length else 1.0


def normalised(gradient: torch.Tensor) -> torch.Tensor:
    """g / (|g| + 0.1) with the norm over all elements of a sample (sCM, section 4.2).

    rCM's text squares the norm by mistake.
    """
    norms = gradient.double().flatten(1).norm(dim=1)
    return gradient / (over_axes(norms, gradient) + TANGENT_FLOOR)


def consistency_loss(student: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """100 |F - sg(F) - g|^2, summed over a sample's elements, averaged over samples.

    sCM's loss without its learned weighting, as rCM, section 3, takes it. Its value is about 100
    whatever happens, as g is normalised; the size of g before that tells how training goes.

    Args:
        student: F of the student, with gradient.
        gradient: what `normalised` returns.
    """
    student = student.double()
    return CONSISTENCY_SCALE * _summed(student - student.detach() - gradient)


def dmd_gradient(x0: torch.Tensor, fake: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """(x0_fake - x0_teacher) / mean |x0 - x0_teacher| by sample, float64 (rCM, section 3).

    The gradient of the reverse KL divergence between the student's samples and the teacher's, whose
    scores the two networks know (DMD2, arXiv 2405.14867).

    Args:
        x0: the student's samples.
        fake: what the fake score makes of them, noised.
        teacher: what the teacher makes of the same, with guidance.
    """
    x0, fake, teacher = x0.detach().double(), fake.double(), teacher.double()
    distance = (x0 - teacher).abs().flatten(1).mean(1).clamp(min=SMALLEST_DISTANCE)
    return (fake - teacher) / over_axes(distance, x0)


def dmd_loss(x0: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """|x0 - sg(x0 - gradient)|^2, summed over a sample's elements, averaged over samples.

    Args:
        x0: the student's samples, with gradient.
        gradient: what dmd_gradient returns.
    """
    x0 = x0.double()
    return _summed(x0 - (x0.detach() - gradient))


def fake_score_loss(
    prediction: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor, angle: torch.Tensor
) -> torch.Tensor:
    """|F_fake - (cos t noise - sin t x0)|^2, summed and averaged as above (rCM, section 3).

    Flow matching on the student's samples x0, so that the fake score stays theirs.
    """
    t = over_axes(angle, x0)
    return _summed(prediction.double() - (t.cos() * noise - t.sin() * x0.detach()))


def _summed(difference: torch.Tensor) -> torch.Tensor:
    return _squared(difference).flatten(1).sum(1).mean()


def _squared(difference: torch.Tensor) -> torch.Tensor:
    """difference^2, zero for a sample that has a value which is not finite."""
    finite = torch.isfinite(difference).flatten(1).all(1)
    finite = finite.reshape(-1, *[1] * (difference.ndim - 1))
    return torch.where(finite, difference, 0).square()
