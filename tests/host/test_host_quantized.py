"""Our attention, switch and sampler on MODELs whose weights ComfyUI itself has in 8 or 4 bits."""

import json
import logging

import goldens
import in_comfyui
import pytest
import torch
from in_comfyui import comfy
from turbodiffusion_pack.nodes.attention import SLAAttentionPatch
from turbodiffusion_pack.nodes.experts import Wan22ExpertSwitch
from turbodiffusion_pack.nodes.sampler import RCMSampler
from turbodiffusion_pack.turbo_core.checkpoint import read_checkpoint

quant_ops = pytest.importorskip("comfy.quant_ops")
# LightX2V's NVFP4-Sparse is trained with this block map and no linear branch, at this top-k.
SLA = {"attention": "sla", "topk": 0.1, "dense_blocks": "", "dense_steps": 0, "backend": "auto"}
FORMATS = ["scaled fp8", "int8_tensorwise", "nvfp4"]
# A GPU computes in 16 bits. For comparison: sparse attention is 1.8e-2 away from dense.
NEAR = 1e-2 if torch.cuda.is_available() else 1e-3


def _host_file(tensors, kind):
    """The plain checkpoint as ComfyUI's own quantized files hold it."""
    file = dict(tensors)
    if kind == "scaled fp8":
        file["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    for name in [n for n in file if n.startswith("blocks.") and file[n].ndim == 2]:
        prefix = name.removesuffix("weight")
        if kind == "scaled fp8":
            scale = file[name].float().abs().amax() / 448
            file[name] = (file[name].float() / scale).to(torch.float8_e4m3fn)
            file[f"{prefix}scale_weight"] = scale
            continue
        layout = quant_ops.QUANT_ALGOS[kind]["comfy_tensor_layout"]
        weight = quant_ops.QuantizedTensor.from_float(file[name], layout)
        file |= weight.state_dict(name)
        config = json.dumps({"format": kind}).encode()
        file[f"{prefix}comfy_quant"] = torch.tensor(list(config), dtype=torch.uint8)
    return file


@pytest.fixture(scope="module", params=FORMATS)
def model(request, paths):
    """Returns a function that loads the checkpoint in this format, by the host, `seed` apart."""
    kind = request.param
    if kind != "scaled fp8" and not hasattr(quant_ops.QuantizedTensor, "state_dict"):
        pytest.skip("this ComfyUI writes no such files")
    if kind != "scaled fp8" and kind not in quant_ops.QUANT_ALGOS:
        pytest.skip("this ComfyUI has no such format")
    tensors = dict(read_checkpoint(paths[1]).tensors)

    def load(seed=0):
        noise = torch.Generator().manual_seed(seed)
        changed = {"head.head.bias": torch.randn(64, generator=noise).bfloat16()}
        return comfy.sd.load_diffusion_model_state_dict(
            _host_file({**tensors, **changed}, kind), model_options={}
        )

    return load


def _sample(model, steps=1):
    noise = torch.randn(1, 16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    sampler, sigmas = RCMSampler.execute(steps, 200.0, "ode").args
    return in_comfyui.sample(model, sampler, sigmas, noise, goldens.load("rcm")["t2v.context"])


def test_sparse_attention_and_the_switch_run_on_it(model, caplog):
    caplog.set_level(logging.INFO)
    stock = model()
    dense = _sample(stock)
    whole = SLAAttentionPatch.execute(stock, **{**SLA, "topk": 1.0}).args[0]
    assert goldens.relative_error(_sample(whole), dense) < NEAR
    sparse = SLAAttentionPatch.execute(stock, **SLA).args[0]
    assert goldens.relative_error(_sample(sparse), dense) > NEAR
    assert torch.equal(_sample(stock), dense)
    low = SLAAttentionPatch.execute(model(seed=1), **SLA).args[0]
    caplog.clear()
    both = _sample(Wan22ExpertSwitch.execute(sparse, low, 0.9).args[0], steps=3)
    assert both.isfinite().all()
    (line,) = [m for m in caplog.messages if "noise expert" in m]
    how = "SLA in 2 of 2 blocks; sla top-k 0.1 (16 bit, no proj_l so no linear branch)"
    assert f"high-noise expert: 2 forward passes; {how}" in line
    assert f"low-noise expert: 1 forward pass; {how}" in line
