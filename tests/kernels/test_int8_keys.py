"""Keys whose int8 is all that is left of them, and values that become low bits beside them."""

import weakref

import goldens
import older_cards
import pytest
import torch
from attention import random_map, random_proj, random_qkv
from devices import CARD, DEVICE, TRITON_DTYPES
from turbodiffusion_pack.kernels import dispatch, nvrtc
from turbodiffusion_pack.kernels.linear_attention import reference as sums
from turbodiffusion_pack.kernels.linear_attention import state_of_int8_keys
from turbodiffusion_pack.kernels.qk_prepare import prepare, prepare_keys
from turbodiffusion_pack.kernels.qk_prepare import triton as prepare_triton
from turbodiffusion_pack.kernels.sla import sla, sla_from_projections
from turbodiffusion_pack.kernels.sparse_attention import (
    PV_DTYPES,
    hopper,
    mma,
    reads_int8_keys,
    room_for_values,
)
from turbodiffusion_pack.kernels.sparse_attention import triton as sparse_triton

SHAPES = [(1, 1, 1), (2, 300, 3), (1, 5000, 9)]
# Of what reads the values: on Hopper its channels stand in another order.
KERNELS = hopper if CARD == dispatch.HOPPER else mma


@pytest.fixture(params=PV_DTYPES)
def pv(request):
    if not reads_int8_keys(torch.device(DEVICE), torch.bfloat16, 128, request.param):
        pytest.skip(f"attention in CUDA C++ with {request.param} values does not run here")
    return request.param


@pytest.fixture
def in_cuda():
    if not reads_int8_keys(torch.device(DEVICE), torch.bfloat16, 128):
        pytest.skip("attention in CUDA C++ does not run here")


def projection(batch, length, heads, dtype, dim=128):
    """k [B, L, H, D] whose channels lie apart, weight [H D], cos and sin [1, L, D / 2]."""
    x = torch.randn(batch, length, heads, dim, device=DEVICE)
    x = (x + 2 * torch.randn(heads, dim, device=DEVICE)).to(dtype)
    angles = torch.rand(1, length, dim // 2, device=DEVICE)
    weight = 1 + 0.2 * torch.randn(heads * dim, device=DEVICE)
    return x, weight, angles.cos(), angles.sin()


def as_rows(keys, length):
    """What the int8 of `keys` stands for, float64 [B, L, H, D], without its center."""
    x = keys.blocks.integers.unflatten(2, (-1, 64)).unflatten(-1, (8, 16))
    row = torch.arange(64, device=DEVICE)[:, None]
    chunk = torch.arange(8, device=DEVICE) ^ row % 8  # where it lies
    x = x.gather(4, chunk[..., None].expand(x.shape)).flatten(-2)
    rows = (x * keys.blocks.scale[..., None, None].double()).flatten(2, 3)
    return rows[:, :, :length].transpose(1, 2)


def some_rows(length, count):
    """Which of `length` rows stand for all."""
    place = torch.arange(min(length, count), dtype=torch.int64)
    return place if length <= count else (place * 2654435769 & 0xFFFFFFFF) * length >> 32


def unseen_row(length):
    """One that does not stand for others, of more than 512."""
    return min(set(range(length)) - set(some_rows(length, 512).tolist()))


@pytest.mark.parametrize(("frames", "height", "width"), [(16, 32, 32), (21, 30, 52), (11, 24, 40)])
def test_some_rows_are_of_all_columns_and_frames(frames, height, width):
    """512 at even steps may be of one column, whose channels RoPE has not turned."""
    rows = some_rows(frames * height * width, 512)
    assert rows.unique().numel() >= 500
    for period, size in ((width, 1), (height, width), (frames, height * width)):
        seen = (rows // size % period).bincount(minlength=period)
        assert seen.min() > 0 and seen.max() <= 3 * 512 / period + 2


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("length", [1, 70, 300, 16384])
def test_the_mean_of_some_rows(length, dtype, monkeypatch):
    monkeypatch.setattr(prepare_triton, "SOME_ROWS", 100)
    x, weight, *rotation = projection(2, length, 3, dtype, 64)
    rows = prepare(x.double().float(), weight, *rotation, backend="reference").rows
    norms = torch.rsqrt(x.float().flatten(2).square().mean(-1) + 1e-6)
    found = prepare_triton.mean_of_some(x, norms, weight, *rotation)
    expected = rows[:, some_rows(length, 100)].mean(1)
    assert found.dtype == dtype
    assert goldens.relative_error(found, expected) <= max(torch.finfo(dtype).eps, 1e-5)


@pytest.mark.parametrize("length", [1, 70, 300, 16384])
def test_what_no_value_is_likely_to_exceed(length, monkeypatch):
    monkeypatch.setattr(sparse_triton, "SOME_ROWS", 100)
    _, _, v = random_qkv(2, length, 3, 64, torch.float16)
    v[:, :, 1, 5] = 0
    found = sparse_triton.sampled_bound(v)
    some = v[:, some_rows(length, 100)].float().abs().amax(1)
    assert torch.equal(found, (sparse_triton.HEADROOM * some).clamp_min(1e-8))


def test_keys_keep_their_rows_where_nothing_runs_in_cuda():
    if CARD == dispatch.HOPPER or CARD[0] in dispatch.BY_MMA_SYNC:
        pytest.skip("this card has kernels in CUDA C++")
    assert not reads_int8_keys(torch.device(DEVICE), torch.bfloat16, 128)
    assert prepare_keys(*projection(1, 70, 2, torch.bfloat16)) is None


def test_nothing_else_sums_up_keys_in_int8():
    v = torch.zeros(1, 70, 2, 128, dtype=torch.bfloat16)
    integers, values = (torch.zeros(1, 2, 128, 128, dtype=torch.int8) for _ in range(2))
    scale, of_channels = torch.ones(1, 2, 2), torch.ones(1, 2, 128)
    given = integers, scale, of_channels.to(v.dtype), v, values.view(1, 2, 2, 128, 64)
    with pytest.raises(ValueError, match="summed up in CUDA"):
        state_of_int8_keys(*given, of_channels)


@pytest.mark.parametrize("card", [(8, 9), (9, 0)], ids=str)
def test_sums_refuse_other_dtypes(card, monkeypatch):
    """What a kernel would read as something else."""
    older_cards.pretend(monkeypatch, card)
    monkeypatch.setattr(nvrtc, "unavailable", lambda: None)
    v = torch.zeros(1, 70, 2, 128, dtype=torch.bfloat16, device=DEVICE)
    given = {
        "integers": v.new_zeros(1, 2, 128, 128, dtype=torch.int8),
        "scale": v.new_ones(1, 2, 2, dtype=torch.float32),
        "center": v.new_zeros(1, 2, 128),
        "values": room_for_values(v.shape, "fp8", v.device),
        "bound": v.new_ones(1, 2, 128, dtype=torch.float32),
    }
    wrong = dict.fromkeys(given, torch.float64)
    if card == dispatch.HOPPER:
        wrong["values"] = torch.float16
    for name, dtype in wrong.items():
        with pytest.raises(TypeError, match=f"{name} must be .*, got {dtype}"):
            state_of_int8_keys(**given | {name: given[name].to(dtype)}, v=v, backend="triton")


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ((0, 0), []),
        ((8, 0), ["fp16"]),
        ((8, 6), ["fp16"]),
        ((8, 9), ["fp8", "fp16"]),
        ((9, 0), ["fp8"]),
        ((10, 0), []),
        ((12, 0), ["fp8", "fp16"]),
    ],
)
def test_who_takes_keys_in_int8(card, expected, monkeypatch):
    older_cards.pretend(monkeypatch, card)
    bf16, device = torch.bfloat16, torch.device(DEVICE)
    assert not any(reads_int8_keys(device, bf16, 128, pv) for pv in PV_DTYPES)
    monkeypatch.setattr(nvrtc, "unavailable", lambda: None)
    monkeypatch.setattr(nvrtc, "version", lambda: (12, 8))
    assert [pv for pv in PV_DTYPES if reads_int8_keys(device, bf16, 128, pv)] == expected
    assert not any(reads_int8_keys(device, bf16, 64, pv) for pv in PV_DTYPES)
    assert not any(reads_int8_keys(device, torch.float32, 128, pv) for pv in PV_DTYPES)
    assert not any(reads_int8_keys(device, bf16, 128, pv, "reference") for pv in PV_DTYPES)
    monkeypatch.setattr(nvrtc, "version", lambda: (12, 6))
    of_hopper = expected if card == dispatch.HOPPER else [pv for pv in expected if pv == "fp16"]
    assert [pv for pv in PV_DTYPES if reads_int8_keys(device, bf16, 128, pv)] == of_hopper


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "length", "heads"), SHAPES)
def test_int8_of_rows_around_a_center(batch, length, heads, dtype, in_cuda):
    arguments = projection(batch, length, heads, dtype)
    before = arguments[0].clone()
    keys = prepare_keys(*arguments)
    assert torch.equal(arguments[0], before)
    rows = prepare(*arguments, block=64)
    assert goldens.relative_error(keys.means + keys.center[:, :, None], rows.means) <= 1e-4
    centered = (rows.rows.double() - keys.center[:, None]).to(dtype).double()
    steps = keys.blocks.scale.double().repeat_interleave(64, 2)[..., :length].mT[..., None]
    off = (as_rows(keys, length) - centered).abs() / steps
    # A rotated number may round the other way, by as much as some steps.
    assert (off > 0.5 + 1e-3).double().mean() <= 2e-3 and off.max() <= 5
    assert off.square().mean().sqrt() <= 0.3
    highest = centered.abs().amax((1, 3))
    assert goldens.relative_error(127 * keys.blocks.scale.amax(2), highest) <= 8e-3
    assert not keys.blocks.integers.unflatten(2, (-1, 64))[:, :, -1, length % 64 or 64 :].any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "length", "heads"), SHAPES)
@pytest.mark.parametrize("times", [1, 30])
def test_sums_over_keys_in_int8(batch, length, heads, dtype, times, pv):
    """Exponents far from one another, too."""
    x, weight, *rotation = projection(batch, length, heads, dtype)
    keys = prepare_keys(x, times * weight, *rotation)
    v = torch.randn_like(x)
    values = room_for_values(v.shape, pv, v.device)
    highest = torch.full((batch, heads, 128), 9.0, device=DEVICE)
    *found, maximum = state_of_int8_keys(*keys.blocks, keys.center, v, values, highest)
    k = as_rows(keys, length) + keys.center[:, None].double()
    exact = sums.key_value_state(k, v.double(), "softmax")
    for x, y in zip(found, exact, strict=True):
        assert goldens.relative_error(x, y) <= 2 * torch.finfo(dtype).eps
    assert torch.equal(maximum, v.float().abs().amax(1))
    expected, _ = KERNELS.quantize_values(v, values.dtype, 64, highest)
    assert torch.equal(values.view(torch.int8), expected.view(torch.int8))


def as_channels(values, kernels=KERNELS):
    """Bytes of values [B, H, N, D, 64] by channel, [B, H, D, N * 64 bytes], on the CPU."""
    column = channel = torch.arange(128)
    if kernels is hopper:
        column = channel // 32 * 32 + channel % 8 // 2 * 8 + channel // 8 % 4 * 2 + channel % 2
    return values.cpu().view(torch.int8)[:, :, :, column].transpose(2, 3).flatten(3)


@pytest.mark.gpu
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["k", "v"])
def test_what_is_not_finite_spoils_what_it_reaches(where, value, pv):
    """And nothing else; in a row that does not stand for others."""
    k, *others = projection(1, 700, 3, torch.bfloat16)
    v, norms = torch.randn_like(k), torch.ones(1, 700, device=DEVICE)
    row = unseen_row(700)

    def summed(k, v):
        keys = prepare_keys(k, *others, row_norms=norms)
        values = room_for_values(v.shape, pv, v.device)
        highest = sparse_triton.sampled_bound(v)
        *sums, maximum = state_of_int8_keys(*keys.blocks, keys.center, v, values, highest)
        scales = KERNELS.mend_values(v, maximum, highest, values)
        return *sums, scales, as_channels(values)

    clean = summed(k, v)
    spoiled = {"k": k.clone(), "v": v.clone()}
    spoiled[where][0, row, 1, 5] = value
    state, normalizer, scales, values = summed(**spoiled)
    bad = torch.zeros(1, 3, 128, 128, dtype=torch.bool, device=DEVICE)
    bad[0, 1, :, slice(None) if where == "k" else 5] = True
    assert not state[bad].isfinite().any() and torch.equal(state[~bad], clean[0][~bad])
    if where == "k":
        assert not normalizer[0, 1].isfinite().any()
        assert torch.equal(normalizer[:, ::2], clean[1][:, ::2])
        assert torch.equal(scales, clean[2]) and torch.equal(values, clean[3])
    else:
        assert torch.equal(normalizer, clean[1]) and not scales[0, 1, 5].isfinite()
        same = torch.ones(1, 3, 128, dtype=torch.bool)
        same[0, 1, 5] = False
        assert torch.equal(values[same], clean[3][same])
        assert torch.equal(scales.cpu()[same], clean[2].cpu()[same])


@pytest.mark.parametrize(
    ("kernels", "pv"),
    [(hopper, "fp8"), (mma, "fp8"), (mma, "fp16")],
    ids=["hopper-fp8", "mma-fp8", "mma-fp16"],
)
def test_values_beyond_what_some_tell_are_made_again(kernels, pv):
    device = torch.device(DEVICE)
    if device.type == "cuda" and pv == "fp8" and not dispatch.has_fp8(device):
        pytest.skip("needs an NVIDIA GPU of sm_89 or newer")
    _, _, v = random_qkv(1, 3000, 3, 128, torch.float16)
    v[0, unseen_row(3000), 1, 9] = 500
    highest, amax = sparse_triton.sampled_bound(v), v.float().abs().amax(1)
    dtype = PV_DTYPES[pv]
    limit = sparse_triton.VALUE_LIMIT if kernels is hopper else mma.VALUE_LIMIT
    values, _ = kernels.quantize_values(v, dtype, 64, highest)
    before = values.clone()
    scales = kernels.mend_values(v, amax, highest, values)
    expected, of_all = kernels.quantize_values(v, dtype, 64, amax)
    mended = torch.zeros(3, 128, dtype=torch.bool)
    mended[1, 9] = True
    rows = [as_channels(x, kernels)[0] for x in (values, before, expected)]
    assert torch.equal(rows[0][mended], rows[2][mended])
    assert torch.equal(rows[0][~mended], rows[1][~mended])
    assert torch.equal(scales[0, 1, 9], of_all[0, 1, 9])
    others = ~mended.to(DEVICE)
    torch.testing.assert_close(scales[0][others], highest[0][others] / limit, atol=0, rtol=1e-6)


def low_bit_inputs(batch, length, heads):
    x, weight, *rotation = projection(batch, length, heads, torch.bfloat16)
    q, k, v = (torch.randn_like(x) for _ in "qkv")
    return q, k, v, (weight, weight.flip(0)), rotation, random_proj(128)


@pytest.mark.gpu
@pytest.mark.parametrize("branch", [True, False], ids=["branch", "softmax"])
@pytest.mark.parametrize(("batch", "length", "heads"), [(1, 300, 3), (2, 2000, 2)])
def test_attention_to_such_keys(batch, length, heads, branch, pv):
    q, k, v, *weights, proj = low_bit_inputs(batch, length, heads)
    chosen = random_map(batch, length, heads, 128, 64, share=0.5)
    options = {"low_bit": True, "pv": pv, "block_map": chosen}
    proj = proj if branch else None
    before = k.clone()
    found = sla_from_projections(q.clone(), k, v, *weights, proj, **options)
    assert torch.equal(k, before)
    exact = sla_from_projections(
        *(x.float() for x in (q, k, v)), *weights, proj, block_map=chosen, backend="reference"
    )
    assert goldens.relative_error(found, exact) <= 4.8e-2
    if batch == 1:
        some_heads = iter(v.split([1, heads - 1], 2))
        parts = sla_from_projections(q.clone(), k, lambda: some_heads, *weights, proj, **options)
        assert torch.equal(parts, found)
    strided = torch.stack((v, v), -1)[..., 0]
    again = sla_from_projections(q.clone(), k, strided, *weights, proj, **options)
    assert torch.equal(again, found)


@pytest.mark.gpu
def test_attention_to_values_beyond_what_some_tell(pv):
    q, k, v, *weights, proj = low_bit_inputs(1, 2000, 3)
    v[0, unseen_row(2000), 1, 9] = 500
    chosen = random_map(1, 2000, 3, 128, 64, share=1.0)
    options = {"low_bit": True, "pv": pv, "block_map": chosen}
    found = sla_from_projections(q.clone(), k, v, *weights, proj, **options)
    rows = (x.float() for x in (q, k, v))
    exact = sla_from_projections(*rows, *weights, proj, block_map=chosen, backend="reference")
    assert goldens.relative_error(found, exact) <= 4.8e-2
    some_heads = iter(v.split([1, 2], 2))
    parts = sla_from_projections(q.clone(), k, lambda: some_heads, *weights, proj, **options)
    assert torch.equal(parts, found)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [300, 5000])
def test_the_linear_branch_hardly_sees_the_int8_of_keys(length, pv):
    x, weight, *rotation = projection(1, length, 3, torch.bfloat16)
    keys, v = prepare_keys(x, weight, *rotation), torch.randn_like(x) + 1
    rows = prepare(x, weight, *rotation, block=64).rows
    values, bound = room_for_values(v.shape, pv, v.device), sparse_triton.sampled_bound(v)
    found = state_of_int8_keys(*keys.blocks, keys.center, v, values, bound)[:2]
    exact = sums.key_value_state(rows.double(), v.double(), "softmax")
    means = [state / normalizer[..., None] for state, normalizer in (found, exact)]
    assert goldens.relative_error(*means) <= 1e-3


@pytest.mark.gpu
def test_values_must_be_where_the_keys_are(pv):
    q, k, v, *rest = low_bit_inputs(1, 300, 2)
    for wrong, kind, told in (
        (v.cpu(), ValueError, "must be on"),
        (v.half(), TypeError, "must be"),
    ):
        with pytest.raises(kind, match=told):
            sla_from_projections(q, k, wrong, *rest, low_bit=True, pv=pv)


@pytest.mark.gpu
def test_keys_are_freed_before_there_are_values(pv):
    q, k, v, *rest = low_bit_inputs(1, 300, 2)
    expected = sla_from_projections(q.clone(), k, v, *rest, low_bit=True, pv=pv)
    given = weakref.ref(own := k.clone())
    held = [own]
    del own

    def values():
        assert given() is None
        return v

    out = sla_from_projections(q, lambda: (held.pop(), None), values, *rest, low_bit=True, pv=pv)
    assert torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("branch", [True, False], ids=["branch", "softmax"])
def test_rotated_rows_take_the_same_passes(branch, pv):
    """And stay as they are."""
    q, k, v = random_qkv(2, 2000, 2, 128, torch.bfloat16)
    proj = random_proj(128) if branch else None
    chosen = random_map(2, 2000, 2, 128, 64, share=0.5)
    before = q.clone(), k.clone()
    found = sla(q, k, v, proj, low_bit=True, pv=pv, block_map=chosen)
    assert torch.equal(q, before[0]) and torch.equal(k, before[1])
    exact = sla(*(x.float() for x in (q, k, v)), proj, block_map=chosen, backend="reference")
    assert goldens.relative_error(found, exact) <= 4.8e-2
