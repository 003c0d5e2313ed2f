"""What a run makes once, and a pass for all of its blocks, changes no bit, and follows changes."""

import functools
from unittest import mock

import goldens
import in_comfyui
import parity
import pytest
import torch
from comfy.ldm.flux.layers import EmbedND
from turbodiffusion_pack.turbo_core.host import block, operations, per_run
from turbodiffusion_pack.turbo_core.host.options import BLOCKS, MADE_ONCE
from turbodiffusion_pack.turbo_core.host.patch import patch_attention
from turbodiffusion_pack.turbo_core.host.rope import kept_rotation
from turbodiffusion_pack.turbo_core.sla_settings import SLASettings


@pytest.fixture(scope="module")
def models():
    settings = SLASettings("dense")
    yield {g: patch_attention(parity.load("t2v-quant.pth", g), settings) for g in ("exact", "fast")}
    parity.load.cache_clear()


@pytest.fixture
def model(models):
    return models["fast"]


def velocity(model, width: int = 8, **options) -> torch.Tensor:
    x = torch.randn(1, 16, 2, 8, width, generator=torch.Generator().manual_seed(0))
    model = model.clone()
    model.model_options["transformer_options"] |= options
    return in_comfyui.velocity(model, x, goldens.load("forward")["t2v.even.context"], 987.5)


def in_a_run_of_its_own(model, **options) -> torch.Tensor:
    with per_run.keep():
        return velocity(model, **options)


@pytest.fixture
def rotations(model, monkeypatch):
    """The sizes of each rotation that the host makes."""
    wan, made = type(model.model.diffusion_model), []
    encode = wan.rope_encode
    monkeypatch.setattr(wan, "rope_encode", lambda *a, **k: made.append(a[1:]) or encode(*a, **k))
    yield made
    # Unpatched the host leaves the model the method that it had here.
    vars(model.model.diffusion_model).pop("rope_encode", None)


def test_a_run_makes_the_rotation_once(model, rotations):
    outputs = []
    for _ in range(2):
        with per_run.keep():
            outputs += [velocity(model), velocity(model)]
    assert len(rotations) == 2
    assert all(torch.equal(y, outputs[0]) for y in outputs)
    velocity(model)
    velocity(model)
    assert len(rotations) == 4  # outside of a run nobody drops it


def test_another_rotation_is_made_anew(model, rotations):
    rope = {"scale_t": 2.0}
    kinds = {"width": 10}, {}, {"rope_options": rope}, {"rope_options": {"shift_y": 3.0}}
    expected = [in_a_run_of_its_own(model, **kind) for kind in kinds]
    assert not any(map(torch.equal, expected[1:], expected[2:]))
    pairs = list(zip(kinds, expected, strict=True))
    rotations.clear()
    with per_run.keep():
        assert all(torch.equal(velocity(model, **k), y) for k, y in pairs)
        assert len(rotations) == 4
        found = velocity(model, rope_options=rope)
        rope["scale_t"] = 3.0  # a node that changes its options in place
        assert not torch.equal(velocity(model, rope_options=rope), found)


def test_another_nodes_rotation_is_made_in_each_pass(model, rotations):
    """It may change with the step; and its own `rope_encode` stays its own."""
    wan, turns = model.model.diffusion_model, []

    def embed(ids):
        turns.append(len(turns))
        return type(wan.rope_embedder).forward(wan.rope_embedder, ids) * turns[-1]

    theirs = model.clone()
    theirs.add_object_patch("diffusion_model.rope_embedder.forward", embed)
    with per_run.keep():
        assert not torch.equal(velocity(theirs), velocity(theirs))
    rotations.clear()
    theirs, wan = model.clone(), model.model.diffusion_model
    twice = functools.partial(type(wan).rope_encode, wan)
    theirs.add_object_patch("diffusion_model.rope_encode", twice)
    with per_run.keep():
        velocity(theirs)
        velocity(theirs)
    assert len(rotations) == 2
    velocity(model)  # the clones' patches are out again


class PosedWan(torch.nn.Module):
    """A Wan whose rotation depends on a tensor, as SCAIL's of newer hosts."""

    def __init__(self):
        super().__init__()
        self.rope_embedder = EmbedND(dim=8, theta=10000.0, axes_dim=[8])

    def rope_encode(self, t, h, w, transformer_options=None, pose_latents=None):
        return t + len(pose_latents)


def test_a_rotation_by_tensors_is_made_anew():
    wan = PosedWan()
    with per_run.keep(), kept_rotation(wan):
        found = [wan.rope_encode(1, 2, 3, pose_latents=torch.zeros(n)) for n in (4, 4, 5)]
        assert per_run.current().rotation is None
    assert found == [5, 5, 6]


def test_the_model_is_let_go_of_without_garbage_collection(model):
    wan = model.model.diffusion_model
    with per_run.keep():
        velocity(model)
        assert "rope_encode" not in vars(wan)
        failing = mock.patch.object(type(wan), "unpatchify", side_effect=RuntimeError)
        with failing, pytest.raises(RuntimeError):
            velocity(model)
        assert "rope_encode" not in vars(wan)


resident_weights = pytest.mark.skipif(
    in_comfyui.DYNAMIC, reason="with dynamic VRAM the host moves the weights by itself"
)


@pytest.fixture
def requantized(monkeypatch):
    """How many weights were requantized at once, each time."""
    found, together = [], operations.requantize_rows_of
    monkeypatch.setattr(
        operations, "requantize_rows_of", lambda w: found.append(len(w)) or together(w)
    )
    return found


@resident_weights
def test_small_weights_are_requantized_at_once(model, requantized, monkeypatch):
    for op in model.model.diffusion_model.modules():
        if isinstance(op, operations.Linear) and in_comfyui.DEVICE.type == "cpu":
            op.bias = torch.nn.Parameter(op.bias.float(), False)  # the dtype it computes in there
    found = velocity(model)
    assert requantized == [6, 6]
    monkeypatch.setattr(operations, "SMALL_BYTES", 0)
    assert torch.equal(velocity(model), found)
    assert requantized == [6, 6]


def _add_at_each_use(op):
    op.weight_function = [lambda weight: weight]


NOT_AT_ONCE = {
    "they multiply in blocks": lambda op: setattr(op, "granularity", "blocks"),
    "a LoRA is added at each use": _add_at_each_use,
    "a LoRA was added before": lambda op: vars(op).__setitem__("merged", None),
    "the host moves them": lambda op: setattr(op, "_v", None),
}


@resident_weights
@pytest.mark.parametrize("change", NOT_AT_ONCE.values(), ids=NOT_AT_ONCE)
def test_one_after_the_other_where(model, change, requantized):
    attn = model.clone().model.diffusion_model.blocks[0].self_attn
    device = next(model.model.parameters()).device
    ops, dtype = [attn._modules[name] for name in "qkvo"], attn.q.bias.dtype
    made = operations.small_int8_weights(ops, dtype, device)
    for op, weights in made.items():
        assert all(map(torch.equal, weights, operations.int8_weights(op, dtype, device)))
    assert list(made) == ops
    before = dict(vars(attn.o))
    try:
        change(attn.o)
        assert operations.small_int8_weights(ops, dtype, device) == {}
    finally:
        vars(attn.o).clear()
        vars(attn.o).update(before)
    assert requantized == [4]


@pytest.mark.parametrize("granularity", ["exact", "fast"])
def test_modulations_of_all_blocks_are_those_of_each(models, granularity, monkeypatch):
    model = models[granularity]
    found = velocity(model)
    monkeypatch.setattr(block, "BLOCKS", "nobody's")
    assert torch.equal(velocity(model), found)


def test_modulations_are_of_this_pass_and_of_blocks_that_have_theirs_here(model):
    blocks = model.model.diffusion_model.blocks
    device, wan_dim = blocks[0].modulation.device, model.model.diffusion_model.dim
    e = torch.randn(2, 1, 6, wan_dim, device=device)
    options = {BLOCKS: (blocks[0], torch.nn.Identity()), MADE_ONCE: {}}
    for changed in (e, 2 * e):
        for b in blocks:
            expected = (b.modulation + changed[:, 0]).chunk(6, 1)
            found = block._modulation(b, changed, device, options)
            assert all(map(torch.equal, found, expected))
            assert all(y.is_contiguous() for y in found)  # a tape tells them apart
