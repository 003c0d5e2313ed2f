"""The linear branch: float64, and Triton against torch's own error."""

import math

import goldens
import pytest
import torch
from attention import exact_linear, linear_branch, phi, random_proj, random_qkv
from devices import BATCHES, DEVICE, LENGTHS, TRITON_DTYPES
from turbodiffusion_pack.kernels.linear_attention import (
    FEATURE_MAPS,
    key_value_state,
    key_value_state_and_maximum,
    linear_attention,
    reference,
    triton_kernels,
)
from turbodiffusion_pack.kernels.qk_prepare import cuda

BACKENDS = ("reference", "triton")
# On a GPU float32 is the reference's: its tiles do not fit.
DTYPES = TRITON_DTYPES if DEVICE == "cpu" else TRITON_DTYPES[1:]


@pytest.fixture
def sums_of_many_programs(monkeypatch):
    """As a GPU's, which has more multiprocessors than the interpreter's one."""
    monkeypatch.setattr(triton_kernels, "multiprocessors", lambda device: 132)


def branch(q, k, v, weight, bias, feature_map, backend):
    state = key_value_state(k, v, feature_map, backend)
    return linear_attention(q, *state, weight, bias, feature_map, backend)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("length", LENGTHS)
def test_reference_is_the_formula(length, batch, feature_map):
    q, k, v = random_qkv(batch, length, 2, 128)
    weight, bias = random_proj(128)
    out = branch(q, k, v, weight, bias, feature_map, "reference")
    exact = exact_linear(q, k, v, weight, bias, feature_map)
    assert goldens.relative_error(out, exact) <= 1e-6


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_reference_sums_the_keys_in_parts(feature_map, monkeypatch):
    monkeypatch.setattr(reference, "ROWS", 100)
    _, k, v = random_qkv(2, 333, 2, 64)
    state, normalizer = key_value_state(k, v, feature_map, "reference")
    exact = phi(k.double(), feature_map).transpose(1, 2)
    assert goldens.relative_error(normalizer, exact.sum(2)) <= 1e-6
    assert goldens.relative_error(state, exact.mT @ v.double().transpose(1, 2)) <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize(("length", "dim"), [(1, 64), (65, 128), (300, 64)])
def test_triton_errs_at_most_twice_as_much_as_torch(
    length, dim, feature_map, dtype, sums_of_many_programs
):
    q, k, v = random_qkv(2, length, 2, dim, dtype)
    arguments = q, k, v, *random_proj(dim), feature_map
    exact = exact_linear(*arguments)
    bound = 2 * goldens.relative_error(linear_branch(*arguments), exact)
    assert goldens.relative_error(branch(*arguments, "triton"), exact) <= max(bound, 1e-6)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_the_state_is_projected_in_the_order_of_the_products(dtype):
    """The same bits as are there in the usual order."""
    state, weight = torch.randn(2, 3, 128, 128, device=DEVICE), random_proj(128)[0]
    arguments = state, torch.rand(2, 3, 128, device=DEVICE), weight, dtype
    columns, summands = cuda.order(torch.device(DEVICE))
    places = cuda.places(torch.device(DEVICE))
    ordered = triton_kernels.project_state(*arguments, places)
    expected = triton_kernels.project_state(*arguments).mT[..., columns, summands]
    assert torch.equal(ordered, expected)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_the_state_lies_as_hoppers_products_take_it(dtype):
    """With the normalizer beside it: of e^q times all columns the quotient is the linear branch."""
    q, k, v = random_qkv(2, 300, 3, 128)
    weight, bias = random_proj(128)
    sums = key_value_state(k, v, "softmax", "reference")
    columns, summands = (x.flatten() for x in cuda.order(torch.device(DEVICE)))
    places = cuda.places_in_halves(torch.device(DEVICE))
    mix = triton_kernels.project_state_and_sums(*sums, weight, dtype, places, k.shape[1])
    chunks = mix.view(2, 3, 2, 136, 8, 8)  # [B, H, half, column, chunk, summand]
    column, chunk = torch.arange(136)[:, None], torch.arange(8)
    table = chunks[:, :, :, column, chunk ^ column % 8].flatten(-2)
    table = torch.cat(table.unbind(2), -1).double()  # [B, H, column, summand]
    mixed = q.double().exp().transpose(1, 2)[..., summands] @ table.mT
    channels, total = mixed[..., :64], mixed[..., 64:72].unflatten(-1, (4, 2)).sum(-1)
    found = torch.empty_like(q, dtype=torch.float64).transpose(1, 2)
    found[..., columns] = torch.cat((channels, mixed[..., 72:]), -1) / total[..., :1]
    assert total.equal(total[..., :1].expand_as(total))
    exact = exact_linear(q, k, v, weight, bias, "softmax")
    bound = max(torch.finfo(dtype).eps, 1e-6)
    assert goldens.relative_error(found.transpose(1, 2) + bias.double(), exact) <= bound


@pytest.mark.gpu
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("length", [*LENGTHS, 32760])
def test_triton_errs_at_most_twice_as_much_as_torch_at_any_length(length, feature_map):
    q, k, v = random_qkv(3, length, 2, 128, torch.bfloat16)
    arguments = q, k, v, *random_proj(128), feature_map
    exact = exact_linear(*arguments)
    bound = 2 * goldens.relative_error(linear_branch(*arguments), exact)
    assert goldens.relative_error(branch(*arguments, "triton"), exact) <= max(bound, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_some_heads_are_what_they_are_among_all(backend, monkeypatch):
    """To the bit, in as many parts: 2 of all, where the own alone would come in 5."""
    monkeypatch.setattr(triton_kernels, "multiprocessors", lambda device: 3)
    q, k, v = random_qkv(1, 300, 6, 64, torch.float16)
    weight, bias = random_proj(64)
    own = slice(3, 5)
    whole = key_value_state(k, v, "softmax", backend)
    some = key_value_state(k[:, :, own], v[:, :, own], "softmax", backend, of_heads=6)
    assert all(torch.equal(x, y[:, own]) for x, y in zip(some, whole, strict=True))
    mixed = linear_attention(q, *whole, weight, bias, backend=backend)
    found = linear_attention(q[:, :, own], *some, weight, bias, backend=backend)
    assert torch.equal(found, mixed[:, :, own])
    others, _ = key_value_state(k[:, :, own], v[:, :, own], "softmax", backend)
    assert backend == "reference" or not torch.equal(others, some[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("length", "dim"), [(1, 64), (65, 128), (300, 64)])
def test_finds_the_largest_value_on_the_way(length, dim, backend, sums_of_many_programs):
    _, k, v = random_qkv(2, length, 2, dim, torch.float16)
    v[:, -1] *= 9
    *sums, maximum = key_value_state_and_maximum(k, v, "softmax", backend)
    assert torch.equal(maximum, v.abs().amax(1).float())
    plain = key_value_state(k, v, "softmax", backend)
    assert all(torch.equal(x, y) for x, y in zip(sums, plain, strict=True))


@pytest.mark.parametrize("heads", [12, 40])
@pytest.mark.parametrize("count", [82, 108, 128, 132, 170])
def test_no_multiprocessor_waits_for_the_last_sums(count, heads, monkeypatch):
    """Programs of the state fill every card's rounds, two on a multiprocessor at a time."""
    monkeypatch.setattr(triton_kernels, "multiprocessors", lambda device: count)
    k, length = torch.empty(1, 32760, heads, 128, device="meta"), 32760
    rows, sums, _ = triton_kernels.room_for_sums(k)
    rounds = math.ceil(len(sums) * heads / (2 * count))
    assert length * heads / (rounds * 2 * count * rows) >= 0.9


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_triton_repeats_itself_to_the_bit(feature_map, sums_of_many_programs):
    _, k, v = random_qkv(1, 300, 2, 64, torch.float16)
    once, again = (key_value_state(k, v, feature_map, "triton") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_beyond_float16_stay_finite(backend):
    """Over 1000 keys elu's sums pass 65504 long before their quotient does."""
    q, k, v = random_qkv(1, 1000, 1, 64, torch.float16)
    arguments = q, (k * 20).abs(), (v * 100).abs(), *random_proj(64), "elu"
    state, _ = key_value_state(*arguments[1:3], "elu", backend)
    assert state.max() > 65504
    exact = exact_linear(*arguments)
    assert goldens.relative_error(branch(*arguments, backend), exact) <= 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dead", ["q", "k"])
def test_a_relu_without_any_positive_channel_leaves_the_bias(dead, backend):
    q, k, v = random_qkv(1, 70, 2, 64, torch.float16)
    q, k = (-q.abs(), k) if dead == "q" else (q, -k.abs())
    weight, bias = random_proj(64)
    out = branch(q, k, v, weight, bias, "relu", backend)
    torch.testing.assert_close(out, bias.half().expand(out.shape), atol=1e-3, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_all_equal_inputs_give_the_projected_value(feature_map, backend):
    x = torch.full((1, 130, 2, 64), 0.5, dtype=torch.float16, device=DEVICE)
    weight, bias = random_proj(64)
    out = branch(x, x, x, weight, bias, feature_map, backend)
    expected = (0.5 * weight.sum(1) + bias).half().expand(out.shape)
    torch.testing.assert_close(out, expected, atol=3e-3, rtol=0)


def test_refuses_what_does_not_fit():
    q, k, v = random_qkv(1, 70, 2, 64)
    state, normalizer = key_value_state(k, v)
    weight, bias = random_proj(64)
    wide = random_qkv(1, 70, 2, 96)[0]
    good = [q, state, normalizer, weight, bias]
    wrong = [
        (0, wide, "q must have a head dim of 64 or 128, got 96"),
        (1, state[:, :1], r"state must be \[1, 2, 64, 64\], got \[1, 1, 64, 64\]"),
        (2, state, r"normalizer must be \[1, 2, 64\]"),
        (3, weight[:32], r"proj_weight must be \[64, 64\], got \[32, 64\]"),
        (4, bias[:1], r"proj_bias must be \[64\], got \[1\]"),
    ]
    for place, value, message in wrong:
        with pytest.raises(ValueError, match=message):
            linear_attention(*good[:place], value, *good[place + 1 :])
    with pytest.raises(ValueError, match="v must match k"):
        key_value_state(k, v[:, 1:])
    with pytest.raises(ValueError, match="must be one of softmax, elu, relu, got 'gelu'"):
        key_value_state(k, v, "gelu")
