"""Gradients and tangents of sparse-linear attention: the original's, and float64 autograd's."""

import goldens
import pytest
import torch
from attention import (
    BLOCK_SHAPES,
    linear_branch,
    random_map,
    random_proj,
    random_qkv,
    selected_keys,
)
from devices import BATCHES, DEVICE, LENGTHS
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from turbodiffusion_pack.kernels import checks, dispatch
from turbodiffusion_pack.kernels.block_map import block_map
from turbodiffusion_pack.kernels.derivatives import asked_for
from turbodiffusion_pack.kernels.linear_attention import FEATURE_MAPS
from turbodiffusion_pack.kernels.sla import sla

BACKENDS = ("reference", "triton")
GPU = pytest.mark.gpu
NAMES = "q", "k", "v", "proj_w", "proj_b"
SHAPES = ((128, 64), (64, 64))  # query and key blocks that are trained with
BOUND = 5e-3


@pytest.fixture
def float64(monkeypatch):
    """Lets the references compute in float64, where no rounding hides a wrong formula."""
    monkeypatch.setattr(checks, "DTYPES", (torch.float64,))
    monkeypatch.setattr(dispatch, "triton_unavailable", lambda device: "no kernel has float64")


def inputs(batch, length, dim, dtype=torch.float64):
    """q, k, v, weight and bias; a gradient of the result; tangents of the inputs."""
    qkv, tangents = (random_qkv(batch, length, 2, dim, dtype) for _ in range(2))
    proj, t_proj = random_proj(dim), random_proj(dim)
    if dtype == torch.float64:
        proj, t_proj = ([x.double() for x in pair] for pair in (proj, t_proj))
    return (*qkv, *proj), random_qkv(batch, length, 2, dim, dtype)[0], (*tangents, *t_proj)


def ours(chosen=None, **options):
    """SLA of q, k, v and, if there is one, the projection."""

    def attend(q, k, v, *proj):
        return sla(q, k, v, proj or None, block_map=chosen, **options)

    return attend


def paper(chosen, block_q=128, block_k=64, feature_map="softmax"):
    """The same by formulas that know no blocks but as a mask, in the inputs' dtype."""

    def attend(q, k, v, *proj):
        hidden = ~selected_keys(chosen, q.shape[1], block_q, block_k)
        scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        sparse = (weights @ v.transpose(1, 2)).transpose(1, 2)
        return sparse + linear_branch(q, k, v, *proj, feature_map) if proj else sparse

    return attend


def gradients(attend, x, d_out):
    x = [y.detach().clone().requires_grad_() for y in x]
    attend(*x).backward(d_out)
    return [y.grad for y in x]


def tangent(attend, x, tangents):
    return torch.func.jvp(attend, tuple(x), tuple(tangents))[1]


def errors(out, exact):
    """Relative errors, to a tenth of v's where less than that is left: what a single key gives to q
    and k cancels."""
    floor = 0.1 * exact[2].norm().item()
    return {
        name: (y.double() - x).norm().item() / max(x.norm().item(), floor)
        for name, y, x in zip(NAMES, out, exact, strict=False)
    }


def double(tensors):
    return [x.double() for x in tensors]


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=GPU)])
def test_equals_the_original(backend):
    data = goldens.load("operators")
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    qkv = (data[f"sla1.{x}"].to(DEVICE, dtype).transpose(1, 2) for x in "qkv")
    x = *qkv, data["sla1.proj_w"].to(DEVICE), data["sla1.proj_b"].to(DEVICE)
    selected = data["sla1.map.128x64"].to(DEVICE)
    chosen = selected.nonzero()[:, -1].int().view(*selected.shape[:3], -1)
    d_out = data["sla1.grad_out"].to(DEVICE, dtype)
    out = gradients(ours(chosen, backend=backend), x, d_out)
    original = [data[f"sla1.grad_{name}"].to(DEVICE) for name in NAMES]
    for name, gradient, expected in zip(NAMES[1:], out[1:], original[1:], strict=True):
        assert goldens.relative_error(gradient, expected) <= BOUND, name
    # The original's row sums of d_out * out are off by 6e-3 in bf16; each moves its query's
    # gradient along the mean of the keys. Float64 autograd is as far from it, 1.4e-2.
    assert goldens.relative_error(out[0], original[0]) <= 3 * BOUND
    off, mean_key = out[0].double() - original[0], sla(x[0], x[1], x[1], None, block_map=chosen)
    along = torch.nn.functional.normalize(mean_key.double(), dim=-1)
    rest = off - (off * along).sum(-1, keepdim=True) * along
    assert rest.norm() <= BOUND * original[0].double().norm()


def check(x, d_out, tangents, chosen, bound=1e-9, **options):
    """Gradients and tangents beside those of the paper's formulas."""
    exact = gradients(paper(chosen, **options), double(x), d_out.double())
    assert max(errors(gradients(ours(chosen, **options), x, d_out), exact).values()) <= bound
    exact = tangent(paper(chosen, **options), double(x), double(tangents))
    assert goldens.relative_error(tangent(ours(chosen, **options), x, tangents), exact) <= bound


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("length", LENGTHS)
def test_any_length(length, batch, float64):
    x, d_out, tangents = inputs(batch, length, 64)
    check(x, d_out, tangents, block_map(x[0], x[1], 0.3))


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("shape", BLOCK_SHAPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_every_option(dim, shape, feature_map, float64):
    x, d_out, tangents = inputs(2, 300, dim)
    options = {"block_q": shape[0], "block_k": shape[1], "feature_map": feature_map}
    check(x, d_out, tangents, random_map(2, 300, 2, *shape), **options)


def test_without_a_projection(float64):
    (*x, _, _), d_out, tangents = inputs(1, 300, 64)
    chosen = random_map(1, 300, 2, 128, 64)
    chosen[0, 0] = chosen.new_tensor([1, 3])  # of five
    check(x, d_out, tangents[:3], chosen)
    dk = gradients(ours(chosen), x, d_out)[1][0, :, 0]
    assert [bool(dk[64 * i : 64 * i + 64].any()) for i in range(5)] == [
        False,
        True,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("wanted", NAMES)
def test_of_one_input_alone(wanted, float64):
    x, d_out, tangents = inputs(1, 130, 64)
    index = NAMES.index(wanted)
    chosen = block_map(x[0], x[1], 0.3)

    def alone(attend):
        return lambda y: attend(*x[:index], y, *x[index + 1 :])

    for differentiate, change in ((gradients, d_out), (tangent, tangents[index : index + 1])):
        out, exact = (differentiate(alone(f(chosen)), [x[index]], change) for f in (ours, paper))
        torch.testing.assert_close(out, exact, rtol=0, atol=1e-9)


def test_the_tangent_is_the_limit_of_differences(float64):
    x, _, tangents = inputs(1, 200, 64)
    attend, step = ours(block_map(x[0], x[1], 0.3)), 1e-5

    def at(place):
        moved = (y + place * t for y, t in zip(x, tangents, strict=True))
        return attend(*(y.requires_grad_() for y in moved)).detach()

    differences = (at(step) - at(-step)) / (2 * step)
    assert goldens.relative_error(tangent(attend, x, tangents), differences) <= 1e-8


def test_the_selection_is_that_without_gradients():
    x, d_out, tangents = inputs(1, 300, 64, torch.float32)
    chosen = block_map(x[0], x[1], 0.3)
    for differentiate, change in ((gradients, d_out), (tangent, tangents)):
        selected, given = (differentiate(ours(c, topk=0.3), x, change) for c in (None, chosen))
        torch.testing.assert_close(selected, given, rtol=0, atol=0)
    recorded = ours(topk=0.3)(*(y.detach().requires_grad_() for y in x))
    assert goldens.relative_error(recorded, ours(topk=0.3)(*x)) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_equals_the_reference(shape, dtype):
    dtype = torch.bfloat16 if DEVICE == "cuda" else dtype
    x, d_out, tangents = inputs(1, 130, 64, dtype)
    options = {"topk": 0.7, "block_q": shape[0], "block_k": shape[1]}
    attend = {backend: ours(backend=backend, **options) for backend in BACKENDS}
    bound = max(4 * torch.finfo(dtype).eps, 2e-6)
    expected, out = (gradients(attend[backend], x, d_out) for backend in BACKENDS)
    assert max(errors(out, double(expected)).values()) <= bound
    with torch.no_grad():
        expected, out = (tangent(attend[backend], x, tangents) for backend in BACKENDS)
    assert goldens.relative_error(out, expected) <= bound


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("length", [*LENGTHS, 4001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_triton_errs_at_most_twice_as_much_as_torch(dtype, length, shape):
    x, d_out, tangents = inputs(3, length, 128, dtype)
    chosen = random_map(3, length, 2, *shape)
    options = {"block_q": shape[0], "block_k": shape[1]}
    exact = gradients(paper(chosen, *shape), double(x), d_out.double())
    bounds = errors(gradients(paper(chosen, *shape), x, d_out), exact)
    out, least = gradients(ours(chosen, backend="triton", **options), x, d_out), 1e-3
    for name, error in errors(out, exact).items():
        assert error <= max(2 * bounds[name], least), name
    exact = tangent(paper(chosen, *shape), double(x), double(tangents))
    torchs = tangent(paper(chosen, *shape), x, tangents)
    out = tangent(ours(chosen, backend="triton", **options), x, tangents)
    bound = 2 * goldens.relative_error(torchs, exact)
    assert goldens.relative_error(out, exact) <= max(bound, least)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("length", "value"), [(1, 0.0), (130, 0.0), (130, 3.0)])
def test_equal_inputs_are_no_nan(length, value, backend):
    x = torch.full((1, length, 1, 64), value, dtype=torch.float16, device=DEVICE)
    inputs = x, x, x, *random_proj(64)
    attend = ours(topk=0.001, backend=backend)
    out = *gradients(attend, inputs, x), tangent(attend, inputs, inputs)
    assert all(y.isfinite().all() for y in out)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(reentrant):
    """The second forward selects what the first did, and is used twice."""
    x, d_out, _ = inputs(1, 300, 64, torch.float32)

    def twice(q, k, v, *proj):
        attend = ours(topk=0.3)
        return attend(attend(q, k, v, *proj), k, v, *proj)

    def checkpointed(*x):
        return checkpoint(twice, *x, use_reentrant=reentrant)

    for out, expected in zip(
        gradients(checkpointed, x, d_out), gradients(twice, x, d_out), strict=True
    ):
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


def taken_by(backend):
    """Triton takes float32 in its interpreter alone."""
    return torch.bfloat16 if (DEVICE, backend) == ("cuda", "triton") else torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_dual_tensors_need_no_torch_func(backend):
    x, _, tangents = inputs(1, 65, 64, taken_by(backend))
    attend = ours(topk=0.5, backend=backend)
    expected = tangent(attend, x, tangents)
    with torch.no_grad(), forward_ad.dual_level():
        duals = [forward_ad.make_dual(y, t) for y, t in zip(x, tangents, strict=True)]
        out = forward_ad.unpack_dual(attend(*duals)).tangent
        torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_func_takes_gradients_too(backend):
    x, d_out, _ = inputs(1, 65, 64, taken_by(backend))
    attend = ours(topk=0.5, backend=backend)
    out = torch.func.grad(lambda *x: (attend(*x) * d_out).sum(), argnums=tuple(range(5)))(*x)
    assert max(errors(out, double(gradients(attend, x, d_out))).values()) <= 1e-6


def test_autocast_rounds_no_sums():
    x, d_out, tangents = inputs(1, 300, 64, torch.bfloat16)
    attend = ours(topk=0.3)
    with torch.no_grad():
        expected = attend(*x)
    for differentiate, change in ((gradients, d_out), (tangent, tangents)):
        alone = differentiate(attend, x, change)
        with torch.autocast(DEVICE, torch.bfloat16):
            torch.testing.assert_close(differentiate(attend, x, change), alone, rtol=0, atol=0)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(attend(*x), expected)


def test_refuses_what_has_no_gradients():
    x, d_out, tangents = inputs(1, 130, 64, torch.float32)
    for differentiate, change in ((gradients, d_out), (tangent, tangents)):
        with pytest.raises(ValueError, match=r"low bits have no gradients.*Pass low_bit=False"):
            differentiate(ours(low_bit=True), x, change)
    q = x[0].detach().clone().requires_grad_()
    (d_q,) = torch.autograd.grad(ours()(q, *x[1:]).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        d_q.sum().backward()


def test_in_inference_mode_nobody_differentiates():
    """Nor does torch, so the kernels without gradients may run."""
    x = torch.ones(3, requires_grad=True)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(3), torch.ones(3))
        assert asked_for(x) and asked_for(dual)
        with torch.inference_mode():
            assert not asked_for(x, dual)
            assert forward_ad.unpack_dual(2 * dual).tangent is None
            assert not (2 * x).requires_grad
