"""NaN in the shapes and dtypes of a model, where on Hopper the CUDA kernels run.

It spoils what it reaches and nothing else: all the rest has the same bits as without it.
"""

import pytest
import torch
from attention import random_map, random_qkv
from devices import DEVICE
from turbodiffusion_pack.kernels import dispatch
from turbodiffusion_pack.kernels.int8_linear import int8_linear
from turbodiffusion_pack.kernels.int8_quant import quantize_rows
from turbodiffusion_pack.kernels.linear_attention import LinearBranch, key_value_state
from turbodiffusion_pack.kernels.qk_prepare import prepare
from turbodiffusion_pack.kernels.sparse_attention import sage_attention

pytestmark = pytest.mark.gpu
LENGTH, HEADS, ROW, HEAD, CHANNEL = 300, 4, 130, 1, 5  # the row lies in the second block of 128


@pytest.fixture(autouse=True)
def runs_in_cuda_on_hopper():
    heard = []
    with dispatch.listening(lambda op, name, why: heard.append((op, name))):
        yield
    if dispatch.capability(torch.device(DEVICE, 0)) == dispatch.HOPPER:
        names = {name for op, name in heard if op in ("prepare", "int8_linear", "sage_attention")}
        assert names == {dispatch.CUDA}


def spoil(x, place, value=torch.nan):
    """A copy of x with `value` in one place."""
    x = x.clone()
    x[place] = value
    return x


def assert_only(spoiled, clean, bad):
    """`spoiled` is NaN where `bad` says so, and has the bits of `clean` elsewhere."""
    assert spoiled[bad].isnan().all()
    assert torch.equal(spoiled[~bad], clean[~bad])


def prepared(x, weight, quantize=True, linear=True):
    rows = torch.arange(LENGTH, device=DEVICE)[:, None] / 7.0
    angles = (rows * torch.linspace(0.1, 1, 64, device=DEVICE))[None]
    branch = None
    if linear:
        keys = torch.randn(1, LENGTH, HEADS, 128, device=DEVICE, dtype=x.dtype)
        proj = torch.randn(128, 128, device=DEVICE), torch.randn(128, device=DEVICE)
        branch = LinearBranch(*key_value_state(keys, keys), *proj)
    out = torch.empty_like(x)
    return out, prepare(
        x, weight, angles.cos(), angles.sin(), quantize=quantize, out=out, branch=branch
    )


@pytest.mark.parametrize(
    ("dtype", "linear"),
    [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, False)],
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_prepare(value, dtype, linear):
    x = torch.randn(1, LENGTH, HEADS, 128, device=DEVICE).to(dtype)
    weight = torch.randn(HEADS * 128, device=DEVICE)
    torch.manual_seed(1)
    out, clean = prepared(x, weight, linear=linear)
    torch.manual_seed(1)
    spoiled_out, spoiled = prepared(spoil(x, (0, ROW, HEAD, CHANNEL), value), weight, linear=linear)
    # NaN spoils the norm of all heads; infinity makes it 0, and NaN only of itself.
    heads = slice(None) if value != value else slice(HEAD, HEAD + 1)
    blocks = torch.zeros(1, HEADS, 3, dtype=torch.bool, device=DEVICE)
    blocks[:, heads, 1] = True
    assert torch.equal(spoiled.blocks.scale.isnan(), blocks)
    assert torch.equal(spoiled.means.isnan().any(-1), blocks)
    others = torch.arange(3, device=DEVICE) != 1
    for part, whole in zip(spoiled.blocks, clean.blocks, strict=True):
        part, whole = (t.unflatten(2, (3, -1))[:, :, others] for t in (part, whole))
        assert torch.equal(part, whole)
    row = torch.arange(LENGTH, device=DEVICE) == ROW
    assert spoiled_out[:, row, heads].isnan().flatten(0, 2).any(-1).all()
    assert torch.equal(spoiled_out[:, ~row], out[:, ~row])


@pytest.mark.parametrize("quantize", [True, False])
def test_prepare_with_a_spoiled_weight(quantize):
    x = torch.randn(1, LENGTH, HEADS, 128, device=DEVICE).bfloat16()
    weight = spoil(torch.ones(HEADS * 128, device=DEVICE), HEAD * 128 + CHANNEL)
    _, found = prepared(x, weight, quantize, linear=False)
    heads = torch.arange(HEADS, device=DEVICE) == HEAD
    assert torch.equal(found.means.isnan().any(-1).all(-1)[0], heads)
    if quantize:
        assert torch.equal(found.blocks.scale.isnan().all(-1)[0], heads)
        assert found.blocks.scale[:, ~heads].isfinite().all()


@pytest.mark.parametrize("name", "qkv")
def test_attention_in_fp8(name):
    if not dispatch.has_fp8(torch.device(DEVICE, 0)):
        pytest.skip("this GPU has no fp8")
    tensors = dict(zip("qkv", random_qkv(1, LENGTH, HEADS, 128, torch.bfloat16), strict=True))
    block_map = random_map(1, LENGTH, HEADS, 128, 64, share=0.8)
    clean = sage_attention(**tensors, block_map=block_map, pv="fp8")
    tensors[name] = spoil(tensors[name], (0, ROW, HEAD, CHANNEL))
    bad = torch.zeros_like(clean, dtype=torch.bool)
    place = {"q": (0, slice(128, 256), HEAD), "k": (0, slice(None), HEAD)}
    bad[place.get(name, (0, slice(None), HEAD, CHANNEL))] = True
    assert_only(sage_attention(**tensors, block_map=block_map, pv="fp8"), clean, bad)


@pytest.mark.parametrize("name", ["x_scale", "w_scale", "bias", "gate", "residual"])
def test_int8_linear(name):
    x, w = torch.randn(1, LENGTH, 384, device=DEVICE), torch.randn(512, 384, device=DEVICE)
    (x_q, x_scale), (w_q, w_scale) = quantize_rows(x), quantize_rows(w)
    operands = {
        "x_scale": x_scale,
        "w_scale": w_scale,
        "bias": torch.randn(512, device=DEVICE).bfloat16(),
        "gate": torch.randn(1, 1, 512, device=DEVICE),
        "residual": torch.randn(1, LENGTH, 512, device=DEVICE).bfloat16(),
    }
    clean = int8_linear(x_q, w_q=w_q, **operands)
    place = {"x_scale": (0, ROW), "gate": (0, 0, CHANNEL), "residual": (0, ROW, CHANNEL)}
    operands[name] = spoil(operands[name], place.get(name, CHANNEL))
    bad = torch.zeros_like(clean, dtype=torch.bool)
    reached = {"x_scale": (0, ROW), "residual": (0, ROW, CHANNEL)}
    bad[reached.get(name, (0, slice(None), CHANNEL))] = True
    assert_only(int8_linear(x_q, w_q=w_q, **operands), clean, bad)
