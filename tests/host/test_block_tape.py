"""The fused block from a tape launches what it launches anew, and only where it may."""

import block_launches
import in_comfyui
import pytest
import torch
from in_comfyui import comfy
from tiny_models import t2v_checkpoint
from turbodiffusion_pack.kernels.tape import Tape
from turbodiffusion_pack.turbo_core.host import block_tape, per_run
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model
from turbodiffusion_pack.turbo_core.host.patch import patch_attention
from turbodiffusion_pack.turbo_core.sla_settings import SLASettings

needs_resident = pytest.mark.skipif(
    in_comfyui.DYNAMIC, reason="dynamic VRAM moves the weights by itself"
)


@pytest.mark.parametrize(
    ("small", "card", "batch"),
    [(None, (9, 0), 1), (0, (9, 0), 1), (None, (9, 0), 2), (None, (8, 9), 1), (None, (8, 0), 1)],
    ids=["rooms together", "each room by itself", "two videos", "Ada", "A100"],
)
def test_a_tape_launches_the_same(small, card, batch):
    assert block_launches.differences(small, card, batch) == []


def test_blocks_run_from_a_tape_where_all_decides_alike():
    none, both = [False, False], [True, True]
    assert block_launches.from_tape() == {
        "the first pass of all": none,
        "the second pass": both,
        "a new prompt": both,
        "a prompt of another length": none,
        "no padding": none,
        "another length": none,
        "other settings": none,
        "16 bits": none,
        "a dense block": none,
        "a dense step": none,
        "a weight that is patched at each use": [False, True],
        "afterwards": both,
    }


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model-quant.pth"
    torch.save(t2v_checkpoint(layers=3), path)
    model = patch_attention(load_turbo_model(str(path)), SLASettings("sagesla", 0.34))
    comfy.model_management.load_models_gpu([model])
    block_tape._tapes.clear()
    yield model
    model.detach()


def text(seed: int, tokens: int) -> torch.Tensor:
    made = torch.zeros(1, 512, 4096)
    made[:, :tokens] = torch.randn(1, tokens, 4096, generator=torch.Generator().manual_seed(seed))
    return made


def run(model, seed: int, context: torch.Tensor, frames: int = 2) -> torch.Tensor:
    shape = len(context), 16, frames, 16, 16
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return in_comfyui.apply(model, x, context, 700.0).cpu()


def lora(model):
    key = "diffusion_model.blocks.0.ffn.0.weight"
    weight = model.model.diffusion_model.blocks[0].ffn[0].weight
    changed = model.clone()
    changed.add_patches({key: ("diff", (torch.ones(weight.shape) / 8,))})
    comfy.model_management.load_models_gpu([changed])
    return changed


def runs(model) -> list[torch.Tensor]:
    """The outputs of passes of which each finds something else changed."""
    with per_run.keep():
        found = [run(model, seed, text(0, 30)) for seed in range(3)]
        found += [run(model, 3, text(1, 30)), run(model, 4, text(1, 30), frames=3)]
    with per_run.keep():
        found += [run(model, seed, text(0, 30).repeat(2, 1, 1)) for seed in range(3)]
    with per_run.keep():
        found += [run(model, 5, text(2, 50)) for _ in range(2)]
        other = patch_attention(model, SLASettings("sagesla", 0.6))
        comfy.model_management.load_models_gpu([other])
        found += [run(other, seed, text(2, 50)) for seed in range(2)]
    changed = lora(model)
    with per_run.keep():
        found += [run(changed, seed, text(2, 50)) for seed in range(3)]
    comfy.model_management.load_models_gpu([model])
    with per_run.keep():
        found += [run(model, seed, text(2, 50)) for seed in range(3)]
    return found


@needs_resident
@pytest.mark.gpu
def test_a_gpu_gives_the_same_from_a_tape(model, monkeypatch):
    from_tape = runs(model)
    assert any(isinstance(tape, Tape) for tape in block_tape._tapes.values())
    monkeypatch.setattr(block_tape, "ATTEMPTS", 0)
    block_tape._tapes.clear()
    for tape, anew in zip(from_tape, runs(model), strict=True):
        assert tape.isfinite().all()
        assert torch.equal(tape, anew)


@needs_resident
@pytest.mark.gpu
def test_a_tape_takes_no_more_of_the_gpu(model, monkeypatch):
    def peak() -> int:
        with per_run.keep():
            for seed in range(3):
                torch.cuda.reset_peak_memory_stats()
                run(model, seed, text(0, 30), frames=9)
        return torch.cuda.max_memory_allocated()

    peak()
    from_tape = peak()
    monkeypatch.setattr(block_tape, "ATTEMPTS", 0)
    block_tape._tapes.clear()
    assert from_tape <= peak() + 2**20
