"""Bad input to the nodes: one clear error each; and MODELs of other loaders and formats."""

import asyncio
import gc
import itertools
import json
import logging
import math
import re
from pathlib import Path

import goldens
import in_comfyui
import pytest
import torch
from in_comfyui import comfy
from model_folders import listed
from turbodiffusion_pack.nodes import NODES
from turbodiffusion_pack.nodes.attention import SLAAttentionPatch
from turbodiffusion_pack.nodes.experts import Wan22ExpertSwitch
from turbodiffusion_pack.nodes.loader import TurboLoader
from turbodiffusion_pack.nodes.model_files import CHECKPOINTS, LORAS
from turbodiffusion_pack.nodes.quantize import W8A8Quantize
from turbodiffusion_pack.nodes.resolution import WanAdaptiveResolution
from turbodiffusion_pack.nodes.sampler import RCMSampler
from turbodiffusion_pack.turbo_core.checkpoint import read_checkpoint
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model
from turbodiffusion_pack.turbo_core.host.options import ATTENTION
from turbodiffusion_pack.turbo_core.host.sampler import rcm_sampler
from turbodiffusion_pack.turbo_core.host.save import save_turbo_model
from turbodiffusion_pack.turbo_core.rcm import rcm_sigmas

Q0 = "blocks.0.self_attn.q"
NORM = "blocks.1.self_attn.norm_q.weight"
PROJ_L = "blocks.1.self_attn.attn_op.local_attn.proj_l.weight"
MAPS = Path("/proc/self/maps")
SLA = {"attention": "sla", "topk": 0.34, "dense_blocks": "", "dense_steps": 0, "backend": "auto"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that ComfyUI looks for diffusion models in, with the golden checkpoints."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("t2v-quant.pth", "t2v.pth"):
        goldens.unpack_checkpoint(name, folder)
    with listed(CHECKPOINTS.name, folder), listed(LORAS.name, folder):
        yield folder


def _load(name):
    inputs = TurboLoader.define_schema().inputs
    defaults = {i.id: i.default for i in inputs if i.id != "checkpoint"}
    return TurboLoader.execute(name, **defaults).args[0]


@pytest.fixture(scope="module")
def wan(folder):
    return _load("t2v-quant.pth")


@pytest.fixture
def report(caplog):
    """Returns what the last run's report line says."""
    caplog.set_level(logging.INFO)
    return lambda: [m for m in caplog.messages if "forward pass" in m][-1]


def _sample(model, steps=2, callback=None):
    noise = torch.randn(1, 16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    context = goldens.load("rcm")["t2v.context"]
    sampler, sigmas = rcm_sampler("ode"), rcm_sigmas(steps, 80)
    return in_comfyui.sample(model, sampler, sigmas, noise, context, callback=callback)


# TurboLoader


def test_a_good_checkpoint_loads(wan):
    assert TurboLoader.validate_inputs("t2v-quant.pth") is True
    assert type(wan.model).__name__ == "WAN21"


def test_no_checkpoint_at_all(folder):
    told = TurboLoader.validate_inputs("not_there.pth")
    for part in ("'not_there.pth'", "not in models/diffusion_models", "press R"):
        assert part in told
    with pytest.raises(FileNotFoundError) as caught:
        _load("not_there.pth")
    assert str(caught.value) == f"checkpoint {told}"
    for name in (None, 5, 1.5, True, {"a": 1}, ["t2v.pth"], "", "x" * 5000, "a\0b", "\ud800"):
        told = TurboLoader.validate_inputs(name)
        assert name is None or ("is not in models/diffusion_models" in told and len(told) < 400)
        with pytest.raises(FileNotFoundError, match="is not in models/diffusion_models"):
            TurboLoader.execute(name, "fast")


class Client:
    """Queues what an API client sends, on the classes that the server knows."""

    def __init__(self, monkeypatch):
        import nodes

        for kind in NODES:
            monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, kind.define_schema().node_id, kind)
        for name, types in (("String", ("STRING",)), ("Model", ("MODEL",)), ("Any", ("*",))):
            fields = {"INPUT_TYPES": dict, "RETURN_TYPES": types, "FUNCTION": "f"}
            monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, type(name, (), fields))
        seen = {"INPUT_TYPES": lambda: {"required": {"x": ("*",)}}, "RETURN_TYPES": ()}
        output = type("Output", (), {**seen, "OUTPUT_NODE": True, "FUNCTION": "f"})
        output.VALIDATE_INPUTS = classmethod(lambda cls, input_types: True)
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Output", output)

    def errors(self, kind, **inputs):
        """What the host finds wrong with a node of the class `kind` and these inputs."""
        import execution

        node_id = kind.define_schema().node_id
        defaults = {i.id: getattr(i, "default", None) for i in kind.define_schema().inputs}
        defaults = {name: value for name, value in defaults.items() if value is not None}
        inputs = {n: v for n, v in {**defaults, **inputs}.items() if v is not MISSING}
        prompt = {name: {"class_type": name, "inputs": {}} for name in ("String", "Model", "Any")}
        prompt[node_id] = {"class_type": node_id, "inputs": inputs}
        prompt["out"] = {"class_type": "Output", "inputs": {"x": [node_id, 0]}}
        wrong = asyncio.run(execution.validate_prompt("id", prompt, None))[3]
        return [(e["message"], e["details"]) for e in wrong.get(node_id, {}).get("errors", ())]


MISSING = object()


@pytest.fixture
def client(monkeypatch):
    return Client(monkeypatch)


def test_names_of_files_can_be_linked(client, folder):
    for output in ("String", "Any"):
        assert client.errors(TurboLoader, checkpoint=[output, 0]) == []
        linked = {"model": ["Model", 0], "projections": [output, 0]}
        assert client.errors(SLAAttentionPatch, **linked) == []
    assert client.errors(TurboLoader, checkpoint="t2v.pth") == []
    assert client.errors(SLAAttentionPatch, model=["Model", 0], projections="t2v.pth") == []


def test_the_host_names_an_input_once(client, folder):
    for kind, name in ((TurboLoader, "checkpoint"), (SLAAttentionPatch, "projections")):
        good = {"model": ["Model", 0]} if kind is SLAAttentionPatch else {}
        ((_, details),) = client.errors(kind, **good, **{name: "not_there.pth"})
        assert details.startswith(f"{name} - 'not_there.pth' is not in models/diffusion_models.")


def test_links_of_other_types_are_refused(client, folder):
    for name in ("checkpoint", "granularity"):
        ((message, details),) = client.errors(
            TurboLoader, **{"checkpoint": "t2v.pth", name: ["Model", 0]}
        )
        assert message == "Return type mismatch between linked nodes"
        assert details == f"{name}, received_type(MODEL) mismatch input_type(COMBO)"
    described = TurboLoader.INPUT_TYPES()["required"]["checkpoint"]
    assert json.loads(json.dumps(described))[0] == "COMBO"


def test_what_is_missing_is_told_by_the_host(client, folder):
    missing = [("Required input is missing", "checkpoint")]
    assert client.errors(TurboLoader, checkpoint=MISSING) == missing
    assert client.errors(SLAAttentionPatch) == [("Required input is missing", "model")]
    assert client.errors(SLAAttentionPatch, model=["Model", 0], projections=MISSING) == []


ODD = [None, 5, -1, 2**70, 0.5, math.nan, math.inf, True, "", "x", {"a": 1}, [], ["a", "b", "c"]]


@pytest.mark.parametrize("kind", NODES, ids=lambda kind: kind.define_schema().node_id)
def test_odd_values_are_told_and_crash_nothing(client, folder, kind):
    """The host converts, our validation answers: neither ever ends in an exception."""
    inputs = kind.define_schema().inputs
    links = dict.fromkeys(("VAE", "IMAGE", "LATENT", "CONDITIONING"), "Any") | {"MODEL": "Model"}
    good = {i.id: [links[i.io_type], 0] for i in inputs if i.io_type in links}
    files = {"checkpoint": "t2v.pth", "lora_name": "t2v.pth"}
    good |= {i.id: files[i.id] for i in inputs if i.id in files}
    assert client.errors(kind, **good) == []
    for odd_input, odd in itertools.product(inputs, ODD):
        for message, _ in client.errors(kind, **{**good, odd_input.id: odd}):
            assert "xception" not in message, (odd_input.id, odd, message)


MODEL_NODES = {
    "SLAAttentionPatch": (lambda m: SLAAttentionPatch.execute(m, **SLA), "model"),
    "projections": (
        lambda m: SLAAttentionPatch.execute(m, **SLA, projections="t2v.pth"),
        "model",
    ),
    "W8A8Quantize": (lambda m: W8A8Quantize.execute(m, "fast", False), "model"),
    "TurboSaveCheckpoint": (lambda m: save_turbo_model(m, Path("never.safetensors")), "model"),
    "high": (lambda m: Wan22ExpertSwitch.execute(m, m, 0.9), "model_high"),
}


@pytest.mark.parametrize("node", MODEL_NODES)
@pytest.mark.parametrize("model", ["abc", 5, None, {"samples": 1}, torch.ones(2)], ids=repr)
def test_what_is_no_model(folder, node, model):
    """The host takes any constant for a MODEL."""
    run, name = MODEL_NODES[node]
    told = f"{name} must be a MODEL, got the {type(model).__name__} .*Link it to a loader"
    with pytest.raises(ValueError, match=re.compile(told, re.DOTALL)):
        run(model)


def test_one_expert_that_is_no_model(wan):
    with pytest.raises(ValueError, match=r"model_low must be a MODEL, got the str 'abc'\. Link"):
        Wan22ExpertSwitch.execute(wan, "abc", 0.9)
    for boundary in (math.nan, -0.1, 1.5, "0.9", None):
        with pytest.raises(ValueError, match="boundary is a sigma from 0 to 1, got"):
            Wan22ExpertSwitch.execute(wan, wan, boundary)


@pytest.mark.parametrize("image", ["abc", 5, torch.ones(64, 64), {"samples": 1}], ids=repr)
def test_what_is_no_image(image):
    with pytest.raises(ValueError, match=r"image must be an IMAGE, got the .*(?s:.)*Link it to"):
        WanAdaptiveResolution.execute("480p", "image", 0.38, image)


@pytest.mark.parametrize("name", ["notes.txt", "../notes.txt", "t2v.pth/../notes.txt"])
def test_a_file_that_is_no_checkpoint(folder, name):
    """Files of other kinds are not listed, and a client that names one learns nothing of it."""
    (folder / "notes.txt").write_text("my secret")
    assert "is not in models/diffusion_models" in TurboLoader.validate_inputs(name)
    assert "is not in models/diffusion_models" in SLAAttentionPatch.validate_inputs(name)
    with pytest.raises(ValueError, match=r"^notes.txt: is no checkpoint by its name"):
        _load("notes.txt")


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def _changed(tensors, name, change):
    return {**tensors, name: change(tensors[name].clone())}


def _fill_one(value):
    def change(tensor):
        tensor.view(-1)[1] = value
        return tensor

    return change


def _without(tensors, name):
    return {n: t for n, t in tensors.items() if n != name}


# name: (what makes the file's content of the golden's tensors, what the message must say)
FAULTS = {
    "code in the pickle": (
        lambda t: {**t, "hook": Touch(Path("code_was_run"))},
        r"contains code .*\(.+\), which were not run.*official source",
    ),
    "another architecture": (
        lambda t: {"double_blocks.0.img_attn.qkv.weight": torch.ones(2, 2)},
        "not a complete Wan model.*head.modulation.*double_blocks.*choose",
    ),
    "a number in place of a tensor": (
        lambda t: {**t, "epoch": 3},
        "named tensors only, got a int under 'epoch'.*save",
    ),
    "no scales": (
        lambda t: _without(t, f"{Q0}.scale"),
        rf"{Q0}.int8_weight has no {Q0}.scale.*(download|convert)",
    ),
    "scales that do not fit": (
        lambda t: _changed(t, f"{Q0}.scale", lambda s: s[:1]),
        rf"{Q0}.scale must be float32 \[2, 2\].*got float32 \[1, 2\].*(download|convert)",
    ),
    "proj_l of the wrong size": (
        lambda t: _changed(t, PROJ_L, lambda w: w[:64]),
        rf"{PROJ_L} must be \[128, 128\], got float32 \[64, 128\].*download or convert",
    ),
    "a scale not finite": (
        lambda t: _changed(t, f"{Q0}.scale", _fill_one(float("inf"))),
        rf"{Q0}.scale has 1 of 4 values.*not finite and positive, got inf.*download or convert",
    ),
    "a norm not finite": (
        lambda t: _changed(t, NORM, _fill_one(float("nan"))),
        rf"{NORM} has 1 of 256 values.*not finite, got nan.*download or convert",
    ),
}


def _refused(name, match):
    """TurboLoader must refuse `name` with one message, and keep nothing of it."""
    gc.collect()  # of models that earlier tests have left
    loaded = list(comfy.model_management.current_loaded_models)
    with pytest.raises(ValueError, match=match) as caught:
        _load(name)
    assert caught.type is ValueError, "the host would show where another type's class is"
    message = str(caught.value)
    assert "\n" not in message
    assert name in message
    del caught
    gc.collect()
    assert comfy.model_management.current_loaded_models == loaded
    if MAPS.exists():
        assert name not in MAPS.read_text(), "the file is still mapped"
        open_files = [str(f.readlink()) for f in Path("/proc/self/fd").iterdir() if f.is_symlink()]
        assert [f for f in open_files if f.endswith(name)] == []


@pytest.mark.parametrize("fault", FAULTS)
def test_an_unusable_checkpoint_is_refused(folder, monkeypatch, tmp_path, fault):
    content, match = FAULTS[fault]
    monkeypatch.chdir(tmp_path)
    torch.save(content(torch.load(folder / "t2v-quant.pth")), folder / "unusable.pth")
    _refused("unusable.pth", match)
    assert not (tmp_path / "code_was_run").exists()


@pytest.mark.parametrize("size", [0, 10, 100_000])
def test_a_truncated_checkpoint_is_refused(folder, size):
    data = (folder / "t2v-quant.pth").read_bytes()
    (folder / "cut.pth").write_bytes(data[:size])
    _refused("cut.pth", "(truncated|cut short|empty).*[Dd]ownload it again")


def test_a_good_checkpoint_loads_after_a_bad_one(folder, wan):
    torch.save({"a": torch.ones(1)}, folder / "bad.pth")
    _refused("bad.pth", "not a complete Wan model")
    again = _load("t2v-quant.pth")
    assert torch.equal(_sample(again), _sample(wan))


# rCMSampler


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        ((0, 80.0, "sde"), "at least one step, got 0"),
        ((-3, 80.0, "sde"), "at least one step, got -3"),
        ((10**18, 80.0, "sde"), "at most 10000 steps, got 1000000000000000000"),
        ((4, 14.0, "sde"), r"sigma_max must be above 14\.1.*got 14\.0.*80 for text, 200 for image"),
        ((4, 0.0, "sde"), "sigma_max must be above"),
        ((4, float("nan"), "sde"), "sigma_max must be above.*got nan"),
        ((4, float("inf"), "sde"), "sigma_max must be above.*got inf"),
        ((4, 80.0, "euler"), "mode must be one of sde, ode, got 'euler'"),
    ],
)
def test_bad_sampler_settings(inputs, match):
    with pytest.raises(ValueError, match=match):
        RCMSampler.execute(*inputs)


def test_good_sampler_settings():
    sampler, sigmas = RCMSampler.execute(4, 80.0, "ode").args
    assert isinstance(sampler, comfy.samplers.KSAMPLER)
    assert torch.equal(sigmas, rcm_sigmas(4, 80.0))


def _stable_diffusion():
    """A UNet of ComfyUI's SD 1.5 kind, as small as it gets."""
    import comfy.supported_models

    config = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "num_res_blocks": [1],
        "channel_mult": [1],
        "transformer_depth": [0],
        "transformer_depth_output": [0, 0],
        "transformer_depth_middle": -1,
        "use_spatial_transformer": True,
        "context_dim": 8,
        "num_heads": 1,
        "dtype": torch.float32,
    }
    model = comfy.supported_models.SD15(config).get_model({}, "")
    return comfy.model_patcher.ModelPatcher(model, in_comfyui.DEVICE, torch.device("cpu"))


def test_rcm_refuses_a_model_that_is_no_flow_model():
    guider = comfy.samplers.CFGGuider(_stable_diffusion())
    guider.inner_set_conds({"positive": [[torch.zeros(1, 77, 8), {}]]})
    guider.set_cfg(1.0)
    noise, steps = torch.zeros(1, 4, 8, 8), []
    with pytest.raises(ValueError, match=r"rectified-flow.*got a MODEL with .*another sampler"):
        guider.sample(
            noise,
            noise,
            rcm_sampler("sde"),
            rcm_sigmas(2, 80),
            callback=lambda *_: steps.append(1),
            disable_pbar=True,
        )
    assert steps == []


# SLAAttentionPatch


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        ({"topk": 0.0}, "topk must be above 0 and at most 1, got 0.0"),
        ({"topk": 1.5}, "topk must be above 0 and at most 1, got 1.5"),
        ({"topk": float("nan")}, "topk must be above 0 and at most 1, got nan"),
        ({"attention": "flash"}, "attention must be one of .*'sagesla'.*got 'flash'"),
        ({"dense_blocks": "first"}, "numbers and ranges such as '0, 2-4', got 'first'"),
        ({"dense_blocks": "0, 1-"}, "numbers and ranges such as '0, 2-4', got '1-'"),
        ({"dense_blocks": "-1"}, "numbers and ranges such as '0, 2-4', got '-1'"),
        ({"dense_blocks": "²"}, "numbers and ranges such as '0, 2-4', got '²'"),
        ({"dense_blocks": "1-0"}, "range '1-0', which runs backwards. Write '0-1'"),
        ({"dense_blocks": "\u0661"}, "numbers and ranges such as '0, 2-4', got '\u0661'"),
        ({"dense_steps": -1}, "dense_steps must be a number from 0 up, got -1"),
        ({"dense_blocks": "0, 2"}, "name block 2, but this model has blocks 0 to 1"),
        ({"dense_blocks": "0-1000000000000"}, "but this model has blocks 0 to 1"),
        ({"backend": "cuda"}, "backend 'cuda' is unknown, use one of auto, triton, reference"),
    ],
)
def test_bad_attention_settings(wan, inputs, match):
    patches = dict(wan.object_patches)
    with pytest.raises(ValueError, match=match):
        SLAAttentionPatch.execute(wan, **{**SLA, **inputs})
    assert wan.object_patches == patches


@pytest.fixture
def examined_anew():
    """What is known of a device is kept, except around this test."""
    from turbodiffusion_pack.kernels import dispatch

    caches = dispatch.triton_unavailable, dispatch.interpreting
    for known in caches:
        known.cache_clear()
    yield
    for known in caches:
        known.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_triton_by_name_without_a_gpu(wan, monkeypatch, examined_anew):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(RuntimeError, match=r"Triton was asked for, but .*on cpu.*Use 'auto'"):
        SLAAttentionPatch.execute(wan, **{**SLA, "backend": "triton"})
    SLAAttentionPatch.execute(wan, **{**SLA, "backend": "triton", "attention": "dense"})


def test_no_triton(wan, monkeypatch, report, examined_anew):
    """Without Triton the references run, the report says why; Triton by name is an error."""
    from turbodiffusion_pack.kernels import dispatch

    monkeypatch.setattr(dispatch, "_TRITON_PROBLEM", "Triton is not installed (for this test)")
    with pytest.raises(RuntimeError, match=r"asked for, but Triton is not installed .*Use 'auto'"):
        SLAAttentionPatch.execute(wan, **{**SLA, "backend": "triton"})
    _sample(SLAAttentionPatch.execute(wan, **SLA).args[0])
    assert "kernels: torch reference, as Triton is not installed (for this test)" in report()


def test_a_model_that_is_not_wan_is_refused_by_name():
    with pytest.raises(ValueError, match=r"needs a Wan MODEL.*got UNetModel.*Connect a Wan 2"):
        SLAAttentionPatch.execute(_stable_diffusion(), **SLA)


def test_wan_with_another_self_attention_is_refused_by_name():
    ar_model = pytest.importorskip("comfy.ldm.wan.ar_model", reason="this ComfyUI has none")
    model = torch.nn.Module()
    model.diffusion_model = ar_model.CausalWanModel(
        dim=128, ffn_dim=128, num_heads=1, num_layers=1, operations=comfy.ops.manual_cast
    )
    patcher = comfy.model_patcher.ModelPatcher(model, in_comfyui.DEVICE, torch.device("cpu"))
    with pytest.raises(ValueError, match="plain self-attention, got CausalWanModel"):
        SLAAttentionPatch.execute(patcher, **SLA)


# Wan MODELs of other loaders


class PackedOperations(comfy.ops.manual_cast):
    """Linears that keep 8-bit codes in a tensor of their own and unpack them at use, as GGUF's."""

    class Packed(torch.Tensor):
        pass

    class Linear(torch.nn.Module, comfy.ops.CastWeightBiasOp):
        comfy_cast_weights = True

        def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
            super().__init__()
            self.weight = self.bias = None

        def _load_from_state_dict(self, state_dict, prefix, *args):
            weight = state_dict[f"{prefix}weight"].float()
            self.step = weight.abs().amax() / 127
            codes = (weight / self.step).round().add(128).to(torch.uint8)
            packed = codes.as_subclass(PackedOperations.Packed)
            self.weight = torch.nn.Parameter(packed, requires_grad=False)
            self.bias = torch.nn.Parameter(state_dict[f"{prefix}bias"], requires_grad=False)

        def forward(self, x):
            codes = self.weight.as_subclass(torch.Tensor).to(x.device)
            weight = (codes.to(x.dtype) - 128) * self.step.to(x)
            return torch.nn.functional.linear(x, weight, self.bias.to(x))


STOCK = {
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
    "fp32": {"dtype": torch.float32},
    "fp8": {"dtype": torch.float8_e4m3fn},
    "packed": {"dtype": torch.bfloat16, "custom_operations": PackedOperations},
}
# A GPU computes in 16 bits, the CPU in fp32. For comparison: dense attention is 2.3e-2 away.
EXACT = 1e-2 if torch.cuda.is_available() else 1e-5
NEAR = {"bf16": EXACT, "fp16": EXACT, "fp32": EXACT, "fp8": 2e-2, "packed": 1e-2}


def _stock_wan(folder, options):
    """The plain golden checkpoint through ComfyUI's own loader, which knows no proj_l."""
    tensors = dict(read_checkpoint(folder / "t2v.pth").tensors)
    return comfy.sd.load_diffusion_model_state_dict(tensors, model_options=options)


@pytest.fixture(scope="module")
def without_projections(folder):
    """What SLA without a linear branch gives, from our own loader."""
    tensors = torch.load(folder / "t2v.pth")
    plain = {name: tensor for name, tensor in tensors.items() if "proj_l" not in name}
    torch.save(plain, folder / "plain.pth")
    model = load_turbo_model(str(folder / "plain.pth"))
    # Rounded timesteps are for TurboDiffusion's checkpoints, other loaders' models have none.
    model.remove_wrappers_with_key("diffusion_model", "turbodiffusion.timestep")
    return _sample(SLAAttentionPatch.execute(model, **SLA).args[0])


@pytest.mark.parametrize("kind", STOCK)
def test_sla_on_a_model_of_another_loader(folder, report, without_projections, kind):
    stock = _stock_wan(folder, STOCK[kind])
    patched = SLAAttentionPatch.execute(stock, **SLA).args[0]
    out = _sample(patched)
    assert "SLA in 2 of 2 blocks; sla top-k 0.34 (16 bit, no proj_l" in report()
    assert "linears" not in report(), "no INT8 linear runs"
    assert goldens.relative_error(out, without_projections) < NEAR[kind]
    sagesla = SLAAttentionPatch.execute(stock, **{**SLA, "attention": "sagesla"}).args[0]
    assert goldens.relative_error(_sample(sagesla), out) < 0.1
    assert "sagesla top-k 0.34 (int8 QK" in report()


@pytest.mark.parametrize("kind", STOCK)
def test_a_model_of_another_loader_is_itself_again_without_the_patch(folder, kind):
    stock = _stock_wan(folder, STOCK[kind])
    before = _sample(stock)
    patched = SLAAttentionPatch.execute(stock, **SLA).args[0]
    assert goldens.relative_error(_sample(patched), before) > 1e-3
    assert torch.equal(_sample(stock), before)
    dense = SLAAttentionPatch.execute(stock, **{**SLA, "attention": "dense"}).args[0]
    assert torch.equal(_sample(dense), before)
    whole = SLAAttentionPatch.execute(stock, **{**SLA, "topk": 1.0}).args[0]
    assert goldens.relative_error(_sample(whole), before) < EXACT
    assert ATTENTION not in stock.model_options.get("transformer_options", {})
