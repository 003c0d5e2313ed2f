"""TurboVAE: its output is the host's, whole or in strips, and its input stays as it was."""

import copy
import itertools
import logging
import weakref
from functools import partial

import in_comfyui  # noqa: F401 - starts ComfyUI
import pytest
import tiny_models
import torch
from comfy.ldm.wan.vae import WanVAE
from comfy.sd import VAE as HostVAE  # noqa: N811
from comfy_extras.nodes_wan import WanImageToVideo
from full_gpu import FullGPU
from in_comfyui import DEVICE, DYNAMIC, comfy
from one_convolution import convolve_alike, summed_in_fp64
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from turbodiffusion_pack.kernels import dispatch
from turbodiffusion_pack.kernels.frames_conv import frames_conv
from turbodiffusion_pack.nodes.vae import TurboVAE as Node
from turbodiffusion_pack.turbo_core import vae_strips
from turbodiffusion_pack.turbo_core.host import causal_vae, short_memory, turbo_vae
from turbodiffusion_pack.turbo_core.host.turbo_vae import TurboVAE, accelerate_vae
from turbodiffusion_pack.turbo_core.vae_strips import strips_of

SIZE = 3, 5  # of latents: height, width
VIDEOS = [(frames, SIZE) for frames in (1, 5, 9, 17, 21)] + [(5, (4, 4)), (5, (7, 2))]
# Sums in another order, on the CPU's way and on cuDNN's.
ATOL = 1e-5 if DEVICE.type == "cpu" else 1e-4

no_streaming = pytest.mark.skipif(DYNAMIC, reason="weights without data cannot be streamed")
on_cpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="cuDNN chooses by the layout")


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def random_vae(dtype=torch.float32, dim=8):
    """A Wan 2.1 VAE all of whose weights say something, biases and norms too."""
    generator = torch.Generator().manual_seed(0)
    config = {**tiny_models.VAE_CONFIG, "dim": dim}
    shapes = {n: t.shape for n, t in WanVAE(**config).state_dict().items()}
    tensors = {n: tiny_models.vae_tensor(n, s, generator) for n, s in shapes.items()}
    for name, tensor in tensors.items():
        if name.endswith((".gamma", ".bias")):
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    return HostVAE(sd=tensors, dtype=dtype)


@pytest.fixture(scope="module")
def vae():
    return random_vae()


@pytest.fixture(scope="module")
def turbo(vae):
    turbo = accelerate_vae(vae)
    assert isinstance(turbo, TurboVAE)
    return turbo


def latents(frames=5, height=3, width=5, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 16, (frames + 3) // 4, height, width, generator=generator)


def video(frames=5, height=24, width=40, seed=0):
    return torch.rand(frames, height, width, 3, generator=torch.Generator().manual_seed(seed))


def psnr(x, exact):
    """In dB, of values in [0, 1]."""
    return float(-10 * (x - exact).double().square().mean().log10())


@pytest.mark.parametrize(("frames", "size"), VIDEOS)
def test_decodes_what_the_host_decodes(vae, turbo, frames, size):
    z = latents(frames, *size)
    expected = vae.decode(z)
    assert expected.shape == (1, frames, 8 * size[0], 8 * size[1], 3)
    torch.testing.assert_close(turbo.decode(z), expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize(("frames", "size"), [*VIDEOS, (3, SIZE), (8, SIZE)])
def test_encodes_what_the_host_encodes(vae, turbo, frames, size):
    x = video(frames, 8 * size[0], 8 * size[1])
    expected = vae.encode(x)
    torch.testing.assert_close(turbo.encode(x), expected, rtol=ATOL, atol=ATOL)


def test_with_convolutions_of_our_own_as_well(vae, turbo, monkeypatch):
    """Those that add bias and residual by themselves; on Hopper they run by such."""
    reference = partial(frames_conv, backend="reference")
    monkeypatch.setattr(causal_vae, "frames_conv", reference)
    monkeypatch.setattr(causal_vae, "left_to_cudnn", lambda *_: None)
    z, x = latents(9), video(9)
    torch.testing.assert_close(turbo.decode(z), vae.decode(z), rtol=0, atol=ATOL)
    torch.testing.assert_close(turbo.encode(x), vae.encode(x), rtol=ATOL, atol=ATOL)


@pytest.mark.parametrize("scores", [1, 2**20])
def test_attention_by_products_is_attention(monkeypatch, scores):
    monkeypatch.setattr(causal_vae, "SCORES", scores)
    q, k, v = torch.randn(3, 2, 24, 9, 16)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.flatten(2).transpose(1, 2) for x in (q, k, v))
    )
    ours = causal_vae.attention_by_products(q, k, v)
    torch.testing.assert_close(ours.flatten(2).transpose(1, 2), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("size", "count"), [((2, 23), 2), ((90, 1), 3), ((1, 160), 8)])
def test_strips_are_the_whole(turbo, monkeypatch, size, count):
    z, x = latents(9, *size), video(9, 8 * size[0], 8 * size[1])
    whole = turbo.decode(z), turbo.encode(x)
    monkeypatch.setattr(turbo_vae.TurboVAE, "_load", lambda *_: count)
    torch.testing.assert_close(turbo.decode(z), whole[0], rtol=0, atol=ATOL)
    torch.testing.assert_close(turbo.encode(x), whole[1], rtol=ATOL, atol=ATOL)


def test_less_of_a_halo_would_show(turbo, monkeypatch):
    """The halos are no wider than they must be: with one latent less there are seams."""
    z, x = latents(5, 2, 24), video(5, 16, 192)
    whole = turbo.decode(z), turbo.encode(x)
    monkeypatch.setattr(turbo_vae.TurboVAE, "_load", lambda *_: 2)
    of = vae_strips.halos
    for module in (turbo_vae, causal_vae):
        monkeypatch.setattr(module, "halos", lambda levels: [max(0, n - 1) for n in of(levels)])
    cut_short = turbo.decode(z), turbo.encode(x)
    seams = [(a - b).abs().max() for a, b in zip(whole, cut_short, strict=True)]
    assert min(seams) > 1e-4


def test_a_batch_is_its_videos(vae, turbo):
    z = latents(5, batch=3)
    torch.testing.assert_close(turbo.decode(z), vae.decode(z), rtol=0, atol=ATOL)
    assert torch.equal(turbo.decode(z)[1:2], turbo.decode(z[1:2]))
    videos = [video(5, seed=n) for n in range(2)]
    expected = torch.cat([vae.encode(x) for x in videos])  # 0.3.75 encodes no batches
    torch.testing.assert_close(turbo.encode(torch.stack(videos)), expected, rtol=ATOL, atol=ATOL)


def test_a_batch_of_images_is_no_video(vae, monkeypatch):
    """As ComfyUI takes it of the image models that use this VAE."""
    monkeypatch.setattr(vae, "not_video", True)
    pictures = torch.stack([video(1, seed=n)[0] for n in range(3)])
    expected = vae.encode(pictures)
    assert expected.shape == (3, 16, 1, 3, 5)
    torch.testing.assert_close(accelerate_vae(vae).encode(pictures), expected, rtol=ATOL, atol=ATOL)


def test_what_is_left_over_of_a_size_is_cropped(vae, turbo):
    x = video(6, 25, 43)
    torch.testing.assert_close(turbo.encode(x), vae.encode(x), rtol=ATOL, atol=ATOL)


def channels_first(convolution):
    return lambda x, *rest: convolution(x.contiguous(), *rest)


@on_cpu
def test_bfloat16_is_the_hosts_bit_for_bit_where_the_convolution_is(monkeypatch):
    """With the host's own convolutions, channels first, nothing else rounds in another way."""
    vae = random_vae(torch.bfloat16)
    turbo, z, x = accelerate_vae(vae), latents(9), video(9)
    assert turbo.vae_dtype == torch.bfloat16
    for name in ("conv2d", "conv3d"):
        patched = channels_first(getattr(torch.nn.functional, name))
        monkeypatch.setattr(causal_vae.functional, name, patched)
    # torch.norm calls it too. How a CPU sums the squares depends on where the channels are.
    in_float64 = partial(summed_in_fp64, torch.linalg.vector_norm)
    monkeypatch.setattr(torch.linalg, "vector_norm", in_float64)
    assert psnr(turbo.decode(z), vae.decode(z)) >= 60
    assert torch.equal(turbo.decode(z), vae.decode(z))
    assert torch.equal(turbo.encode(x), vae.encode(x))


@pytest.mark.gpu
@pytest.mark.parametrize("sums", ["fp64", "cudnn"])
def test_by_one_function_both_convolve_alike_on_a_gpu(wide, monkeypatch, sums):
    """Kernels round as ComfyUI's layers do, one step after the other; a norm's squares are summed
    in another order, which the encoder's last layers spread over the frames."""
    convolve_alike(sums, monkeypatch.setattr)
    z = latents(9, 16, 24)
    assert psnr(accelerate_vae(wide[0]).decode(z), wide[0].decode(z)) >= 60


def test_bfloat16_is_as_near_to_float32_as_the_hosts(vae):
    """A CPU sums channels in another order where they are last, and random weights amplify it."""
    half = random_vae(torch.bfloat16)
    z, x = latents(9), video(9)
    exact, latent = vae.decode(z), vae.encode(x)
    turbo = accelerate_vae(half)
    assert psnr(turbo.decode(z), exact) >= psnr(half.decode(z), exact) - 0.5
    assert psnr(turbo.encode(x), latent) >= psnr(half.encode(x), latent) - 0.5


def test_tiles_are_the_hosts(vae, turbo):
    z, x = latents(9, 4, 7), video(9, 32, 56)
    tiles = {"tile_x": 4, "tile_y": 4, "overlap": 1, "tile_t": 2, "overlap_t": 1}
    expected = vae.decode_tiled(z, **tiles)
    torch.testing.assert_close(turbo.decode_tiled(z, **tiles), expected, rtol=0, atol=ATOL)
    tiles = {"tile_x": 32, "tile_y": 32, "overlap": 8, "tile_t": 8, "overlap_t": 4}
    expected = vae.encode_tiled(x, **tiles)
    torch.testing.assert_close(turbo.encode_tiled(x, **tiles), expected, rtol=ATOL, atol=ATOL)


def test_image_to_video_takes_it(vae, turbo):
    picture = video(1, 32, 48)
    ours, host = (
        WanImageToVideo.execute([["", {}]], [["", {}]], v, 48, 32, 5, 1, start_image=picture).args
        for v in (turbo, vae)
    )
    ours, host = (out[0][0][1]["concat_latent_image"] for out in (ours, host))
    torch.testing.assert_close(ours, host, rtol=ATOL, atol=ATOL)


def test_an_image_with_alpha(turbo):
    picture = torch.cat([video(1), torch.rand(1, 24, 40, 1)], dim=-1)
    assert torch.equal(turbo.encode(picture), turbo.encode(picture[..., :3]))


def test_the_input_stays_as_it_was(vae):
    attributes, tensors = dict(vars(vae)), {n: t.clone() for n, t in vae.get_sd().items()}
    turbo = Node.execute(vae).args[0]
    turbo.decode(latents())
    turbo.encode(video())
    assert vars(vae) == attributes
    assert all(torch.equal(t, tensors[n]) for n, t in vae.get_sd().items())
    assert turbo.patcher is vae.patcher
    shared = zip(vae.get_sd().values(), turbo.get_sd().values(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in shared)
    assert accelerate_vae(turbo) is turbo
    assert copy.copy(turbo.first_stage_model).model is vae.first_stage_model


def test_nothing_keeps_it_once_it_is_let_go(vae):
    """No cycle of references, which would stay until Python looks for such."""
    turbo = accelerate_vae(vae)
    turbo.decode(latents())
    gone = weakref.ref(turbo)
    del turbo
    assert gone() is None


class CancelledError(Exception):
    pass


@pytest.mark.parametrize("run", [lambda v: v.decode(latents(17)), lambda v: v.encode(video(17))])
def test_a_user_can_cancel_between_pieces(turbo, monkeypatch, run):
    seen = itertools.count()

    def after_three():
        if next(seen) == 2:
            raise CancelledError

    name = "throw_exception_if_processing_interrupted"
    monkeypatch.setattr(comfy.ops, "run_every_op", lambda: None)  # the few ops that are the host's
    monkeypatch.setattr(comfy.model_management, name, after_three)
    with pytest.raises(CancelledError):
        run(turbo)
    assert next(seen) == 3


def test_the_bar_moves_to_its_end(turbo):
    told = []

    def note(value, total, *_, **__):
        told.append((value, total))

    comfy.utils.set_progress_bar_global_hook(note)
    try:
        turbo.decode(latents(9))
        assert told[0][1] == 3  # 0.33 leaves out what comes too soon
        assert told[-1] == (3, 3)
        told.clear()
        turbo.encode(video(17))
        assert told[-1] == (5, 5)
        assert told == sorted(told)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)


def _out_of_memory():
    """As torch tells it, and where the host knows that also as the driver does."""
    management = comfy.model_management
    yield management.OOM_EXCEPTION("out of memory")
    if hasattr(management, "is_oom"):
        yield management.ACCELERATOR_ERROR("CUDA error: out of memory")


@pytest.mark.parametrize("error", [*_out_of_memory()], ids=lambda error: type(error).__name__)
def test_where_memory_runs_out_there_are_more_strips(turbo, monkeypatch, caplog, error):
    z, tried = latents(5, 2, 16), []
    expected, decode = turbo.decode(z), TurboVAE._decode

    def short(self, samples, count):
        tried.append(count)
        if count < 4:
            raise error
        return decode(self, samples, count)

    monkeypatch.setattr(TurboVAE, "_decode", short)
    torch.testing.assert_close(turbo.decode(z), expected, rtol=0, atol=ATOL)
    assert tried == [1, 2, 4]
    assert "tries again in 4 strips" in caplog.text


def test_where_memory_is_short_one_strip_goes_on(turbo, monkeypatch, caplog):
    z, full = latents(5, 2, 16), FullGPU()
    expected = turbo.decode(z)
    monkeypatch.setattr(TurboVAE, "_decode", full.during(TurboVAE._decode))
    monkeypatch.setattr(comfy.model_management, "soft_empty_cache", full.give_back)
    monkeypatch.setattr(short_memory, "_is_short", lambda device, needed: True)
    monkeypatch.setattr(short_memory, "_cached", lambda device: 0)
    monkeypatch.setattr(short_memory, "MOST", 10**6)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    with full, caplog.at_level(logging.INFO):
        found = turbo.decode(z)
    assert torch.equal(found, expected)
    times = full.asked // full.EVERY
    told = f"memory ran out {times} times, went on with 0.00 GB"
    assert times > 10 and caplog.text.count("memory ran out") == caplog.text.count(told) == 1


def test_another_error_is_not_tried_again(turbo, monkeypatch):
    tried = []

    def fails(self, samples, count):
        tried.append(count)
        raise RuntimeError("something else")

    monkeypatch.setattr(TurboVAE, "_decode", fails)
    with pytest.raises(RuntimeError, match="something else"):
        turbo.decode(latents())
    assert len(tried) == 1


def test_latents_of_something_else_are_refused(turbo):
    with pytest.raises(ValueError, match=r"latents \[B, 16, T, H, W\], got \[1, 4, 8, 8\]"):
        turbo.decode(torch.zeros(1, 4, 8, 8))


def out_of_memory(*_, **__):
    raise comfy.model_management.OOM_EXCEPTION("out of memory")


def test_where_no_strips_fit_it_goes_on_in_the_hosts_tiles(vae, turbo, monkeypatch, caplog):
    for name in ("_decode", "_encode"):
        monkeypatch.setattr(TurboVAE, name, out_of_memory)
    z, videos = latents(5, 2, 40, batch=2), [video(5, 16, 320, seed=n) for n in range(2)]
    expected = vae.decode_tiled(z, tile_x=32, tile_y=32, overlap=8)
    torch.testing.assert_close(turbo.decode(z), expected, rtol=0, atol=ATOL)
    assert caplog.text.count("goes on in ComfyUI's tiles") == 1
    expected = [vae.encode_tiled(x, tile_x=256, tile_y=256, overlap=64) for x in videos]
    encoded = turbo.encode(torch.stack(videos))
    torch.testing.assert_close(encoded, torch.cat(expected), rtol=ATOL, atol=ATOL)


def test_memory_that_never_suffices_is_an_error(turbo, monkeypatch):
    monkeypatch.setattr(TurboVAE, "_decode", out_of_memory)
    monkeypatch.setattr(HostVAE, "decode_tiled_3d", out_of_memory)
    with pytest.raises(comfy.model_management.OOM_EXCEPTION):
        turbo.decode(latents())


class Living(TorchDispatchMode):
    """Most bytes of tensors beside `weights` that live at once on the device "meta"."""

    def __init__(self, weights):
        super().__init__()
        self.weights = {StorageWeakRef(weight.untyped_storage()) for weight in weights}
        self.sizes, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(x, torch.Tensor) and x.device.type == "meta":
                storage = x.untyped_storage()
                self.sizes[StorageWeakRef(storage)] = storage.nbytes()
        gone = {ref for ref in self.sizes if ref.expired()}
        self.sizes = {r: n for r, n in self.sizes.items() if r not in gone | self.weights}
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out


def one_kernel(y, cache, *_):
    """The memory that `causal_frames` takes where Triton runs it."""
    return y.new_empty(y.shape[0], cache.shape[1] + y.shape[1], *y.shape[2:])


def one_kernel_resampled(y, _=None, __=None, split=1, scale=1, corner=0):
    batch, frames, height, width, channels = y.shape
    sides = scale * height + corner, scale * width + corner
    return y.new_empty(batch, split * frames, *sides, channels // split)


def channels_last(convolution):
    """As cuDNN gives it; "meta" tensors do not know that of frames."""

    def convolve(x, *rest):
        with _disable_current_modes():
            batch, channels, *size = convolution(x, *rest).shape
        return x.new_empty(batch, *size, channels).movedim(-1, 1)

    return convolve


@pytest.fixture
def full_size(vae, monkeypatch):
    """A TurboVAE of Wan's own width whose tensors have no memory behind them."""
    with torch.device("meta"):
        model = WanVAE(**{**tiny_models.VAE_CONFIG, "dim": 96}).bfloat16()
    for name in ("conv2d", "conv3d"):
        patched = channels_last(getattr(torch.nn.functional, name))
        monkeypatch.setattr(causal_vae.functional, name, patched)
    monkeypatch.setattr(causal_vae, "causal_frames", one_kernel)
    monkeypatch.setattr(causal_vae, "resample_frames", one_kernel_resampled)
    for part in (model.decoder, model.encoder):  # else it asks how much memory "meta" has
        part.middle[1].optimized_attention = lambda q, k, v: torch.empty_like(v)
    wide = accelerate_vae(vae)
    wide.first_stage_model = turbo_vae.PieceByPiece(model)
    return wide


@no_streaming
@pytest.mark.parametrize(("size", "count"), [((60, 104), 1), ((90, 160), 2), ((160, 90), 5)])
def test_memory_is_what_is_asked_for(full_size, size, count):
    """Of tensors without data, so that the largest video takes no time."""
    model, frames = full_size.first_stage_model.model, 4
    strips = strips_of(*size, count)
    z = torch.empty(1, 16, frames, *size, device="meta", dtype=torch.bfloat16)
    with Living(model.parameters()) as living:
        features = causal_vae.decode_features(model, z)
        for strip in strips:
            for piece in causal_vae.decode_pieces(model, features, strip if count > 1 else None):
                assert piece.shape[1] in (1, 4)
    asked = full_size._decode_bytes(z.shape, torch.bfloat16, count)
    assert 0.8 * asked < living.peak <= asked, (living.peak, asked)


@no_streaming
@pytest.mark.parametrize(("size", "count"), [((480, 832), 1), ((720, 1280), 2), ((1280, 720), 5)])
def test_encoding_takes_the_memory_that_is_asked_for(full_size, monkeypatch, size, count):
    x = torch.empty(1, 13, *size, 3, device="meta")
    full_size.device = full_size.output_device = torch.device("meta")
    full_size.vae_dtype = torch.bfloat16
    with Living(full_size.first_stage_model.model.parameters()) as living:
        full_size._encode(x, count)
    asked = full_size._encode_bytes((1, 3, 13, *size), torch.bfloat16, count)
    assert 0.8 * asked < living.peak <= asked, (living.peak, asked)


def test_the_memory_asked_for_at_720p(full_size):
    """What the host reserves is 12.9 GB."""
    wide = full_size
    for size, most in (((90, 160), 4.6e9), ((60, 104), 4.0e9)):
        shape = (1, 16, 21, *size)
        assert 2e9 < wide.memory_used_decode(shape, torch.bfloat16) < most
        pixels = (1, 3, 81, 8 * size[0], 8 * size[1])
        assert 1e9 < wide.memory_used_encode(pixels, torch.bfloat16) < most
    needs = [wide._decode_bytes((1, 16, 21, 90, 160), torch.bfloat16, n) for n in (1, 2, 3, 8)]
    assert needs == sorted(needs, reverse=True)
    assert needs[-1] < 2e9


def test_other_vaes_are_left_alone(vae, monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)

    class Other(HostVAE):
        pass

    def stands_for(kind=HostVAE, **attributes):
        other = kind.__new__(kind)
        vars(other).update(vars(vae), **attributes)
        return other

    patched = WanVAE(**tiny_models.VAE_CONFIG)
    patched.decode = lambda z: z
    for other, reason in (
        (stands_for(Other), "it is a Other"),
        (stands_for(first_stage_model=torch.nn.Linear(1, 1)), r"torch.nn.modules.linear.Linear"),
        (stands_for(first_stage_model=patched), "something else has patched its decode"),
        (stands_for(device=torch.device("xpu")), "the kernels are for NVIDIA GPUs"),
        (object(), "it is a object"),
    ):
        caplog.clear()
        assert accelerate_vae(other) is other
        assert reason in caplog.text


def test_wan_22s_vae_is_left_alone():
    from comfy.ldm.wan import vae2_2

    with torch.device("meta"):
        model = vae2_2.WanVAE(dim=8, z_dim=48, dim_mult=[1, 2, 4, 4], num_res_blocks=2,
                              attn_scales=[], temperal_downsample=[False, True, True])  # fmt: skip
    other = HostVAE.__new__(HostVAE)
    other.first_stage_model, other.device = model, torch.device("cpu")
    assert "only Wan 2.1's is known" in turbo_vae.why_not(other)


@pytest.fixture(scope="module")
def wide():
    """Wan's own width in bf16, and the same weights in fp32."""
    return random_vae(torch.bfloat16, 96), random_vae(torch.float32, 96)


@pytest.mark.gpu
def test_full_width_on_a_gpu(wide):
    half, exact = wide
    turbo, told = accelerate_vae(half), {}
    z, x = latents(9, 30, 52), video(9, 240, 416)
    with dispatch.listening(lambda op, name, why: told.update({op: name})):
        pixels, encoded = turbo.decode(z), turbo.encode(x)
    assert set(told.values()) == {dispatch.TRITON}
    assert pixels.device.type == "cpu"
    wanted = exact.decode(z), exact.encode(x)
    assert psnr(pixels, wanted[0]) >= psnr(half.decode(z), wanted[0]) - 0.5
    assert psnr(encoded, wanted[1]) >= psnr(half.encode(x), wanted[1]) - 0.5


@pytest.mark.gpu
@no_streaming
def test_weights_that_stay_in_ram_give_the_same(wide, monkeypatch):
    """As with --novram: each comes when its layer runs."""
    turbo, z, x = accelerate_vae(wide[0]), latents(5, 12, 20), video(5, 96, 160)
    expected = turbo.decode(z), turbo.encode(x)
    comfy.model_management.unload_all_models()
    monkeypatch.setattr(
        comfy.model_management, "vram_state", comfy.model_management.VRAMState.NO_VRAM
    )
    outs = turbo.decode(z), turbo.encode(x)
    weight = wide[0].first_stage_model.decoder.conv1.weight
    assert weight.device.type == "cpu"
    comfy.model_management.unload_all_models()
    assert all(torch.equal(out, wanted) for out, wanted in zip(outs, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 2, 4])
def test_memory_on_a_gpu_is_what_is_asked_for(wide, monkeypatch, count):
    turbo = accelerate_vae(wide[0])
    z, x = latents(13, 60, 104), video(13, 480, 832)
    comfy.model_management.load_models_gpu([turbo.patcher])
    monkeypatch.setattr(TurboVAE, "_load", lambda *_: count)
    for run, shape, need in (
        (lambda: turbo.decode(z), z.shape, turbo._decode_bytes),
        (lambda: turbo.encode(x), (1, 3, *x.shape[:3]), turbo._encode_bytes),
    ):
        run()  # the first makes what libraries keep for good, such as cuBLAS's workspace
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        taken = torch.cuda.max_memory_allocated() - before
        asked = need(shape, torch.bfloat16, count)
        assert 0.6 * asked < taken <= asked, (taken, asked)
        assert torch.cuda.memory_allocated() <= before + 2**20
