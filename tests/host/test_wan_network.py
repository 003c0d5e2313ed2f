"""ComfyUI's WanModel as a network to train: the host's own answers, gradients and tangents."""

import in_comfyui  # noqa: F401 - ComfyUI comes into the process with it
import pytest
import torch
from comfy.ldm.wan.model import WanModel
from torch.func import jvp
from turbodiffusion_pack.turbo_core.checkpoint import CheckpointError
from turbodiffusion_pack.turbo_core.checkpoint.sizes import Sizes
from turbodiffusion_pack.turbo_core.host.wan_network import build_network, load_weights
from turbodiffusion_pack.turbo_core.training.initial_weights import initial_weights
from turbodiffusion_pack.turbo_core.training.recorded import Backward

SLA = {"topk": 0.5, "block_q": 64, "block_k": 64}


@pytest.fixture(autouse=True)
def outside_inference_mode():
    with torch.inference_mode(False):
        yield


def sizes(in_channels=16) -> Sizes:
    return Sizes(dim=256, ffn_dim=256, num_layers=2, in_channels=in_channels)


def random_weights(sizes: Sizes) -> dict[str, torch.Tensor]:
    """Weights none of which is zero or one."""
    weights = initial_weights(sizes, seed=0)
    generator = torch.Generator().manual_seed(1)
    return {n: w + 0.02 * torch.randn(w.shape, generator=generator) for n, w in weights.items()}


def network(sizes: Sizes, sla=None):
    built = build_network(sizes, sla=sla)
    load_weights(built, random_weights(sizes))
    if sla:
        for block in built.blocks:
            torch.nn.init.normal_(
                block.self_attn.proj_l.weight, std=0.1, generator=torch.Generator().manual_seed(4)
            )
    return built


def inputs(sizes: Sizes, batch=2, dtype=torch.float32):
    """x, timestep, context, image; 128 tokens."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, 16, 2, 16, 16, generator=generator, dtype=dtype)
    image = torch.randn(batch, 20, 2, 16, 16, generator=generator, dtype=dtype)
    timestep = torch.tensor([987.65, 412.3], dtype=dtype)[:batch]
    context = torch.randn(batch, 5, 4096, generator=generator)
    return x, timestep, context, image if sizes.in_channels == 36 else None


@pytest.mark.parametrize("in_channels", [16, 36])
def test_its_velocity_is_the_hosts(in_channels):
    s = sizes(in_channels)
    ours = network(s)
    ours.bf16_timesteps = False
    theirs = WanModel(
        in_dim=in_channels, dim=s.dim, ffn_dim=s.ffn_dim, num_layers=s.num_layers, num_heads=2,
        dtype=torch.float32, operations=torch.nn,
    )  # fmt: skip
    theirs.load_state_dict(ours.state_dict())
    x, timestep, context, image = inputs(s)
    beside = x if image is None else torch.cat([x, image], 1)
    with torch.no_grad():
        wanted = theirs(beside, timestep, context)
        torch.testing.assert_close(ours(x, timestep, context, image), wanted, rtol=1e-4, atol=1e-4)


def test_timesteps_are_rounded_as_turbodiffusions():
    ours = network(sizes())
    x, _, context, _ = inputs(sizes())
    with torch.no_grad():
        rounded = ours(x, torch.tensor([987.65, 412.3]), context)
        assert rounded.equal(ours(x, torch.tensor([988.0, 412.0]), context))
        ours.bf16_timesteps = False
        assert not rounded.equal(ours(x, torch.tensor([987.65, 412.3]), context))


@pytest.mark.parametrize("sla", [None, SLA])
def test_its_tangent_is_the_central_difference(sla):
    ours = network(sizes(), sla)
    ours.bf16_timesteps = False
    x, timestep, context, _ = inputs(sizes())
    along = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))

    def velocity(h):
        return ours(x + h * along, timestep + h * torch.tensor([5.0, -3.0]), context)

    with torch.no_grad():
        _, tangent = jvp(velocity, (torch.zeros(()),), (torch.ones(()),))
        wanted = (velocity(1e-2) - velocity(-1e-2)) / 2e-2
    assert (tangent - wanted).norm() < 1e-2 * wanted.norm()


def test_checkpointing_changes_no_gradient():
    ours = network(sizes(), SLA)
    x, timestep, context, _ = inputs(sizes())
    found = []
    for ours.checkpointing in (False, True):
        ours.zero_grad()
        ours(x, timestep, context).square().mean().backward()
        found.append([p.grad for p in ours.parameters()])
    assert all(a.equal(b) for a, b in zip(*found, strict=True))
    assert all(grad.abs().sum() > 0 for grad in found[0])


def test_checkpointing_leaves_generators_alone(monkeypatch):
    """Their state cannot be read while a CUDA graph is recorded."""
    ours = network(sizes())
    ours.checkpointing = True
    x, timestep, context, _ = inputs(sizes())
    monkeypatch.setattr(torch, "get_rng_state", lambda: pytest.fail("the CPU's was read"))
    ours(x, timestep, context).square().mean().backward()


@pytest.mark.gpu
def test_a_graph_holds_checkpointing():
    ours = network(sizes()).cuda()
    given, found = [x.cuda() for x in inputs(sizes())[:3]], []

    def loss(*given):
        return ours(*given).square().mean(), {}

    for ours.checkpointing in (False, True):
        ours.zero_grad()
        Backward(loss, list(ours.parameters()), recorded=True)(1.0, *given)
        found.append([p.grad.clone() for p in ours.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3 * float(a.abs().max()))


def test_wrong_weights_are_refused_by_name():
    weights = random_weights(sizes())
    with pytest.raises(CheckpointError, match="has no place in this network"):
        load_weights(build_network(sizes()), {**weights, "blocks.2.ffn.0.weight": torch.ones(1)})
    del weights["head.head.bias"]
    with pytest.raises(CheckpointError, match=r"head\.head\.bias is missing"):
        load_weights(build_network(sizes()), weights)
