"""Gradients through a MODEL: right, or refused with a reason; held against central differences."""

import contextlib
import itertools
import logging

import goldens
import in_comfyui
import pytest
import torch
from in_comfyui import comfy
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from turbodiffusion_pack.kernels.block_map import block_map
from turbodiffusion_pack.turbo_core import run_report
from turbodiffusion_pack.turbo_core.host import self_attention
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model
from turbodiffusion_pack.turbo_core.host.patch import patch_attention
from turbodiffusion_pack.turbo_core.host.self_attention import sla
from turbodiffusion_pack.turbo_core.sla_settings import SLASettings

wrapped = pytest.mark.skipif(
    in_comfyui.DYNAMIC, reason="dynamic VRAM leaves out what is added to small weights"
)
BLOCK = "diffusion_model.blocks.0"
ADDED = [
    f"{BLOCK}.self_attn.q.weight",
    f"{BLOCK}.self_attn.norm_k.weight",
    f"{BLOCK}.self_attn.o.bias",
    f"{BLOCK}.cross_attn.k.weight",
    f"{BLOCK}.ffn.0.weight",
]


@pytest.fixture(autouse=True)
def recording(monkeypatch):
    # Newer hosts rotate by a kernel without gradients unless their train node runs.
    monkeypatch.setattr(comfy.model_management, "in_training", True, raising=False)
    with torch.inference_mode(False), torch.enable_grad():
        yield


@pytest.fixture(scope="module")
def int8_wan(paths):
    return _untrained(paths[0])


@pytest.fixture(scope="module")
def float_wan(paths):
    return _untrained(paths[1])


def _untrained(path):
    with torch.inference_mode(False):
        model = load_turbo_model(path)
    model.model.requires_grad_(False)
    return model


class Added(torch.nn.Module):
    """What the host's training adds to a weight at each use."""

    def __init__(self, shape):
        super().__init__()
        self.difference = torch.nn.Parameter(torch.zeros(shape))

    def forward(self, weight):
        return weight + self.difference.to(weight)


def _with_added(model, names=ADDED):
    """A clone of `model`, and by name what is added to its weights."""
    model, added = model.clone(), {}
    for name in names:
        added[name] = Added(comfy.utils.get_attr(model.model, name).shape)
        model.add_weight_wrapper(name, added[name])
    return model, {name: module.difference for name, module in added.items()}


def _velocity(model, x=None):
    data = goldens.load("forward")
    x = data["t2v.even.x"] if x is None else x
    return in_comfyui.velocity(model, x, data["t2v.even.context"].clone(), 987.5)


def _gradients(model, x):
    """Of the velocity along one direction: by name, x first, what each tensor gets."""
    model, added = _with_added(model)
    out = _velocity(model, x)
    (out * _direction(out, 1)).sum().backward()
    return model, {"x": x, **added}


def _direction(like, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator).to(like)


def _by_differences(run, tensor, direction, step=3e-3):
    """Derivative of run() along `direction` of `tensor`."""
    values = []
    for change in (step, -step):
        with torch.no_grad():
            tensor.add_(direction, alpha=change)
        values.append(run().item())
        with torch.no_grad():
            tensor.sub_(direction, alpha=change)
    return (values[0] - values[1]) / (2 * step)


def _fix_block_maps(monkeypatch):
    """Give every SLA call the key blocks that its block selected at first: a gradient knows no
    other selection."""
    whole, maps, calls = sla, [], itertools.count()

    def fixed(q, k, v, proj, topk, **options):
        index = next(calls) % 2
        if index == len(maps):
            maps.append(block_map(q.detach(), k.detach(), topk, backend="reference"))
        return whole(q, k, v, proj, topk=topk, block_map=maps[index], **options)

    monkeypatch.setattr(self_attention, "sla", fixed)


@pytest.fixture
def x():
    return goldens.load("forward")["t2v.even.x"].float().clone().requires_grad_()


@wrapped
def test_float_weights_and_loras_get_their_gradients(float_wan, x, monkeypatch):
    """Off by at most 1e-2; a gradient of nothing is 1 off."""
    _fix_block_maps(monkeypatch)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    sparse = patch_attention(float_wan, SLASettings("sagesla", 0.34))
    sparse.set_model_compute_dtype(torch.float32)  # on a GPU too; differences vanish in bf16
    model, tensors = _gradients(sparse, x)

    def run():
        out = _velocity(model, x)
        return (out * _direction(out, 1)).sum()

    for name, tensor in tensors.items():
        direction = _direction(tensor, 2)
        expected = _by_differences(run, tensor, direction)
        assert (tensor.grad * direction).sum().item() == pytest.approx(expected, rel=3e-2), name


@wrapped
@pytest.mark.parametrize("attention", ["dense", "sagesla"])
def test_int8_weights_pass_the_gradients_of_the_float_ones(float_wan, int8_wan, x, attention):
    """Within INT8's own error: 2.5e-2 here; a gradient of nothing is 1 off."""
    gradients = []
    for wan in (float_wan, int8_wan):
        x.grad = None
        # All blocks: near-ties of the selection fall otherwise in INT8.
        patched = patch_attention(wan, SLASettings(attention, 1.0))
        tensors = _gradients(patched, x)[1]
        gradients.append({name: tensor.grad.clone() for name, tensor in tensors.items()})
    for name, expected in gradients[0].items():
        assert goldens.relative_error(gradients[1][name], expected) < 0.1, name


@contextlib.contextmanager
def _training(model, *names):
    """While this lasts the weights `names` of blocks.1 ask for gradients, wherever the host moves
    them. Gives a function that returns them: moved ones are others."""

    def weights():
        return [comfy.utils.get_attr(model.model, f"diffusion_model.blocks.1.{n}") for n in names]

    try:
        for weight in weights():
            weight.requires_grad_(True)
        model.model._apply(torch.Tensor.clone)  # as the host moves it to a GPU
        yield weights
    finally:
        for weight in weights():
            weight.requires_grad_(False).grad = None


def test_trained_weights_get_gradients(float_wan):
    """Not only what is added to them."""
    names = "self_attn.q.weight", "self_attn.proj_l.weight", "ffn.2.weight"
    with _training(float_wan, *names) as weights:
        if in_comfyui.DYNAMIC:
            with pytest.raises(ValueError, match=r"streams from RAM.*--disable-dynamic-vram"):
                _velocity(float_wan)
            return
        _velocity(float_wan).sum().backward()
        assert [weight.grad.abs().sum() > 0 for weight in weights()] == [True] * 3


def test_an_int8_weight_cannot_be_trained(int8_wan):
    # torch itself refuses ComfyUI 0.3.75's tensors.
    refused = r"only Tensors of floating point|an INT8 weight is asked.*Train a LoRA on it"
    with (
        pytest.raises((RuntimeError, ValueError), match=refused),
        _training(int8_wan, "ffn.0.weight"),
    ):
        _velocity(int8_wan)


@pytest.mark.parametrize("attention", ["dense", "sagesla"])
def test_tangents_pass_like_gradients(int8_wan, x, attention, monkeypatch):
    """Forward mode: the same derivative along one direction of x and one of the velocity."""
    _fix_block_maps(monkeypatch)
    model = patch_attention(int8_wan, SLASettings(attention, 0.34))
    model.set_model_compute_dtype(torch.float32)
    out, along = _velocity(model, x), _direction(x, 2)
    (out * _direction(out, 1)).sum().backward()
    expected = (x.grad * along).sum().item()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(
            _velocity(model, forward_ad.make_dual(x.detach(), along))
        ).tangent
    assert (tangent * _direction(out, 1)).sum().item() == pytest.approx(expected, rel=1e-3)


def test_the_report_says_why(int8_wan, x, caplog):
    caplog.set_level(logging.INFO)
    with run_report.run():
        _velocity(int8_wan, x)
    (line,) = (m for m in caplog.messages if "forward pass" in m)
    for part in (
        "not fused in blocks 0-1: gradients are asked for",
        "SLA in 2 of 2 blocks; sla top-k 0.1 (16 bit",
        "torch reference, as gradients are asked for",
        "INT8 fast (per token and channel) in 4 linears",  # of the text, which x does not reach
    ):
        assert part in line
    assert "; fused" not in line


def test_without_gradients_all_is_as_ever(int8_wan, x):
    with torch.no_grad():
        expected = _velocity(int8_wan, x)
    with torch.inference_mode():
        assert torch.equal(_velocity(int8_wan, x), expected)
    with run_report.run() as report:  # recording is on, but nothing asks for a gradient
        assert torch.equal(_velocity(int8_wan), expected)
    assert report.counts.fused == {0, 1}


@pytest.mark.parametrize("asked", ["residual", "residual_scale"])
def test_what_is_added_to_an_int8_linear_gets_its_gradient(int8_wan, asked):
    linear = int8_wan.model.diffusion_model.blocks[0].ffn[2]
    device = in_comfyui.DEVICE
    x = torch.ones(1, 8, linear.in_features, device=device)
    added = {
        "residual": torch.zeros(1, 8, linear.out_features, device=device),
        "residual_scale": torch.ones(1, 1, linear.out_features, device=device),
    }
    added[asked].requires_grad_()
    linear(x, **added).sum().backward()
    assert added[asked].grad.abs().sum() > 0


@wrapped
def test_a_model_as_the_train_node_has_it(paths, x):
    """Loaded in inference mode, as by any node, with something added to every weight and bias."""
    with torch.inference_mode():
        model = load_turbo_model(paths[0])
    model.model._apply(torch.Tensor.clone)  # as on a GPU, where the node moves it outside of it
    ops = (n for n, m in model.model.named_modules() if hasattr(m, "weight_function"))
    names = [f"{op}.{part}" for op in ops for part in ("weight", "bias")]
    parameters = {name for name, _ in model.model.named_parameters()}
    model, added = _with_added(model, [name for name in names if name in parameters])
    model.set_model_compute_dtype(torch.bfloat16)
    model.model.requires_grad_(False)
    _velocity(model).square().sum().backward()
    assert len(added) > 50
    assert [name for name, tensor in added.items() if not tensor.grad.abs().sum() > 0] == []


@wrapped
@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sla", "sagesla", "dense"])
def test_gradients_on_a_gpu_are_those_of_the_reference(float_wan, x, attention):
    """SLA's own kernels have gradients; of others nothing may be left on the way."""
    gradients = []
    for backend in ("auto", "reference"):
        x.grad = None
        settings = SLASettings(attention, 0.34, backend=backend)
        patched = patch_attention(float_wan, settings)
        with run_report.run() as report:
            tensors = _gradients(patched, x)[1]
        ran = ("sparse_attention_with_lse", "Triton", None) in report.counts.kernels
        assert ran == (backend == "auto" and attention != "dense")
        gradients.append([tensor.grad.clone() for tensor in tensors.values()])
    for gradient, expected in zip(*gradients, strict=True):
        # Both round to bf16 on their way: 2.5e-2 on an H100.
        assert goldens.relative_error(gradient, expected) < 4e-2
        assert gradient.abs().sum() > 0
