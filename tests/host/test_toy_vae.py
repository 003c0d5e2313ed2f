"""The toy world's VAE is ComfyUI's: in one piece or in many, scaled or not, in its own nodes."""

import in_comfyui
import pytest
import tiny_models
import torch
from comfy.latent_formats import Wan21
from comfy.sd import VAE as HostVAE  # noqa: N811
from comfy_extras.nodes_wan import WanImageToVideo
from safetensors.torch import save_file
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model
from turbodiffusion_pack.turbo_core.host.wan_vae import (
    LatentVAE,
    TrainableVAE,
    latent_statistics,
)
from turbodiffusion_pack.turbo_core.training import recorded as recorded_passes
from turbodiffusion_pack.turbo_core.training.error import TrainingError
from turbodiffusion_pack.turbo_core.training.presets import VAE, Clips
from turbodiffusion_pack.turbo_core.training.toy import vae as toy_vae
from turbodiffusion_pack.turbo_core.training.toy.clips import conditioned, shards
from turbodiffusion_pack.turbo_core.training.toy.world import draw, render

VIDEO = (9, 32)  # frames and pixels
CPU = torch.device("cpu")


def random_vae() -> TrainableVAE:
    """All of whose layers do something, as they do not yet where training starts."""
    torch.manual_seed(0)
    network = TrainableVAE(4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return network


@pytest.fixture
def network():
    with torch.inference_mode(False):
        yield random_vae()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    save_file(random_vae().wan.state_dict(), path)
    return path


def videos(count: int = 2, frames: int = 9) -> torch.Tensor:
    return toy_vae.pictures(render(draw(0, 0, count), frames, VIDEO[1]))


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_a_whole_clip_is_what_comfyui_makes_of_it_in_pieces(network, frames):
    clip = videos(2, frames)
    latents, _ = network.encode(clip)
    assert latents.shape == (2, 16, (frames + 3) // 4, 4, 4)
    assert torch.allclose(latents, network.wan.encode(clip), atol=1e-5)
    decoded = network.decode(latents)
    assert decoded.shape == clip.shape
    assert torch.allclose(decoded, network.wan.decode(latents), atol=1e-4)


def test_the_fold_is_exact(network):
    """Latents come out with Wan's mean and deviation, and decode to the same videos."""
    clip = videos(2)
    network.double()
    before, log_variance = network.encode(clip.double())
    decoded = network.decode(before)
    found = (before.mean((0, 2, 3, 4)), before.movedim(1, 0).flatten(1).std(1))
    toy_vae.fold(network.wan, found, latent_statistics())
    after, new_log_variance = network.encode(clip.double())
    format = Wan21()
    normal = format.process_in(after)
    assert normal.mean((0, 2, 3, 4)).abs().max() < 1e-6
    assert (normal.movedim(1, 0).flatten(1).std(1) - 1).abs().max() < 1e-6
    assert torch.allclose(network.decode(after), decoded, atol=1e-10)
    scale = format.latents_std.flatten().double() / found[1]
    wider = (new_log_variance - log_variance).mean((0, 2, 3, 4))
    assert torch.allclose(wider, 2 * scale.log(), atol=1e-10)


def test_the_spread_is_that_of_all_latents(network):
    network.float()
    clips = [draw(0, at, 2) for at in (0, 2, 4)]
    mean, deviation = toy_vae.latent_spread(network, clips, VIDEO)
    latents = network.encode(toy_vae.pictures(render(draw(0, 0, 6), *VIDEO)))[0]
    assert torch.allclose(mean.float(), latents.mean((0, 2, 3, 4)), atol=1e-5)
    assert torch.allclose(deviation.float(), latents.movedim(1, 0).flatten(1).std(1), rtol=1e-4)


def host_vae(file):
    """ComfyUI's VAE as its loader has it, on the CPU in fp32, where both can be compared."""
    tensors = in_comfyui.comfy.utils.load_torch_file(str(file))
    return HostVAE(sd=tensors, device=CPU, dtype=torch.float32)


def test_comfyui_loads_the_file_and_sees_the_same(file):
    """Its VAE node's encode and decode against ours."""
    clips = render(draw(0, 0, 1), *VIDEO)
    host = host_vae(file)
    ours = LatentVAE(file, CPU)
    latents = ours.encode(toy_vae.pictures(clips))
    theirs = Wan21().process_in(host.encode(clips[0]))
    assert torch.allclose(theirs, latents, atol=1e-4)
    seen = toy_vae.frames_of(ours.decode(latents))
    assert torch.allclose(host.decode(Wan21().process_out(latents)), seen, atol=1e-4)


def test_the_picture_is_given_as_comfyui_gives_it(file, tmp_path):
    """WanImageToVideo and the model's own concatenation against what the data stage writes."""
    clip = render(draw(0, 3, 1), *VIDEO)
    host = host_vae(file)
    frames, pixels = VIDEO
    positive, *_ = WanImageToVideo.execute(
        [[torch.zeros(1, 16, 4096), {}]], [], host, pixels, pixels, frames, 1, clip[0, :1]
    ).args
    given = {n: positive[0][1][n] for n in ("concat_latent_image", "concat_mask")}
    tiny_models.write_checkpoint(tmp_path / "i2v.pth", tiny_models.i2v_checkpoint(layers=1))
    model = load_turbo_model(str(tmp_path / "i2v.pth")).model
    theirs = model.concat_cond(noise=torch.zeros(1, 16, 3, 4, 4), device=CPU, **given)
    ours = conditioned(LatentVAE(file, CPU).encode, toy_vae.pictures(clip))
    assert theirs.shape == ours.shape == (1, 20, 3, 4, 4)
    assert torch.allclose(theirs, ours, atol=1e-4)


def test_shards_hold_all_samples_in_order(file):
    encode = LatentVAE(file, CPU).encode
    settings = Clips(samples=5, batch=2)
    (shard,) = shards(encode, settings, VIDEO, 0, True, CPU)
    assert shard["latents"].shape == (5, 16, 3, 4, 4) and shard["images"].shape == (5, 20, 3, 4, 4)
    last = encode(toy_vae.pictures(render(draw(0, 4, 1), *VIDEO)))
    assert torch.allclose(shard["latents"][4:].float(), last, atol=2e-3, rtol=2e-3)


def test_training_learns_and_a_step_depends_on_its_number_alone():
    settings = VAE(steps=8, batch=8, crop=16, warmup=1, lr=5e-3, whole=0.25)
    with torch.inference_mode(False):
        network = TrainableVAE(4)
        training = toy_vae.VAETraining(network, settings, VIDEO, seed=0)
        before = {n: p.detach().clone() for n, p in network.named_parameters()}
        first = training.step(0)["l1"]
        for n in range(1, 6):
            training.step(n)
        assert training.step(0)["l1"] < 0.9 * first
        network.load_state_dict(before)
        assert torch.equal(training.step(0)["l1"], first)
        assert training._clips(5, toy_vae.Draws(0, 5, 0, CPU)).shape == (8, 3, 9, 16, 16)
        assert training._clips(6, toy_vae.Draws(0, 6, 0, CPU)).shape == (2, 3, 9, 32, 32)


class OneSize:
    """Recorded without a GPU, which takes no other shapes than the first ones."""

    def __init__(self, work):
        self.work, self.shapes = work, None

    def __call__(self, *given):
        shapes = [tensor.shape for tensor in given]
        self.shapes = self.shapes or shapes
        assert shapes == self.shapes
        return self.work(*given)


def updates(recorded: bool, device: str = "cpu") -> list[float]:
    """The losses of the last crops and the first whole frames."""
    settings = VAE(steps=8, batch=4, crop=16, warmup=1, lr=5e-3, whole=0.5)
    with torch.inference_mode(False):
        torch.manual_seed(0)
        network = TrainableVAE(4).to(device)
        training = toy_vae.VAETraining(network, settings, (5, 32), seed=0, recorded=recorded)
        return [float(training.step(n)["loss"]) for n in range(2, 6)]


def test_replayed_passes_learn_as_others(monkeypatch):
    monkeypatch.setattr(recorded_passes, "Recorded", OneSize)
    assert updates(True) == updates(False)


@pytest.mark.gpu
def test_a_graph_of_the_vae_learns_as_python_does():
    assert updates(True, "cuda") == pytest.approx(updates(False, "cuda"), rel=0.02)


def test_crops_show_the_shape():
    clips = draw(0, 0, 64)
    corner = toy_vae.around(clips, 9, 0.25, torch.Generator().manual_seed(0))
    assert corner.min() >= 0 and corner.max() <= 0.75
    seen = render(clips, 9, 64, corner, 16).flatten(1, 3)
    assert (seen.std(1).amax(1) > 0.01).all()


def test_what_is_no_vae_is_told(tmp_path):
    with pytest.raises(TrainingError, match=r"no Wan 2\.1 VAE"):
        LatentVAE(tmp_path / "missing.safetensors", CPU)
    save_file({"decoder.head.0.gamma": torch.ones(4, 1, 1, 1)}, tmp_path / "other.safetensors")
    with pytest.raises(TrainingError, match=r"no Wan 2\.1 VAE"):
        LatentVAE(tmp_path / "other.safetensors", CPU)
