"""The losses against what is known of them without them: one Gaussian, whose flow has a formula."""

import math

import pytest
import torch
from turbodiffusion_pack.turbo_core.training import losses
from turbodiffusion_pack.turbo_core.training.trigflow import (
    LARGEST_ANGLE,
    denoise,
    noised,
    predict,
)

STD = 0.3  # of the data, whose mean is zero
ANGLES = torch.tensor([0.0, 0.01, 0.4, 0.8, 1.2, 1.5, LARGEST_ANGLE], dtype=torch.float64)
TANGENTS = {
    "jvp": (losses.consistency_tangent, 1e-12),
    "difference": (losses.consistency_difference, 1e-3),
}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def spread(t):
    """The standard deviation of cos t x0 + sin t noise."""
    return (t.cos() ** 2 * STD**2 + t.sin() ** 2).sqrt()


def slope(t):
    """F = slope(t) x is the answer that Gaussian data have: d ln spread / dt."""
    return t.cos() * t.sin() * (1 - STD**2) / spread(t) ** 2


def gaussian(x, level):
    """The rectified-flow velocity of Gaussian data."""
    s = level.reshape(-1, *[1] * (x.ndim - 1))
    variance = (1 - s) ** 2 * STD**2 + s**2
    return (s - (1 - s) * STD**2) / variance * x


def consistent(x, level):
    """The velocity of a perfect student of Gaussian data, which goes to x0 = STD x / spread."""
    t = torch.atan2(level, 1 - level).reshape(-1, *[1] * (x.ndim - 1))
    on_circle = x * (t.cos() + t.sin())
    prediction = (t.cos() - STD / spread(t)) / t.sin().clamp(min=1e-12) * on_circle
    return prediction * (t.cos() + t.sin()) - (t.cos() - t.sin()) * on_circle


def column(values):
    return values.reshape(-1, 1, 1)


def points() -> torch.Tensor:
    return normal(len(ANGLES), 3, 4)


def test_the_gaussian_answers_as_its_formula_says():
    x = points()
    torch.testing.assert_close(predict(gaussian, x, ANGLES), column(slope(ANGLES)) * x)


@pytest.mark.parametrize(("tangent", "bound"), TANGENTS.values(), ids=TANGENTS)
def test_the_tangent_of_a_gaussian(tangent, bound):
    """On the ODE dx/dt = a x of F = a x: dF/dt = (a' + a^2) x, and a'' is known to autograd."""
    x, t = points(), ANGLES.clone().requires_grad_()
    a = slope(t)
    (change,) = torch.autograd.grad(a.sum(), t)
    t, a = ANGLES, a.detach()
    known = column(t.cos() * t.sin() * (change + a**2)) * x
    found = tangent(gaussian, x, ANGLES, column(a) * x)
    assert found.dtype == torch.float64
    assert (found - known).norm() <= bound * known.norm()


@pytest.mark.parametrize(("tangent", "bound"), TANGENTS.values(), ids=TANGENTS)
def test_the_tangent_follows_the_teacher(tangent, bound):
    """Another teacher than the student, and one that answers each element differently."""
    x, teacher = points(), normal(len(ANGLES), 3, 4, seed=5)
    t = ANGLES.clone().requires_grad_()
    a = slope(t)
    (change,) = torch.autograd.grad(a.sum(), t)
    known = column(change) * x + column(a.detach()) * teacher
    known = column(ANGLES.cos() * ANGLES.sin()) * known
    found = tangent(gaussian, x, ANGLES, teacher)
    assert (found - known).norm() <= bound * known.norm()


def test_a_tenth_of_the_step_is_a_hundredth_of_the_error():
    x, t, teacher = points()[2:5], ANGLES[2:5], normal(3, 3, 4, seed=5)
    exact = losses.consistency_tangent(gaussian, x, t, teacher)
    large, small = (
        (losses.consistency_difference(gaussian, x, t, teacher, step) - exact).norm().item()
        for step in (1e-2, 1e-3)
    )
    assert large / small == pytest.approx(100, rel=0.05)


def test_the_tangents_are_none_of_the_gradients_business():
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    for tangent, _ in TANGENTS.values():
        x = points()
        assert not tangent(lambda x, s: weight * gaussian(x, s), x, ANGLES, x).requires_grad


def test_a_perfect_student_has_no_gradient_left():
    """df/dt = 0 along the teacher's ODE, which is what the loss asks for; at r = 1 alone."""
    inside = ANGLES[1:-1]
    x = points()[1:-1]
    teacher = predict(gaussian, x, inside)
    student = predict(consistent, x, inside)
    tangent = losses.consistency_tangent(consistent, x, inside, teacher)
    gradient = losses.consistency_gradient(student, teacher, x, tangent, inside, 1.0)
    assert gradient.abs().max() < 1e-9
    early = losses.consistency_gradient(student, teacher, x, tangent, inside, 0.5)
    assert early.abs().max() > 1e-2
    wrong = losses.consistency_gradient(student, teacher, x, -tangent, inside, 1.0)
    assert wrong.abs().max() > 1e-2


def test_the_gradient_is_the_change_of_the_denoised_sample():
    """g = cos t df/dt, f by the ODE's own small steps, for a student that is not the teacher."""
    inside = torch.tensor([0.4, 0.8, 1.2], dtype=torch.float64)
    x, h = points()[:3], 1e-5
    teacher = predict(gaussian, x, inside)

    def student(x, s):
        return 0.7 * gaussian(x, s) + x.sin() * s.reshape(-1, 1, 1)

    def f(shift):
        later = inside + shift
        moved = math.cos(shift) * x + math.sin(shift) * teacher
        return denoise(moved, predict(student, moved, later), later)

    tangent = losses.consistency_tangent(student, x, inside, teacher)
    answer = predict(student, x, inside)
    found = losses.consistency_gradient(answer, teacher, x, tangent, inside, 1.0)
    known = column(inside.cos()) * (f(h) - f(-h)) / (2 * h)
    torch.testing.assert_close(found, known, rtol=0, atol=1e-8)


@pytest.mark.parametrize("r", [0.0, 0.3, 1.0])
def test_the_warm_up_is_in_two_places(r):
    """In the weight of the teacher's pull and before x; the tangent is whole from the start."""
    x, teacher, student, tangent = (normal(1, 2, seed=seed) for seed in range(4))
    for angle in (0.3, 1.2):
        t = torch.tensor([angle])
        found = losses.consistency_gradient(student, teacher, x, tangent, t, r)
        c, s = math.cos(t.item()), math.sin(t.item())
        pull = c * math.sqrt(1 - (r * s) ** 2)
        known = -pull * (student - teacher) - r * c * s * x - tangent
        torch.testing.assert_close(found, known)


def test_the_warm_up_grows_from_nothing_to_all():
    assert [losses.warmup_share(i, 4) for i in (0, 1, 4, 9)] == [0, 0.25, 1, 1]
    assert losses.warmup_share(0, 0) == 1


def test_normalised_gradients_have_length_one_by_sample():
    gradient = normal(3, 5, 7) * torch.tensor([1e6, 1.0, 1e-3]).reshape(3, 1, 1)
    length = gradient.flatten(1).norm(dim=1)
    found = losses.normalised(gradient).flatten(1).norm(dim=1)
    torch.testing.assert_close(found, length / (length + 0.1))


def test_the_consistency_loss_pulls_along_the_gradient():
    answer = normal(4, 3, 2).requires_grad_()
    gradient = losses.normalised(normal(4, 3, 2, seed=1))
    loss = losses.consistency_loss(answer, gradient)
    loss.backward()
    assert loss.item() == pytest.approx(100 * gradient.square().flatten(1).sum(1).mean().item())
    torch.testing.assert_close(answer.grad, -2 * 100 * gradient / 4)


def test_the_dmd_loss_pulls_from_the_fake_score_to_the_teacher():
    x0 = normal(4, 3, 2).requires_grad_()
    fake, teacher = normal(4, 3, 2, seed=1), normal(4, 3, 2, seed=2)
    gradient = losses.dmd_gradient(x0, fake, teacher)
    distance = (x0.detach() - teacher).abs().mean((1, 2), keepdim=True)
    torch.testing.assert_close(gradient, (fake - teacher) / distance)
    loss = losses.dmd_loss(x0, gradient)
    loss.backward()
    assert loss.item() == pytest.approx(gradient.square().flatten(1).sum(1).mean().item())
    torch.testing.assert_close(x0.grad, 2 * gradient / 4)


def test_a_student_at_the_teachers_sample_is_no_division_by_zero():
    x0 = normal(2, 3)
    assert losses.dmd_gradient(x0, x0, x0).tolist() == torch.zeros(2, 3).tolist()
    assert losses.dmd_gradient(x0, x0 + 1e-9, x0).abs().max() < 1e-3


def test_the_fake_score_learns_the_students_samples():
    x0, noise = normal(7, 3, 4), normal(7, 3, 4, seed=1)
    x = noised(x0, noise, ANGLES)
    answer = predict(lambda point, s: noise - x0, x, ANGLES)
    assert losses.fake_score_loss(answer, x0, noise, ANGLES).item() < 1e-25
    loss = losses.fake_score_loss(answer + 0.5, x0, noise, ANGLES)
    assert loss.item() == pytest.approx(3 * 4 * 0.25)


def test_regression_and_flow_matching_are_means_in_float32():
    a, b = normal(2, 3).bfloat16(), normal(2, 3, seed=1).bfloat16()
    found = losses.sla_regression(a, b)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (a.float() - b.float()).square().mean())
    x0, noise = normal(2, 3).float(), normal(2, 3, seed=1).float()
    assert losses.flow_matching(noise - x0, x0, noise) == 0
    torch.testing.assert_close(losses.flow_matching(noise - x0 + 2, x0, noise), torch.tensor(4.0))


def loss_of(kind: str, answer: torch.Tensor) -> torch.Tensor:
    other = normal(4, 3, 2, seed=1)
    if kind == "consistency":
        return losses.consistency_loss(answer, other)
    if kind == "dmd":
        return losses.dmd_loss(answer, losses.dmd_gradient(answer, other, other + 1))
    if kind == "fake score":
        return losses.fake_score_loss(answer, other, other, torch.ones(4))
    if kind == "regression":
        return losses.sla_regression(answer, other)
    return losses.flow_matching(answer, other, -other)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "kind", ["consistency", "dmd", "fake score", "regression", "flow matching"]
)
def test_a_sample_that_is_not_finite_counts_as_nothing(kind, bad):
    good = normal(4, 3, 2).requires_grad_()
    spoilt = good.detach().clone()
    spoilt[1, 2, 0] = bad
    spoilt.requires_grad_()
    loss_of(kind, good).backward()
    loss_of(kind, spoilt).backward()
    assert spoilt.grad[1].tolist() == torch.zeros(3, 2).tolist()
    others = [0, 2, 3]
    assert torch.equal(spoilt.grad[others], good.grad[others])
    assert loss_of(kind, spoilt).isfinite()


def test_a_tangent_that_is_not_finite_spoils_its_own_sample_alone():
    gradient = normal(4, 3, 2)
    gradient[2, 0, 0] = math.nan
    answer = normal(4, 3, 2, seed=1).requires_grad_()
    losses.consistency_loss(answer, losses.normalised(gradient)).backward()
    assert answer.grad[2].tolist() == torch.zeros(3, 2).tolist()
    assert answer.grad[[0, 1, 3]].abs().min() > 0
