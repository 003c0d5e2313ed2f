"""The stages teacher, sla and rcm by the command's own functions, on a CPU and far too short."""

import argparse
import csv
import dataclasses
import json
import shutil
import types
from pathlib import Path

import in_comfyui  # noqa: F401 - ComfyUI comes into the process with it
import pytest
import tiny_data
import torch
from safetensors.torch import load_file, save_file
from turbodiffusion_pack.turbo_core.checkpoint import CheckpointError, read_checkpoint
from turbodiffusion_pack.turbo_core.host import stages
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model
from turbodiffusion_pack.turbo_core.host.wan_network import build_network, load_weights, wan_tensors
from turbodiffusion_pack.turbo_core.rcm import rcm_angles
from turbodiffusion_pack.turbo_core.training.batches import UNCONDITIONAL, Data, Draws
from turbodiffusion_pack.turbo_core.training.error import TrainingError
from turbodiffusion_pack.turbo_core.training.initial_weights import (
    TIME_WEIGHT,
    fast_time_features,
    initial_weights,
    still_time_features,
)
from turbodiffusion_pack.turbo_core.training.merge import merge_files
from turbodiffusion_pack.turbo_core.training.presets import PRESETS, override
from turbodiffusion_pack.turbo_core.training.rcm import RCMTraining
from turbodiffusion_pack.turbo_core.training.sla import SampledSLATraining, SLATraining
from turbodiffusion_pack.turbo_core.training.teacher import teacher_samples
from turbodiffusion_pack.turbo_core.training.trigflow import level_of

CPU = torch.device("cpu")
MODEL = "model.safetensors"


@pytest.fixture(autouse=True)
def outside_inference_mode():
    with torch.inference_mode(False):
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run whose teacher is through."""
    root = tmp_path_factory.mktemp("run")
    tiny_data.write(root / "latents", PRESETS["toy-cpu"].latent)
    with torch.inference_mode(False):
        stage(root, "teacher", "steps=40")
    return root


def stage(root: Path, name: str, *assignments: str, preset="toy-cpu", data=None, base=None) -> Path:
    """Run a stage in `root`; its folder."""
    args = argparse.Namespace(
        preset=preset, out=root, base=base, data=data or root / "latents", steps=None, seed=0,
        set=list(assignments), dry_run=False, sla=None, rcm=None,
    )  # fmt: skip
    stages.STAGES[name](args, CPU)
    return root / name


def column(folder: Path, name: str) -> list[float]:
    with (folder / "log.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_the_teacher_learns_and_loads(run):
    losses = column(run / "teacher", "loss")
    assert mean(losses[-8:]) < 0.85 * mean(losses[:8])
    model = load_turbo_model(str(run / "teacher" / "model.safetensors"))
    assert len(model.model.diffusion_model.blocks) == 2


def test_sla_comes_closer_to_the_dense_teacher(run):
    """From a student that is some way off, as SLA alone changes little in so early a teacher."""
    preset = PRESETS["toy-cpu"]
    weights = load_file(run / "teacher" / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    off = {n: w + 0.03 * torch.randn(w.shape, generator=generator) for n, w in weights.items()}
    student = build_network(preset.sizes, sla={"topk": 0.1, "block_q": 64, "block_k": 64})
    teacher = build_network(preset.sizes)
    load_weights(student, off)
    load_weights(teacher, weights)
    settings = dataclasses.replace(preset.sla, lr=1e-3)
    training = SLATraining(student, teacher, Data(run / "latents", CPU), settings, seed=0)
    losses = [float(training.step(n)["loss"]) for n in range(20)]
    assert mean(losses[-5:]) < 0.5 * mean(losses[:2])


def test_samples_of_sla_have_the_presets_guidance(run):
    """A toy's is not Wan's."""
    preset, data = PRESETS["toy-cpu"], Data(run / "latents", CPU)
    network = build_network(preset.sizes)
    load_weights(network, load_file(run / "teacher" / "model.safetensors"))
    batch = data.take(torch.arange(1))
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(0))
    for guidance in (1.0, 5.0):
        settings = dataclasses.replace(preset.sla, guidance=guidance)
        found = SLATraining(network, network, data, settings, seed=0).sample(batch, noise)
        wanted = teacher_samples(network, batch, data.unconditional, noise, guidance)
        assert torch.equal(found, wanted)


def test_samples_while_training_wait_for_no_compiler(run):
    """Eight of them, where the compiled network trains with batches of another size."""
    made = []
    twice = torch.compile(lambda x: 2 * x, backend=lambda graph, _: made.append(0) or graph.forward)
    training = types.SimpleNamespace(sample=lambda batch, noise: twice(noise))
    sample = stages._sampler(training, Data(run / "latents", CPU), 0, lambda latents: latents)
    assert len(sample()) == stages.SHOWN
    assert not made


def test_sla_writes_what_turbo_loader_runs(run):
    folder = stage(run, "sla", "steps=3")
    checkpoint = read_checkpoint(folder / "model.safetensors")
    assert all(weight.abs().max() > 0 for weight, _ in checkpoint.proj_l)
    assert_smooth_in_time(folder)
    assert load_turbo_model(str(folder / "model.safetensors"))
    with pytest.raises(CheckpointError, match="train from the plain Wan model"):
        stage(run / "again", "sla", data=run / "latents", base=folder / "model.safetensors")


def test_rcm_teaches_student_and_fake_score_in_turn(run):
    folder = stage(run, "rcm", "steps=14", "consistency_only=4", "every=3")
    with (folder / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    students = [i for i, row in enumerate(rows) if row["consistency"]]
    assert students == [0, 1, 2, 3, 4, 7, 10, 13]
    assert [i for i, row in enumerate(rows) if row["dmd"]] == [4, 7, 10, 13]
    assert [i for i, row in enumerate(rows) if row["fake"]] == [5, 6, 8, 9, 11, 12]
    teacher, student = (load_file(run / n / "model.safetensors") for n in ("teacher", "rcm"))
    assert teacher.keys() == student.keys()
    moved = [name for name in teacher if not teacher[name].equal(student[name])]
    assert {n for n in teacher if n.startswith("blocks.")} <= set(moved)
    assert_smooth_in_time(run / "teacher")
    assert_smooth_in_time(folder)


def rcm_of(run: Path, **settings) -> RCMTraining:
    networks = [build_network(PRESETS["toy-cpu"].sizes) for _ in range(3)]
    for network in networks:
        load_weights(network, load_file(run / "teacher" / MODEL))
    settings = dataclasses.replace(PRESETS["toy-cpu"].rcm, **settings)
    return RCMTraining(*networks, Data(run / "latents", CPU), settings, seed=0)


@pytest.mark.parametrize("where", ["sampler", "anywhere"])
def test_samples_in_training_may_stop_where_the_sampler_does(run, where):
    training = rcm_of(run, consistency_only=0, every=2, sampler_angles=where == "sampler")
    levels = []
    training.student.network.register_forward_hook(
        lambda _, given, out: levels.append(given[1][0].item() / 1000)
    )
    training.step(7)  # the fake score's fourth
    wanted = level_of(torch.tensor(rcm_angles(4, 80.0)[:-1])).tolist()
    assert len(levels) == 4
    assert (levels == pytest.approx(wanted, abs=1e-6)) == (where == "sampler")


def test_a_teacher_may_be_trained_further(run, tmp_path):
    base = run / "teacher" / MODEL
    stage(tmp_path, "teacher", "steps=1", "lr=0.0", data=run / "latents", base=base)
    found, given = load_file(tmp_path / "teacher" / MODEL), load_file(base)
    assert all(found[name].equal(given[name]) for name in given)


def assert_smooth_in_time(folder: Path) -> None:
    """The fast time features, which start at 0, have stayed there, and the others have learnt."""
    weight = load_file(folder / "model.safetensors")[TIME_WEIGHT]
    start = initial_weights(PRESETS["toy-cpu"].sizes, 0, 64)[TIME_WEIGHT]
    assert (weight[:, fast_time_features()] == 0).all()
    assert not torch.equal(weight, start)


def test_fast_time_features_that_a_base_makes_use_of_go_on_learning():
    """Wan's own."""
    network = build_network(PRESETS["toy-cpu"].sizes)
    weights = initial_weights(PRESETS["toy-cpu"].sizes, 0)
    load_weights(network, weights)
    assert torch.equal(still_time_features(network)[TIME_WEIGHT], fast_time_features())
    load_weights(network, {**weights, TIME_WEIGHT: torch.ones_like(weights[TIME_WEIGHT])})
    assert still_time_features(network) == {}


def test_a_tangent_by_differences_teaches_alike(run, tmp_path):
    names = ("jvp", "difference")
    folders = [
        stage(
            tmp_path / name, "rcm", "steps=3", f"tangent={name}",
            data=run / "latents", base=run / "teacher" / "model.safetensors",
        )
        for name in names
    ]  # fmt: skip
    exact, differences = (column(folder, "tangent") for folder in folders)
    assert differences == pytest.approx(exact, rel=0.05)


def test_image_to_video_trains_its_pictures(tmp_path):
    tiny_data.write(tmp_path / "latents", PRESETS["toy-cpu-i2v"].latent, image=True)
    for name in ("teacher", "sla", "rcm"):
        stage(tmp_path, name, "steps=3", preset="toy-cpu-i2v")
    weight = read_checkpoint(tmp_path / "rcm" / "model.safetensors").tensors[
        "patch_embedding.weight"
    ]
    assert weight.shape[1] == 36


def test_a_step_depends_on_its_number_and_slots_alone(run, tmp_path):
    """What makes a resume exact, and one GPU's run that of many."""
    base = {"data": run / "latents", "base": run / "teacher" / "model.safetensors"}
    settings = ("steps=4", "micro_batch=2", "lr=0.001")
    through = stage(tmp_path / "a", "sla", *settings, **base)
    with pytest.raises(KeyboardInterrupt):
        stage_killed_after(2, tmp_path / "b", "sla", *settings, **base)
    resumed = stage(tmp_path / "b", "sla", *settings, **base)
    a, b = (load_file(folder / "model.safetensors") for folder in (through, resumed))
    assert all(a[name].equal(b[name]) for name in a)
    assert column(through, "loss") == column(resumed, "loss")


def stage_killed_after(saves: int, *args, **kwargs) -> None:
    """Run a stage with a checkpoint each step, and stop it dead behind one of them."""
    from turbodiffusion_pack.turbo_core.training.run_folder import RunFolder

    save = RunFolder.save

    def save_and_die(self, step, state):
        save(self, step, state)
        if step == saves:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RunFolder, "save", save_and_die)
        stage(*args[:2], "save_every=1", *args[2:], **kwargs)


def test_other_data_are_other_settings(run, tmp_path):
    """A resumed run would go on with other samples and say nothing."""
    base = run / "teacher" / "model.safetensors"
    stage(tmp_path, "sla", "steps=1", data=run / "latents", base=base)
    with pytest.raises(TrainingError, match=r"was started with other settings .data "):
        stage(tmp_path, "sla", "steps=1", data=tmp_path / "others", base=base)


def test_how_it_is_computed_may_change_but_not_what(run, tmp_path):
    """A folder of 0.4.0 says nothing of text_channels: it ran with the preset's."""
    stage(tmp_path, "teacher", "steps=1", data=run / "latents")
    stage(tmp_path, "teacher", "steps=1", "compiled=True", "context=20", data=run / "latents")
    settings = tmp_path / "teacher" / "settings.json"
    told = json.loads(settings.read_text())
    assert told.pop("text_channels") == 64
    for text in (settings.read_text(), json.dumps(told)):
        settings.write_text(text)
        stage(tmp_path, "teacher", "steps=1", data=run / "latents")
        with pytest.raises(TrainingError, match=r"settings .text_channels 64, now 32\)"):
            stage(tmp_path, "teacher", "steps=1", "text_channels=32", data=run / "latents")


@pytest.mark.parametrize("name, setting", [("sla", "after_rcm"), ("rcm", "sampler_angles")])
def test_a_folder_of_an_earlier_version_goes_on_as_it_began(run, tmp_path, name, setting):
    """One of 0.8.1 says nothing of the setting: it ran without."""
    base = {"data": run / "latents", "base": run / "teacher" / MODEL}
    settings = stage(tmp_path, name, "steps=1", **base) / "settings.json"
    told = json.loads(settings.read_text())
    assert told[name].pop(setting) is False
    settings.write_text(json.dumps(told))
    stage(tmp_path, name, "steps=1", **base)
    with pytest.raises(TrainingError, match=rf"{name}\.{setting} false, now true"):
        stage(tmp_path, name, "steps=1", f"{setting}=True", **base)


def test_a_full_disk_keeps_no_process_waiting(tmp_path, monkeypatch):
    """The others gather every tensor, so the one that writes does, even if it can write none."""
    gathered = []
    monkeypatch.setattr(stages, "_gathered", lambda tensor: gathered.append(1) or tensor)
    tensors = {name: torch.zeros(2) for name in "abc"}
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(FileExistsError):
        stages._save(tmp_path / "model.safetensors", tensors, {})
    assert len(gathered) == 3


def test_what_does_not_fit_is_refused(run, tmp_path):
    sizes = dataclasses.replace(PRESETS["toy-cpu"].sizes, num_layers=1)
    save_file(initial_weights(sizes, 0), tmp_path / "deep.safetensors")
    with pytest.raises(TrainingError, match="has latents"):
        stage(tmp_path, "teacher", preset="toy", data=run / "latents")
    latents = Path(shutil.copytree(run / "latents", tmp_path / "latents"))
    save_file({"context": torch.zeros(5, 64)}, latents / UNCONDITIONAL)
    with pytest.raises(TrainingError, match="4 tokens and an unconditional one of 5"):
        stage(tmp_path / "b", "teacher", data=latents)
    with pytest.raises(TrainingError, match="cannot be dealt"):
        stage(tmp_path / "c", "teacher", "batch=7", data=run / "latents")
    (latents / "data-00001.safetensors").unlink()
    with pytest.raises(TrainingError, match=r"cannot be read .*data-00001.safetensors\): run the"):
        stage(tmp_path / "d", "teacher", data=latents)
    for base, told in (
        (tmp_path / "no.safetensors", "no.safetensors: does not exist: choose a"),
        (
            tmp_path / "deep.safetensors",
            r"is no model of the preset toy-cpu \(num_layers 1, not 2\): choose another preset or",
        ),
    ):
        with pytest.raises(CheckpointError, match=told):
            stage(tmp_path / "e", "sla", data=run / "latents", base=base)
    with pytest.raises(ValueError, match="write NAME=VALUE with one of steps, batch"):
        override(PRESETS["toy"], "sla", ["step=3"])
    with pytest.raises(ValueError, match="lr is a number such as"):
        override(PRESETS["toy"], "sla", ["lr=fast"])
    with pytest.raises(ValueError, match="has no teacher stage"):
        override(PRESETS["14B-480P"], "teacher", ["steps=3"])


def test_an_index_that_counts_other_samples(tmp_path):
    """More than its files hold would be looked up past their end."""
    tiny_data.write(tmp_path, PRESETS["toy-cpu"].latent)
    (tmp_path / "index.json").write_text('{"samples": [16, 40]}')
    with pytest.raises(TrainingError, match=r"counts \[16, 40\] samples, its files hold \[16, "):
        Data(tmp_path, torch.device("cpu"))


def test_sla_may_be_tuned_on_the_student(run, tmp_path):
    """What it writes is an update, which on the base and the student's makes the tuned student."""
    base = {"data": run / "latents", "base": run / "teacher" / "model.safetensors"}
    with pytest.raises(TrainingError, match="rcm is not finished: run the stage rcm"):
        stage(tmp_path, "sla", "after_rcm=True", **base)
    rcm = stage(tmp_path, "rcm", "steps=3", "lr=0.01", "consistency_only=1", **base)
    tuned = {}
    exported = SampledSLATraining.exported

    def seen(training):
        tuned.update(training.learner.average())
        return exported(training)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(SampledSLATraining, "exported", seen)
        sla = stage(tmp_path, "sla", "after_rcm=True", "steps=2", **base)
    merge_files(base["base"], sla / MODEL, rcm / MODEL, tmp_path / "merged.safetensors")
    merged, student = load_file(tmp_path / "merged.safetensors"), load_file(rcm / MODEL)
    assert merged.keys() == wan_tensors(tuned).keys() > student.keys()
    for name, tensor in wan_tensors(tuned).items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-6)
    moved = max((merged[name] - student[name]).abs().max() for name in student)
    assert moved > 1e-5
    save_file(
        {name: tensor + 1e-3 for name, tensor in student.items()}, tmp_path / "other.safetensors"
    )
    with pytest.raises(CheckpointError, match="was tuned on another student than other"):
        merge_files(
            base["base"], sla / MODEL, tmp_path / "other.safetensors", tmp_path / "no.safetensors"
        )
    assert not (tmp_path / "no.safetensors").exists()


def test_the_student_is_met_where_its_samples_go(run):
    """At its sampler's levels, each point made of what the sparse network made of the last one."""
    preset, data = PRESETS["toy-cpu"], Data(run / "latents", CPU)
    sparse = build_network(preset.sizes, sla={"topk": 0.4, "block_q": 64, "block_k": 64})
    dense = build_network(preset.sizes)
    for network in (sparse, dense):
        load_weights(network, load_file(run / "teacher" / MODEL))
    angles = rcm_angles(4, 80.0)[:-1]
    asked = {}
    for name, network in (("sparse", sparse), ("dense", dense)):
        network.register_forward_hook(
            lambda _, given, out, name=name: asked.setdefault(name, []).append((given, out))
        )
    settings = dataclasses.replace(preset.sla, batch=3, micro_batch=3)
    training = SampledSLATraining(sparse, dense, None, angles, data, settings, seed=0)
    told = training._learn(0, 0, 1.0)
    assert len(asked["sparse"]) == len(asked["dense"]) == 4
    draws, x0 = Draws(0, 0, 0, CPU), 0.0
    batch = draws.batch(data, 3)
    for place, angle in enumerate(angles):
        (x, timestep, context, _), out = asked["sparse"][place]
        level = float(level_of(torch.tensor(angle)))
        noise = draws.normal(f"noise {place}", batch.latents)
        torch.testing.assert_close(x, (1 - level) * x0 + level * noise, rtol=1e-5, atol=1e-5)
        assert timestep.tolist() == pytest.approx([1000 * level] * 3)
        assert context.equal(batch.context)
        assert asked["dense"][place][0][0].equal(x)
        x0 = x - level * out.detach()
    pairs = zip(asked["sparse"], asked["dense"], strict=True)
    losses = [(a - b).square().mean().item() for (_, a), (_, b) in pairs]
    assert float(told["loss"]) == pytest.approx(mean(losses), rel=1e-4)
    assert_gradients_of_the_mean(sparse, dense, [given for given, _ in asked["sparse"][:4]])


def assert_gradients_of_the_mean(sparse, dense, points) -> None:
    """Of all points' losses, in the projections, which the gradients reach last."""
    weights = [block.self_attn.proj_l.weight for block in sparse.blocks]
    found = [weight.grad.clone() for weight in weights]
    losses = [(sparse(*given) - dense(*given).detach()).square().mean() for given in points]
    wanted = torch.autograd.grad(sum(losses) / len(losses), weights)
    for got, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-9)


def sampled_sla(run, **settings) -> SampledSLATraining:
    """Of the toy-cpu preset on the teacher as student, with another one's weights to start from."""
    preset = PRESETS["toy-cpu"]
    sparse = build_network(preset.sizes, sla={"topk": 0.4, "block_q": 64, "block_k": 64})
    dense = build_network(preset.sizes)
    weights = load_file(run / "teacher" / MODEL)
    make = torch.Generator().manual_seed(0)
    load_weights(dense, weights)
    load_weights(
        sparse, {n: w + 0.02 * torch.randn(w.shape, generator=make) for n, w in weights.items()}
    )
    settings = dataclasses.replace(preset.sla, batch=2, micro_batch=2, **settings)
    angles, data = rcm_angles(4, 80.0)[:-1], Data(run / "latents", CPU)
    return SampledSLATraining(sparse, dense.requires_grad_(False), None, angles, data, settings, 0)


def gradients_at_points(training: SampledSLATraining) -> tuple[list, list[float]]:
    """Of update 0, what each point adds to the first block's gradients, and each point's loss."""
    weight, found, told = training.learner.network.blocks[0].ffn[0].weight, [], []
    learn = training.learn

    def seen(share, *given):
        weight.grad = None
        values = learn(share, *given)
        found.append(weight.grad.clone())
        told.append(float(values["loss"]))
        return values

    training.learn = seen
    training._learn(0, 0, 1.0)
    return found, told


def test_balance_weighs_each_point_by_a_power_of_its_loss(run):
    plain, losses = gradients_at_points(sampled_sla(run))
    balanced, told = gradients_at_points(sampled_sla(run, balance=1.5))
    assert told == losses and len(told) == 4
    assert max(losses) > 1.1 * min(losses)
    for before, after, loss in zip(plain, balanced, losses, strict=True):
        torch.testing.assert_close(after, before * loss**-1.5, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("told", [{}, {"rollout": "2", "sigma_max": "100.0"}])
def test_the_student_says_where_its_sampler_goes(tmp_path, told):
    """rcm --set rollout=2, which is no setting of the stage sla."""
    args = argparse.Namespace(out=tmp_path, rcm=tmp_path / "student.safetensors")
    save_file({"weight": torch.zeros(1)}, args.rcm, metadata=told)
    wanted = rcm_angles(2, 100.0) if told else rcm_angles(4, 80.0)
    assert stages._angles(args, PRESETS["toy-cpu"]) == wanted[:-1]


def test_sla_on_the_student_goes_on_as_if_it_had_not_stopped(run, tmp_path):
    base = {"data": run / "latents", "base": run / "teacher" / "model.safetensors"}
    settings = ("after_rcm=True", "steps=3", "micro_batch=4", "lr=0.001")
    folders = []
    for name in "ab":
        stage(tmp_path / name, "rcm", "steps=2", **base)
        if name == "b":
            with pytest.raises(KeyboardInterrupt):
                stage_killed_after(1, tmp_path / name, "sla", *settings, **base)
        folders.append(stage(tmp_path / name, "sla", *settings, **base))
    a, b = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(a[name].equal(b[name]) for name in a)
