"""RMS norm and SiLU before a causal convolution: against torch's layers, and their gradients."""

import pytest
import torch
from devices import DEVICE, TRITON_DTYPES
from torch.nn import functional
from turbodiffusion_pack.kernels.norm_silu import norm_silu
from turbodiffusion_pack.kernels.norm_silu import triton as kernels

BACKENDS = ("reference", "triton")
SIZES = ((1, 1, 3, 5, 8), (2, 4, 5, 7, 24), (1, 2, 33, 40, 32))  # [B, T, H, W, C]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def outside_inference_mode():
    with torch.inference_mode(False):
        yield


def operands(size, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(size, generator=generator)
    gamma = 1 + 0.3 * torch.randn(size[-1], generator=generator)
    return tuple(t.to(DEVICE, dtype).requires_grad_() for t in (x, gamma))


def layers(x, gamma, before):
    """As ComfyUI's VAE has them, channels first, in fp32."""
    first = x.float().movedim(-1, 1)
    normed = functional.normalize(first, dim=1) * x.shape[-1] ** 0.5
    active = functional.silu(normed * gamma.float().view(-1, 1, 1, 1))
    return functional.pad(active, (0, 0, 0, 0, before, 0)).movedim(1, -1)


def learnt(compute, size, dtype, before) -> list[torch.Tensor]:
    """What `compute` gives of x and gamma, and both gradients."""
    x, gamma = operands(size, dtype)
    y = compute(x, gamma, before)
    weights = torch.linspace(-1, 2, y.numel(), device=DEVICE).view_as(y)
    (y.float() * weights).sum().backward()
    return [y.detach(), x.grad, gamma.grad]


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients_are_those_of_the_layers(backend, size, before, dtype):
    def ours(x, gamma, before):
        return norm_silu(x, gamma, before, backend)

    found, wanted = (learnt(f, size, dtype, before) for f in (ours, layers))
    for a, b in zip(found, wanted, strict=True):
        bound = TOLERANCE[dtype] * float(b.float().abs().max())
        torch.testing.assert_close(a.float(), b.float(), rtol=TOLERANCE[dtype], atol=bound)
    assert found[0].is_contiguous() and found[0].dtype == dtype


def test_a_program_sums_the_gradients_of_many_pixels(monkeypatch):
    """As on a GPU, where there are more pixels than programs have room for at once."""
    monkeypatch.setattr(kernels, "VALUES", 64)
    monkeypatch.setattr(kernels, "MOST_PROGRAMS", 3)
    found = learnt(lambda *given: norm_silu(*given, "triton"), SIZES[1], torch.float32, 2)
    wanted = learnt(layers, SIZES[1], torch.float32, 2)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_pixel_of_zeros_stays_zero():
    x, gamma = torch.zeros(1, 1, 1, 2, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    for backend in BACKENDS:
        y = norm_silu(x.requires_grad_(), gamma, 1, backend)
        y.sum().backward()
        assert not y.any() and x.grad.isfinite().all()


def test_channels_that_lie_apart_are_read_too():
    x, gamma = operands((1, 2, 4, 5, 8))
    apart = x.detach().movedim(-1, 1).contiguous().movedim(1, -1)
    for backend in BACKENDS:
        assert torch.equal(norm_silu(apart, gamma, 2, backend), norm_silu(x, gamma, 2, backend))


def test_what_does_not_fit_is_refused():
    x, gamma = operands((1, 2, 4, 5, 8))
    with pytest.raises(ValueError, match=r"gamma \[C\], got"):
        norm_silu(x, gamma[:4])
    with pytest.raises(TypeError):
        norm_silu(x.to(torch.int32), gamma)
