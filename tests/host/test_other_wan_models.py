"""SLA in ComfyUI's other Wan models: their blocks run unfused, and the report says why."""

import in_comfyui
import pytest
import torch
from in_comfyui import comfy
from turbodiffusion_pack.turbo_core import run_report
from turbodiffusion_pack.turbo_core.host.patch import patch_attention
from turbodiffusion_pack.turbo_core.sla_settings import SLASettings

wan = comfy.ldm.wan.model
SIZES = {"dim": 256, "ffn_dim": 256, "num_heads": 2, "num_layers": 2, "in_dim": 16}
FLOAT = "its weights are not INT8"
IMAGE = "its cross-attention is a WanI2VCrossAttention"


def _animate(**options):
    return pytest.importorskip("comfy.ldm.wan.model_animate").AnimateWanModel(**options)


# name: (model, options, further inputs by their shapes, why its blocks are not fused)
MODELS = {
    "t2v": (wan.WanModel, {"model_type": "t2v"}, {}, FLOAT),
    "narrow": (wan.WanModel, {"model_type": "t2v", "num_heads": 8}, {}, "its head_dim is 32"),
    "i2v": (
        wan.WanModel,
        {"model_type": "i2v"},
        {"clip_fea": (1, 257, 1280)},
        IMAGE,
    ),
    "vace": (
        wan.VaceWanModel,
        {"model_type": "vace", "vace_layers": 1, "vace_in_dim": 96},
        {"vace_context": (1, 1, 96, 3, 16, 16)},
        FLOAT,
    ),
    "humo": (
        wan.HumoWanModel,
        {},
        {"audio_embed": (1, 3, 8, 5, 1280)},
        "it is a WanAttentionBlockAudio",
    ),
    "s2v": (wan.WanModel_S2V, {}, {}, "timesteps differ between tokens"),
    "camera": (wan.CameraWanModel, {"model_type": "camera"}, {}, IMAGE),
    "animate": (_animate, {}, {"pose_latents": (1, 16, 2, 16, 16)}, IMAGE),
}


class Holder(torch.nn.Module):
    """What a ModelPatcher asks of the model that it patches."""

    manual_cast_dtype = None

    def __init__(self, diffusion_model):
        super().__init__()
        self.diffusion_model = diffusion_model
        self.device = in_comfyui.DEVICE

    def get_dtype(self):
        return torch.float32


def _tiny(kind, options):
    options = SIZES | options
    model = kind(**options, operations=comfy.ops.manual_cast, dtype=torch.float32)
    model.load_state_dict(in_comfyui.random_weights(kind, **options))
    return model.requires_grad_(False).to(in_comfyui.DEVICE)


@pytest.mark.parametrize("attention", ["sla", "sagesla"])
@pytest.mark.parametrize("name", MODELS)
def test_blocks_run_unfused_and_the_report_says_why(name, attention):
    kind, options, shapes, reason = MODELS[name]
    device = in_comfyui.DEVICE
    patcher = comfy.model_patcher.ModelPatcher(Holder(_tiny(kind, options)), device, device)
    model = patch_attention(patcher, SLASettings(attention, 0.34))
    model.patch_model()
    x, context = torch.randn(1, 16, 3, 16, 16), torch.randn(1, 20, 4096)
    further = {name: torch.randn(shape).to(device) for name, shape in shapes.items()}
    if name == "vace":
        further["vace_strength"] = [1.0]
    with run_report.run() as report:
        out = model.model.diffusion_model(
            x.to(device),
            torch.tensor([900.0], device=device),
            context.to(device),
            transformer_options={
                **model.model_options["transformer_options"],
                "wrappers": model.wrappers,
            },
            **further,
        )
    assert out.shape == x.shape
    assert out.isfinite().all()
    assert f"not fused in blocks 0-1: {reason}" in report.line()
