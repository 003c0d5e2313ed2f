"""The examination of a toy run, with random networks in the place of trained ones."""

import argparse
import csv
import dataclasses

import in_comfyui  # noqa: F401
import pytest
import torch
from safetensors.torch import save_file
from turbodiffusion_pack.turbo_core.checkpoint.names import PROJ_L
from turbodiffusion_pack.turbo_core.host import as_nodes, toy_evaluate, toy_stages
from turbodiffusion_pack.turbo_core.host.toy_evaluate import Models, evaluate, experts
from turbodiffusion_pack.turbo_core.host.wan_vae import TrainableVAE
from turbodiffusion_pack.turbo_core.rcm import default_sigma_max, rcm_angles
from turbodiffusion_pack.turbo_core.training import presets, run_folder
from turbodiffusion_pack.turbo_core.training.batches import Batch
from turbodiffusion_pack.turbo_core.training.initial_weights import initial_weights
from turbodiffusion_pack.turbo_core.training.samplers import few_steps
from turbodiffusion_pack.turbo_core.training.toy import words
from turbodiffusion_pack.turbo_core.training.toy.world import corner_of_region
from turbodiffusion_pack.turbo_core.training.velocity import velocity_of

CPU = torch.device("cpu")
SMALL = dataclasses.replace(
    presets.PRESETS["toy-cpu"],
    latent=(2, 4, 4),
    evaluate=presets.Evaluation(prompts=2, at_once=4, teacher_steps=2),
)
SMALL_I2V = dataclasses.replace(SMALL, sizes=presets.PRESETS["toy-cpu-i2v"].sizes)


@pytest.fixture(autouse=True)
def small_presets(monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "toy-cpu", SMALL)
    monkeypatch.setitem(presets.PRESETS, "toy-cpu-i2v", SMALL_I2V)


def write_run(path, preset: presets.Preset, seed: int = 0):
    """A run whose models are one random network; with SLA its attention is sparse besides."""
    torch.manual_seed(seed)
    weights = initial_weights(preset.sizes, seed, 64)
    weights = {n: t + 0.02 * torch.randn(t.shape) for n, t in weights.items()}
    projections = {
        f"blocks.{i}.{PROJ_L}.{part}": torch.zeros(shape)
        for i in range(preset.sizes.num_layers)
        for part, shape in (("weight", (128, 128)), ("bias", (128,)))
    }
    vae = TrainableVAE(4).wan.state_dict()
    contents = {
        "data": ("vae.safetensors", vae),
        "teacher": ("model.safetensors", weights),
        "rcm": ("model.safetensors", weights),
        "sla": ("model.safetensors", weights | projections),
        "merge": ("model.safetensors", weights | projections),
    }
    for stage, (name, tensors) in contents.items():
        with run_folder.open(path, stage, {}) as folder:
            folder.finish(lambda part, n=name, t=tensors: save_file(t, part / n))
    return path


def arguments(path, preset: str, **others) -> argparse.Namespace:
    plain = {"seed": 0, "steps": None, "set": [], "low": None, "data": None, "dry_run": False}
    return argparse.Namespace(**plain | {"out": path, "preset": preset} | others)


def test_all_models_of_a_run_are_examined(tmp_path, capsys):
    args = arguments(write_run(tmp_path / "run", SMALL), "toy-cpu")
    with torch.inference_mode(False):
        evaluate(args, CPU)
    table = (tmp_path / "run" / "evaluate" / "table.md").read_text(encoding="utf-8")
    text = (tmp_path / "run" / "evaluate" / "table.csv").read_text(encoding="utf-8")
    rows = {row["name"]: row for row in csv.DictReader(text.splitlines())}
    assert len(rows) == 15
    assert float(rows["teacher 2"]["latent_mse"]) == 0
    merged, dense = (float(rows[name]["latent_mse"]) for name in ("merged 1", "rCM 1"))
    assert merged == pytest.approx(dense) and dense > 0
    assert float(rows["INT8 nodes 1"]["psnr"]) > 20
    assert "4 videos of 2 prompts" in table and "| untuned |" in table
    assert table.count("reached: ") == 17
    (picture,) = (tmp_path / "run" / "evaluate").glob("stages.*")
    assert picture.stat().st_size <= toy_evaluate.LARGEST_PICTURE
    capsys.readouterr()
    evaluate(args, CPU)
    assert "is finished" in capsys.readouterr().err


def test_sla_after_rcm_is_measured_beside_the_student(tmp_path, capsys):
    """At its sampler's levels; what the stage wrote is no model of its own, so it has no row."""
    run = write_run(tmp_path / "run", SMALL)
    (run / "sla" / "model.safetensors").unlink()
    teacher = initial_weights(SMALL.sizes, 1, 64)
    save_file(teacher, run / "teacher" / "model.safetensors")
    args = arguments(run, "toy-cpu")
    student = dataclasses.replace(SMALL.sla, after_rcm=True, topk=1.0)
    with pytest.MonkeyPatch.context() as patched, torch.inference_mode(False):
        patched.setitem(presets.PRESETS, "toy-cpu", dataclasses.replace(SMALL, sla=student))
        evaluate(args, CPU)
    table = (run / "evaluate" / "table.md").read_text(encoding="utf-8")
    assert "\n| SLA 2 |" not in table and "\n| merged 4 |" in table
    assert "| SLA's velocity error | s 0.988 | s 0.934 | s 0.853 | s 0.609 |" in table
    errors = [line for line in table.splitlines() if line.startswith(("| untuned", "| tuned"))]
    assert errors == [
        f"| {name} | 0.0000 | 0.0000 | 0.0000 | 0.0000 |" for name in ("untuned", "tuned")
    ]
    capsys.readouterr()


def test_sla_is_examined_as_the_run_has_it(tmp_path):
    """--set changed it, or an earlier version had other presets and no after_rcm."""
    preset = dataclasses.replace(SMALL, sla=dataclasses.replace(SMALL.sla, after_rcm=True))
    assert toy_evaluate.as_trained(preset, tmp_path) == preset
    told = {**dataclasses.asdict(SMALL.sla), "topk": 0.7, "betas": [0.9, 0.99]}
    del told["after_rcm"]
    with run_folder.open(tmp_path, "sla", {"preset": "toy-cpu", "sla": told}):
        pass
    found = toy_evaluate.as_trained(preset, tmp_path).sla
    assert (found.topk, found.block_k, found.after_rcm) == (0.7, SMALL.sla.block_k, False)


@pytest.mark.parametrize("kind", ["text", "picture"])
def test_nodes_sample_what_the_network_does(tmp_path, kind):
    """One step, so no noise is drawn: INT8 and bf16 against fp32; two experts for a picture."""
    preset = SMALL_I2V if kind == "picture" else SMALL
    paths = [write_run(tmp_path / str(seed), preset, seed) for seed in range(2)]
    low = paths[1] if kind == "picture" else None
    args = arguments(paths[0], "toy-cpu", low=low)
    models = Models(args, preset, CPU)
    model = as_nodes.quantized(models.files("teacher"), 0.1, toy_evaluate.BOUNDARY)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 16, *preset.latent, generator=generator)
    image = torch.randn(2, 20, *preset.latent, generator=generator)
    image[:, :4] = (torch.arange(2) == 0).float().view(1, 1, 2, 1, 1)
    prompts = ("a big red circle grows on black", "a small cyan diamond moves left on navy")
    context = torch.stack([words.encode(prompt) for prompt in prompts])
    batch = Batch(noise, context, image if kind == "picture" else None)
    network = models.network("teacher")
    angles = torch.tensor(rcm_angles(1, default_sigma_max(preset.sizes.in_channels))[:-1])
    expected = few_steps(velocity_of(network, batch), noise, angles, generator)
    found = as_nodes.sample(model, noise, context, batch.image, 1, seed=0)
    assert (found - expected).norm() < 0.05 * expected.norm()
    other = as_nodes.sample(model, noise, context.flip(0), batch.image, 1, seed=0)
    assert (other - found).abs().max() > 0.01


def test_experts_part_the_noise_levels():
    network = experts(lambda *_: "high", lambda *_: "low")
    said = [network(None, torch.tensor([t]), None, None) for t in (1000.0, 900.0, 899.0, 0.0)]
    assert said == ["high", "high", "low", "low"]


def test_a_dry_run_starts_nothing(tmp_path, capsys):
    for stage in (evaluate, toy_stages.vae, toy_stages.data):
        stage(arguments(tmp_path / "run", "toy", dry_run=True), CPU)
    told = capsys.readouterr().out
    assert told.count("clips of 17 frames of 256 x 256; nothing is started") == 3
    assert "samples 10240" in told and "prompts 256" in told and not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="for toys"):
        toy_stages.vae(arguments(tmp_path / "run", "14B-480P"), CPU)


def test_a_run_that_is_not_finished_is_told(tmp_path):
    with pytest.raises(Exception, match="run the stage data"):
        evaluate(arguments(tmp_path / "empty", "toy-cpu"), CPU)


def test_held_out_prompts_come_twice_with_other_starts(tmp_path):
    path = write_run(tmp_path / "run", SMALL_I2V) / "data" / "vae.safetensors"
    vae = toy_evaluate.LatentVAE(path, CPU)
    clips, batch = toy_evaluate.held_out(SMALL_I2V, SMALL_I2V.evaluate, vae)
    assert clips.colour.tolist() == clips.colour[::2].repeat_interleave(2).tolist()
    assert not torch.equal(clips.start[0], clips.start[1])
    corners = corner_of_region(clips.start)
    assert torch.equal(corners[::2], corners[1::2])  # all prompts of text say that
    assert batch.latents.shape == (4, 16, 2, 4, 4) and batch.image.shape == (4, 20, 2, 4, 4)
    assert torch.equal(batch.context[0], batch.context[1]) and batch.context.shape[1:] == (16, 4096)
    assert torch.allclose(batch.image[:, 4:, 0], batch.latents[:, :, 0], atol=1e-4)  # causal
