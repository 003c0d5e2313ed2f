"""Conversion keeps every bit, needs neither ComfyUI nor kernels, and never leaves half a file."""

import errno
import json
import os
import re
import secrets
import shutil
import struct
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import fresh_process
import memory_work
import pytest
import torch
from goldens import unpack_checkpoint
from layouts import LAYOUTS, assert_same, conv
from peak_memory import can_measure
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from turbodiffusion_pack.turbo_core.checkpoint import CheckpointError, read_checkpoint, write
from turbodiffusion_pack.turbo_core.checkpoint.write import write_safetensors
from turbodiffusion_pack.turbo_core.convert import convert
from zero_checkpoint import official_zeros

TESTS = Path(__file__).resolve().parent.parent
sys.path.append(str(TESTS))

import race_writers  # noqa: E402

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


@pytest.mark.parametrize("name", ["x-00001-of-00002.safetensors", "a-00002-of-00002.safetensors"])
def test_a_target_that_could_not_be_read_back(quant, tmp_path, name):
    with pytest.raises(ValueError, match=r"of-00002.* has the name of one shard .*choose a name"):
        convert(quant, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_target_named_like_the_only_shard_is_read_back(quant, tmp_path):
    target = tmp_path / "x-00001-of-00001.safetensors"
    convert(quant, target)
    assert read_checkpoint(target).quantized


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
    match = r"^out\S* needs 0.01 GB, but its drive has 0.00 GB left: free some space"
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
        match = (
            r"^out\S* could not be written \(File too large\): .* unchanged. Choose another place"
        )
        with pytest.raises(OSError, match=match):
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
    match = r"^out.safetensors could not be written \(No space left .*Free some space or choose"
    with pytest.raises(OSError, match=match):
        convert(quant, target, overwrite=True, progress=fill_up)
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]
    assert target.read_text() == "old"


def test_an_interrupted_conversion_leaves_nothing(quant, tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(quant, tmp_path / "out.safetensors", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", TARGETS)
def test_space_is_asked_for_only_where_it_is_missing(quant, tmp_path, monkeypatch, name):
    def refuse(_):
        raise PermissionError(errno.EPERM, "Operation not permitted", str(tmp_path))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="Operation not permitted") as caught:
        convert(quant, tmp_path / name)
    assert "space" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# Two writers


@pytest.mark.parametrize("target", TARGETS)
def test_a_name_that_is_taken_meanwhile_is_kept(quant, tmp_path, monkeypatch, target):
    """Another converter is done first, and neither was told to overwrite."""
    fsync = os.fsync

    def be_second(file):
        (tmp_path / target).write_text("the other's")
        fsync(file)

    monkeypatch.setattr(os, "fsync", be_second)
    with pytest.raises(FileExistsError, match=r"^out\S* exists by now, .*choose another name"):
        convert(quant, tmp_path / target)
    assert (tmp_path / target).read_text() == "the other's"
    assert left_behind(tmp_path) == []


def test_a_rename_that_fails_leaves_nothing(quant, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match=r"out.pth could not be written \(Input/output error\)"):
        convert(quant, tmp_path / "out.pth")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("taken", [True, False])
def test_a_file_system_without_hard_links(quant, tmp_path, monkeypatch, taken):
    target = tmp_path / "out.safetensors"

    def refuse(*_):
        if taken:
            target.write_text("the other's")
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    if taken:
        with pytest.raises(FileExistsError, match="exists by now"):
            convert(quant, target)
        assert target.read_text() == "the other's"
    else:
        convert(quant, target)
        assert_same(load(target), conv(load(quant)))
    assert left_behind(tmp_path) == []


def test_a_planted_link_is_not_followed(quant, tmp_path, monkeypatch):
    """Whatever name the part gets, a file that has it already is not written to."""
    (tmp_path / "victim").write_text("precious")
    monkeypatch.setattr(os, "getpid", lambda: 7)
    monkeypatch.setattr(secrets, "token_hex", lambda _: "7")
    for name in ("out.pth.7.part", "turbodiffusion-7.part"):
        (tmp_path / name).symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        convert(quant, tmp_path / "out.pth")
    assert (tmp_path / "victim").read_text() == "precious"
    assert (tmp_path / "turbodiffusion-7.part").is_symlink(), "it is not ours to remove"


def test_two_writers_in_races(tmp_path, monkeypatch):
    """A short version of the command, which has two processes."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # slow, and the same for both
    faults, stayed = race_writers.race(100, tmp_path, threads=True)
    assert faults == []
    assert stayed.total() == 100
    assert min(stayed[1], stayed[2]) > 5, "neither is always the last or the first"


# Files that nobody finished

OLD_PART = "turbodiffusion-0123456789abcdef.part"


def make_old(path: Path) -> None:
    os.utime(path, (time.time() - 7200,) * 2)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signal")
def test_the_next_writer_removes_what_a_killed_one_left(quant, tmp_path):
    killed = run(["-c", SIGNALLED], quant, tmp_path / "out.pth", "SIGKILL")
    assert killed.returncode == -9, killed.stderr
    (part,) = tmp_path.iterdir()
    convert(quant, tmp_path / "a.safetensors")
    assert part.exists(), "written to of late, perhaps by another machine"
    make_old(part)
    convert(quant, tmp_path / "b.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


@pytest.mark.skipif(sys.platform == "win32", reason="an open file is its own lock there")
def test_a_part_that_is_being_written_stays(quant, tmp_path):
    def see(done, total):
        if done == total // 2:
            (part,) = tmp_path.glob("*.part")
            make_old(part)
            convert(quant, tmp_path / "other.safetensors")

    convert(quant, tmp_path / "out.safetensors", progress=see)
    assert_same(load(tmp_path / "out.safetensors"), load(tmp_path / "other.safetensors"))
    assert left_behind(tmp_path) == []


def test_other_files_stay(quant, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / OLD_PART).symlink_to(victim)
    (tmp_path / OLD_PART.replace("0", "1")).mkdir()
    downloads = "download.part", "turbodiffusion-model.safetensors.part"
    for name in (*downloads, "out.safetensors.7.part"):
        (tmp_path / name).write_text("another program's")
    for path in tmp_path.iterdir():
        make_old(path)
    before = {path.name for path in tmp_path.iterdir()}
    convert(quant, tmp_path / "out.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == before | {"out.safetensors"}
    assert victim.read_text() == "precious"


# The writer


def test_a_complete_file_stands_though_its_part_cannot_be_removed(quant, tmp_path, monkeypatch):
    def busy(path, missing_ok=False):
        raise PermissionError(13, "used by another program", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(type(tmp_path), "unlink", busy)
        convert(quant, tmp_path / "out.safetensors")
    assert load(tmp_path / "out.safetensors").keys() == load(quant).keys()


def test_values_that_differ_from_what_was_planned(tmp_path):
    planned = {"a": torch.ones(2, 3), "b": torch.ones(1)}
    for values, told in {
        (("a", torch.ones(3, 2)), ("b", torch.ones(1))): r"a became .*\[3, 2\], it was .*\[2, 3\]",
        (("a", torch.ones(2, 3).half()), ("b", torch.ones(1))): "a became torch.float16",
        (("a", torch.ones(2, 3)),): "no values were given for b",
        (("c", torch.ones(1)),): "c was not among the tensors",
        (("b", torch.ones(1)), ("b", torch.ones(1))): "b was not among .* or came twice",
    }.items():
        with pytest.raises(ValueError, match=told):
            write_safetensors(tmp_path / "a.safetensors", planned, values)
    assert list(tmp_path.iterdir()) == []


def test_a_dtype_that_checkpoints_do_not_hold(tmp_path):
    with pytest.raises(ValueError, match=r"a is torch.complex64.*save it as one of torch.float64"):
        write_safetensors(tmp_path / "a.safetensors", {"a": torch.ones(1, dtype=torch.complex64)})


@pytest.mark.parametrize("dtype", write.DTYPES)
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
    assert told.stderr.startswith(f"error: {target.name} exists already")
    assert "Traceback" not in told.stderr
    told = run(module, quant, target, "--overwrite", "--names", "official")
    assert told.returncode == 0, told.stderr
    assert_same(load(target), load(quant))


# The command with a signal in the middle: at the first tensor, when the part is there already.
SIGNALLED = """
import os, signal, sys
from turbo_core import convert
from turbo_core.checkpoint import write
number = signal.Signals[sys.argv.pop()]
bytes_of = write._bytes

def interrupted(tensor):
    os.kill(os.getpid(), number)
    return bytes_of(tensor)

write._bytes = interrupted
convert.main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signal")
@pytest.mark.parametrize("name", TARGETS)
def test_a_terminated_command_leaves_nothing(quant, tmp_path, name):
    told = run(["-c", SIGNALLED], quant, tmp_path / name, "SIGTERM")
    assert (told.returncode, told.stderr) == (143, "error: stopped, nothing was left behind\n")
    assert list(tmp_path.iterdir()) == []


# Memory


@pytest.mark.skipif(not can_measure(), reason="needs /proc/self/status")
@pytest.mark.parametrize("target", TARGETS)
def test_conversion_takes_less_memory_than_a_block(tmp_path, target):
    source = tmp_path / ("in.safetensors" if target.endswith(".pth") else "in.pth")
    (save_file if target.endswith(".pth") else torch.save)(official_zeros(num_layers=2), source)
    try:
        work = memory_work.convert_file, source, tmp_path / target
        peak = fresh_process.call(memory_work.peak_of, *work)
        assert (tmp_path / target).stat().st_size > 200 * MIB
        assert peak < 64 * MIB
    finally:
        for path in tmp_path.iterdir():
            path.unlink()
