"""Frames between causal convolutions: against torch's own layers, and Triton against torch."""

import pytest
import torch
from devices import DEVICE, TRITON_DTYPES
from torch.nn import functional
from turbodiffusion_pack.kernels.causal_frames import (
    causal_frames,
    frames_apart,
    resample_frames,
)

BACKENDS = ("reference", "triton")
SIZES = ((1, 1, 3, 5, 8), (2, 4, 5, 7, 24), (1, 2, 33, 40, 96))  # [B, T, H, W, C]
# After each step in a dtype a value may round the other way once.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def random(*shape, dtype=torch.float32, mean=0.0):
    return (torch.randn(shape) + mean).to(DEVICE, dtype)


def operands(size, before=2, dtype=torch.float32):
    """y, cache, gamma, bias, residual."""
    batch, _, height, width, channels = size
    cache = random(batch, before, height, width, channels, dtype=dtype)
    vectors = random(channels, dtype=dtype, mean=1), random(channels, dtype=dtype)
    return random(*size, dtype=dtype), cache, *vectors, random(*size, dtype=dtype)


def layer_by_layer(y, cache, gamma, bias, residual):
    """The frames, and x, as a VAE of channels-first layers computes them."""
    x = y + bias + residual
    channels_first = x.movedim(-1, 1)
    normed = functional.normalize(channels_first, dim=1) * y.shape[-1] ** 0.5
    active = functional.silu(normed * gamma.view(-1, 1, 1, 1)).movedim(1, -1)
    return torch.cat([cache, active], dim=1), x


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_frames_are_those_of_the_layers(backend, size, dtype):
    y, cache, gamma, bias, residual = operands(size, dtype=dtype)
    expected, x = layer_by_layer(y, cache, gamma, bias, residual)
    out = causal_frames(y, cache, gamma, bias, residual, keep=True, backend=backend)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(out[:, :2], expected[:, :2])
    assert torch.equal(cache, out[:, -2:])
    assert torch.equal(y, x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frames", [1, 2, 4])
def test_frames_apart_are_the_same_frames(backend, frames):
    y, cache, *rest = operands((2, frames, 5, 7, 24))
    kept, given = y.clone(), cache.clone()
    parts = frames_apart(kept, given, *rest, keep=True, backend=backend)
    assert torch.equal(given, cache)
    assert torch.equal(
        torch.cat(parts, dim=1), causal_frames(y, cache, *rest, keep=True, backend=backend)
    )
    assert torch.equal(parts[2], cache)
    assert torch.equal(kept, y)
    assert all(part.is_contiguous() for part in parts)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("before", [1, 2])
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_pieces_are_the_whole(frames, before, backend):
    """The cache carries over: a video in pieces of any length is the video at once."""
    y = random(1, 6, 3, 4, 8)
    none = torch.zeros(1, before, 3, 4, 8, device=DEVICE)
    whole = causal_frames(y, none.clone(), backend=backend)
    assert torch.equal(whole, torch.cat([none, y], dim=1))
    cache = none.clone()
    for t in range(0, 6, frames):
        piece = causal_frames(y[:, t : t + frames], cache, backend=backend)
        assert torch.equal(piece, whole[:, t : t + before + frames])


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_keep_y_stays(backend):
    y, cache, gamma, bias, residual = operands(SIZES[1])
    before = y.clone()
    causal_frames(y, cache, gamma, bias, residual, backend=backend)
    assert torch.equal(y, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_part_of_the_columns_is_read(backend):
    y, cache, gamma, bias, residual = operands((2, 2, 4, 9, 8))
    y, residual = y[:, :, 1:, 2:7], residual[:, :, 1:, 2:7]
    cache = cache[:, :, 1:, 2:7].contiguous()
    expected, _ = layer_by_layer(y, cache, gamma, bias, residual)
    out = causal_frames(y, cache, gamma, bias, residual, backend=backend)
    torch.testing.assert_close(out, expected, rtol=2e-6, atol=2e-6)
    expected = resample_frames(y.clone(), bias, residual.clone(), scale=2, backend="reference")
    assert torch.equal(resample_frames(y, bias, residual, scale=2, backend=backend), expected)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_pixels_of_zeros_stay_zeros(backend, dtype):
    y = torch.zeros(1, 2, 3, 3, 16, device=DEVICE, dtype=dtype)
    gamma = torch.ones(16, device=DEVICE, dtype=dtype)
    assert not causal_frames(y, y.clone(), gamma, backend=backend).any()


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_frames_grow_as_torch_upsamples(backend, dtype):
    shape = 2, 3, 5, 7, 16
    y, bias, residual = (random(*s, dtype=dtype) for s in (shape, shape[-1:], shape))
    out = resample_frames(y, bias, residual, split=2, scale=2, backend=backend)
    x = (y + bias + residual).permute(0, 4, 1, 2, 3)  # [B, C, T, H, W]
    doubled = x.reshape(2, 2, 8, 3, 5, 7)
    frames = torch.stack((doubled[:, 0], doubled[:, 1]), 3).reshape(2, 8, 6, 5, 7)
    pictures = frames.movedim(2, 1).flatten(0, 1)
    larger = functional.interpolate(pictures.float(), scale_factor=2, mode="nearest-exact")
    expected = larger.unflatten(0, (2, 6)).movedim(2, -1).to(dtype)
    assert out.is_contiguous()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_corner_of_zeros(backend):
    y, bias, residual = random(1, 2, 4, 6, 8), random(8), random(1, 2, 4, 6, 8)
    out = resample_frames(y, bias, residual, corner=1, backend=backend)
    assert torch.equal(out[:, :, :4, :6], y + bias + residual)
    assert out.shape == (1, 2, 5, 7, 8)
    assert not out[:, :, 4].any()
    assert not out[:, :, :, 6].any()


def test_bad_input_is_refused():
    y, cache = torch.zeros(1, 2, 3, 4, 8), torch.zeros(1, 2, 3, 4, 8)
    with pytest.raises(TypeError, match=r"causal_frames takes fp32.*got torch\.float64"):
        causal_frames(y.double(), cache.double())
    with pytest.raises(ValueError, match=r"needs y \[B, T, H, W, C\], got \[2, 3, 4, 8\]"):
        causal_frames(y[0], cache)
    with pytest.raises(ValueError, match=r"cache \[1, 2, 3, 5, 8\] is not of the frames y"):
        causal_frames(y, torch.zeros(1, 2, 3, 5, 8))
    with pytest.raises(ValueError, match=r"cache must be contiguous"):
        causal_frames(y, torch.zeros(1, 2, 3, 8, 4).transpose(3, 4))
    with pytest.raises(ValueError, match=r"needs gamma \[8\], got \[9\]"):
        causal_frames(y, cache, torch.ones(9))
    with pytest.raises(ValueError, match=r"needs residual \[1, 2, 3, 4, 8\], got \[2, 3, 4, 8\]"):
        resample_frames(y, residual=y[0])
    with pytest.raises(ValueError, match=r"8 channels are not those of 3 frames"):
        resample_frames(y, split=3)
