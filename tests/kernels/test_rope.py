"""RoPE: the complex product in float64, and Triton within the rounding of its output."""

import goldens
import pytest
import torch
from devices import BATCHES, DEVICE, LENGTHS, TRITON_DTYPES
from turbodiffusion_pack.kernels.rope import apply_rope


def random_angles(batch, length, head_dim):
    """cos and sin [batch, L, D/2]."""
    angles = torch.rand(batch, length, head_dim // 2, device=DEVICE) * 7
    return angles.cos(), angles.sin()


def exact_rope(x, cos, sin):
    """Pairs as complex numbers, turned by their angle."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    turn = torch.complex(cos.double(), sin.double())[:, :, None]
    return torch.view_as_real(pairs * turn).flatten(-2)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("length", LENGTHS)
def test_reference_follows_the_formula(length, batch):
    x = torch.randn(batch, length, 2, 64, device=DEVICE)
    cos, sin = random_angles(batch, length, 64)
    y = apply_rope(x, cos, sin, backend="reference")
    assert goldens.relative_error(y, exact_rope(x, cos, sin)) <= 1e-6


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("own_angles", (False, True))
@pytest.mark.parametrize(("length", "heads", "head_dim"), ((1, 1, 64), (65, 3, 128), (7, 12, 64)))
def test_triton_only_rounds_its_output(length, heads, head_dim, own_angles, batch, dtype):
    x = torch.randn(batch, length, heads, head_dim, device=DEVICE).to(dtype)
    cos, sin = random_angles(batch if own_angles else 1, length, head_dim)
    y = apply_rope(x, cos, sin, backend="triton")
    # Half a step for the output's rounding. In fp32 those of both products before it count too:
    # |x0 cos| + |x1 sin| <= |(x0, x1)|, for either element of a pair.
    half_steps = 1 + 2**0.5 if dtype == torch.float32 else 1.001
    error = goldens.relative_error(y, exact_rope(x, cos, sin))
    assert y.dtype == dtype
    assert error <= half_steps * torch.finfo(dtype).eps / 2


@pytest.mark.gpu
def test_triton_only_rounds_its_output_at_model_size():
    x = torch.randn(2, 3001, 40, 128, device=DEVICE, dtype=torch.bfloat16)
    cos, sin = random_angles(1, 3001, 128)
    exact = exact_rope(x, cos, sin)
    rounded = goldens.relative_error(exact.bfloat16(), exact)
    assert goldens.relative_error(apply_rope(x, cos, sin), exact) <= 2 * rounded


@pytest.mark.parametrize(
    "order", ((0, 2, 1, 3), (1, 0, 2, 3), (0, 1, 3, 2)), ids=("heads", "batch", "channels")
)
def test_triton_takes_any_strides(order):
    x = torch.randn(16, 16, 64, 64, device=DEVICE).permute(order)[:2, :9, :3]
    cos, sin = (angles[..., ::2] for angles in random_angles(2, 9, 128))
    y = apply_rope(x, cos, sin, backend="triton")
    assert goldens.relative_error(y, exact_rope(x, cos, sin)) <= 1e-6


@pytest.mark.parametrize("backend", ("reference", "triton"))
@pytest.mark.parametrize("value", (0.0, 3.0))
def test_equal_inputs(value, backend):
    x = torch.full((3, 5, 2, 64), value, device=DEVICE)
    cos, sin = random_angles(1, 5, 64)
    y = apply_rope(x, cos, sin, backend=backend)
    torch.testing.assert_close(y.double(), exact_rope(x, cos, sin), rtol=1e-6, atol=1e-6)


def test_head_dim_that_triton_cannot_take():
    x = torch.randn(1, 3, 2, 96, device=DEVICE)
    cos, sin = random_angles(1, 3, 96)
    y = apply_rope(x, cos, sin)
    assert goldens.relative_error(y, exact_rope(x, cos, sin)) <= 1e-6
    with pytest.raises(RuntimeError, match="the head dim 96 is not a power of two"):
        apply_rope(x, cos, sin, backend="triton")


def test_bad_input_is_refused():
    x = torch.zeros(2, 5, 2, 64)
    cos, sin = torch.ones(2, 1, 5, 32).unbind()
    with pytest.raises(TypeError, match=r"takes fp32, fp16 or bf16, got torch\.float64"):
        apply_rope(x.double(), cos, sin)
    with pytest.raises(ValueError, match=r"with an even D, got \[2, 5, 2, 63\]"):
        apply_rope(x[..., 1:], cos, sin)
    with pytest.raises(ValueError, match=r"needs x \[B, L, H, D\].*got \[5, 2, 64\]"):
        apply_rope(x[0], cos, sin)
    with pytest.raises(ValueError, match=r"needs cos \[1 or 2, 5, 32\], got \[1, 4, 32\]"):
        apply_rope(x, cos[:, 1:], sin)
    with pytest.raises(TypeError, match=r"takes sin in fp32, got torch\.float16"):
        apply_rope(x, cos, sin.half())
