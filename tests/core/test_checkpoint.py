"""A checkpoint's tensors are the file's own, under Wan's names, whatever the file is wrapped in."""

import struct
from pathlib import Path

import pytest
import torch
from goldens import unpack_checkpoint
from layouts import as_official, assert_holds, mapped_file
from safetensors.torch import save_file
from turbodiffusion_pack.turbo_core.checkpoint import read_checkpoint

NAMES = ("t2v.pth", "t2v-quant.pth")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: unpack_checkpoint(name, folder) for name in NAMES}


@pytest.fixture
def image_to_video(files, tmp_path) -> Path:
    """The quantised checkpoint with the 20 more input channels of an image-to-video model."""
    tensors = original(files["t2v-quant.pth"])
    generator = torch.Generator().manual_seed(1)
    tensors["patch_embedding.weight"] = torch.randn(256, 36 * 4, generator=generator).bfloat16()
    torch.save(tensors, tmp_path / "i2v.pth")
    return tmp_path / "i2v.pth"


@pytest.fixture(params=NAMES)
def path(request, files) -> Path:
    """A plain and a quantised checkpoint."""
    return files[request.param]


def original(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


def test_every_tensor_is_the_files_own(path):
    assert_holds(read_checkpoint(path), original(path))


def test_every_tensor_of_an_image_to_video_model_too(image_to_video):
    assert_holds(read_checkpoint(image_to_video), original(image_to_video))


@pytest.mark.parametrize(("name", "quantized"), [("t2v.pth", False), ("t2v-quant.pth", True)])
def test_the_architecture_is_read_from_the_tensors(files, tmp_path, name, quantized):
    nameless = tmp_path / "x.bin"
    nameless.write_bytes(files[name].read_bytes())
    checkpoint = read_checkpoint(nameless)
    assert (checkpoint.dim, checkpoint.ffn_dim, checkpoint.num_layers) == (256, 512, 2)
    assert (checkpoint.in_channels, checkpoint.head_dim) == (16, 128)
    assert checkpoint.quantized is quantized
    assert checkpoint.has_sla is True


def test_an_image_to_video_model_has_36_input_channels(image_to_video):
    assert read_checkpoint(image_to_video).in_channels == 36


def test_int8_weights_stay_int8_and_every_one_has_its_scale(files):
    checkpoint = read_checkpoint(files["t2v-quant.pth"])
    int8 = {n for n, t in checkpoint.tensors.items() if t.dtype == torch.int8}
    assert int8 == {f"{module}.weight" for module in checkpoint.scales}
    assert len(int8) == 2 * 10
    assert checkpoint.scales["blocks.1.ffn.2"].shape == (2, 4)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_every_tensor_is_a_view_of_the_file(path, tmp_path, suffix):
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc/self/maps")
    if suffix == ".safetensors":
        save_file(original(path), tmp_path / "a.safetensors")
        path = tmp_path / "a.safetensors"
    tensors = as_official(read_checkpoint(path))
    assert {mapped_file(tensor) for tensor in tensors.values()} == {str(path)}


def test_a_tensor_in_memory_is_not_taken_for_a_view():
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc/self/maps")
    assert not mapped_file(torch.ones(1 << 20)).endswith(".pth")


def test_the_patch_embedding_is_viewed_as_the_convolution_it_is(image_to_video):
    weight = read_checkpoint(image_to_video).tensors["patch_embedding.weight"]
    flat = original(image_to_video)["patch_embedding.weight"]
    assert weight.shape == (256, 36, 1, 2, 2)
    x = torch.randn(1, 36, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    convolved = torch.nn.functional.conv3d(x, weight.float()).flatten()
    torch.testing.assert_close(convolved, flat.float() @ x.flatten())


def test_a_patch_embedding_that_is_a_convolution_already_is_kept(path, tmp_path):
    tensors = original(path)
    tensors["patch_embedding.weight"] = tensors["patch_embedding.weight"].view(256, 16, 1, 2, 2)
    torch.save(tensors, tmp_path / "conv.pth")
    assert_holds(read_checkpoint(tmp_path / "conv.pth"), original(path))


@pytest.mark.parametrize(
    "prefix",
    ["net.", "model.diffusion_model.", "diffusion_model.", "model.", "module.", "module.net."],
)
@pytest.mark.parametrize("nested", [False, True])
def test_prefixes_and_nesting_come_off(path, tmp_path, prefix, nested):
    tensors = {prefix + name: tensor for name, tensor in original(path).items()}
    torch.save({"state_dict": tensors, "step": 7} if nested else tensors, tmp_path / "a.pth")
    assert_holds(read_checkpoint(tmp_path / "a.pth"), original(path))


def test_parameters_become_plain_tensors(files, tmp_path):
    tensors = original(files["t2v.pth"])
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}
    torch.save(parameters, tmp_path / "a.pth")
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    assert_holds(checkpoint, tensors)
    assert not any(tensor.requires_grad for tensor in as_official(checkpoint).values())


def test_pytorchs_old_format_is_read_too(path, tmp_path):
    torch.save(original(path), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_holds(read_checkpoint(tmp_path / "old.pth"), original(path))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pth_is_told_by_its_bytes(path, tmp_path, zipped):
    misnamed = tmp_path / "a.safetensors"
    torch.save(original(path), misnamed, _use_new_zipfile_serialization=zipped)
    assert_holds(read_checkpoint(misnamed), original(path))


@pytest.mark.parametrize("name", ["a.safetensors", "misnamed.pth"])
def test_safetensors_are_told_by_their_bytes(path, tmp_path, name):
    save_file(original(path), tmp_path / name)
    assert_holds(read_checkpoint(tmp_path / name), original(path))


def test_a_safetensors_header_that_starts_like_a_pickle(path, tmp_path):
    save_file(original(path), tmp_path / "a.bin")
    data = (tmp_path / "a.bin").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    padding = (0x80 - length) % 256
    header = struct.pack("<Q", length + padding) + data[8 : 8 + length] + b" " * padding
    assert header[:1] == b"\x80"
    (tmp_path / "a.bin").write_bytes(header + data[8 + length :])
    assert_holds(read_checkpoint(tmp_path / "a.bin"), original(path))


def test_a_wan_model_without_sla_is_one(path, tmp_path):
    tensors = {name: t for name, t in original(path).items() if "proj_l" not in name}
    torch.save(tensors, tmp_path / "a.pth")
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    assert checkpoint.has_sla is False
    assert_holds(checkpoint, tensors)


def test_each_linear_may_be_quantised_or_not(files, tmp_path):
    plain, mixed = original(files["t2v.pth"]), original(files["t2v-quant.pth"])
    for module in ("blocks.0.self_attn.q", "blocks.1.ffn.2"):
        del mixed[f"{module}.int8_weight"], mixed[f"{module}.scale"]
        mixed[f"{module}.weight"] = plain[f"{module}.weight"]
    torch.save(mixed, tmp_path / "a.pth")
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    assert len(checkpoint.scales) == 18
    assert_holds(checkpoint, mixed)


def test_a_width_that_is_no_multiple_of_the_int8_block(files, tmp_path):
    tensors = original(files["t2v-quant.pth"])
    for block in ("blocks.0", "blocks.1"):
        for part in ("int8_weight", "bias"):
            tensors[f"{block}.ffn.0.{part}"] = tensors[f"{block}.ffn.0.{part}"][:500]
        tensors[f"{block}.ffn.2.int8_weight"] = tensors[f"{block}.ffn.2.int8_weight"][:, :500]
    torch.save(tensors, tmp_path / "a.pth")
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    assert checkpoint.ffn_dim == 500
    assert checkpoint.scales["blocks.0.ffn.0"].shape == (4, 2)
    assert_holds(checkpoint, tensors)


def test_an_image_branch_may_be_quantised(image_to_video, tmp_path):
    """W8A8Quantize makes such files of Wan 2.1 image-to-video models."""
    tensors = original(image_to_video)
    for part in ("int8_weight", "scale", "bias"):
        name = f"blocks.0.cross_attn.k_img.{part}"
        tensors[name] = tensors[f"blocks.0.cross_attn.k.{part}"].clone()
    torch.save(tensors, tmp_path / "a.pth")
    assert_holds(read_checkpoint(tmp_path / "a.pth"), tensors)


def test_a_weight_may_have_one_scale_per_output_channel(files, tmp_path):
    tensors = original(files["t2v-quant.pth"])
    tensors["blocks.1.ffn.2.scale"] = torch.rand(256) + 0.5
    torch.save(tensors, tmp_path / "a.pth")
    assert_holds(read_checkpoint(tmp_path / "a.pth"), tensors)


def test_progress_counts_up_to_its_total(path):
    calls = []
    read_checkpoint(path, progress=lambda done, total: calls.append((done, total)))
    total = calls[0][1]
    assert calls == [(done, total) for done in range(1, total + 1)]
    assert total > 20
