"""Every unusable file is one clear error: what is wrong, what was found, what to do."""

import io
import json
import pickle
import re
import zipfile
from pathlib import Path

import layouts
import pytest
import torch
from goldens import unpack_checkpoint
from safetensors.torch import load_file, save_file
from turbodiffusion_pack.turbo_core.checkpoint import CheckpointError, read_checkpoint

Q0 = "blocks.0.self_attn.q"
PROJ_L1 = "blocks.1.self_attn.attn_op.local_attn.proj_l"


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return unpack_checkpoint("t2v.pth", tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def quant(tmp_path_factory) -> Path:
    return unpack_checkpoint("t2v-quant.pth", tmp_path_factory.mktemp("quant"))


def refuse(path: Path, *parts: str) -> CheckpointError:
    """Reading `path` must fail with one message that starts with the file's name, tells nothing of
    where it is, and holds `parts` in order."""
    with pytest.raises(CheckpointError, match=".*".join(map(re.escape, parts))) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(f"{path.name}: ")
    assert str(path.parent) not in str(caught.value)
    assert len(str(caught.value)) < 1000
    return caught.value


def refuse_bytes(folder: Path, data: bytes, *parts: str) -> CheckpointError:
    path = folder / "bad.pth"
    path.write_bytes(data)
    return refuse(path, *parts)


def refuse_tensors(folder: Path, content: object, *parts: str) -> CheckpointError:
    path = folder / "bad.pth"
    torch.save(content, path)
    return refuse(path, *parts)


def test_no_file(tmp_path):
    refuse(tmp_path / "nothing.pth", "does not exist", "choose a .pth")


def test_a_folder_without_a_model(tmp_path):
    refuse(tmp_path, "is a folder without one index", "got none", "choose a .pth")


def test_a_folder_of_several_models(plain, tmp_path):
    for name in ("high.safetensors", "low.safetensors"):
        save_file(torch.load(plain), tmp_path / name)
    refuse(tmp_path, "is a folder", "got high.safetensors, low.safetensors", "choose a .pth")


def test_an_empty_file(tmp_path):
    refuse_bytes(tmp_path, b"", "empty (0 bytes)", "download it again")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_pth(quant, tmp_path, share):
    data = quant.read_bytes()
    cut = data[: int(len(data) * share)]
    refuse_bytes(tmp_path, cut, "truncated", f"{len(cut)} bytes", "Download it again")


@pytest.mark.parametrize("size", [30, 400, 100_000])
def test_a_truncated_pth_of_the_old_format(plain, tmp_path, size):
    buffer = io.BytesIO()
    torch.save(torch.load(plain), buffer, _use_new_zipfile_serialization=False)
    refuse_bytes(tmp_path, buffer.getvalue()[:size], "truncated or damaged", "Download it again")


@pytest.mark.parametrize("share", [0.001, 0.5, 0.99])
def test_a_truncated_safetensors(quant, tmp_path, share):
    save_file(torch.load(quant), tmp_path / "whole.safetensors")
    data = (tmp_path / "whole.safetensors").read_bytes()
    cut = data[: int(len(data) * share)]
    refuse_bytes(tmp_path, cut, "truncated or damaged", "header", "Download it again")


def test_a_file_of_a_few_bytes(tmp_path):
    refuse_bytes(tmp_path, b"\x10\x00\x00", "cut short (3 bytes)", "Download it again")


def test_a_zip_that_torch_did_not_write(tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refuse(tmp_path / "bad.pth", "damaged", "Download it again")


@pytest.mark.parametrize("position", [0.2, 0.5, 0.8])
def test_a_damaged_pickle(plain, tmp_path, position):
    with zipfile.ZipFile(plain) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "bad.pth", "w") as archive:
        for name, data in records.items():
            cut = data[: int(len(data) * position)] if name.endswith("data.pkl") else data
            archive.writestr(name, cut)
    refuse(tmp_path / "bad.pth", "damaged", "Download it again")


def test_a_zip_in_several_parts(plain, tmp_path):
    data = bytearray(plain.read_bytes())
    data[data.rindex(b"PK\x06\x07") + 16] = 9  # number of disks in the zip64 locator
    refuse_bytes(tmp_path, bytes(data), "truncated", "Download it again")


def test_a_damaged_storage_key_in_the_old_format(tmp_path):
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(3)}, buffer, _use_new_zipfile_serialization=False)
    data = buffer.getvalue()
    key = re.search(rb"\d{8,}", data)[0]
    refuse_bytes(tmp_path, data.replace(key, b"0" * len(key), 1), "damaged", "storage key")


@pytest.mark.parametrize(
    ("data", "meaning"),
    [
        (b"GGUF\x03" + bytes(100), "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"something else", "neither a .pth nor a .safetensors"),
    ],
)
def test_another_kind_of_file_is_named(tmp_path, data, meaning):
    refuse_bytes(tmp_path, data, meaning)


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Evaluate(Touch):
    def __reduce__(self):
        return eval, (f"open({str(self.path)!r}, 'w')",)


@pytest.mark.parametrize("kind", [Touch, Evaluate])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(plain, tmp_path, kind, zipped):
    trace, path = tmp_path / "trace", tmp_path / "bad.pth"
    content = {**torch.load(plain), "hook": kind(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    error = refuse(path, "contains code", "not run", "official source")
    assert "eval" in str(error) or "pathlib" in str(error) or "getattr" in str(error)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the pickle must be able to do harm, or this test shows nothing"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 4])
def test_code_in_a_bare_pickle_is_not_run(tmp_path, protocol):
    trace = tmp_path / "trace"
    refuse_bytes(tmp_path, pickle.dumps(Evaluate(trace), protocol=protocol), "bad.pth")
    assert not trace.exists()


def test_a_whole_module(tmp_path):
    refuse_tensors(tmp_path, torch.nn.Linear(2, 2), "contains code", "torch.nn", "state dict")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (torch.ones(3), ["named tensors", "got a Tensor"]),
        ([torch.ones(3)], ["named tensors", "got a list"]),
        ({}, ["named tensors", "got an empty dict"]),
        ({"a": torch.ones(1), "step": 3}, ["named tensors", "got a int under 'step'"]),
        ({3: torch.ones(1)}, ["named tensors", "under 3"]),
        ({"state_dict": {"epoch": "x"}}, ["named tensors", "got a str under 'epoch'"]),
    ],
)
def test_something_else_than_named_tensors(tmp_path, content, parts):
    refuse_tensors(tmp_path, content, *parts)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", "choose a TurboDiffusion checkpoint"),
        ("double_blocks.0.img_attn.qkv.weight", "choose a TurboDiffusion checkpoint"),
        ("condition_embedder.time_embedder.linear_1.weight", "part of a diffusers model"),
        ("blocks.0.scale_shift_table", "part of a diffusers model"),
        ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "LoRA"),
        ("blocks.7.self_attn.q.weight", "part of a Wan model"),
    ],
)
def test_another_architecture(tmp_path, name, advice):
    content = {name: torch.ones(2)}
    refuse_tensors(tmp_path, content, "not a complete Wan model", "head.modulation", name, advice)


@pytest.fixture
def shards(quant, tmp_path) -> Path:
    """The index of a set of three shards."""
    return layouts.sglang_shards(torch.load(quant), tmp_path)


SHARD_2 = "diffusion_pytorch_model-00002-of-00003.safetensors"


def test_a_missing_shard(shards):
    shards.with_name(SHARD_2).unlink()
    refuse(shards, f"{SHARD_2} is missing beside", "download it too")
    refuse(shards.with_name(SHARD_2.replace("2-of", "1-of")), f"{SHARD_2} is missing")


def test_a_shard_without_its_index(shards):
    shards.unlink()
    refuse(shards.with_name(SHARD_2), "is one of several shards", shards.name, "whole folder")


def test_a_truncated_shard(shards):
    shard = shards.with_name(SHARD_2)
    shard.write_bytes(shard.read_bytes()[:10_000])
    refuse(shards, f"shard {SHARD_2}: is truncated or damaged", "Download it again")


def test_a_shard_of_another_download(shards):
    shard = shards.with_name(SHARD_2)
    tensors = load_file(shard)
    name, _ = tensors.popitem()
    save_file(tensors, shard)
    refuse(shards, f"{name} is in {shards.name} but not in {SHARD_2}", "download all shards again")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "JSONDecodeError"),
        ("\xff", "JSONDecodeError"),
        ("[" * 100_000, "RecursionError"),
        ("9" * 5000, "ValueError"),
        ("{}", "it has no weight_map"),
        ("[]", "it has no weight_map"),
        ('{"weight_map": []}', "it has no weight_map"),
        ('{"weight_map": {"a": 3}}', "it has no weight_map"),
    ],
)
def test_a_damaged_index(shards, text, found):
    shards.write_text(text)
    refuse(shards, f"{shards.name} is damaged ({found}", "Download it again")


def test_an_index_as_large_as_no_model_needs(shards):
    shards.write_text(" " * (2**22 + 1))
    refuse(shards, f"{shards.name} has 4194305 bytes", "download it again")


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("", "a file without a name is missing beside"),
        ("x" * 300, f"{'x' * 80}... is missing beside"),
        ("a\0b.safetensors", "is missing beside"),
        ("a\nb.safetensors", "is missing beside"),
        ("\ud800.safetensors", "is missing beside"),
        (".", ". is missing beside"),
        ("..", ".. is missing beside"),
    ],
)
def test_a_shard_with_an_impossible_name(shards, file, told):
    shards.write_text(json.dumps({"weight_map": {"a": file}}))
    refuse(shards, told, "download it too")


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_an_index_that_leaves_its_folder(shards, file):
    shards.write_text(json.dumps({"weight_map": {"a": file}}))
    refuse(shards, "names files outside its folder", "official source")


@pytest.mark.parametrize("layout", ["fastvideo", "sglang"])
def test_a_diffusers_model_with_an_image_encoder(plain, tmp_path, layout):
    name = "blocks.1.attn2.add_k_proj.weight"
    tensors = {**torch.load(plain), name: torch.ones(2)}
    path = layouts.LAYOUTS[layout](tensors, tmp_path)
    refuse(path, f"is a diffusers model with {name}", "no place in TurboDiffusion's Wan", "choose")


def test_names_of_two_layouts(plain, tmp_path):
    tensors = torch.load(plain)
    tensors["blocks.1.to_q.weight"] = tensors.pop("blocks.1.self_attn.q.weight")
    found = "blocks.1.to_q.weight of diffusers beside head.modulation of Wan"
    refuse_tensors(tmp_path, tensors, "mixes two layouts", f"got {found}", "convert the file again")


def test_half_a_diffusers_model(plain, tmp_path):
    path = layouts.fastvideo_in_memory(torch.load(plain), tmp_path)
    tensors = torch.load(path)["state_dict"]
    del tensors["blocks.1.attn2.to_k.weight"]
    refuse_tensors(tmp_path, tensors, "blocks.1.cross_attn.k.weight is missing", "download")


def test_a_tensor_under_two_names(plain, tmp_path):
    tensors = torch.load(plain)
    other = f"_orig_mod.{Q0}.bias"
    tensors[other] = tensors[f"{Q0}.bias"]
    refuse_tensors(tmp_path, tensors, f"has {Q0}.bias and {other}", "the same tensor", "download")


@pytest.mark.parametrize("part", ["weight_scale", "weight_scale_inv"])
def test_fp8_weights(plain, tmp_path, part):
    tensors = torch.load(plain)
    tensors[f"{Q0}.weight"] = tensors[f"{Q0}.weight"].to(torch.float8_e4m3fn)
    tensors[f"{Q0}.{part}"] = torch.ones(2, 2)
    refuse_tensors(tmp_path, tensors, "another format", f"{Q0}.{part}", "-quant")


def test_a_wan_model_of_other_channels(plain, tmp_path):
    tensors = torch.load(plain)
    tensors["patch_embedding.weight"] = torch.zeros(256, 48 * 4)
    refuse_tensors(tmp_path, tensors, "48 input channels", "16 (text to video) or 36")


FOREIGN = ["weight_scale", "weight_scale_inv", "scale_weight", "comfy_quant"]
W4A8_W6A8_AWQ = ["weight_s_rel", "weight_s_channel", "weight_codebook", "weight_zeros"]


@pytest.mark.parametrize("name", FOREIGN + W4A8_W6A8_AWQ)
def test_another_quantisation(plain, tmp_path, name):
    tensors = {**torch.load(plain), f"{Q0}.{name}": torch.ones(1)}
    of_comfyui = name not in ("weight_scale", "weight_scale_inv")
    loader = "load it with ComfyUI's own" if of_comfyui else "a copy that is made for ComfyUI"
    refuse_tensors(tmp_path, tensors, "another format", f"{Q0}.{name}", loader, "-quant")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_comfyuis_own_8_and_4_bits(plain, tmp_path, dtype):
    """Whichever tensor comes first, the loader is named that takes such a file."""
    tensors = torch.load(plain)
    tensors[f"{Q0}.weight"] = torch.ones(256, 256).to(dtype)
    tensors[f"{Q0}.weight_scale"] = torch.ones(())
    tensors[f"{Q0}.comfy_quant"] = torch.tensor(list(b'{"format": "x"}'), dtype=torch.uint8)
    refuse_tensors(tmp_path, tensors, "another format", "with ComfyUI's own Load Diffusion Model")


@pytest.mark.parametrize("name", ["blocks.0.to_gate_compress.weight", f"{Q0}.gate_compress.bias"])
def test_gates_of_vsa(plain, tmp_path, name):
    tensors = {**torch.load(plain), name: torch.ones(256)}
    refuse_tensors(tmp_path, tensors, "VSA, another sparse attention than SLA", name, "Load Diff")


@pytest.mark.parametrize(
    "setting",
    [
        torch.ones(8),
        torch.zeros(0, dtype=torch.uint8),
        torch.zeros(2, 2, dtype=torch.uint8),
        torch.tensor(list(b"not JSON"), dtype=torch.uint8),
        torch.tensor(list(b"[" * 60_000), dtype=torch.uint8),
        torch.full((70_000,), ord(" "), dtype=torch.uint8),
        torch.tensor(list(b"1"), dtype=torch.uint8),
        torch.tensor(list(b"[1]"), dtype=torch.uint8),
    ],
    ids=["floats", "empty", "two axes", "no JSON", "brackets", "long", "a number", "a list"],
)
def test_a_layer_setting_that_is_none(plain, tmp_path, setting):
    name = "blocks.0.self_attn.comfy_attention.config"
    tensors = {**torch.load(plain), name: setting}
    refuse_tensors(tmp_path, tensors, name, "JSON text in uint8", "download or convert")


def drop(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def put(name, change):
    return lambda tensors: tensors.update({name: change(tensors.get(name))})


def drop_block(index):
    return lambda tensors: [tensors.pop(n) for n in [*tensors] if n.startswith(f"blocks.{index}.")]


def value(position, number):
    """Set one element of a copy to `number`."""

    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[position] = number
        return tensor

    return change


INT8_FAULTS = {
    "no scale": (drop(f"{Q0}.scale"), [f"{Q0}.int8_weight has no {Q0}.scale"]),
    "no int8 weight": (drop(f"{Q0}.int8_weight"), [f"{Q0}.scale has no {Q0}.int8_weight"]),
    "scale too short": (
        put("blocks.1.ffn.2.scale", lambda s: s[:, :3]),
        ["blocks.1.ffn.2.scale must be float32 [2, 4]", "weight [256, 512]", "got float32 [2, 3]"],
    ),
    "scale transposed": (
        put("blocks.1.ffn.0.scale", lambda s: s.T),
        ["blocks.1.ffn.0.scale must be float32 [4, 2]", "got float32 [2, 4]"],
    ),
    "scales of another width": (
        put("blocks.1.ffn.2.scale", lambda s: torch.ones(512)),
        ["blocks.1.ffn.2.scale must be float32 [2, 4]", "or [256]", "got float32 [512]"],
    ),
    "scale twice": (
        lambda t: t.update(
            {f"{Q0}.weight_scale": t[f"{Q0}.scale"], f"{Q0}.weight": t[f"{Q0}.int8_weight"]}
        ),
        [f"has {Q0}.scale and {Q0}.weight_scale, which mean the same tensor"],
    ),
    "scale in bf16": (
        put(f"{Q0}.scale", torch.Tensor.bfloat16),
        [f"{Q0}.scale must be float32", "got bfloat16 [2, 2]"],
    ),
    "int8 weight in float": (
        put(f"{Q0}.int8_weight", torch.Tensor.float),
        [f"{Q0}.int8_weight must be int8 [out, in]", "got float32 [256, 256]"],
    ),
    "int8 weight flat": (
        put(f"{Q0}.int8_weight", torch.Tensor.flatten),
        [f"{Q0}.int8_weight must be int8 [out, in]", "got int8 [65536]"],
    ),
    "weight twice": (
        put(f"{Q0}.weight", lambda _: torch.zeros(256, 256)),
        [f"{Q0}.int8_weight stands beside {Q0}.weight"],
    ),
    "int8 outside the blocks": (
        put("head.head.int8_weight", lambda _: torch.zeros(64, 256, dtype=torch.int8)),
        ["head.head.int8_weight is not a Linear of a block"],
    ),
    "int8 proj_l": (
        put(f"{PROJ_L1}.int8_weight", lambda _: torch.zeros(128, 128, dtype=torch.int8)),
        [f"{PROJ_L1}.int8_weight is not a Linear of a block"],
    ),
    "int8 weight of another width": (
        lambda t: t.update(
            {
                f"{Q0}.int8_weight": torch.zeros(256, 384, dtype=torch.int8),
                f"{Q0}.scale": torch.ones(2, 3),
            }
        ),
        [f"{Q0}.weight must be [256, 256]", "got int8 [256, 384]"],
    ),
    "scale NaN": (
        put(f"{Q0}.scale", value(3, float("nan"))),
        [f"{Q0}.scale has 1 of 4 values", "not finite and positive", "got nan"],
    ),
    "scale infinite": (put(f"{Q0}.scale", value(0, float("inf"))), [f"{Q0}.scale", "got inf"]),
    "scale zero": (put(f"{Q0}.scale", value(1, 0.0)), [f"{Q0}.scale", "positive", "got 0.0"]),
    "scale negative": (put(f"{Q0}.scale", value(1, -0.5)), [f"{Q0}.scale", "got -0.5"]),
}

PLAIN_FAULTS = {
    "block missing": (drop_block(0), ["block 0 is missing", "got 1 blocks"]),
    "no block": (lambda t: [drop_block(i)(t) for i in (0, 1)], ["block 0 is missing", "got 0"]),
    "block number huge": (
        put("blocks.4000000000.modulation", lambda _: torch.zeros(1, 6, 256)),
        ["block 2 is missing", "got 3 blocks"],
    ),
    "Linear missing": (drop("blocks.1.cross_attn.v.weight"), ["blocks.1.cross_attn.v.weight is"]),
    "first ffn missing": (drop("blocks.0.ffn.0.weight"), ["blocks.0.ffn.0.weight is missing"]),
    "bias missing": (drop("blocks.1.ffn.2.bias"), ["blocks.1.ffn.2.bias is missing"]),
    "norm missing": (drop("blocks.1.norm3.weight"), ["blocks.1.norm3.weight is missing"]),
    "head missing": (drop("head.head.weight"), ["head.head.weight is missing"]),
    "patches missing": (drop("patch_embedding.weight"), ["patch_embedding.weight is missing"]),
    "patches of odd width": (
        put("patch_embedding.weight", lambda w: w[:, :63]),
        ["patch_embedding.weight must have 5 axes", "got shape [256, 63]"],
    ),
    "patches of another size": (
        put("patch_embedding.weight", lambda w: w.view(256, 16, 2, 2, 1)),
        ["patch_embedding.weight must be [256, 16, 1, 2, 2]", "got bfloat16 [256, 16, 2, 2, 1]"],
    ),
    "dim no multiple of 128": (
        put("head.modulation", lambda m: m[..., :200]),
        ["dim 200", "multiple of 128"],
    ),
    "modulation flat": (
        put("head.modulation", torch.Tensor.flatten),
        ["head.modulation must have 3 axes", "got shape [512]"],
    ),
    "attention of another width": (
        put("blocks.1.cross_attn.o.weight", lambda w: w[:128]),
        ["blocks.1.cross_attn.o.weight must be [256, 256]", "got bfloat16 [128, 256]"],
    ),
    "ffn of another width in one block": (
        put("blocks.1.ffn.0.weight", lambda w: w[:384]),
        ["blocks.1.ffn.0.weight must be [512, 256]", "got bfloat16 [384, 256]"],
    ),
    "output of another width": (
        put("head.head.weight", lambda w: w[:48]),
        ["head.head.weight must be [64, 256]"],
    ),
    "int8 weight without its own name": (
        put(f"{Q0}.weight", lambda w: w.to(torch.int8)),
        [f"{Q0}.weight must be floating point", "got int8 [256, 256]", "-quant"],
    ),
    "proj_l in one block only": (
        drop(f"{PROJ_L1}.weight", f"{PROJ_L1}.bias"),
        [f"{PROJ_L1}.weight is missing", "2 of 4 proj_l"],
    ),
    "proj_l without bias": (drop(f"{PROJ_L1}.bias"), [f"{PROJ_L1}.bias is missing", "3 of 4"]),
    "proj_l too wide": (
        put(f"{PROJ_L1}.weight", lambda _: torch.zeros(256, 256)),
        [f"{PROJ_L1}.weight must be [128, 128]", "got float32 [256, 256]"],
    ),
    "proj_l bias too short": (
        put(f"{PROJ_L1}.bias", lambda b: b[:64]),
        [f"{PROJ_L1}.bias must be [128]", "got float32 [64]"],
    ),
    "proj_l integer": (
        put(f"{PROJ_L1}.weight", torch.Tensor.int),
        [f"{PROJ_L1}.weight must be floating point", "got int32 [128, 128]"],
    ),
    "proj_l NaN": (
        put(f"{PROJ_L1}.weight", value(-1, float("nan"))),
        [f"{PROJ_L1}.weight has 1 of 16384 values that are not finite", "got nan"],
    ),
    "proj_l bias infinite": (
        put(f"{PROJ_L1}.bias", value(5, float("-inf"))),
        [f"{PROJ_L1}.bias", "got -inf"],
    ),
    "norm NaN": (
        put("blocks.0.self_attn.norm_q.weight", value(7, float("nan"))),
        ["blocks.0.self_attn.norm_q.weight has 1 of 256 values", "got nan"],
    ),
    "norm3 infinite": (
        put("blocks.1.norm3.weight", value(0, float("inf"))),
        ["blocks.1.norm3.weight", "got inf"],
    ),
    "bias NaN": (put("head.head.bias", value(0, float("nan"))), ["head.head.bias", "got nan"]),
    "modulation NaN": (
        put("blocks.1.modulation", value(0, float("nan"))),
        ["blocks.1.modulation has 1 of 1536 values", "got nan"],
    ),
}


def refuse_changed(path: Path, folder: Path, fault) -> None:
    change, parts = fault
    tensors = torch.load(path)
    change(tensors)
    error = refuse_tensors(folder, tensors, *parts)
    assert re.search("download|convert|take|choose", str(error)), "the message must say what to do"


@pytest.mark.parametrize("fault", INT8_FAULTS.values(), ids=INT8_FAULTS)
def test_int8_that_does_not_fit(quant, tmp_path, fault):
    refuse_changed(quant, tmp_path, fault)


@pytest.mark.parametrize("fault", PLAIN_FAULTS.values(), ids=PLAIN_FAULTS)
def test_tensors_that_do_not_fit(plain, tmp_path, fault):
    refuse_changed(plain, tmp_path, fault)


def test_the_big_weights_are_not_looked_through(plain, tmp_path):
    tensors = torch.load(plain)
    tensors[f"{Q0}.weight"] = value(0, float("nan"))(tensors[f"{Q0}.weight"])
    torch.save(tensors, tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth").tensors[f"{Q0}.weight"][0, 0].isnan()
