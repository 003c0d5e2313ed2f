"""Conversion keeps every bit, needs neither ComfyUI nor kernels, and never leaves half a file."""

import errno
import json
import re
import shutil
import struct
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from goldens import unpack_checkpoint
from layouts import LAYOUTS, assert_same, conv
from peak_memory import can_measure
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from turbodiffusion_pack.turbo_core import checkpoint_write
from turbodiffusion_pack.turbo_core.checkpoint import CheckpointError, read_checkpoint
from turbodiffusion_pack.turbo_core.checkpoint_write import write_safetensors
from turbodiffusion_pack.turbo_core.convert import convert
from zero_checkpoint import official_zeros

TESTS = Path(__file__).resolve().parent.parent
MIB = 2**20
MODELS = ("t2v.pth", "t2v-quant.pth")
TARGETS = ("out.safetensors", "out.pth")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("official")
    return {name: unpack_checkpoint(name, folder) for name in MODELS}


@pytest.fixture(params=MODELS)
def official(request, files) -> Path:
    return files[request.param]


@pytest.fixture
def quant(files) -> Path:
    return files["t2v-quant.pth"]


def load(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path)


def test_there_and_back_is_the_same_bit_for_bit(official, tmp_path):
    convert(official, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.pth")
    assert_same(load(tmp_path / "b.pth"), load(official))
    convert(tmp_path / "b.pth", tmp_path / "c.safetensors")
    assert (tmp_path / "c.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_comfy_names_differ_in_the_patch_embedding_only(official, tmp_path):
    convert(official, tmp_path / "a.safetensors")
    assert_same(load(tmp_path / "a.safetensors"), conv(load(official)))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("names", ["official", "comfy"])
def test_either_names_fit_either_format(quant, tmp_path, target, names):
    convert(quant, tmp_path / target, names)
    expected = load(quant) if names == "official" else conv(load(quant))
    assert_same(load(tmp_path / target), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_becomes_the_official_file(official, tmp_path, layout):
    source = LAYOUTS[layout](load(official), tmp_path)
    count = convert(source, tmp_path / "out.pth")
    assert_same(load(tmp_path / "out.pth"), load(official))
    assert count == len(load(official))


def test_a_checkpoint_of_an_odd_width_stays_aligned(files, tmp_path):
    tensors = load(files["t2v.pth"])
    for block in ("blocks.0", "blocks.1"):
        for name in (f"{block}.ffn.0.weight", f"{block}.ffn.0.bias"):
            tensors[name] = tensors[name][:501].clone()
        tensors[f"{block}.ffn.2.weight"] = tensors[f"{block}.ffn.2.weight"][:, :501]
    torch.save(tensors, tmp_path / "odd.pth")
    convert(tmp_path / "odd.pth", tmp_path / "a.safetensors", "official")
    assert_same(load(tmp_path / "a.safetensors"), tensors)


def test_settings_of_single_layers_are_for_comfyui_only(official, tmp_path):
    setting = torch.tensor(list(b'{"attention": "comfy_kitchen_int8"}'), dtype=torch.uint8)
    name = "blocks.1.self_attn.comfy_attention.config"
    save_file({**conv(load(official)), name: setting}, tmp_path / "in.safetensors")
    convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    assert_same(load(tmp_path / "out.safetensors"), {**conv(load(official)), name: setting})
    with pytest.raises(CheckpointError, match=f"{re.escape(name)}.*no place for: choose the names"):
        convert(tmp_path / "in.safetensors", tmp_path / "out.pth")


def test_tensors_lie_where_their_dtypes_need_them(quant, tmp_path):
    convert(quant, tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    assert start % 64 == 0
    entries = json.loads(data[8:start])
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert entries.pop("__metadata__") == {"format": "pt"}
    itemsize = {"F32": 4, "BF16": 2, "I8": 1}
    assert {entry["dtype"] for entry in entries.values()} == set(itemsize)
    spans = sorted((*entry["data_offsets"], itemsize[entry["dtype"]]) for entry in entries.values())
    assert all(begin % size == 0 for begin, _, size in spans)
    ends = [0, *(end for _, end, _ in spans)]
    assert [begin for begin, _, _ in spans] == ends[:-1], "no holes"
    assert start + ends[-1] == len(data)


def test_progress_counts_up_to_its_total(quant, tmp_path):
    calls = []
    count = convert(quant, tmp_path / "a.safetensors", progress=lambda *call: calls.append(call))
    assert calls == [(done, count) for done in range(1, count + 1)]


# Targets


def left_behind(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.suffix == ".part"]


@pytest.mark.parametrize("name", TARGETS)
def test_an_older_file_is_kept_unless_allowed_to_go(quant, tmp_path, name):
    target = tmp_path / name
    target.write_text("old")
    with pytest.raises(FileExistsError, match=r"out.* exists already: choose another name"):
        convert(quant, target)
    assert target.read_text() == "old"
    convert(quant, target, overwrite=True)
    assert read_checkpoint(target).quantized
    assert left_behind(tmp_path) == []


def test_a_folder_is_not_overwritten(quant, tmp_path):
    (tmp_path / "a.pth").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        convert(quant, tmp_path / "a.pth", overwrite=True)


def test_a_file_is_not_converted_onto_itself(quant, tmp_path):
    source = Path(shutil.copy(quant, tmp_path / "a.pth"))
    with pytest.raises(ValueError, match="is the file that is read: choose another name"):
        convert(source, source, overwrite=True)
    assert source.read_bytes() == quant.read_bytes()


@pytest.mark.parametrize(("name", "got"), [("a.gguf", "'.gguf'"), ("a", "'no suffix'")])
def test_a_target_of_another_format(quant, tmp_path, name, got):
    with pytest.raises(ValueError, match=rf"must end in .safetensors, .pth, .pt, got {got}"):
        convert(quant, tmp_path / name)


def test_a_target_in_no_folder(quant, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is no folder: create it first, for a"):
        convert(quant, tmp_path / "nowhere" / "a.pth")


def test_unknown_names(quant, tmp_path):
    with pytest.raises(ValueError, match="names must be one of official, comfy, got 'wan'"):
        convert(quant, tmp_path / "a.pth", "wan")


def test_a_bad_source_is_named(tmp_path):
    (tmp_path / "bad.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"bad.pth: is empty \(0 bytes\): download it again"):
        convert(tmp_path / "bad.pth", tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


def test_scales_per_channel_have_no_official_form(quant, tmp_path):
    tensors = load(quant)
    tensors["blocks.0.ffn.0.scale"] = torch.rand(512) + 0.5
    torch.save(tensors, tmp_path / "rows.pth")
    match = r"blocks.0.ffn.0.scale is one per output channel.*got shape \[512\].*names comfy"
    with pytest.raises(CheckpointError, match=match):
        convert(tmp_path / "rows.pth", tmp_path / "a.pth")
    convert(tmp_path / "rows.pth", tmp_path / "a.safetensors")
    assert_same(load(tmp_path / "a.safetensors"), conv(tensors))


# A full disk


@pytest.mark.parametrize("name", TARGETS)
def test_a_disk_without_room_is_told_before_work(quant, tmp_path, monkeypatch, name):
    usage = namedtuple("Usage", "free")(1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    match = r"out\S* needs 0.01 GB, but .* has 0.00 GB left: free some space"
    with pytest.raises(OSError, match=match):
        convert(quant, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("older", [True, False])
def test_a_disk_that_fills_up(quant, tmp_path, name, older):
    """A limit on the size of files, which the system refuses to write beyond."""
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    target = tmp_path / name
    if older:
        target.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, limits[1]))
    try:
        with pytest.raises(OSError, match=r"could not be written \(.*older file is unchanged"):
            convert(quant, target, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == [name] * older
    assert not older or target.read_text() == "old"


def test_a_write_error_halfway(quant, tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")

    def fill_up(done, total):
        if done == total // 2:
            raise full

    target = tmp_path / "out.safetensors"
    target.write_text("old")
    with pytest.raises(OSError, match=r"out.safetensors could not be written \(.*No space left"):
        convert(quant, target, overwrite=True, progress=fill_up)
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]
    assert target.read_text() == "old"


def test_an_interrupted_conversion_leaves_nothing(quant, tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(quant, tmp_path / "out.safetensors", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


# The writer


def test_values_that_differ_from_what_was_planned(tmp_path):
    planned = {"a": torch.ones(2, 3), "b": torch.ones(1)}
    for values, told in {
        (("a", torch.ones(3, 2)), ("b", torch.ones(1))): r"a became .*\[3, 2\], it was .*\[2, 3\]",
        (("a", torch.ones(2, 3).half()), ("b", torch.ones(1))): "a became torch.float16",
        (("a", torch.ones(2, 3)),): "no values were given for b",
    }.items():
        with pytest.raises(ValueError, match=told):
            write_safetensors(tmp_path / "a.safetensors", planned, values)
    assert list(tmp_path.iterdir()) == []


def test_a_dtype_that_checkpoints_do_not_hold(tmp_path):
    with pytest.raises(ValueError, match=r"a is torch.complex64.*save it as one of torch.float64"):
        write_safetensors(tmp_path / "a.safetensors", {"a": torch.ones(1, dtype=torch.complex64)})


@pytest.mark.parametrize("dtype", checkpoint_write.DTYPES)
def test_every_dtype_is_read_back_by_safetensors(tmp_path, dtype):
    tensors = {"a": torch.arange(6).view(2, 3).to(dtype).T, "b": torch.tensor(3).to(dtype)}
    write_safetensors(tmp_path / "a.safetensors", tensors)
    assert_same(load_file(tmp_path / "a.safetensors"), tensors)


# The command

# Modules that are None cannot be imported.
WITHOUT = """
import runpy, sys
for name in ("comfy", "comfy_api", "folder_paths", "kernels", "nodes", "triton", "numba"):
    sys.modules[name] = None
sys.argv[0] = "convert"
runpy.run_module("turbo_core.convert", run_name="__main__")
"""


def run(start: list[str], *args: object, cwd: Path = TESTS.parent) -> subprocess.CompletedProcess:
    command = [sys.executable, *start, *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_the_command_needs_neither_comfyui_nor_kernels(quant, tmp_path):
    told = run(["-c", WITHOUT], quant, tmp_path / "out.safetensors")
    assert told.returncode == 0, told.stderr
    assert re.search(r"out.safetensors: 93 tensors, 0.01 GB", told.stdout)
    assert_same(load(tmp_path / "out.safetensors"), conv(load(quant)))


@pytest.mark.parametrize("isolated", [[], ["-I"]], ids=["usual", "portable"])
def test_the_command_runs_by_its_path_from_any_folder(quant, tmp_path, isolated):
    script = TESTS.parent / "turbo_core" / "convert.py"
    told = run([*isolated, str(script)], quant, "out.safetensors", cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    assert_same(load(tmp_path / "out.safetensors"), conv(load(quant)))


def test_the_command_tells_what_is_wrong(quant, tmp_path):
    module = ["-m", "turbo_core.convert"]
    target = tmp_path / "out.pth"
    target.write_text("old")
    told = run(module, quant, target)
    assert told.returncode == 1
    assert told.stderr.startswith(f"error: {target} exists already")
    assert "Traceback" not in told.stderr
    told = run(module, quant, target, "--overwrite", "--names", "official")
    assert told.returncode == 0, told.stderr
    assert_same(load(target), load(quant))


# Memory

CHILD = """
import sys
sys.path.append(sys.argv[1])
import conftest
import torch
from pathlib import Path
from peak_memory import peak_anonymous
from turbodiffusion_pack.turbo_core.convert import convert
torch.set_num_threads(1)
with peak_anonymous() as peak:
    convert(Path(sys.argv[2]), Path(sys.argv[3]))
sys.stdout.write(str(peak.bytes))
"""


@pytest.mark.skipif(not can_measure(), reason="needs /proc/self/status")
@pytest.mark.parametrize("target", TARGETS)
def test_conversion_takes_less_memory_than_a_block(tmp_path, target):
    source = tmp_path / ("in.safetensors" if target.endswith(".pth") else "in.pth")
    (save_file if target.endswith(".pth") else torch.save)(official_zeros(num_layers=2), source)
    try:
        told = run(["-c", CHILD], TESTS, source, tmp_path / target)
        assert told.returncode == 0, told.stderr
        assert (tmp_path / target).stat().st_size > 200 * MIB
        assert int(told.stdout) < 64 * MIB
    finally:
        for path in tmp_path.iterdir():
            path.unlink()
