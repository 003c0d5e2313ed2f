"""Convolutions of frames: against torch's own layers, and CUDA against torch."""

import pytest
import torch
from cuda_kernels import captured
from devices import CARD, DEVICE
from torch.nn import functional
from turbodiffusion_pack.kernels.dispatch import HOPPER
from turbodiffusion_pack.kernels.frames_conv import frames_conv, left_to_cudnn, packed, reference


def on_hopper(test):
    """A GPU test of an H100 or H200, and of no older card that it plays."""
    return pytest.mark.gpu(pytest.mark.skipif(CARD != HOPPER, reason="needs a Hopper GPU")(test))


TAPS = ((3, 3, 3), (1, 3, 3), (3, 1, 1))
CHANNELS = ((96, 96), (192, 96), (192, 192), (192, 384))
# [B, T, H, W]: a part of a patch, and more patches than multiprocessors.
SIZES = ((1, 1, 5, 9), (2, 3, 43, 53), (1, 4, 90, 160))


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device=DEVICE).to(dtype)


def operands(size, channels, out_channels, taps, dtype=torch.bfloat16):
    """x, weight, bias and a residual that is a part of wider frames."""
    batch, frames, height, width = size
    x = random(batch, frames + taps[0] - 1, height, width, channels, dtype=dtype)
    weight = random(out_channels, channels, *taps) / (channels * taps[0] * taps[1] * taps[2]) ** 0.5
    wider = random(batch, frames, height, width + 6, out_channels, dtype=dtype)
    return x, weight.to(dtype), random(out_channels, dtype=dtype), wider[:, :, :, 2:-4]


def in_parts(x):
    """As `frames_apart` gives them, of two frames before."""
    frames = x.shape[1] - 2
    first = min(2, frames)
    return tuple(part.clone() for part in x.split((first, frames - first, 2), dim=1))


@pytest.mark.parametrize("taps", TAPS)
def test_the_reference_is_torchs_convolution(taps):
    x, weight, bias, residual = operands((2, 2, 5, 7), 8, 12, taps, torch.float32)
    sides = 0, taps[1] // 2, taps[2] // 2
    y = functional.conv3d(x.movedim(-1, 1), weight, bias, padding=sides).movedim(1, -1) + residual
    given = (x,) if taps[0] == 1 else (x, in_parts(x))
    for frames in given:
        ours = frames_conv(frames, packed(weight), bias, residual, backend="reference")
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, y, rtol=1e-5, atol=1e-5)


def test_a_convolution_of_pictures():
    x, weight = random(1, 2, 5, 7, 8, dtype=torch.float32), random(12, 8, 3, 3, dtype=torch.float32)
    y = functional.conv2d(x[0].movedim(-1, 1), weight, padding=1).movedim(1, -1)
    ours = frames_conv(x, packed(weight), backend="reference")[0]
    torch.testing.assert_close(ours, y, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_together_is_refused():
    x, weight = random(1, 3, 4, 4, 8), packed(random(8, 16, 3, 3, 3))
    with pytest.raises(ValueError, match=r"got \[1, 3, 4, 4, 8\] and \[3, 3, 3, 8, 16\]"):
        frames_conv(x, weight)
    with pytest.raises(
        ValueError, match=r"needs residual \[1, 1, 4, 4, 8\], got \[1, 3, 4, 4, 8\]"
    ):
        frames_conv(x, weight[..., :8], residual=x)
    with pytest.raises(RuntimeError, match="cannot run in CUDA: channels are no multiples of 96"):
        frames_conv(x, weight[..., :8])


def test_what_the_kernel_cannot_convolve(monkeypatch):
    captured(monkeypatch, HOPPER)
    x, weight, y = random(1, 3, 4, 6, 96), packed(random(96, 96, 3, 3, 3)), random(1, 1, 4, 6, 97)
    assert left_to_cudnn(x, 96) is None
    assert "it multiplies 16 bits" in left_to_cudnn(x.float(), 96)
    assert "no multiples of 96" in left_to_cudnn(x, 3)
    with pytest.raises(ValueError, match="needs contiguous frames"):
        frames_conv(x[:, :, :, 1:], weight)
    with pytest.raises(ValueError, match="cannot read a residual of strides"):
        frames_conv(x, weight, residual=y[..., 1:])
    captured(monkeypatch, (8, 9))
    assert "they are for Hopper" in left_to_cudnn(x, 96)


def test_a_launch_says_what_was_given(monkeypatch):
    launches = captured(monkeypatch, HOPPER)
    x, weight, bias, residual = operands((1, 3, 20, 40), 96, 192, (3, 1, 1))
    parts = in_parts(x)
    y = frames_conv(parts, packed(weight), bias, residual)
    (launch,) = launches
    given = launch.operands
    maps = given.before_map, given.x_map, given.after_map
    assert [list(map[:5]) for map in maps] == [[x.data_ptr(), 1, 8, 16, 64] for x in parts]
    assert list(given.w_more_map[1:3]) == [192, 32]
    pointers = given.bias, given.residual, given.y
    assert pointers == (bias.data_ptr(), residual.data_ptr(), y.data_ptr())
    sizes = given.batch, given.frames, given.height, given.width, given.channels, given.columns
    assert sizes == (1, 3, 20, 40, 96, 192)
    assert (given.apart, given.taps_t, given.taps_h, given.taps_w) == (2, 3, 1, 1)
    steps = given.residual_b, given.residual_t, given.residual_h, given.residual_w
    assert steps == residual.stride()[:4]


@on_hopper
@pytest.mark.parametrize("taps", TAPS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_cuda_is_the_exact_sum_rounded(channels, size, taps):
    x, weight, *_ = operands(size, *channels, taps)
    exact = reference.frames_conv((x.double(),), packed(weight).double(), None, None)
    torch.testing.assert_close(
        frames_conv(x, packed(weight)).double(), exact, rtol=2**-8, atol=1e-4
    )


@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", CHANNELS)
def test_bias_and_residual_are_rounded_one_after_the_other(channels, dtype):
    x, weight, bias, residual = operands((2, 3, 43, 53), *channels, (3, 3, 3), dtype)
    y = frames_conv(x, packed(weight))
    assert torch.equal(frames_conv(x, packed(weight), bias), y + bias)
    assert torch.equal(frames_conv(x, packed(weight), None, residual), y + residual)
    assert torch.equal(frames_conv(x, packed(weight), bias, residual), y + bias + residual)


@on_hopper
def test_a_part_is_bit_for_bit_what_the_whole_is():
    x, weight, *_ = operands((1, 3, 50, 60), 96, 192, (3, 3, 3))
    whole = frames_conv(x, packed(weight))
    part = frames_conv(x[:, 1:, 7:, 3:].contiguous(), packed(weight))
    assert torch.equal(part[:, :, 1:, 1:], whole[:, 1:, 8:, 4:])


@on_hopper
@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_frames_in_parts_are_the_frames(frames):
    x, weight, bias, residual = operands((2, frames, 30, 40), 96, 192, (3, 3, 3))
    whole = frames_conv(x, packed(weight), bias, residual)
    assert torch.equal(frames_conv(in_parts(x), packed(weight), bias, residual), whole)
