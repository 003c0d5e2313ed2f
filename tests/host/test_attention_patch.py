"""SLA on a Wan MODEL beside everything else that people patch into one."""

import copy
import inspect
import json
import logging
import re

import goldens
import in_comfyui
import pytest
import torch
from in_comfyui import comfy
from turbodiffusion_pack.turbo_core import run_report
from turbodiffusion_pack.turbo_core.host import text
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model
from turbodiffusion_pack.turbo_core.host.options import ATTENTION
from turbodiffusion_pack.turbo_core.host.patch import patch_attention
from turbodiffusion_pack.turbo_core.host.sampler import rcm_sampler
from turbodiffusion_pack.turbo_core.rcm import rcm_sigmas
from turbodiffusion_pack.turbo_core.sla_settings import SLASettings

SELF_ATTN = "diffusion_model.blocks.0.self_attn.forward"
# A GPU computes in bf16, the CPU in fp32.
EXACT = 1e-2 if torch.cuda.is_available() else 1e-5
TOKENS = 192  # of the latents below: three key blocks, not a multiple of 128 rows

pytestmark = pytest.mark.usefixtures("info_log")


@pytest.fixture
def info_log(caplog):
    caplog.set_level(logging.INFO)


@pytest.fixture(scope="module")
def loaded(paths):
    return load_turbo_model(paths[0])


@pytest.fixture(scope="module")
def float_model(paths):
    """Its output moves little where its input does; INT8 weights turn 1e-7 into 1e-4."""
    return load_turbo_model(paths[1])


def _patch(model, attention="sla", topk=0.34, **settings):
    return patch_attention(model, SLASettings(attention, topk, **settings))


def _noise(batch=1, frames=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 16, frames, 16, 16, generator=generator)


def _context(name="positive"):
    context = in_comfyui.pad_context(goldens.load("rcm")["t2v.context"])
    return context if name == "positive" else 4 * context.flip(-2)


def _run(model, steps=1, noise=None, cfg=1.0, positive="positive", callback=None):
    """An ODE run through ComfyUI's guider from an empty latent."""
    noise = _noise() if noise is None else noise
    guider = comfy.samplers.CFGGuider(model)
    conds = {"positive": [[_context(positive), {}]], "negative": [[_context("negative"), {}]]}
    guider.inner_set_conds(conds)
    guider.set_cfg(cfg)
    sampler, sigmas = rcm_sampler("ode"), rcm_sigmas(steps, 80)
    latent = torch.zeros_like(noise)
    return guider.sample(noise, latent, sampler, sigmas, callback=callback, disable_pbar=True)


@pytest.fixture
def line(caplog):
    """Returns the report line of the one run since it was called last."""

    def take():
        (found,) = [m for m in caplog.messages if "forward pass" in m]
        caplog.clear()
        return found

    return take


@pytest.fixture
def sla_calls(monkeypatch):
    """The block of every SLA call, in order."""
    blocks, note = [], run_report.note_sla

    def noting(block, *how):
        blocks.append(block)
        note(block, *how)

    monkeypatch.setattr(run_report, "note_sla", noting)
    return blocks


def test_every_block_runs_sla(loaded, line, sla_calls):
    _run(_patch(loaded), steps=3)
    assert sla_calls == [0, 1] * 3
    report = line()
    assert report.startswith("TurboDiffusion: 3 forward passes; SLA in 2 of 2 blocks; sla top-k")
    assert "dense" not in report
    assert re.search(r"INT8 \w+ \(.+\) in 20 linears", report)


def test_dense_blocks_stay_dense(loaded, line, sla_calls):
    some = _run(_patch(loaded, dense_blocks=(1,)), steps=2)
    assert sla_calls == [0, 0]
    report = line()
    assert "SLA in 1 of 2 blocks" in report
    assert "dense in block 1: dense attention chosen" in report
    every = _run(_patch(loaded, dense_blocks=(0, 1)), steps=2)
    assert sla_calls == [0, 0]
    assert "SLA in 0 of 2 blocks; dense in blocks 0-1: dense attention chosen" in line()
    assert torch.equal(every, _run(_patch(loaded, "dense"), steps=2))
    assert goldens.relative_error(some, every) > 1e-3


def test_first_steps_stay_dense(loaded, line, sla_calls):
    calls_before_step = []
    callback = lambda *_: calls_before_step.append(len(sla_calls))  # noqa: E731
    mixed = _run(_patch(loaded, dense_steps=1), steps=3, callback=callback)
    assert calls_before_step == [0, 2, 4]
    report = line()
    assert "SLA in 2 of 2 blocks" in report
    assert "dense in blocks 0-1: chosen for the first 1 steps" in report
    assert goldens.relative_error(mixed, _run(_patch(loaded), steps=3)) > 1e-3


def test_more_dense_steps_than_steps_is_dense(loaded, sla_calls):
    out = _run(_patch(loaded, dense_steps=5), steps=2)
    assert sla_calls == []
    assert torch.equal(out, _run(_patch(loaded, "dense"), steps=2))


def _zeros(calls):
    """Somebody's self-, cross-attention or feed-forward that returns zeros."""

    def forward(x, *args, **kwargs):
        calls.append(tuple(x.shape))
        return torch.zeros_like(x)

    return forward


@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_somebody_elses_self_attention_is_honoured_and_reported(loaded, line, sla_calls, first):
    calls, model = [], loaded.clone()
    if first == "ours":
        model = _patch(model)
        model.add_object_patch(SELF_ATTN, _zeros(calls))
    else:
        model.object_patches.pop(SELF_ATTN)
        model.add_object_patch(SELF_ATTN, _zeros(calls))
        model = _patch(model)
    out = _run(model, steps=2)
    assert calls == [(1, TOKENS, 256)] * 2
    assert sla_calls == [1, 1]
    report = line()
    assert "SLA in 1 of 2 blocks" in report
    assert f"dense in block 0: its self-attention is patched by {__name__}" in report
    assert goldens.relative_error(_run(_patch(loaded), steps=2), out) > 1e-3


class ForeignAttention(torch.nn.Module):
    """Somebody's whole self-attention module, around parts of `own`.

    With dynamic VRAM the host fails where these are missing: it puts back what it had loaded, while
    this module is in place already.
    """

    def __init__(self, own):
        super().__init__()
        self.norm_q, self.norm_k = own.norm_q, own.norm_k
        self.calls = []

    def forward(self, x, freqs, transformer_options):
        self.calls.append(tuple(x.shape))
        return torch.zeros_like(x)


def test_somebody_elses_attention_module_is_honoured(loaded, line):
    model = loaded.clone()
    theirs = ForeignAttention(model.model.diffusion_model.blocks[0].self_attn)
    before = _run(_patch(loaded))
    line()
    model.add_object_patch(SELF_ATTN.removesuffix(".forward"), theirs)
    _run(_patch(model))
    assert theirs.calls == [(1, TOKENS, 256)]
    report = line()
    assert "SLA in 1 of 2 blocks" in report
    assert f"dense in block 0: its self-attention is patched by {__name__}" in report
    assert torch.equal(_run(_patch(loaded)), before)


@pytest.mark.parametrize("part", ["cross_attn", "ffn"])
def test_somebody_elses_other_patches_run(loaded, line, part):
    calls = []
    model = _patch(loaded)
    model.add_object_patch(f"diffusion_model.blocks.0.{part}.forward", _zeros(calls))
    out = _run(model)
    assert calls == [(1, TOKENS, 256)]
    assert "SLA in 2 of 2 blocks" in line()
    assert goldens.relative_error(_run(_patch(loaded)), out) > 1e-3


@pytest.mark.parametrize("part", ["self_attn", "cross_attn", "ffn.1", "norm3"])
def test_somebody_elses_hooks_are_called(paths, line, part):
    model, calls = _patch(load_turbo_model(paths[0]), "sagesla"), []
    block = model.model.diffusion_model.blocks[0]
    block.get_submodule(part).register_forward_hook(lambda *_: calls.append(part))
    _run(model)
    # A newer host's feed-forward layer goes past its own GELU.
    passed = part == "ffn.1" and type(block.ffn) is not torch.nn.Sequential
    assert calls == ([] if passed else [part])
    own = "its self-attention" if part == "self_attn" else "a part of it"
    assert f"not fused in block 0: a node patches {own}" in line()


class MergedAttention(comfy.ldm.wan.model.WanSelfAttention):
    """One Linear for q, k and v, as a newer host may have it (0.45 has for another model)."""

    def __init__(self, own):
        torch.nn.Module.__init__(self)
        vars(self).update({**vars(own), "_modules": dict(own._modules)})
        self.qkv = torch.nn.ModuleList((own.q, own.k, own.v))  # of three times the width
        del self.q, self.k, self.v

    def forward(self, x, freqs, transformer_options):
        q, k, v = (linear(x) for linear in self.qkv)
        return self.o(q + k + v)


@pytest.mark.parametrize("attention", ["self_attn", "cross_attn"])
def test_merged_projections_step_aside(paths, line, attention):
    model = load_turbo_model(paths[0])
    block = model.model.diffusion_model.blocks[0]
    if attention == "self_attn":
        block.self_attn = MergedAttention(block.self_attn)
    else:
        merged = block.cross_attn
        merged.qkv = merged.q
        del merged.q
        merged.forward = lambda x, context, **options: merged.o(merged.qkv(x))
    _run(_patch(model))
    report = line()
    missing = "k, q, v" if attention == "self_attn" else "q"
    assert f"not fused in block 0: its attention has no {missing} of its own" in report
    if attention == "self_attn":
        assert "dense in block 0: its attention has no k, q, v of its own" in report


def test_attn1_patch_is_applied(loaded):
    """ComfyUI 0.3.75 has no such patch for Wan; where SLA runs, it works there too."""
    seen = []

    def halve(values):
        seen.append({name: tuple(values[name].shape) for name in "xqk"})
        assert ATTENTION in values["transformer_options"]
        return values["x"] / 2

    model = _patch(loaded)
    model.set_model_attn1_patch(halve)
    out = _run(model)
    heads = (1, TOKENS, 2, 128)
    assert seen == [{"x": (1, TOKENS, 256), "q": heads, "k": heads}] * 2
    assert goldens.relative_error(_run(_patch(loaded)), out) > 1e-3


def test_attention_override_serves_dense_blocks(loaded, monkeypatch):
    monkeypatch.setattr(text, "MOST_KEYS", 0)  # padding as one key rounds otherwise
    seen = []

    def override(original, q, k, v, heads, **options):
        seen.append(k.shape[1] == TOKENS)
        return original(q, k, v, heads, **options)

    model = _patch(loaded, dense_blocks=(1,))
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    out = _run(model)
    assert seen == [False, True, False]  # cross, self of block 1, cross
    assert torch.equal(out, _run(_patch(loaded, dense_blocks=(1,))))


def test_block_replacement_wraps_ours(loaded, line, monkeypatch):
    monkeypatch.setattr(text, "MOST_KEYS", 0)  # as above: here nothing of the text is kept
    seen = []

    def wrapper(args, extra):
        seen.append(tuple(args["img"].shape))
        return extra["original_block"](args)

    model = _patch(loaded)
    for index in range(2):
        model.set_model_patch_replace(wrapper, "dit", "double_block", index)
    out = _run(model)
    assert seen == [(1, TOKENS, 256)] * 2
    assert "SLA in 2 of 2 blocks" in line()
    assert torch.equal(out, _run(_patch(loaded)))


def test_clones_run_the_same(loaded, line):
    model = _patch(loaded, dense_blocks=(0,))
    expected = _run(model, steps=2)
    told = line()
    for clone in (model.clone(), model.clone().clone()):
        assert torch.equal(_run(clone, steps=2), expected)
        assert line() == told


def test_a_clone_keeps_its_settings_when_the_other_changes(loaded, line):
    model = _patch(loaded)
    clone = _patch(model.clone(), "dense")
    _run(model)
    assert "SLA in 2 of 2" in line()
    _run(clone)
    assert "SLA in 0 of 2" in line()


@pytest.mark.skipif(
    "force_deepcopy" not in inspect.signature(comfy.model_patcher.ModelPatcher.clone).parameters,
    reason="this ComfyUI clones no weights",
)
def test_a_clone_with_its_own_weights_uses_them(paths, line):
    model = _patch(load_turbo_model(paths[0]), dense_blocks=(1,))
    expected = _run(model)
    told = line()
    clone = model.clone(force_deepcopy=True)
    assert clone.model is not model.model
    model.detach()
    for block in model.model.diffusion_model.blocks:
        block.self_attn.q = block.self_attn.proj_l = None
    assert torch.equal(_run(clone), expected)
    assert line() == told


def test_a_second_patch_takes_the_place_of_the_first(loaded, line, sla_calls):
    once = _patch(loaded, topk=0.67)
    twice = _patch(_patch(loaded, "dense", dense_steps=3), topk=0.67)
    for model in (once, twice):
        for kind in ("outer_sample", "diffusion_model"):
            assert len(model.wrappers[kind][ATTENTION]) == 1
        assert len(model.callbacks["on_clone"][ATTENTION]) == 1
    assert torch.equal(_run(twice), _run(once))
    assert sla_calls == [0, 1] * 2


def test_model_options_hold_plain_values(loaded):
    options = _patch(loaded, dense_blocks=(0,)).model_options
    copied = copy.deepcopy(options)["transformer_options"][ATTENTION]
    assert copied == options["transformer_options"][ATTENTION]
    json.dumps(copied)


def test_cfg_batch_equals_its_single_runs(float_model, line):
    model = _patch(float_model)
    guided = _run(model, cfg=3.0)
    assert "1 forward pass" in line(), "both conditions run as one batch"
    positive, negative = _run(model), _run(model, positive="negative")
    assert goldens.relative_error(positive, negative) > 1e-3
    assert goldens.relative_error(guided, negative + 3 * (positive - negative)) < EXACT


@pytest.mark.parametrize("attention", ["sla", "dense"])
def test_a_batch_of_latents_equals_its_single_runs(float_model, attention):
    model, noise = _patch(float_model, attention), _noise(batch=2)
    both = _run(model, noise=noise)
    singles = torch.cat([_run(model, noise=noise[i : i + 1]) for i in range(2)])
    assert goldens.relative_error(both, singles) < EXACT
    assert goldens.relative_error(both[:1], both[1:]) > 0.1


def test_int8_blocks_start_anew_at_every_sample(paths):
    """192 rows a sample: a block across samples would share a scale with rows 100 times larger."""
    model = load_turbo_model(paths[0])
    comfy.model_management.load_models_gpu([model])
    x = _noise(batch=2).reshape(2, TOKENS, -1).repeat(1, 1, 4).to(in_comfyui.DEVICE)
    x[1] *= 100
    linear = model.model.diffusion_model.blocks[0].self_attn.q
    linear.granularity = "blocks"
    singles = torch.cat([linear(x[i : i + 1]) for i in range(2)])
    assert torch.equal(linear(x), singles)
    assert goldens.relative_error(linear(x.flatten(0, 1)[None])[0, :TOKENS], singles[0]) > 1e-2


@pytest.mark.parametrize("order", ["windows first", "sla first"])
def test_context_windows(loaded, line, sla_calls, order):
    if order == "sla first":
        model = in_comfyui.context_windows(_patch(loaded, dense_steps=1), length=9, overlap=5)
    else:
        model = _patch(in_comfyui.context_windows(loaded, length=9, overlap=5), dense_steps=1)
    out = _run(model, steps=2, noise=_noise(frames=5))
    assert out.isfinite().all()
    windows = len(sla_calls) // 2  # in the second step
    assert windows > 1
    report = line()
    assert f"{2 * windows} forward passes; SLA in 2 of 2 blocks" in report
    assert "dense in blocks 0-1: chosen for the first 1 steps" in report


def test_settings_are_checked_once_a_forward_pass(loaded, monkeypatch):
    model, checked = _patch(loaded), []
    check = SLASettings.__post_init__
    monkeypatch.setattr(SLASettings, "__post_init__", lambda self: checked.append(check(self)))
    in_comfyui.velocity(model, _noise(), _context(), 500.0)
    assert len(checked) == 1
