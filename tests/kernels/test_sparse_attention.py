"""Block-sparse attention in float and in low bits: float64, and Triton against the reference."""

import sys

import goldens
import pytest
import torch
from attention import (
    BLOCK_SHAPES,
    exact_sparse,
    random_map,
    random_qkv,
    selected_keys,
)
from devices import BATCHES, CARD, DEVICE, LENGTHS, TRITON_DTYPES
from turbodiffusion_pack.kernels.checks import in_steps_of_16_bytes
from turbodiffusion_pack.kernels.dispatch import has_fp8
from turbodiffusion_pack.kernels.sparse_attention import (
    PV_DTYPES,
    default_pv,
    hopper,
    reference,
    sage_attention,
    sparse_attention,
)
from turbodiffusion_pack.kernels.sparse_attention import triton as triton_kernels

# On a GPU float32 is the reference's: its tiles do not fit.
DTYPES = TRITON_DTYPES if DEVICE == "cpu" else TRITON_DTYPES[1:]
PV = ("fp16", pytest.param("fp8", marks=pytest.mark.gpu))
LOW_BIT_ERROR = {"fp16": 3e-2, "fp8": 5.8e-2}  # of random attention, measured 1.9e-2 and 4.4e-2


def need_fp8(pv):
    if pv == "fp8" and not has_fp8(torch.device(DEVICE)):
        pytest.skip("needs an NVIDIA GPU of sm_89 or newer")


def room(like):
    """Where an implementation writes to: contiguous, and poisoned."""
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def torch_error(q, k, v, block_map, shape, exact):
    """The error of torch's own attention in the inputs' dtype."""
    mask = selected_keys(block_map, q.shape[1], *shape)
    heads = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask)
    return goldens.relative_error(out.transpose(1, 2), exact)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("length", LENGTHS)
def test_reference_is_masked_softmax(length, batch, dim):
    q, k, v = random_qkv(batch, length, 2, dim)
    block_map = random_map(batch, length, 2, 128, 64)
    out = sparse_attention(q, k, v, block_map, backend="reference")
    assert goldens.relative_error(out, exact_sparse(q, k, v, block_map)) <= 1e-6


@pytest.mark.parametrize("shape", BLOCK_SHAPES, ids=str)
def test_reference_takes_every_block_shape(shape):
    q, k, v = random_qkv(1, 300, 2, 64)
    block_map = random_map(1, 300, 2, *shape)
    out = sparse_attention(q, k, v, block_map, *shape, backend="reference")
    assert goldens.relative_error(out, exact_sparse(q, k, v, block_map, *shape)) <= 1e-6


def test_reference_goes_through_the_query_blocks_in_parts(monkeypatch):
    q, k, v = random_qkv(1, 1000, 2, 64)
    block_map = random_map(1, 1000, 2, 64, 64)
    monkeypatch.setattr(reference, "SCORES", 3 * 64 * 64 * block_map.shape[-1])
    out = sparse_attention(q, k, v, block_map, 64, 64, backend="reference")
    assert goldens.relative_error(out, exact_sparse(q, k, v, block_map, 64, 64)) <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("length", "dim", "shape"),
    [(1, 64, (128, 64)), (65, 128, (64, 64)), (129, 64, (64, 128)), (200, 128, (128, 64))],
)
def test_triton_errs_at_most_twice_as_much_as_torch(length, dim, shape, dtype):
    q, k, v = random_qkv(2, length, 2, dim, dtype)
    block_map = random_map(2, length, 2, *shape, share=0.7)
    exact = exact_sparse(q, k, v, block_map, *shape)
    out = sparse_attention(q, k, v, block_map, *shape, backend="triton")
    bound = 2 * torch_error(q, k, v, block_map, shape, exact)
    assert goldens.relative_error(out, exact) <= max(bound, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", BLOCK_SHAPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("length", [*LENGTHS, 4000])
def test_triton_errs_at_most_twice_as_much_as_torch_at_any_length(length, dim, shape):
    q, k, v = random_qkv(3, length, 2, dim, torch.bfloat16)
    block_map = random_map(3, length, 2, *shape)
    exact = exact_sparse(q, k, v, block_map, *shape)
    out = sparse_attention(q, k, v, block_map, *shape, backend="triton")
    bound = 2 * torch_error(q, k, v, block_map, shape, exact)
    assert goldens.relative_error(out, exact) <= max(bound, 1e-6)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_order_of_the_indices_does_not_matter(backend):
    q, k, v = random_qkv(1, 300, 1, 64, torch.float16)
    block_map = random_map(1, 300, 1, 128, 64, share=1.0)
    out = sparse_attention(q, k, v, block_map.flip(-1), backend=backend)
    assert goldens.relative_error(out, exact_sparse(q, k, v, block_map)) <= 1e-3


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("attention", [sparse_attention, sage_attention])
def test_all_equal_inputs_give_the_value(attention, backend):
    x = torch.full((1, 130, 2, 128), 0.75, dtype=torch.float16, device=DEVICE)
    block_map = random_map(1, 130, 2, 128, 64, share=1.0)
    out = attention(x, x, x, block_map, backend=backend)
    torch.testing.assert_close(out, x, atol=1e-3, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("low_bit", [False, True])
def test_adds_to_the_linear_branch(low_bit, backend):
    q, k, v = random_qkv(2, 200, 2, 64, torch.float16)
    there = torch.randn_like(q)
    block_map = random_map(2, 200, 2, 128, 64)
    attention = sage_attention if low_bit else sparse_attention
    plain = attention(q, k, v, block_map, backend=backend).double()
    exact = plain + there.double()
    out = attention(q, k, v, block_map, linear=there, backend=backend)
    assert out is there
    assert goldens.relative_error(out, exact) <= 1e-3


@pytest.mark.parametrize("pv", ["fp16", "fp8"])
@pytest.mark.parametrize("length", [1, 65, 672])
def test_low_bits_stay_close_to_exact_attention(length, pv):
    q, k, v = random_qkv(2, length, 2, 128)
    k = k + 20 * torch.randn(2, 1, 2, 128, device=DEVICE)  # what K smoothing takes away
    v = v * torch.logspace(-3, 5, 128, device=DEVICE)  # beyond float16, scaled per channel
    block_map = random_map(2, length, 2, 128, 64)
    out = sage_attention(q, k, v, block_map, pv, backend="reference")
    exact = exact_sparse(q, k, v, block_map)
    size = v.double().abs().amax((0, 1, 2))
    assert goldens.relative_error(out / size, exact / size) <= LOW_BIT_ERROR[pv]


@pytest.mark.parametrize("pv", PV)
@pytest.mark.parametrize("shape", BLOCK_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_triton_quantizes_to_the_same_integers(dtype, shape, pv):
    need_fp8(pv)
    q, k, v = random_qkv(2, 200, 2, 64, dtype)
    arguments = q, k, v, k.float().mean(1), PV_DTYPES[pv], *shape
    found, expected = triton_kernels.quantize(*arguments), reference.quantize(*arguments)
    for x in ("q", "k", "v"):
        assert torch.equal(getattr(found, x).float(), getattr(expected, x).float())
    for x in ("q_scale", "k_scale", "v_scale"):
        torch.testing.assert_close(getattr(found, x), getattr(expected, x), atol=0, rtol=1e-6)


@pytest.mark.parametrize("pv", PV)
@pytest.mark.parametrize(
    ("length", "dim", "shape"),
    [(1, 64, (128, 64)), (65, 128, (64, 64)), (129, 64, (64, 128)), (200, 128, (128, 64))],
)
def test_triton_equals_the_reference_on_the_same_operands(length, dim, shape, pv):
    need_fp8(pv)
    q, k, v = random_qkv(2, length, 2, dim)
    block_map = random_map(2, length, 2, *shape, share=0.7)
    operands = reference.quantize(q, k, v, k.mean(1), PV_DTYPES[pv], *shape)
    expected = reference.sage_attention(operands, block_map, room(q), False)
    out = triton_kernels.sage_attention(operands, block_map, room(q), False)
    assert goldens.relative_error(out, expected) <= 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("pv", ["fp16", "fp8"])
@pytest.mark.parametrize("shape", BLOCK_SHAPES, ids=str)
@pytest.mark.parametrize("length", [*LENGTHS, 4000])
def test_triton_equals_the_reference_at_any_length(length, shape, pv):
    need_fp8(pv)
    q, k, v = random_qkv(3, length, 2, 128)
    block_map = random_map(3, length, 2, *shape)
    operands = reference.quantize(q, k, v, k.mean(1), PV_DTYPES[pv], *shape)
    expected = reference.sage_attention(operands, block_map, room(q), False)
    out = triton_kernels.sage_attention(operands, block_map, room(q), False)
    assert goldens.relative_error(out, expected) <= 1e-3


def need_hopper():
    if CARD != (9, 0):
        pytest.skip("needs a Hopper GPU")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    ("length", "share"),
    [(length, 0.4) for length in LENGTHS]
    # Sums move on every 32 blocks, and the copies go by 32: 32, 33, 63, 64 and 65 of them.
    + [(4000, 0.51), (4000, 0.53), (4000, 1.0), (4096, 1.0), (4100, 1.0)],
)
def test_cuda_on_hopper_errs_like_the_reference(length, share, batch, dtype):
    need_hopper()
    q, k, v = random_qkv(batch, length, 3, 128, dtype)
    block_map = random_map(batch, length, 3, 128, 64, share)
    arguments = q, k, v, k.float().mean(1), PV_DTYPES["fp8"], 128, 64
    found, expected = hopper.quantize(*arguments), reference.quantize(*arguments)
    exact = exact_sparse(q, k, v, block_map)
    plain = reference.sage_attention(expected, block_map, room(q), False)
    out = hopper.sage_attention(found, block_map, room(q), False)
    # It rounds the weights to e4m3 against another reference than their maximum.
    error = goldens.relative_error(out, exact)
    assert error <= max(1.1 * goldens.relative_error(plain, exact), 1e-3)
    there = torch.randn(q.shape, dtype=dtype, device=DEVICE)
    both = out.double() + there.double()
    assert hopper.sage_attention(found, block_map, there, True) is there
    assert goldens.relative_error(there, both) <= 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize("share", [0.06, 0.12, 0.23, 0.4])  # of 18 blocks 1, 2, 4 and 7
def test_cuda_on_hopper_goes_on_from_tile_to_tile(share):
    """Of several tiles of a program each starts the scores of the next one."""
    need_hopper()
    q, k, v = random_qkv(1, 1100, 60, 128, torch.bfloat16)
    block_map = random_map(1, 1100, 60, 128, 64, share)
    exact = exact_sparse(q, k, v, block_map)
    plain = sage_attention(q, k, v, block_map, "fp8", backend="reference")
    error = goldens.relative_error(sage_attention(q, k, v, block_map, "fp8"), exact)
    assert error <= 1.1 * goldens.relative_error(plain, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("sharpness", [4, 12])
def test_cuda_on_hopper_takes_sharp_attention(sharpness):
    """Scores that grow from block to block raise the rows' reference again and again."""
    need_hopper()
    q, k, v = random_qkv(1, 4000, 2, 128, torch.bfloat16)
    growth = torch.linspace(0.1, 1, 4000, device=DEVICE)[None, :, None, None]
    q, k = q * sharpness, (k * growth).to(k.dtype)
    block_map = random_map(1, 4000, 2, 128, 64, share=1.0)
    exact = exact_sparse(q, k, v, block_map)
    arguments = q, k, v, block_map, "fp8"
    plain = sage_attention(*arguments, backend="reference")
    error = goldens.relative_error(sage_attention(*arguments), exact)
    assert error <= 1.1 * goldens.relative_error(plain, exact)


@pytest.mark.gpu
def test_cuda_on_hopper_runs_where_it_fits(monkeypatch):
    need_hopper()
    calls = []
    run = hopper.sage_attention
    monkeypatch.setattr(hopper, "sage_attention", lambda *a: calls.append(1) or run(*a))
    for dim, pv, expected in ((128, None, 1), (128, "fp8", 2), (128, "fp16", 2), (64, None, 2)):
        q, k, v = random_qkv(1, 300, 2, dim, torch.bfloat16)
        sage_attention(q, k, v, random_map(1, 300, 2, 128, 64), pv)
        assert len(calls) == expected


@pytest.mark.gpu
def test_cuda_on_hopper_writes_where_16_bytes_are_not_one():
    need_hopper()
    q, k, v = random_qkv(1, 130, 2, 128, torch.bfloat16)
    block_map = random_map(1, 130, 2, 128, 64)
    operands = hopper.quantize(q, k, v, k.float().mean(1), PV_DTYPES["fp8"], 128, 64)
    there = torch.randn(q.numel() + 1, dtype=q.dtype, device=DEVICE)
    shifted = there[1:].view(q.shape)
    expected = hopper.sage_attention(operands, block_map, shifted.clone(), True)
    assert hopper.sage_attention(operands, block_map, shifted, True) is shifted
    assert torch.equal(shifted, expected)


def test_channels_of_values_may_stand_in_eights():
    """A thread of Hopper's product has columns 8 j + 2 t + {0, 1}: channels side by side."""
    v = random_qkv(2, 200, 3, 128, torch.float16)[2]
    arguments = v, torch.float16, 64
    plain, scales = triton_kernels.quantize_values(*arguments)
    found, same_scales = triton_kernels.quantize_values(*arguments, eights=True)
    held = found.unflatten(3, (4, 4, 4, 2)).transpose(4, 5)  # [..., 32 columns, t, j, pair, keys]
    assert torch.equal(held.flatten(3, 6), plain) and not torch.equal(found, plain)
    assert torch.equal(scales, same_scales)


@pytest.mark.skipif(DEVICE != "cpu", reason="Triton's interpreter is off where there is a GPU")
def test_triton_fp8_layout_in_the_interpreter():
    """The interpreter cuts fp8 off where it should round, so this sees only gross errors."""
    q, k, v = random_qkv(1, 130, 2, 64)
    block_map = random_map(1, 130, 2, 64, 64, share=1.0)
    out = sage_attention(q, k, v, block_map, "fp8", 64, 64, backend="triton")
    expected = sage_attention(q, k, v, block_map, "fp8", 64, 64, backend="reference")
    assert goldens.relative_error(out, expected) <= 0.12


@pytest.mark.parametrize("low_bit", [False, True])
@pytest.mark.parametrize(("length", "shape"), [(70, (64, 64)), (200, (128, 64)), (130, (64, 128))])
def test_tensor_maps_read_what_pointers_read(length, shape, low_bit, monkeypatch):
    """Loads by tensor map, as on Hopper and newer, against loads by pointer."""
    q, k, v = random_qkv(2, length, 2, 64, torch.float16)
    block_map = random_map(2, length, 2, *shape, share=0.7)
    attention = sage_attention if low_bit else sparse_attention
    arguments = {"block_q": shape[0], "block_k": shape[1], "backend": "triton"}
    if low_bit:
        arguments["pv"] = "fp16"
    monkeypatch.setattr(triton_kernels, "has_tma", lambda device: False)
    expected = attention(q, k, v, block_map, **arguments)
    if DEVICE == "cpu" or CARD >= (9, 0):
        monkeypatch.setattr(triton_kernels, "has_tma", lambda device: True)
    assert in_steps_of_16_bytes(k) and in_steps_of_16_bytes(v)
    out = attention(q, k, v, block_map, **arguments)
    torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-3)


def test_steps_of_16_bytes():
    x = torch.zeros(1, 8, 2, 72, dtype=torch.float16, device=DEVICE)
    assert in_steps_of_16_bytes(x[..., :64])
    assert not in_steps_of_16_bytes(x[..., 1:65])
    assert not in_steps_of_16_bytes(x[..., :1, :64].expand(1, 8, 2, 64))
    assert not in_steps_of_16_bytes(torch.zeros(1, 8, 2, 68, dtype=x.dtype)[..., :64])


def test_takes_what_is_known_of_q_and_v():
    q, k, v = random_qkv(1, 130, 2, 64, torch.float16)
    block_map = random_map(1, 130, 2, 128, 64)
    blocks, v_max = reference.quantize_heads(q, 128), v.float().abs().amax(1)
    for backend in ("reference", "triton"):
        options = {"pv": "fp16", "backend": backend}
        out = sage_attention(q, k, v, block_map, **options)
        known = sage_attention(blocks, k, v, block_map, v_max=v_max, **options)
        assert torch.equal(known, out)


def test_takes_the_mean_of_k_where_it_is_known():
    q, k, v = random_qkv(1, 130, 2, 64)
    block_map = random_map(1, 130, 2, 128, 64)
    out = sage_attention(q, k, v, block_map, "fp16", backend="reference")
    known = sage_attention(q, k, v, block_map, "fp16", k_mean=k.mean(1), backend="reference")
    assert goldens.relative_error(known, out) <= 1e-4


@pytest.mark.parametrize(
    ("card", "cuda_problem", "pv"),
    [(card, None, "fp16") for card in ((0, 0), (8, 0), (8, 6))]
    + [(card, None, "fp8") for card in ((8, 9), (9, 0), (10, 0), (12, 0))]
    + [((9, 0), "NVRTC does not load", "fp16"), ((8, 9), "for Hopper", "fp8")],
)
def test_values_go_to_fp8_where_that_is_faster(card, cuda_problem, pv, monkeypatch):
    module = sys.modules[sparse_attention.__module__]
    monkeypatch.setattr(module, "capability", lambda device: card)
    monkeypatch.setattr(module, "cuda_unavailable", lambda device: cuda_problem)
    monkeypatch.setattr(module, "has_fp8", lambda device: card >= (8, 9))
    assert default_pv(torch.device("cuda")) == pv


def test_values_go_where_the_card_wants_them():
    q, k, v = random_qkv(1, 130, 2, 64, torch.float16)
    block_map = random_map(1, 130, 2, 128, 64)
    pv = default_pv(torch.device(DEVICE))
    expected = sage_attention(q, k, v, block_map, pv)
    assert torch.equal(sage_attention(q, k, v, block_map), expected)


def test_refuses_what_does_not_fit():
    q, k, v = random_qkv(1, 130, 2, 64)
    wide = random_qkv(1, 130, 2, 96)
    good = random_map(1, 130, 2, 128, 64)
    none = good[..., :0]
    cases = [
        (lambda: sparse_attention(*wide, good), "q must have a head dim of 64 or 128, got 96"),
        (lambda: sparse_attention(q, k, v[:, 1:], good), "v must match q"),
        (lambda: sparse_attention(q, k, v, good[:, :, :1]), r"block_map must be \[1, 2, 2, 1\]"),
        (lambda: sparse_attention(q, k, v, good[0]), r"block_map must be \[1, 2, 2, 1\]"),
        (lambda: sparse_attention(q, k, v, none), "must select 1 to 3 key blocks, got 0"),
        (lambda: sparse_attention(q, k, v, good, 128, 128), "128x64, 64x64 or 64x128, got 128x128"),
        (lambda: sparse_attention(q, k, v, good, linear=q[:, 1:]), r"linear must be \[1, 130, 2"),
        (lambda: sparse_attention(q, k, v, good, linear=q.half()), "linear must be contiguous and"),
        (lambda: sage_attention(q, k, v, good, "int8"), "pv must be 'fp8', 'fp16' or None"),
        (lambda: sage_attention(q, k, v, good, k_mean=k), r"k_mean must be \[1, 2, 64\]"),
        (lambda: sage_attention(q, k, v, good, v_max=k), r"v_max must be \[1, 2, 64\]"),
        (
            lambda: sage_attention(reference.Int8Blocks(k, k), k, v, good),
            r"q\.integers must be \[1, 2, 256, 64\]",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match=r"block_map must be int32, got torch\.int64"):
        sparse_attention(q, k, v, good.long())


def test_triton_by_name_says_why_it_cannot_run():
    q, k, v = (x.transpose(-1, -2).contiguous().mT for x in random_qkv(1, 70, 2, 64))
    with pytest.raises(RuntimeError, match="the head dim is not contiguous, got strides"):
        sparse_attention(q, k, v, random_map(1, 70, 2, 128, 64), backend="triton")
