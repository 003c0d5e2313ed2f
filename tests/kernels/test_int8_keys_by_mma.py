"""Sums over keys in int8 by mma.sync: what test_int8_keys.py does not ask of all cards."""

import goldens
import pytest
import torch
from devices import CARD, DEVICE
from turbodiffusion_pack.kernels import dispatch, nvrtc
from turbodiffusion_pack.kernels.linear_attention import mma as linear_mma
from turbodiffusion_pack.kernels.linear_attention import reference as sums
from turbodiffusion_pack.kernels.linear_attention import state_of_int8_keys
from turbodiffusion_pack.kernels.sparse_attention import PV_DTYPES, mma, room_for_values
from turbodiffusion_pack.kernels.sparse_attention import triton as sparse_triton

pytestmark = pytest.mark.gpu
SHAPES = [(1, 1, 1), (1, 33, 2), (2, 300, 3), (1, 5000, 9)]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@pytest.fixture(params=["fp16", "fp8"])
def pv(request):
    if CARD[0] not in dispatch.BY_MMA_SYNC or nvrtc.unavailable():
        pytest.skip("needs a card of mma.sync, and NVRTC")
    if request.param == "fp8" and CARD < (8, 9):
        pytest.skip("this card has no fp8")
    return request.param


def keys_and_values(batch, length, heads, dtype):
    """Integers, scales and center of some keys, and v [B, L, H, D]."""
    shape = batch, length, heads, 128
    k = torch.randn(shape, device=DEVICE) + 2 * torch.randn(heads, 128, device=DEVICE)
    center = k.mean(1).to(dtype)
    keys = *sparse_triton.quantize_keys(k, 64, center, swizzled=True), center
    return keys, torch.randn(shape, dtype=dtype, device=DEVICE)


def as_rows(integers, scale, center, length):
    """What the keys stand for, float64 [B, L, H, D]."""
    x = integers.unflatten(2, (-1, 64)).unflatten(-1, (8, 16))
    row = torch.arange(64, device=DEVICE)[:, None]
    chunk = torch.arange(8, device=DEVICE) ^ row % 8  # where it lies
    x = x.gather(4, chunk[..., None].expand(x.shape)).flatten(-2)
    rows = (x * scale[..., None, None].double()).flatten(2, 3)[:, :, :length].transpose(1, 2)
    return rows + center[:, None].double()


def summed(keys, v, pv, bound=None, **options):
    """The sums and the largest |v|, and the values that are left."""
    values = room_for_values(v.shape, pv, v.device)
    values.view(torch.int8).fill_(3)
    bound = sparse_triton.sampled_bound(v) if bound is None else bound
    return *state_of_int8_keys(*keys, v, values, bound, **options), values


def quantized(v, pv, bound):
    return mma.quantize_values(v, PV_DTYPES[pv], 64, bound)[0]


def same_bits(x, y):
    return torch.equal(x.view(torch.int8), y.view(torch.int8))


@DTYPES
@pytest.mark.parametrize(("batch", "length", "heads"), SHAPES)
def test_values_beyond_the_bound_become_the_largest(batch, length, heads, dtype, pv):
    """float16 sums of attention would overflow beyond it."""
    keys, v = keys_and_values(batch, length, heads, dtype)
    bound = torch.full((batch, heads, 128), 9.0, device=DEVICE)
    bound[..., ::7] = 0.7
    *found, maximum, values = summed(keys, v, pv, bound)
    exact = sums.key_value_state(as_rows(*keys, length), v.double(), "softmax")
    for x, y in zip(found, exact, strict=True):
        assert goldens.relative_error(x, y) <= 2 * torch.finfo(dtype).eps
    assert torch.equal(maximum, v.float().abs().amax(1))
    assert same_bits(values, quantized(v, pv, bound))


@DTYPES
def test_some_heads_are_what_they_are_among_all(dtype, pv):
    keys, v = keys_and_values(1, 3000, 6, dtype)
    *found, maximum, values = summed(keys, v, pv)
    some, bound = slice(2, 5), sparse_triton.sampled_bound(v)
    room = torch.zeros_like(values)
    given = *(x[:, some] for x in keys), v[:, :, some], room[:, some], bound[:, some].contiguous()
    *parts, highest = state_of_int8_keys(*given, of_heads=6)
    for x, y in zip((*parts, highest), (*found, maximum), strict=True):
        assert torch.equal(x, y[:, some])
    assert same_bits(room[:, some], values[:, some])
    assert not room[:, :2].view(torch.int8).any() and not room[:, 5:].view(torch.int8).any()


def test_values_whose_heads_lie_apart(pv):
    keys, v = keys_and_values(2, 700, 3, torch.bfloat16)
    apart = v.transpose(1, 2).contiguous().transpose(1, 2)
    for x, y in zip(summed(keys, apart, pv), summed(keys, v, pv), strict=True):
        assert same_bits(x, y)


@pytest.mark.parametrize(("parts", "batch", "heads"), [(1, 1, 1), (13, 1, 40), (3, 2, 7)])
def test_parts_are_joined_in_order(parts, batch, heads):
    if CARD[0] not in dispatch.BY_MMA_SYNC or nvrtc.unavailable():
        pytest.skip("needs a card of mma.sync, and NVRTC")
    state = torch.randn(parts, batch, heads, 128, 128, device=DEVICE)
    normalizer, maxima = torch.randn(2, parts, batch, heads, 128, device=DEVICE)
    maxima[parts // 2, 0, 0, 5] = torch.nan
    *found, maximum = linear_mma._joined(state, normalizer, maxima)
    for x, given in zip(found, (state, normalizer), strict=True):
        in_order = given[0].clone()
        for part in given[1:]:
            in_order += part
        assert torch.equal(x, in_order)
    assert maximum[0, 0, 5].isnan()
    torch.testing.assert_close(maximum, maxima.amax(0), rtol=0, atol=0, equal_nan=True)
