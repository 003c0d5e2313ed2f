"""No file hangs the reader, makes it take memory that the file has not, or ends it otherwise."""

import io
import json
import pickle
import re
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from layouts import assert_same
from mutations import KINDS, complete_model, in_itself, odd_tensors, small_model, training_file
from peak_memory import can_measure
from safetensors.torch import save
from turbodiffusion_pack.turbo_core.checkpoint import CheckpointError, read_checkpoint
from turbodiffusion_pack.turbo_core.checkpoint.file import read_tensors

sys.path.append(str(Path(__file__).resolve().parent.parent))

import fuzz_checkpoints

MB = 1_000_000
EXTRA = "blocks.0.x"  # beside a complete model, looked through like any small tensor


def refuse(path: Path, *parts: str) -> None:
    """Reading `path` must fail with one short line that has its name and `parts` in order."""
    with pytest.raises(CheckpointError, match=".*".join(map(re.escape, parts))) as caught:
        read_checkpoint(path)
    told = str(caught.value)
    assert told.startswith(f"{path.name}: ")
    assert str(path.parent) not in told
    assert told.isprintable()
    assert len(told) < 1000


def save_pth(content: object, path: Path, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def save_pickle(pickled: bytes, path: Path, method: int = zipfile.ZIP_STORED, **records) -> Path:
    """A zip-format file around this data.pkl."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a/data.pkl", pickled)
        for name, record in records.items():
            archive.writestr(f"a/{name}", record)
    return path


def save_header(header: dict, path: Path, data: bytes = b"") -> Path:
    """A .safetensors file with this header."""
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


# What is read


@pytest.mark.parametrize("zipped", [True, False])
def test_every_dtype_shape_and_view_is_read(tmp_path, zipped):
    dtypes = (torch.float64, torch.float16, torch.float8_e5m2, torch.int16, torch.uint8)
    tensors = small_model() | {str(dtype): torch.arange(6).to(dtype) for dtype in dtypes}
    tensors |= {"empty": torch.ones(0, 3), "number": torch.tensor(2.5), "rest": torch.ones(9)[7:]}
    tensors["parameter"] = torch.nn.Parameter(torch.ones(2, 3).T)
    tensors["attributed"] = torch.ones(3)
    tensors["attributed"].note = 1
    path = save_pth(tensors, tmp_path / "a.pth", zipped)
    assert_same(read_tensors(path), {name: tensor.detach() for name, tensor in tensors.items()})


@pytest.mark.parametrize("zipped", [True, False])
def test_the_state_dict_of_a_training_file_is_read(tmp_path, zipped):
    content = training_file()
    tensors = read_tensors(save_pth(content, tmp_path / "a.pth", zipped))
    assert_same(tensors, {name: t.detach() for name, t in content["state_dict"].items()})
    assert tensors["net.a"].data_ptr() == tensors["net.b"].data_ptr(), "they share memory"
    assert not any(tensor.requires_grad for tensor in tensors.values())


def test_views_of_one_storage_in_the_old_format(tmp_path):
    """PyTorch before 0.4 wrote them so."""
    path = save_pth({"a": torch.arange(8.0)}, tmp_path / "a.pth", zipped=False)
    data = path.read_bytes()
    assert data.count(b"K\x08N") == 1, "8 elements, no view"
    path.write_bytes(data.replace(b"K\x08N", b"K\x08X\x01\0\0\0vK\x02K\x05\x87"))
    refuse(path, "a [8] is larger than the 20 bytes")
    shorter = path.read_bytes().replace(b"K\x08\x85", b"K\x05\x85")
    path.write_bytes(shorter)
    assert_same(read_tensors(path), {"a": torch.arange(2.0, 7.0)})


def test_records_that_need_64_bits(tmp_path):
    """As in files of more than 4 GB, where the directory has the numbers elsewhere."""
    path = save_pth({"a": torch.arange(3)}, tmp_path / "a.pth")
    data = path.read_bytes()
    start = data.index(b"PK\x01\x02")
    while data[start : start + 4] == b"PK\x01\x02":
        name, extra, comment = struct.unpack_from("<3H", data, start + 28)
        (header,) = struct.unpack_from("<L", data, start + 42)
        sizes = struct.unpack_from("<2L", data, start + 20)
        wide = struct.pack("<2H3Q", 1, 24, sizes[1], sizes[0], header)
        entry = bytearray(data[start : start + 46])
        struct.pack_into("<2L", entry, 20, 0xFFFFFFFF, 0xFFFFFFFF)
        struct.pack_into("<H", entry, 30, len(wide))
        struct.pack_into("<L", entry, 42, 0xFFFFFFFF)
        entry = bytes(entry) + data[start + 46 : start + 46 + name] + wide
        end = start + 46 + name + extra + comment
        data = data[:start] + entry + data[end:]
        start += len(entry)
    at = data.index(b"PK\x06\x06")
    moved = data.index(b"PK\x06\x07")
    data = data[: moved + 8] + struct.pack("<Q", at) + data[moved + 16 :]
    path.write_bytes(data)
    assert_same(read_tensors(path), {"a": torch.arange(3)})


# Files that would never end


@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_in_itself(tmp_path, zipped):
    content = {"a": torch.ones(1)}
    content["state_dict"] = content
    path = save_pth(content, tmp_path / "a.pth", zipped)
    refuse(path, "has its state dict in more than 8 others, or in itself", "save")
    refuse(save_pth(in_itself(), path, zipped), "or in itself")


def test_what_progress_raises_ends_the_reading(tmp_path):
    class Interrupt(BaseException):
        pass

    def interrupt(done, total):
        raise Interrupt

    with pytest.raises(Interrupt):
        read_checkpoint(save_pth(complete_model(), tmp_path / "a.pth"), progress=interrupt)


def test_tensors_in_tensors_without_end(tmp_path):
    """Each made of the next, as deep as no call stack is."""
    names = b"ctorch._tensor\n_rebuild_from_type_v2\nq\0ctorch\nTensor\nq\1"
    nested = b"h\0" + b"(h\0h\1" * 20_000 + b")" + b"Nt" * 20_000 + b"R."
    refuse(save_pickle(b"\x80\2" + names + nested, tmp_path / "a.pth"), "got a torch.Tensor")


def test_numbers_as_keys_that_collide(tmp_path):
    """Python's hash of these is 0 for all: 40 000 of them in one dict took minutes."""
    content = {n * (2**61 - 1): None for n in range(40)}
    refuse(save_pth(content, tmp_path / "a.pth"), "got a int as a name", "save")


def test_many_tensors_of_the_same_memory(tmp_path):
    memory = torch.zeros(2**20)
    content = complete_model() | {f"{EXTRA}{n}": memory[n:] for n in range(100)}
    refuse(save_pth(content, tmp_path / "a.pth"), "has tensors that share memory", "in a file of")


def test_more_than_a_model_has(tmp_path):
    header = {str(n): {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]} for n in range(40_000)}
    refuse(save_header(header, tmp_path / "a.safetensors"), "has 40000 tensors", "alone")
    data = bytearray(save_pickle(b"", tmp_path / "a.pth").read_bytes())
    struct.pack_into("<H", data, data.index(b"PK\x05\x06") + 10, 40_000)
    (tmp_path / "a.pth").write_bytes(data)
    refuse(tmp_path / "a.pth", "40000 records, more than any model")


def test_a_zip_directory_of_empty_fields(tmp_path):
    """To go through one such record's fields took 0.2 s."""
    fields = b"\xff\xff\0\0" * 16383
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", *[0] * 9, 3, len(fields), *[0] * 5)
    directory = b"".join(entry + f"{n:03}".encode() + fields for n in range(140))
    local = struct.pack("<4s5H3L2H", b"PK\3\4", *[0] * 10)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 140, 140, len(directory), len(local), 0)
    (tmp_path / "a.pth").write_bytes(local + directory + end)
    refuse(tmp_path / "a.pth", "a zip directory of more than 8388608 bytes")


# Files that would take memory


def expanded(path: Path) -> Path:
    return save_pth(complete_model() | {EXTRA: torch.ones(1).expand(2**30)}, path)


def expanded_in_one_axis(path: Path) -> Path:
    tensor = torch.ones(1000).as_strided((2**18, 1000), (0, 1))
    return save_pth(complete_model() | {f"{EXTRA}.modulation": tensor}, path)


def deflated_pickle(path: Path) -> Path:
    pickled = pickle.dumps({"a": "x"}, protocol=2)[:-1] + b"0" * (100 * MB) + b"."
    return save_pickle(pickled, path, zipfile.ZIP_DEFLATED)


def deflated_tensor(path: Path) -> Path:
    save_pth({"a": torch.zeros(2**21, dtype=torch.int8)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, record in records.items():
            big = len(record) > MB
            archive.writestr(name, record, zipfile.ZIP_DEFLATED if big else zipfile.ZIP_STORED)
    return path


def old_length(path: Path) -> Path:
    """More elements than the file has, in its list of tensors."""
    save_pth({"a": torch.zeros(70_000)}, path, zipped=False)
    number = b"J" + struct.pack("<i", 70_000)
    data = path.read_bytes()
    assert data.count(number) == 2, "of the storage, and of the tensor"
    path.write_bytes(data.replace(number, b"J" + struct.pack("<i", 2**30)))
    return path


def old_storage(path: Path) -> Path:
    """More elements than the file has, before the elements themselves."""
    save_pth({"a": torch.zeros(70_000)}, path, zipped=False)
    count = struct.pack("<q", 70_000)
    data = path.read_bytes()
    assert data.count(count) == 1
    path.write_bytes(data.replace(count, struct.pack("<q", 2**32)))
    return path


def call(name: str, number: int) -> bytes:
    """The pickle of a call of `name` with this number."""
    body = number.to_bytes(8, "little")
    return b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n\x8a\x08" + body + b"\x85R."


def a_bytearray(path: Path) -> Path:
    return save_pickle(call("__builtin__ bytearray", 2**31), path)


def a_tensor_without_values(path: Path) -> Path:
    return save_pickle(call("torch FloatTensor", 2**29), path)


def a_long_text(path: Path) -> Path:
    return save_pickle(b"\x80\x02X\xff\xff\xff\xffabc.", path)


def many_dicts(path: Path) -> Path:
    return save_pickle(b"\x80\x02" + b"}" * (4 * MB) + b".", path)


BLOATS = {
    expanded: f"{EXTRA} [1073741824] is larger than the 4 bytes",
    expanded_in_one_axis: f"{EXTRA}.modulation [262144, 1000] is larger than the 4000 bytes",
    deflated_pickle: "has a compressed or encrypted record (a/data.pkl)",
    deflated_tensor: "has a compressed or encrypted record (a/data/0)",
    old_length: "storage key",
    old_storage: "storage key",
    a_bytearray: "named tensors, got a builtins.bytearray",
    a_tensor_without_values: "contains code or Python objects (torch.FloatTensor)",
    a_long_text: "expected 4294967295 bytes",
    many_dicts: "lists more than a model has",
}


@pytest.fixture(scope="module")
def bloated(tmp_path_factory) -> dict:
    """The files, each alone in a folder."""
    return {make: make(tmp_path_factory.mktemp(make.__name__) / "a.pth") for make in BLOATS}


@pytest.mark.parametrize("make", BLOATS, ids=lambda make: make.__name__)
def test_a_file_that_asks_for_more_than_it_has(bloated, make):
    refuse(bloated[make], BLOATS[make])


@pytest.mark.skipif(not can_measure(), reason="needs /proc/self/status")
@pytest.mark.parametrize("make", BLOATS, ids=lambda make: make.__name__)
def test_it_takes_neither_memory_nor_time(bloated, make):
    result = fuzz_checkpoints.read(bloated[make], 0)
    assert (result.outcome, result.fault) == ("refused", "")


@pytest.mark.skipif(not can_measure(), reason="needs /proc/self/status")
def test_memory_and_time_would_be_seen(bloated, monkeypatch):
    monkeypatch.setattr(fuzz_checkpoints, "read_checkpoint", lambda _: torch.ones(30 * MB).sum())
    assert re.search("took 1.. MB for a file", fuzz_checkpoints.read(bloated[a_long_text], 0).fault)
    monkeypatch.setattr(fuzz_checkpoints, "SECONDS", 0.0)
    assert re.search("took 0.. s", fuzz_checkpoints.read(bloated[a_long_text], 0).fault)


@pytest.mark.skipif(not can_measure(), reason="needs /proc/self/status")
def test_files_damaged_at_random():
    """A short version of the command."""
    report = fuzz_checkpoints.fuzz([0], first=0, count=400)
    assert report.faults == [], str(report)
    assert report.outcomes.total() == 400
    assert all(report.outcomes[kind, "read"] for kind in KINDS), "some are still good"
    assert all(report.outcomes[kind, "refused"] > 50 for kind in KINDS)


# What is no plain tensor, or none that is known

ODD = {
    "sparse": "a sparse tensor",
    "meta": "a meta tensor",
    "complex": "complex64",
    "negated": "a negated or conjugated view",
    "quantized": "a quantized tensor",
    "fp4": "float4_e2m1fn_x2",
    "shape": "a torch.Size",
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ODD)
def test_what_is_no_plain_tensor_is_refused_by_name(tmp_path, name, zipped):
    content = complete_model() | {EXTRA: odd_tensors()[name]}
    path = save_pth(content, tmp_path / "a.pth", zipped)
    refuse(path, f"{EXTRA} is {ODD[name]}", "a checkpoint holds")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_in_a_tensor_are_refused_by_name(tmp_path):
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    path = save_pth(complete_model() | {EXTRA: nested}, tmp_path / "a.pth")
    refuse(path, f"{EXTRA} is a nested tensor")
    compressed = torch.eye(3).to_sparse_csr()
    path = save_pth(complete_model() | {EXTRA: compressed}, tmp_path / "a.pth")
    refuse(path, f"{EXTRA} is a sparse tensor")


class Subclass(torch.Tensor):
    pass


def test_a_tensor_of_another_class_is_refused_by_name(tmp_path):
    content = complete_model() | {EXTRA: torch.ones(2).as_subclass(Subclass)}
    path = save_pth(content, tmp_path / "a.pth")
    refuse(path, "contains code or Python objects (", "Subclass", "not run")


@pytest.mark.parametrize(
    ("dtype", "shape", "size"), [("F4", [4], 2), ("F8_E8M0", [2], 2), ("C64", [1], 8)]
)
def test_another_dtype_in_safetensors_is_refused_by_name(tmp_path, dtype, shape, size):
    header = {EXTRA: {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}
    refuse(save_header(header, tmp_path / "a.safetensors", bytes(size)), f"{EXTRA} is {dtype}")


@pytest.mark.parametrize("shape", [[0, 2**64 - 1, 1], [0, 2**63], [2**32, 0, 2**32], [0] * 70])
def test_an_impossible_shape_in_safetensors(tmp_path, shape):
    header = {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
    refuse(save_header(header, tmp_path / "a.safetensors"), "is truncated or damaged (")


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        (b"\x88", b"K\x03\x85", b"K\x01\x85"),
        (b"K\x00", b"\x88\x85", b"K\x01\x85"),
        (b"K\x00", b"K\x01\x85", b"\x8a\x09\0\0\0\0\0\0\0\0\x01\x85"),
        (b"K\x00", b"K\x03\x85", b"J\xff\xff\xff\xff\x85"),
        (b"J\xff\xff\xff\xff", b"K\x03\x85", b"K\x01\x85"),
        (b"K\x00", b"K\x03\x85", b")"),
        (b"K\x00", b"(" + 9 * b"K\x01" + b"t", b"(" + 9 * b"K\x01" + b"t"),
    ],
    ids=["offset true", "axis true", "stride 2**64", "stride -1", "offset -1", "none", "9 axes"],
)
def test_impossible_numbers_of_a_tensor(tmp_path, offset, shape, stride):
    """In the old format, whose records have no checksums."""
    data = save_pth({"a": torch.ones(3)}, tmp_path / "a.pth", zipped=False).read_bytes()
    start, end = data.index(b"QK\x00K\x03\x85"), data.index(b"\x89ccoll")
    data = data[: start + 1] + offset + shape + stride + data[end:]
    (tmp_path / "a.pth").write_bytes(data)
    refuse(tmp_path / "a.pth", "damaged (a has ")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("blocks." + "9" * 5000 + ".x", "an impossible name of 5009 characters (blocks.999"),
        ("a\nb", r"an impossible name of 3 characters ('a\nb')"),
        ("\x1b[2J", r"an impossible name of 4 characters ('\x1b[2J')"),
    ],
)
def test_an_impossible_name(tmp_path, name, told):
    tensors = complete_model() | {name: torch.ones(1)}
    refuse(save_pth(tensors, tmp_path / "a.pth"), told, "download")
    (tmp_path / "a.safetensors").write_bytes(save(tensors))
    refuse(tmp_path / "a.safetensors", told, "download")


@pytest.mark.parametrize("index", ["00", "1" * 200, "\u0663"])
def test_blocks_are_counted_in_plain_numbers(tmp_path, index):
    tensors = complete_model() | {f"blocks.{index}.x": torch.ones(1)}
    refuse(save_pth(tensors, tmp_path / "a.pth"), "block 1 is missing, got 2 blocks")


# Other kinds of files


def test_a_file_that_is_none_by_its_name_is_not_looked_into(tmp_path):
    (tmp_path / "notes.txt").write_text("my secret")
    refuse(tmp_path / "notes.txt", "is no checkpoint by its name: choose a .pth")
    (tmp_path / "notes.pth").write_text("my secret")
    with pytest.raises(CheckpointError, match=r"neither a .pth nor a .safetensors") as caught:
        read_checkpoint(tmp_path / "notes.pth")
    assert "secret" not in str(caught.value)


def test_what_the_system_refuses(tmp_path):
    refuse(tmp_path / f"{'x' * 300}.pth", "could not be read (File name too long): check")


def test_a_file_of_a_big_endian_machine(tmp_path):
    path = save_pickle(b"\x80\x02}.", tmp_path / "a.pth", byteorder=b"big")
    refuse(path, "was saved on a big-endian machine", "safetensors")
    data = save_pth({}, path, zipped=False).read_bytes()
    little = b"little_endianq\x02\x88"
    assert data.count(little) == 1
    path.write_bytes(data.replace(little, little[:-1] + b"\x89"))
    refuse(path, "was saved on a big-endian machine")


def test_a_pickle_of_another_program(tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(pickle.dumps([1], protocol=2))
    refuse(path, "is a pickle, but not one of torch.save", "save the state dict")
    torch.save({"a": torch.ones(1)}, path, pickle_protocol=4)
    refuse(path, "is a pickle that torch.save does not write (opcode FRAME)", "save")


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_zip_directory_that_is_cut(tmp_path, cut):
    data = save_pth(small_model(), tmp_path / "a.pth").read_bytes()
    start = data.index(b"PK\x01\x02")
    (tmp_path / "a.pth").write_bytes(data[:start] + data[start + cut :])
    refuse(tmp_path / "a.pth", "damaged")


def test_two_records_of_one_name(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a/data.pkl", b"1")
        archive.writestr("a/data.pkl", b"2")
    (tmp_path / "a.pth").write_bytes(buffer.getvalue())
    refuse(tmp_path / "a.pth", "two records a/data.pkl")
