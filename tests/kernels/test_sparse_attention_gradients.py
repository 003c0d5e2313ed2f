"""Gradients and tangents of block-sparse attention: a dense formula in float64, and Triton."""

import compilations
import goldens
import pytest
import torch
from attention import BLOCK_SHAPES, exact_sparse, random_map, random_qkv, selected_keys
from devices import BATCHES, CARD, DEVICE, TRITON_DTYPES
from turbodiffusion_pack.kernels import checks
from turbodiffusion_pack.kernels.sparse_attention import (
    gradients_reference,
    sparse_attention,
    sparse_attention_backward,
    sparse_attention_jvp,
    sparse_attention_with_lse,
)
from turbodiffusion_pack.kernels.sparse_attention import gradients_triton as triton_kernels

LENGTHS = (1, 63, 64, 65, 200, 1000)
# On a GPU float32 is the reference's: its tiles do not fit.
DTYPES = TRITON_DTYPES if DEVICE == "cpu" else TRITON_DTYPES[1:]
CASES = [(1, 64, (128, 64)), (65, 128, (64, 64)), (129, 64, (64, 128)), (200, 128, (128, 64))]


@pytest.fixture
def float64(monkeypatch):
    """Lets the ops take float64, which only their reference computes in."""
    monkeypatch.setattr(checks, "DTYPES", (*checks.DTYPES, torch.float64))


def doubles(*tensors):
    return [x.double() for x in tensors]


def exact_gradients(q, k, v, block_map, d_out, shape):
    """Float64 autograd through masked softmax attention: out, dq, dk, dv."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out = exact_sparse(*leaves, block_map, *shape)
    return out.detach(), *torch.autograd.grad(out, leaves, d_out.double())


def exact_tangent(q, k, v, block_map, tangents, shape):
    """Forward mode through masked softmax attention in float64."""

    def attention(*rows):
        return exact_sparse(*rows, block_map, *shape)

    return torch.func.jvp(attention, tuple(doubles(q, k, v)), tuple(doubles(*tangents)))[1]


def all_of_it(q, k, v, block_map, d_out, tangents, shape, backend):
    """out, dq, dk, dv and the tangent of out, as an implementation computes them."""
    options = {"block_q": shape[0], "block_k": shape[1], "backend": backend}
    out, lse = sparse_attention_with_lse(q, k, v, block_map, **options)
    known = q, k, v, out, lse
    gradients = sparse_attention_backward(*known, d_out, block_map, **options)
    t_out = sparse_attention_jvp(*known, *tangents, block_map, **options)
    assert all(x.is_contiguous() and x.dtype == q.dtype for x in (out, *gradients, t_out))
    return out, *gradients, t_out


def exact(q, k, v, block_map, d_out, tangents, shape):
    t_out = exact_tangent(q, k, v, block_map, tangents, shape)
    return *exact_gradients(q, k, v, block_map, d_out, shape), t_out


def random_case(batch, length, dim, shape, dtype=torch.float32, share=0.4):
    """q, k, v, block map, d_out, tangents and the block shape."""
    q, k, v = random_qkv(batch, length, 2, dim, dtype)
    d_out, *tangents = (torch.randn_like(q) for _ in range(4))
    return q, k, v, random_map(batch, length, 2, *shape, share), d_out, tangents, shape


def torch_errors(q, k, v, block_map, d_out, tangents, shape, expected):
    """Errors of torch's own attention, and its tangents, in the inputs' dtype."""
    mask = selected_keys(block_map, q.shape[1], *shape)

    def attention(*rows):
        heads = (x.transpose(1, 2) for x in rows)
        return torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask)

    def plain(*rows):
        q, k, v = (x.transpose(1, 2) for x in rows)
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
        return scores.softmax(-1) @ v

    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    gradients = torch.autograd.grad(out, leaves, d_out.transpose(1, 2))
    _, t_out = torch.func.jvp(plain, (q, k, v), tuple(tangents))
    found = out.transpose(1, 2), *gradients, t_out.transpose(1, 2)
    return [goldens.relative_error(x, y) for x, y in zip(found, expected, strict=True)]


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("length", LENGTHS)
def test_reference_equals_autograd_of_the_formula(length, batch, dim, float64):
    case = random_case(batch, length, dim, (128, 64), torch.float64)
    for found, expected in zip(all_of_it(*case, "reference"), exact(*case), strict=True):
        assert (found - expected).abs().max() <= 1e-9 * expected.abs().max().clamp_min(1)


@pytest.mark.parametrize("shape", BLOCK_SHAPES, ids=str)
def test_reference_takes_every_block_shape(shape, float64):
    case = random_case(1, 300, 64, shape, torch.float64)
    for found, expected in zip(all_of_it(*case, "reference"), exact(*case), strict=True):
        assert (found - expected).abs().max() <= 1e-9


def test_reference_goes_through_the_blocks_in_parts(monkeypatch, float64):
    case = random_case(1, 1000, 64, (64, 64), torch.float64)
    monkeypatch.setattr(gradients_reference, "SCORES", 20 * 64 * 64)  # 3 query blocks, 2 of keys
    for found, expected in zip(all_of_it(*case, "reference"), exact(*case), strict=True):
        assert (found - expected).abs().max() <= 1e-9


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_lse_is_the_logarithm_of_the_sum(backend):
    q, k, v, block_map, *_ = random_case(2, 200, 64, (128, 64))
    if DEVICE == "cuda":
        q, k, v = (x.half() for x in (q, k, v))
    scores = torch.einsum("blhd,bmhd->bhlm", q.double(), k.double()) / 8
    hidden = ~selected_keys(block_map, 200, 128, 64)
    expected = scores.masked_fill(hidden, -torch.inf).logsumexp(-1) / torch.log(torch.tensor(2.0))
    _, lse = sparse_attention_with_lse(q, k, v, block_map, backend=backend)
    assert lse.dtype == torch.float32 and lse.is_contiguous()
    torch.testing.assert_close(lse.double(), expected.double(), atol=1e-4, rtol=1e-5)


def test_tangents_are_central_differences(float64):
    q, k, v, block_map, _, tangents, shape = random_case(1, 200, 64, (128, 64), torch.float64)

    def out_at(step):
        moved = (x + step * t for x, t in zip((q, k, v), tangents, strict=True))
        return sparse_attention_with_lse(*moved, block_map, *shape, backend="reference")

    out, lse = out_at(0)
    t_out = sparse_attention_jvp(
        q, k, v, out, lse, *tangents, block_map, *shape, backend="reference"
    )
    difference = (out_at(1e-5)[0] - out_at(-1e-5)[0]) / 2e-5
    assert goldens.relative_error(t_out, difference) <= 1e-8


def test_tangents_and_gradients_are_each_others_transpose(float64):
    """<d_out, J t> = <J^T d_out, t>: what torch checks of forward and backward mode, at any L."""
    q, k, v, block_map, d_out, tangents, shape = random_case(2, 300, 64, (64, 128), torch.float64)
    *_, dq, dk, dv, t_out = all_of_it(
        q, k, v, block_map, d_out, tangents, shape, "reference"
    )  # fmt: skip
    there = (d_out * t_out).sum()
    back = sum((g * t).sum() for g, t in zip((dq, dk, dv), tangents, strict=True))
    torch.testing.assert_close(there, back, atol=1e-9, rtol=1e-9)


def test_the_transposed_map_names_who_selected_a_key_block():
    block_map = random_map(2, 1000, 3, 128, 64, share=0.3).flip(-1)
    n_queries, n_keys = 8, 16
    queries, ends = gradients_reference.transpose_map(block_map, n_keys)
    assert queries.dtype == ends.dtype == torch.int32
    for head, chosen in enumerate(block_map.flatten(0, 1).tolist()):
        for key in range(n_keys):
            begin, end = ends[head * n_keys + key : head * n_keys + key + 2].tolist()
            wanted = [i + head * n_queries for i in range(n_queries) if key in chosen[i]]
            assert queries[begin:end].tolist() == wanted


def test_long_lists_start_first_and_the_others_head_by_head():
    counts = torch.tensor([1, 2, 9, 0, 1, 12, 2, 1], device=DEVICE)
    ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    assert triton_kernels.long_first(ends).tolist() == [5, 2, 0, 1, 3, 4, 6, 7]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "dim", "shape"), CASES)
def test_triton_errs_at_most_twice_as_much_as_torch(length, dim, shape, dtype):
    case = random_case(2, length, dim, shape, dtype, share=0.7)
    expected = exact(*case)
    bounds = torch_errors(*case, expected)
    for found, best, bound in zip(all_of_it(*case, "triton"), expected, bounds, strict=True):
        if best.norm() > 1e-6:  # of a single key's softmax q and k have no gradient
            # Of a single key torch's tangent is exact.
            floor = torch.finfo(dtype).eps if length == 1 else 0
            assert goldens.relative_error(found, best) <= max(2 * bound, floor, 2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", BLOCK_SHAPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("length", [*LENGTHS[1:], 4000])
def test_triton_errs_at_most_twice_as_much_as_torch_at_any_length(length, dim, shape):
    case = random_case(3, length, dim, shape, torch.bfloat16)
    expected = exact(*case)
    bounds = torch_errors(*case, expected)
    for found, best, bound in zip(all_of_it(*case, "triton"), expected, bounds, strict=True):
        assert goldens.relative_error(found, best) <= max(2 * bound, 1e-6)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_key_blocks_that_nobody_selected_get_zeros(backend):
    case = random_case(1, 300, 64, (128, 64), torch.float16)
    q, k, v, block_map, d_out, tangents, shape = case
    block_map = torch.zeros_like(block_map[..., :1]) + 2
    _, _, dk, dv, _ = all_of_it(q, k, v, block_map, d_out, tangents, shape, backend)
    for gradient in (dk, dv):
        assert not gradient[:, :128].any() and not gradient[:, 192:].any()
        assert gradient[:, 128:192].any()


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("length", [1, 130])
def test_all_equal_inputs_give_finite_numbers(length, backend):
    x = torch.full((1, length, 2, 128), 0.75, dtype=torch.float16, device=DEVICE)
    block_map = torch.zeros(1, 2, -(-length // 128), 1, dtype=torch.int32, device=DEVICE)
    out, *rest = all_of_it(x, x, x, block_map, x, (x, x, x), (128, 64), backend)
    torch.testing.assert_close(out, x, atol=1e-3, rtol=0)
    assert all(y.isfinite().all() for y in rest)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_large_scores_give_finite_numbers(backend):
    """Rows past the end and keys past the end have scores of 0, where e^-lse would overflow."""
    q, _, *rest = random_case(1, 200, 64, (128, 64), torch.float16)
    q = q.abs() * 16
    everything = all_of_it(q, -q, *rest, backend)
    assert all(y.isfinite().all() for y in everything)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_order_of_the_indices_does_not_matter(backend):
    case = random_case(1, 300, 64, (128, 64), torch.float16, share=1.0)
    q, k, v, block_map, *rest = case
    found = all_of_it(q, k, v, block_map.flip(-1), *rest, backend)
    for x, best in zip(found, exact(*case), strict=True):
        assert goldens.relative_error(x, best) <= 2e-3


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_takes_expanded_and_strided_gradients_and_tangents(backend):
    q, k, v, block_map, _, _, shape = random_case(1, 130, 64, (128, 64), torch.float16)
    ones = torch.ones_like(v)
    expected = all_of_it(q, k, v, block_map, ones, (ones, ones, ones), shape, backend)
    expanded = torch.ones((), dtype=q.dtype, device=DEVICE).expand(q.shape)
    strided = torch.ones(1, 130, 64, 2, dtype=q.dtype, device=DEVICE).mT
    for x in (expanded, strided):
        found = all_of_it(q, k, v, block_map, x, (x, x, x), shape, backend)
        assert all(torch.equal(y, best) for y, best in zip(found, expected, strict=True))


@pytest.mark.parametrize(("length", "shape"), [(70, (64, 64)), (200, (128, 64)), (130, (64, 128))])
def test_tensor_maps_read_what_pointers_read(length, shape, monkeypatch):
    """Loads by tensor map, as on Hopper and newer, against loads by pointer."""
    case = random_case(2, length, 64, shape, torch.float16, share=0.7)
    monkeypatch.setattr(triton_kernels, "has_tma", lambda device: False)
    expected = all_of_it(*case, "triton")
    if DEVICE == "cpu" or CARD >= (9, 0):
        monkeypatch.setattr(triton_kernels, "has_tma", lambda device: True)
    for found, best in zip(all_of_it(*case, "triton"), expected, strict=True):
        torch.testing.assert_close(found, best, atol=2e-3, rtol=2e-3)


def test_the_forward_is_the_one_without_gradients():
    q, k, v, block_map, *_ = random_case(2, 200, 64, (128, 64), torch.float16)
    for backend in ("reference", "triton"):
        out, _ = sparse_attention_with_lse(q, k, v, block_map, backend=backend)
        plain = sparse_attention(q, k, v, block_map, backend=backend)
        torch.testing.assert_close(out, plain, atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
def test_the_same_inputs_give_the_same_bits():
    case = random_case(2, 4000, 128, (128, 64), torch.bfloat16)
    first = all_of_it(*case, "triton")
    for _ in range(3):
        again = all_of_it(*case, "triton")
        assert all(torch.equal(x, y) for x, y in zip(again, first, strict=True))


@pytest.mark.gpu
def test_a_gpu_compiles_nothing_for_a_new_length_or_topk():
    shape = 128, 64
    all_of_it(*random_case(1, 1560, 128, shape, torch.bfloat16, share=0.1), "triton")
    with compilations.counted() as again:
        for length, share in [(3600, 0.1), (1560, 0.5), (1001, 0.1)]:
            all_of_it(*random_case(2, length, 128, shape, torch.bfloat16, share), "triton")
    assert again == []


@pytest.mark.gpu
def test_gradients_beyond_two_billion_elements():
    """Addresses of the last rows do not fit 32 bits."""
    if torch.cuda.mem_get_info()[0] < 48 * 2**30:
        pytest.skip("needs 48 GB of free GPU memory")
    heads, n_queries = 40, 2**31 // (40 * 128 * 128) + 4
    shape = 1, n_queries * 128, heads, 128
    q, k, v, d_out = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    query = torch.arange(n_queries, device="cuda", dtype=torch.int32)
    block_map = torch.stack([query, query + n_queries], -1).expand(1, heads, -1, -1).contiguous()
    out, lse = sparse_attention_with_lse(q, k, v, block_map)
    dq, dk, dv = sparse_attention_backward(q, k, v, out, lse, d_out, block_map)

    def last(x, block, rows):
        return x[:, block * rows : (block + 1) * rows, -1:].transpose(1, 2).double()

    # The last query block sees two key blocks, which nobody else sees.
    keys, values = (
        torch.cat([last(x, n_queries - 1, 64), last(x, 2 * n_queries - 1, 64)], 2) for x in (k, v)
    )
    leaves = [x.requires_grad_() for x in (last(q, n_queries - 1, 128), keys, values)]
    best = torch.nn.functional.scaled_dot_product_attention(*leaves)
    best = torch.autograd.grad(best, leaves, last(d_out, n_queries - 1, 128))
    assert goldens.relative_error(last(dq, n_queries - 1, 128), best[0]) <= 1e-2
    for found, exact in zip((dk, dv), best[1:], strict=True):
        assert goldens.relative_error(last(found, 2 * n_queries - 1, 64), exact[:, :, 64:]) <= 1e-2


def test_refuses_what_does_not_fit():
    q, k, v, block_map, d_out, tangents, _ = random_case(1, 130, 64, (128, 64))
    out, lse = sparse_attention_with_lse(q, k, v, block_map)
    known = q, k, v, out, lse
    cases = [
        (
            lambda: sparse_attention_with_lse(q, k, v, block_map[0]),
            r"block_map must be \[1, 2, 2, 1\]",
        ),
        (
            lambda: sparse_attention_backward(*known, d_out[:, 1:], block_map),
            r"d_out must match q",
        ),
        (
            lambda: sparse_attention_backward(q, k, v, out, lse[:, 1:], d_out, block_map),
            r"lse must be \[1, 2, 130\]",
        ),
        (
            lambda: sparse_attention_jvp(*known, *tangents[:2], v[..., :1], block_map),
            "tv must have a head dim of 64 or 128, got 1",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match=r"lse must be float32, got torch\.float16"):
        sparse_attention_backward(q, k, v, out, lse.half(), d_out, block_map)
    with pytest.raises(TypeError, match=r"d_out must be torch\.float32 like q, got torch\.float16"):
        sparse_attention_backward(*known, d_out.half(), block_map)
