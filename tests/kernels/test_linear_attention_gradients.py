"""Gradients and tangents of the linear branch: float64 autograd, and Triton beside torch's own."""

import goldens
import pytest
import torch
from attention import linear_branch, random_proj, random_qkv
from devices import BATCHES, DEVICE, LENGTHS, TRITON_DTYPES
from turbodiffusion_pack.kernels import checks
from turbodiffusion_pack.kernels.linear_attention import (
    FEATURE_MAPS,
    LinearBranch,
    gradients_reference,
    key_value_state,
    linear_attention_backward,
    linear_attention_jvp,
    triton_kernels,
)

# On a GPU float32 is the reference's: its tiles do not fit.
DTYPES = TRITON_DTYPES if DEVICE == "cpu" else TRITON_DTYPES[1:]
BACKENDS = ("reference", "triton")
NAMES = "dq", "dk", "dv", "d_weight", "d_bias"


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """So that each goes through several tiles of the few rows here."""
    monkeypatch.setattr(triton_kernels, "PROGRAMS", 8)
    monkeypatch.setattr(triton_kernels, "multiprocessors", lambda device: 1)


@pytest.fixture
def float64(monkeypatch):
    """Lets the references compute in float64, where no rounding hides a wrong formula."""
    monkeypatch.setattr(checks, "DTYPES", (torch.float64,))


def inputs(batch, length, dim, dtype):
    """q, k, v and the projection, a gradient of the result, and tangents of those five."""
    (*qkv, d_out), tangents = (
        [y for _ in range(2) for y in random_qkv(batch, length, 2, dim, dtype)][:n] for n in (4, 3)
    )
    proj, t_proj = random_proj(dim), random_proj(dim)
    if dtype == torch.float64:
        proj, t_proj = ([y.double() for y in pair] for pair in (proj, t_proj))
    return (*qkv, *proj), d_out, (*tangents, *t_proj)


def paper_gradients(x, d_out, feature_map):
    """Autograd's, through the branch as the paper writes it, in the inputs' dtype."""
    x = [y.detach().clone().requires_grad_() for y in x]
    return torch.autograd.grad(linear_branch(*x, feature_map), x, d_out)


def paper_tangent(x, tangents, feature_map):
    return torch.func.jvp(lambda *x: linear_branch(*x, feature_map), x, tangents)[1]


def our_branch(k, v, weight, bias, feature_map, backend):
    return LinearBranch(*key_value_state(k, v, feature_map, backend), weight, bias, feature_map)


def our_gradients(x, d_out, feature_map, backend):
    onto = [torch.zeros(y.shape, dtype=y.dtype, device=y.device) for y in x[:3]]
    branch = our_branch(*x[1:], feature_map, backend)
    d_proj = linear_attention_backward(*x[:3], branch, d_out, onto, backend)
    return *onto, *d_proj


def our_tangent(x, tangents, feature_map, backend):
    branch = our_branch(*x[1:], feature_map, backend)
    return linear_attention_jvp(*x[:3], branch, tangents, backend)


def double(tensors):
    return tuple(y.double() for y in tensors)


def errors(out, exact):
    """Relative errors, to a tenth of dv where less than that is left: what a single key gives to q
    and k cancels but for the epsilon of the divisor."""
    floor = 0.1 * exact[2].norm().item()
    return {
        name: (y.double() - x).norm().item() / max(x.norm().item(), floor)
        for name, y, x in zip(NAMES, out, exact, strict=True)
    }


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("length", LENGTHS)
def test_reference_is_the_derivative(length, batch, feature_map, float64, monkeypatch):
    monkeypatch.setattr(gradients_reference, "ROWS", 300)
    x, d_out, tangents = inputs(batch, length, 64, torch.float64)
    out = our_gradients(x, d_out, feature_map, "reference")
    assert max(errors(out, paper_gradients(x, d_out, feature_map)).values()) <= 1e-9
    t_out = our_tangent(x, tangents, feature_map, "reference")
    assert goldens.relative_error(t_out, paper_tangent(x, tangents, feature_map)) <= 1e-9


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize(("length", "dim"), [(7, 64), (65, 128), (100, 64)])
def test_triton_errs_at_most_twice_as_much_as_torch(length, dim, feature_map, dtype):
    check_beside_torch(inputs(2, length, dim, dtype), feature_map)


@pytest.mark.gpu
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("length", [*LENGTHS[1:], 32760])
def test_triton_errs_at_most_twice_as_much_as_torch_at_any_length(length, feature_map):
    check_beside_torch(inputs(3, length, 128, torch.bfloat16), feature_map)


def check_beside_torch(problem, feature_map):
    x, d_out, tangents = problem
    dtype = d_out.dtype
    exact = paper_gradients(double(x), d_out.double(), feature_map)
    bounds = errors(paper_gradients(x, d_out, feature_map), exact)
    least = max(torch.finfo(dtype).eps / 4, 1e-6)
    for name, error in errors(our_gradients(x, d_out, feature_map, "triton"), exact).items():
        assert error <= max(2 * bounds[name], least), name
    exact = paper_tangent(double(x), double(tangents), feature_map)
    bound = goldens.relative_error(paper_tangent(x, tangents, feature_map), exact)
    error = goldens.relative_error(our_tangent(x, tangents, feature_map, "triton"), exact)
    assert error <= max(2 * bound, least)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("length", [1, 70])
def test_gradients_are_added_to_what_is_there(length, feature_map, backend):
    x, d_out, _ = inputs(1, length, 64, DTYPES[0])
    branch = our_branch(*x[1:], feature_map, backend)
    onto = [torch.ones(y.shape, dtype=y.dtype, device=DEVICE) for y in x[:3]]
    linear_attention_backward(*x[:3], branch, d_out, onto, backend)
    # In float32 softmax's gradients came to 19 of these over 60 seeds; one not added is off by 1.
    tolerance = (40 if x[0].dtype == torch.float32 else 10) * torch.finfo(x[0].dtype).eps
    for there, alone in zip(onto, our_gradients(x, d_out, feature_map, "reference"), strict=False):
        torch.testing.assert_close(there, alone + 1, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_every_time(backend):
    x, d_out, _ = inputs(1, 300, 64, torch.float16)
    first, second = (our_gradients(x, d_out, "softmax", backend) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e-5, 1e3])
def test_small_and_large_gradients_fit_float16(size, backend):
    """dG is a sum over all queries, d(state) a mean: neither may leave float16 on the way."""
    x, d_out, _ = inputs(1, 300, 64, torch.float16)
    d_out = (d_out * size).half()
    exact = paper_gradients(double(x), d_out.double(), "softmax")
    unavoidable = errors([y.half() for y in exact], exact)
    for name, error in errors(our_gradients(x, d_out, "softmax", backend), exact).items():
        assert error <= 3 * max(unavoidable[name], 5e-4), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("value", [0.0, -0.5])
def test_equal_inputs_are_no_nan(value, feature_map, backend):
    """With relu neither queries nor keys have a positive channel then."""
    x = torch.full((1, 130, 2, 64), value, dtype=torch.float16, device=DEVICE)
    gradients = our_gradients((x, x, x, *random_proj(64)), x, feature_map, backend)
    tangent = our_tangent(
        (x, x, x, *random_proj(64)), (x, x, x, *random_proj(64)), feature_map, backend
    )
    assert all(y.isfinite().all() for y in (*gradients, tangent))


def test_refuses_what_does_not_fit():
    (q, k, v, *proj), d_out, tangents = inputs(1, 70, 64, torch.float32)
    branch = our_branch(k, v, *proj, "softmax", "reference")
    onto = [torch.zeros(1, 70, 2, 64, device=DEVICE) for _ in "qkv"]
    narrow = branch._replace(normalizer=branch.normalizer[:, :1])
    for arguments, message in (
        ((branch, d_out[:, 1:], onto), "d_out must match q"),
        ((narrow, d_out, onto), r"normalizer must be \[1, 2, 64\]"),
        ((branch, d_out, [q, *onto[1:]]), "onto must be contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_attention_backward(q, k, v, *arguments)
    with pytest.raises(ValueError, match="tv must match q"):
        linear_attention_jvp(q, k, v, branch, (*tangents[:2], v[:, 1:], *tangents[3:]))
