"""torch.compile, as ComfyUI's own TorchCompileModel puts it around a MODEL: the output stays.

Dynamo alone (backend "eager") gives the same bits; Inductor rounds otherwise here and there.
"""

import logging
import shutil

import goldens
import in_comfyui
import pytest
import torch
from turbodiffusion_pack.turbo_core.host import text
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model
from turbodiffusion_pack.turbo_core.host.patch import patch_attention
from turbodiffusion_pack.turbo_core.host.sampler import rcm_sampler
from turbodiffusion_pack.turbo_core.host.timesteps import round_to_bf16
from turbodiffusion_pack.turbo_core.rcm import rcm_sigmas
from turbodiffusion_pack.turbo_core.sla_settings import SLASettings

# Without the timestep's rounding the output is 8.5e-3 away from the golden one, on a CPU.
GOLDEN_BOUND = 1e-2 if torch.cuda.is_available() else 6e-3
# Of the output without torch.compile: 1.3e-5 on a CPU, 7e-3 without the rounding.
INDUCTOR_BOUND = 1e-3

pytestmark = pytest.mark.skipif(
    in_comfyui.DYNAMIC and not torch.cuda.is_available(),
    reason="torch.compile knows no cpu:0, which plays the GPU where dynamic VRAM is simulated",
)
inductor = pytest.mark.skipif(
    not torch.cuda.is_available() and not (shutil.which("g++") or shutil.which("cl")),
    reason="Inductor needs a C++ compiler, found neither g++ nor cl",
)
FLOATS = (torch.float32, torch.float64, torch.float16)


@pytest.fixture(autouse=True)
def compiled_anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def wan(paths):
    return load_turbo_model(paths[0], "exact")


def _compiled(model, backend="eager"):
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    return TorchCompileModel.execute(model, backend).args[0]


def _velocity(model):
    data = goldens.load("forward")
    return in_comfyui.velocity(model, data["t2v.even.x"], data["t2v.even.context"], 987.5)


def _sample(model, steps=2):
    noise = torch.randn(1, 16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    context = goldens.load("rcm")["t2v.context"]
    sampler, sigmas = rcm_sampler("ode"), rcm_sigmas(steps, 80)
    return in_comfyui.sample(model, sampler, sigmas, noise, context)


def _as_cast(x):
    return x.to(torch.bfloat16).to(x.dtype)


def _numbers(dtype):
    """Every kind of number: random bits, ties, zeros, infinities, NaN, sizes of timesteps."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=generator).int()
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 987.65, 987.5, 0.0, -0.0, 3.4e38])
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan])
    timesteps = 1000 * torch.rand(10_000, generator=generator)
    return torch.cat((bits.view(torch.float32), ties, odd, timesteps)).to(dtype)


@pytest.fixture(params=[False, True], ids=["run", "traced"])
def traced(request, monkeypatch):
    """As torch.compile traces the rounding, and as it runs without."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: request.param)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.bfloat16])
def test_timesteps_are_rounded_as_by_a_cast(dtype, traced):
    x = _numbers(dtype)
    torch.testing.assert_close(round_to_bf16(x), _as_cast(x), rtol=0, atol=0, equal_nan=True)
    one = torch.tensor([987.65], dtype=dtype).expand(3)
    assert round_to_bf16(one).tolist() == [988.0] * 3


def test_gradients_pass_the_rounding_as_they_pass_a_cast(traced):
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.tensor([987.65, 0.0, 1e-3], requires_grad=True)
        rounded = round_to_bf16(x)
        rounded.sum().backward()
    assert torch.equal(rounded, _as_cast(x))
    assert x.grad.tolist() == [1.0] * 3


@inductor
def test_the_rounding_survives_inductor():
    """A cast to bf16 and back does not: this test's own control."""

    @torch.compile(dynamic=False)
    def rounded(*tensors):
        return [round_to_bf16(x) for x in tensors], [_as_cast(x) for x in tensors]

    inputs = [_numbers(dtype).to(in_comfyui.DEVICE) for dtype in FLOATS]
    ours, casts = rounded(*inputs)
    for x, out in zip(inputs, ours, strict=True):
        torch.testing.assert_close(out, _as_cast(x), rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(casts[0], _as_cast(inputs[0])), "Inductor keeps casts: is this needed?"


@inductor
def test_the_golden_forward_pass_through_inductor(wan):
    model = patch_attention(wan, SLASettings("dense"))
    out = _velocity(_compiled(model, "inductor"))
    golden = goldens.load("forward")["t2v.even.out.original.int8.topk0.1.t988"]
    assert goldens.relative_error(out, golden) <= GOLDEN_BOUND
    if not torch.cuda.is_available():
        assert goldens.relative_error(out, _velocity(model)) <= INDUCTOR_BOUND


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["dense", "sla", "sagesla"])
@pytest.mark.parametrize("weights", [0, 1], ids=["int8", "float"])
@pytest.mark.parametrize("granularity", ["fast", "exact"])
def test_inductor_on_a_gpu(paths, attention, weights, granularity):
    """The embeddings and, of a float model, all but the attention are Inductor's. bf16's rounding
    is what remains: top-k 1 leaves no near-tie of the block selection to decide."""
    model = load_turbo_model(paths[weights], granularity)
    model = patch_attention(model, SLASettings(attention, 1.0))
    out = _velocity(_compiled(model, "inductor"))
    assert goldens.relative_error(out, _velocity(model)) <= 1e-2


SETTINGS = {
    "sagesla": SLASettings("sagesla", 0.34),
    "another top-k": SLASettings("sagesla", 0.9),
    "dense": SLASettings("dense"),
    "a dense step": SLASettings("sla", 0.34, dense_steps=1),
}


def test_settings_changed_after_compilation_hold(paths):
    """Newer hosts drop the guards on transformer_options, where the settings are."""
    model = load_turbo_model(paths[1])
    outputs = []
    for name, settings in SETTINGS.items():
        patched = patch_attention(model, settings)
        outputs.append(_sample(patched))
        assert torch.equal(_sample(_compiled(patched)), outputs[-1]), name
    assert not any(map(torch.equal, outputs, outputs[1:]))


def test_single_blocks_compiled(wan, monkeypatch):
    """As other packs' nodes do it."""
    monkeypatch.setattr(text, "MOST_KEYS", 0)  # nothing of the text is kept then, see may_change
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model, keys = wan.clone(), [f"diffusion_model.blocks.{i}" for i in range(2)]
    set_torch_compile_wrapper(model, backend="eager", keys=keys)
    assert torch.equal(_sample(model), _sample(wan))


def test_a_compiled_run_reports_what_ran(wan, caplog):
    plain = _sample(wan)
    caplog.set_level(logging.INFO)
    assert torch.equal(_sample(_compiled(wan)), plain)
    (line,) = (m for m in caplog.messages if "forward pass" in m)
    for part in ("2 forward passes", "SLA in 2 of 2 blocks", "fused in blocks 0-1", "20 linears"):
        assert part in line
