"""ComfyUI's own node trains a LoRA on our MODELs, through SLA."""

import inspect
import logging
import math

import goldens
import in_comfyui
import pytest
import torch
from comfy_extras.nodes_train import TrainLoraNode
from turbodiffusion_pack.kernels.sla import sla
from turbodiffusion_pack.turbo_core import run_report
from turbodiffusion_pack.turbo_core.host import self_attention
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model
from turbodiffusion_pack.turbo_core.host.patch import patch_attention
from turbodiffusion_pack.turbo_core.sla_settings import SLASettings

CHOSEN = {
    "batch_size": 1,
    "steps": 2,
    "grad_accumulation_steps": 1,
    "learning_rate": 1e-2,
    "rank": 2,
    "optimizer": "AdamW",
    "loss_function": "MSE",
    "seed": 0,
    "training_dtype": "bf16",
    "lora_dtype": "fp32",
    "algorithm": "LoRA",
    "gradient_checkpointing": True,
    "existing_lora": "[None]",
    "quantized_backward": False,
    "checkpoint_depth": 1,
    "offloading": False,
    "bucket_mode": False,
    "bypass_mode": False,
}


LEARN = [f"self_attn.{name}" for name in ("q", "k", "v", "o", "proj_l")]


def train(model, **options):
    """The LoRA that the node trains on two tiny videos, by name, and its losses."""
    data = goldens.load("forward")
    context = in_comfyui.pad_context(data["t2v.ragged.context"])
    video = {"samples": data["t2v.ragged.x"][..., :16, :16].float()}  # 3 x 8 x 8 tokens
    known = inspect.signature(TrainLoraNode.execute).parameters
    chosen = {name: [value] for name, value in {**CHOSEN, **options}.items() if name in known}
    *_, lora, losses, _ = TrainLoraNode.execute(
        [model], [video, video], [[[context, {}]]], **chosen
    ).args
    return lora, losses["loss"]


@pytest.fixture
def calls(monkeypatch):
    """The shapes of q in each call of SLA."""
    shapes = []

    def counted(q, *rest, **options):
        shapes.append(q.shape)
        return sla(q, *rest, **options)

    monkeypatch.setattr(self_attention, "sla", counted)
    return shapes


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_lora_learns_through_sla(paths, checkpointing, calls, caplog):
    caplog.set_level(logging.INFO)
    model = patch_attention(load_turbo_model(paths[1]), SLASettings("sagesla", 0.34))
    lora, losses = train(model, gradient_checkpointing=checkpointing)
    assert all(map(math.isfinite, losses))  # each of its own noise level, so they need not fall
    # What starts as zero and decays stays zero without a gradient.
    learned = [
        lora[f"diffusion_model.blocks.{i}.{name}.lora_up.weight"] for i in (0, 1) for name in LEARN
    ]
    assert all(weight.isfinite().all() and weight.any() for weight in learned)
    (line,) = (m for m in caplog.messages if "forward passes" in m)
    assert "SLA in 2 of 2 blocks; sla top-k 0.34 (16 bit" in line
    assert "not fused in blocks 0-1: gradients are asked for" in line
    kernels = (
        "Triton and torch reference" if in_comfyui.DEVICE.type == "cuda" else "torch reference"
    )
    assert f"kernels: {kernels}, as" in line
    assert len(calls) == 2 * 2 * (1 + checkpointing)  # steps, blocks, and again for the backward


@pytest.mark.parametrize("depth", [2, 3])
def test_checkpointing_reaches_what_ours_took_the_place_of(paths, depth, calls):
    """Newer hosts wrap the blocks or their parts, 0.3.75 always the blocks."""
    model = patch_attention(load_turbo_model(paths[0]), SLASettings("sagesla", 0.34))
    train(model, steps=1, checkpoint_depth=depth)
    assert len(calls) == 2 * 2


def test_the_model_samples_as_before(paths):
    data = goldens.load("forward")
    model = load_turbo_model(paths[0])

    def velocity():
        with run_report.run() as report:
            out = in_comfyui.velocity(
                model, data["t2v.ragged.x"], data["t2v.ragged.context"], 987.5
            )
        return out, report.counts.fused

    before = velocity()
    train(model, steps=1)
    after = velocity()
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1] == {0, 1}
