"""Sparse-linear attention against the original's outputs, and mutants that must miss them."""

import weakref

import goldens
import pytest
import torch
from attention import (
    BLOCK_SHAPES,
    exact_linear,
    exact_sparse,
    random_map,
    random_proj,
    random_qkv,
)
from devices import BATCHES, DEVICE, LENGTHS
from turbodiffusion_pack.kernels.block_map import block_map
from turbodiffusion_pack.kernels.dispatch import has_fp8
from turbodiffusion_pack.kernels.norm import rms_norm
from turbodiffusion_pack.kernels.qk_prepare import norms_of_squares, square_sums
from turbodiffusion_pack.kernels.rope import apply_rope
from turbodiffusion_pack.kernels.sla import Norms, sla, sla_from_projections

GPU = pytest.mark.gpu
BACKENDS = ("reference", "triton")
BOUND = 5e-3
TOPK = 0.2
OUTPUTS = [("sla0", "softmax"), ("sla1", "softmax"), ("sla1", "elu"), ("sla1", "relu")]
# The interpreter takes seconds for a head.
HEADS = {"reference": 2, "triton": 2 if DEVICE == "cuda" else 1}
LOW_BIT_BOUND = {"fp16": 2.8e-2, "fp8": 4.8e-2}


def golden(name, dtype=torch.float32, heads=2):
    """q, k, v [B, L, H, D] and the projection of one golden, on the test's device."""
    data = goldens.load("operators")
    qkv = (data[f"{name}.{x}"][:, :heads].to(DEVICE, dtype).transpose(1, 2) for x in "qkv")
    return *qkv, (data[f"{name}.proj_w"].to(DEVICE), data[f"{name}.proj_b"].to(DEVICE))


def golden_output(name, feature_map, heads=2):
    """The original's output [B, L, H, D]."""
    return goldens.load("operators")[f"{name}.sla.{feature_map}"][:, :heads].transpose(1, 2)


def golden_map(name, heads=2):
    """The key blocks that the original selected, int32 [B, H, NQ, count]."""
    selected = goldens.load("operators")[f"{name}.map.128x64"][:, :heads].to(DEVICE)
    return selected.nonzero()[:, -1].int().view(*selected.shape[:3], -1)


def first_blocks(q, k):
    """A map of the right shape that always takes the first key blocks."""
    chosen = block_map(q, k, TOPK)
    first = torch.arange(chosen.shape[-1], dtype=torch.int32, device=chosen.device)
    return first.expand(chosen.shape)


def identity(proj):
    """A projection that leaves the linear branch as it is."""
    _, bias = proj
    return torch.eye(len(bias), device=DEVICE), torch.zeros_like(bias)


# From q, k, v, proj and the options of sla.
MUTANTS = {
    "no linear branch": lambda q, k, v, proj, **o: sla(q, k, v, None, TOPK, **o),
    "identity projection": lambda q, k, v, proj, **o: sla(q, k, v, identity(proj), TOPK, **o),
    "first blocks": lambda q, k, v, proj, **o: sla(
        q, k, v, proj, block_map=first_blocks(q, k), **o
    ),
    "top-k 0.5": lambda q, k, v, proj, **o: sla(q, k, v, proj, 0.5, **o),
    "dense": lambda q, k, v, proj, **o: sla(q, k, v, proj, 1.0, **o),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "feature_map"), OUTPUTS)
def test_equals_the_original(name, feature_map, backend):
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    heads = HEADS[backend]
    options = {"block_map": golden_map(name, heads), "feature_map": feature_map}
    out = sla(*golden(name, dtype, heads), **options, backend=backend)
    assert goldens.relative_error(out, golden_output(name, feature_map, heads)) <= BOUND


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize(("name", "feature_map"), OUTPUTS)
def test_mutants_miss_the_original(name, feature_map, mutant):
    out = MUTANTS[mutant](*golden(name), feature_map=feature_map)
    assert goldens.relative_error(out, golden_output(name, feature_map)) > BOUND


@pytest.mark.parametrize("pv", LOW_BIT_BOUND)
@pytest.mark.parametrize("name", ["sla0", "sla1"])
def test_low_bits_stay_close_to_exact_arithmetic(name, pv):
    """At the same block map; the original's own low-bit attention is 3.6e-2 away."""
    q, k, v, proj = golden(name)
    chosen = golden_map(name)
    exact = exact_sparse(q, k, v, chosen) + exact_linear(q, k, v, *proj, "softmax")
    out = sla(q, k, v, proj, low_bit=True, block_map=chosen, pv=pv, backend="reference")
    assert goldens.relative_error(out, exact) <= LOW_BIT_BOUND[pv]


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("pv", LOW_BIT_BOUND)
def test_mutants_in_low_bits_miss_exact_arithmetic(pv, mutant):
    q, k, v, proj = golden("sla0")
    exact = exact_sparse(q, k, v, golden_map("sla0"))
    exact += exact_linear(q, k, v, *proj, "softmax")
    options = {"low_bit": True, "pv": pv, "backend": "reference"}
    out = MUTANTS[mutant](q, k, v, proj, **options)
    assert goldens.relative_error(out, exact) > LOW_BIT_BOUND[pv]


@pytest.mark.parametrize("pv", ["fp16", pytest.param("fp8", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["sla0", "sla1"])
def test_low_bits_in_triton_stay_close_to_exact_arithmetic(name, pv):
    if pv == "fp8" and not has_fp8(torch.device(DEVICE)):
        pytest.skip("needs an NVIDIA GPU of sm_89 or newer")
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    q, k, v, proj = golden(name, dtype, HEADS["triton"])
    chosen = golden_map(name, HEADS["triton"])
    exact = exact_sparse(q, k, v, chosen) + exact_linear(q, k, v, *proj, "softmax")
    out = sla(q, k, v, proj, low_bit=True, block_map=chosen, pv=pv, backend="triton")
    assert goldens.relative_error(out, exact) <= LOW_BIT_BOUND[pv]


@pytest.mark.parametrize("topk", [0.001, 0.3, 1.0])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("length", LENGTHS)
def test_is_sparse_plus_linear_attention(length, batch, topk):
    q, k, v = random_qkv(batch, length, 2, 64)
    proj = random_proj(64)
    chosen = block_map(q, k, topk)
    exact = exact_sparse(q, k, v, chosen) + exact_linear(q, k, v, *proj, "softmax")
    out = sla(q, k, v, proj, topk)
    assert goldens.relative_error(out, exact) <= 2e-6


def test_topk_1_is_dense_attention_plus_the_linear_branch():
    q, k, v = random_qkv(2, 300, 2, 128)
    proj = random_proj(128)
    heads = (x.double().transpose(1, 2) for x in (q, k, v))
    dense = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2)
    exact = dense + exact_linear(q, k, v, *proj, "elu")
    out = sla(q, k, v, proj, 1.0, feature_map="elu")
    assert goldens.relative_error(out, exact) <= 2e-6


@pytest.mark.parametrize("low_bit", [False, True])
@pytest.mark.parametrize("shape", BLOCK_SHAPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_triton_equals_the_reference(dim, shape, low_bit):
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    q, k, v = random_qkv(2, 150, 2, dim, dtype)
    proj = random_proj(dim)
    options = {"low_bit": low_bit, "pv": "fp16", "block_q": shape[0], "block_k": shape[1]}
    expected = sla(q, k, v, proj, 0.5, **options, backend="reference")
    out = sla(q, k, v, proj, 0.5, **options, backend="triton")
    assert goldens.relative_error(out, expected) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("low_bit", [False, True])
@pytest.mark.parametrize("length", [1, 130])
def test_all_equal_inputs_are_no_nan(length, low_bit, backend):
    x = torch.zeros(1, length, 2, 64, dtype=torch.float16, device=DEVICE)
    proj = random_proj(64)
    out = sla(x, x, x, proj, 0.1, low_bit, backend=backend)
    torch.testing.assert_close(out, proj[1].half().expand(out.shape), atol=1e-3, rtol=0)


def test_an_injected_map_replaces_topk():
    q, k, v = random_qkv(1, 300, 2, 64)
    chosen = random_map(1, 300, 2, 128, 64)
    out = sla(q, k, v, None, 1.0, block_map=chosen)
    assert goldens.relative_error(out, exact_sparse(q, k, v, chosen)) <= 1e-6


def random_projections(length, heads, dim, dtype=torch.float32):
    """What sla_from_projections takes: q, k, v, norms, rotation and the projection."""
    q, k, v = (x.contiguous() for x in random_qkv(1, length, heads, dim, dtype))
    norms = tuple(1 + 0.2 * torch.randn(heads * dim, device=DEVICE) for _ in "qk")
    angles = torch.rand(1, length, dim // 2, device=DEVICE)
    return q, k, v, norms, (angles.cos(), angles.sin()), random_proj(dim)


def by_its_parts(q, k, v, norms, rotation, proj, **options):
    """Norm, rotation and attention, one after the other."""

    def rotated(x, norm):
        normed = rms_norm(x.flatten(2), norm, backend="reference").view(x.shape)
        return apply_rope(normed, *rotation, backend="reference")

    q, k = map(rotated, (q, k), norms)
    return sla(q, k, v, proj, **options, backend="reference")


@pytest.mark.parametrize("low_bit", [False, True])
@pytest.mark.parametrize("length", [1, 65, 300])
def test_from_projections_is_norm_rotation_and_attention(length, low_bit):
    arguments = random_projections(length, 2, 64)
    options = {"topk": 0.5, "low_bit": low_bit, "pv": "fp16"}
    expected = by_its_parts(*arguments, **options)
    out = sla_from_projections(*arguments, **options, backend="reference")
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("low_bit", "pv"), [(False, None), (True, "fp16"), pytest.param(True, "fp8", marks=GPU)]
)
@pytest.mark.parametrize("dim", [64, 128])
def test_from_projections_in_triton(dim, low_bit, pv):
    if pv == "fp8" and not has_fp8(torch.device(DEVICE)):
        pytest.skip("needs an NVIDIA GPU of sm_89 or newer")
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    arguments = random_projections(200, 2, dim, dtype)
    options = {"low_bit": low_bit, "pv": pv}
    options["block_map"] = random_map(1, 200, 2, 128, 64, share=0.7)
    expected = by_its_parts(*arguments, **options)
    out = sla_from_projections(*arguments, **options, backend="triton")
    # One more rounding of q and k than in test_triton_equals_the_reference, and e4m3's steps.
    bound = 2e-2 if pv == "fp8" else 8 * torch.finfo(dtype).eps
    assert goldens.relative_error(out, expected) <= bound


def test_from_projections_takes_what_is_known_of_rows():
    """Squares four times as large halve q's norm, and so on."""
    q, k, v, norms, *rest = random_projections(300, 2, 64)
    squares = [x.flatten(2).square().sum(-1)[:, None] for x in (q, k)]
    expected = by_its_parts(q, k, v, (norms[0] / 2, norms[1]), *rest)
    q_norms, k_norms = (norms_of_squares(x, 128) for x in (4 * squares[0], squares[1]))
    given = (lambda: (q, q_norms)), (lambda: (k, k_norms))
    out = sla_from_projections(*given, v, norms, *rest, backend="reference")
    assert goldens.relative_error(out, expected) <= 1e-5


@pytest.mark.parametrize("low_bit", [False, True])
def test_some_heads_from_projections_are_what_they_are_among_all(low_bit, monkeypatch):
    """To the bit, as ranks have them that share an attention."""
    on_gpu = DEVICE == "cuda"
    length, heads, dim = (9000, 40, 128) if on_gpu else (200, 2, 64)
    if not on_gpu:
        monkeypatch.setattr("turbodiffusion_pack.kernels.linear_attention.triton.PROGRAMS", 8)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    q, k, v, (q_norm, k_norm), *rest = random_projections(length, heads, dim, dtype)
    own, channels = slice(heads // 2), slice(heads // 2 * dim)
    row_norms = [norms_of_squares(square_sums(x).mT, heads * dim) for x in (q, k)]

    def attend(of, norms):
        mine = [x[:, :, of].clone(memory_format=torch.contiguous_format) for x in (q, k, v)]
        given = (lambda: (mine[0], row_norms[0])), (lambda: (mine[1], row_norms[1]))
        options = {"low_bit": low_bit, "backend": "triton"}
        return sla_from_projections(*given, mine[2], norms, *rest, **options)

    whole = attend(slice(heads), (q_norm, k_norm))
    some = attend(own, Norms(q_norm[channels], k_norm[channels], heads=heads))
    assert torch.equal(some, whole[:, :, own])
    alone = attend(own, (q_norm[channels], k_norm[channels]))
    assert on_gpu or not torch.equal(alone, some)  # 16 bits may hide it


def test_from_projections_takes_every_option():
    q, k, *rest = random_projections(300, 2, 64)
    chosen = random_map(1, 300, 2, 128, 64)
    for options in (
        {"topk": 1.0},
        {"block_map": chosen},
        {"low_bit": True, "pv": "fp8", "topk": 0.3},
    ):
        for inputs in (rest, [*rest[:3], None]):
            expected = by_its_parts(q, k, *inputs, **options)
            arguments = q.clone(), k.clone(), *inputs
            out = sla_from_projections(*arguments, **options, backend="reference")
            assert torch.equal(out, expected)


def test_from_projections_needs_no_memory_for_q_and_k():
    q, k, *rest = random_projections(300, 2, 64)
    out = sla_from_projections(q, k, *rest, low_bit=True, pv="fp16", backend="reference")
    assert out.data_ptr() == q.data_ptr()


def test_in_low_bits_keys_and_values_are_freed_before_there_are_queries():
    q, k, v, *rest = random_projections(130, 2, 64)
    expected = by_its_parts(q, k, v, *rest, low_bit=True, pv="fp16")
    given = []

    def give(x):
        given.append(weakref.ref(y := x.clone()))
        return y

    def queries():
        assert [x() for x in given] == [None, None]
        return q, None

    functions = queries, lambda: (give(k), None), lambda: give(v)
    out = sla_from_projections(*functions, *rest, low_bit=True, pv="fp16", backend="reference")
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_in_low_bits_values_come_some_heads_after_the_others(backend):
    """Each is quantized by then, as the next one takes its memory."""
    dtype = torch.float16 if backend == "triton" else torch.float32
    q, k, v, *rest = random_projections(130, 4, 64, dtype)
    options = {"low_bit": True, "pv": "fp16", "backend": backend, "topk": 0.5}
    for proj in (rest[2], None):
        weights = *rest[:2], proj
        expected = sla_from_projections(q.clone(), k.clone(), v, *weights, **options)

        def values():
            room = torch.empty_like(v[:, :, :2])
            for heads in v.split(2, dim=2):
                yield room.copy_(heads)
                room.fill_(float("nan"))

        out = sla_from_projections(q.clone(), k.clone(), values, *weights, **options)
        assert torch.equal(out, expected)
    with pytest.raises(ValueError, match="v must have the 4 heads of k, got 2"):
        sla_from_projections(q, k, lambda: iter([v[:, :, :2].clone()]), *rest, **options)


def test_from_projections_refuses_what_does_not_fit():
    q, *rest = random_projections(130, 2, 64)
    options = {"low_bit": True, "pv": "fp16", "backend": "reference"}
    with pytest.raises(ValueError, match="block_map must be"):
        sla_from_projections(q, *rest, **options, block_map=random_map(1, 130, 1, 128, 64))
    with pytest.raises(ValueError, match="q must be"):
        sla_from_projections(q[:, :64].contiguous(), *rest, **options)
    with pytest.raises(ValueError, match="pv must be 'fp8', 'fp16' or None, got 'int8'"):
        sla_from_projections(q, *rest, **{**options, "pv": "int8"})


def test_refuses_what_does_not_fit():
    q, k, v = random_qkv(1, 130, 2, 64)
    wide = random_qkv(1, 130, 2, 96)
    weight, bias = proj = random_proj(64)
    big, long = random_proj(128)
    cases = [
        ((*wide, proj), {}, "q must have a head dim of 64 or 128, got 96"),
        ((q, k, v, proj), {"topk": 0.0}, "topk must be above 0 and at most 1, got 0.0"),
        ((q, k, v, proj), {"topk": 1.5}, "topk must be above 0 and at most 1, got 1.5"),
        ((q, k, v, (big, bias)), {}, r"proj weight must be \[64, 64\], got \[128, 128\]"),
        ((q, k, v, (weight, long)), {}, r"proj bias must be \[64\], got \[128\]"),
        ((q, k, v, proj), {"feature_map": "gelu"}, "feature_map must be one of"),
        ((q, k, v, proj), {"block_k": 32}, "must be 128x64, 64x64 or 64x128, got 128x32"),
        ((q, k, v, proj), {"backend": "cuda"}, "backend 'cuda' is unknown"),
        (
            (q, k, v, proj),
            {"block_map": random_map(1, 130, 1, 128, 64)},
            r"block_map must be \[1, 2, 2, 1\], got \[1, 1, 2, 1\]",
        ),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ValueError, match=message):
            sla(*arguments, **options)
