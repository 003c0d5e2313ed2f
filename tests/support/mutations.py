"""Checkpoint files of every format, damaged at random: by their bytes and by what they mean."""

import io
import json
import pickletools
import random
import struct
import zipfile

import torch
from safetensors.torch import save
from turbodiffusion_pack.turbo_core.checkpoint.sizes import Sizes, wan_shapes

KINDS = ("zip", "old", "safetensors", "index")
SHARDS = ("m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors")
INDEX = "m.safetensors.index.json"

NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 8, 127, 128, 255, 256, 4096, 65535, 2**27, 2**30, 2**31 - 1, 2**31),
    *(2**32 - 1, 2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**300),
)
WORDS = (
    *("", "a", "../a", "/etc/passwd", "x" * 300, "blocks.", "blocks." + "9" * 5000 + ".x", "\0"),
    *("\ud800", "\n", "data", "head.modulation", "state_dict", "storage", "cpu", "meta", "cuda:7"),
    *("F4", "F8_E8M0", "C64", "F32", "I8", "U64", "BOOL", "weight_map", "__metadata__", *SHARDS),
)
GLOBALS = (
    *("__builtin__ eval", "__builtin__ bytearray", "__builtin__ set", "posix system", "torch Size"),
    *("torch FloatTensor", "torch.FloatTensor x", "torch FloatStorage", "torch BFloat16Storage"),
    *("torch QInt8Storage", "torch ComplexFloatStorage", "torch.storage UntypedStorage"),
    *("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3", "torch bfloat16"),
    *("torch._utils _rebuild_sparse_tensor", "torch._utils _rebuild_qtensor", "torch device"),
    *("torch._utils _rebuild_meta_tensor_no_storage", "torch._utils _rebuild_nested_tensor"),
    *("torch._utils _rebuild_parameter", "torch._tensor _rebuild_from_type_v2", "torch Tensor"),
    *("collections OrderedDict", "collections Counter", "_codecs encode", "torch nothing"),
)
OPCODES = b"}])(.RbQstuaeN\x88\x89\x85\x86\x87\x81012"


def complete_model() -> dict[str, torch.Tensor]:
    """The smallest Wan model, of one block, 0.8 MB."""
    sizes = Sizes(dim=128, ffn_dim=128, num_layers=1, in_channels=16)
    tensors = {}
    for name, shape in wan_shapes(sizes).items():
        matrix = name.endswith("weight") and len(shape) > 1
        tensors[name] = torch.zeros(shape, dtype=torch.float8_e4m3fn if matrix else torch.float32)
    linear = "blocks.0.self_attn.q"
    tensors[f"{linear}.int8_weight"] = tensors.pop(f"{linear}.weight").to(torch.int8)
    tensors[f"{linear}.scale"] = torch.ones(1, 1)
    return tensors


def small_model() -> dict[str, torch.Tensor]:
    """A few tensors of all kinds, 1 kB."""
    return {
        "head.modulation": torch.ones(1, 2, 16, dtype=torch.bfloat16),
        "blocks.0.self_attn.q.weight": torch.ones(4, 6).T,
        "blocks.0.norm3.bias": torch.ones(20)[3:9],
        "ids": torch.arange(5),
        "mask": torch.tensor([True, False]),
        "fp8": torch.ones(4).to(torch.float8_e4m3fn),
    }


def training_file() -> dict:
    """What a training script saves."""
    model = small_model()
    shared = {"net.a": model["ids"], "net.b": model["ids"]}
    parameters = {name: torch.nn.Parameter(torch.ones(2)) for name in ("head.modulation", "x.y")}
    return {
        "state_dict": torch.nn.Linear(2, 2).state_dict() | model | shared | parameters,
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-5}]},
        "iteration": 7,
        "device": torch.device("cpu"),
    }


def odd_tensors() -> dict[str, torch.Tensor]:
    """Tensors that no checkpoint holds."""
    return {
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.empty(3, device="meta"),
        "complex": torch.ones(2, dtype=torch.complex64),
        "negated": torch.ones(2, dtype=torch.complex64).conj().imag,
        "expanded": torch.ones(1).expand(2**20),
        "quantized": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
        "fp4": torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "shape": torch.Size([1, 2]),
    }


def in_itself() -> dict:
    """A state dict under its own key, and a pair that hold each other."""
    first, second = small_model(), small_model()
    first["model"], second["model"] = second, first
    first["state_dict"] = first
    return first


class Sources:
    """The files that are damaged, made once."""

    def __init__(self):
        small, complete = small_model(), complete_model()
        expanded = complete | {"blocks.0.x": torch.ones(1).expand(2**30)}
        others = [training_file(), odd_tensors(), in_itself(), expanded]
        contents = [small, small, complete, complete, *others]
        self.zip = [_saved(content, True) for content in contents]
        self.old = [_saved(content, False) for content in contents]
        named = {name: tensor.contiguous() for name, tensor in small.items()}
        self.safetensors = [save(named, {"note": "x"}), save(complete)]
        names = list(complete)
        halves = (names[::2], names[1::2])
        self.shards = {
            shard: save({name: complete[name] for name in half})
            for shard, half in zip(SHARDS, halves, strict=True)
        }
        places = {n: s for s, half in zip(SHARDS, halves, strict=True) for n in half}
        self.index = json.dumps({"metadata": {"total_size": 1}, "weight_map": places}).encode()

    def damaged(self, kind: str, rng: random.Random) -> tuple[str, dict[str, bytes]]:
        """The name of the file to open, and the files to write first."""
        if kind == "index":
            return self._damaged_index(rng)
        data = rng.choice(getattr(self, kind))
        meaning = {"zip": _other_zip, "old": _other_old, "safetensors": _other_safetensors}[kind]
        for damage in rng.choice([[meaning], [_other_bytes], [meaning, _other_bytes]]):
            data = damage(data, rng)
        name = f"a{rng.choice(['.safetensors'] if kind == 'safetensors' else ['.pth', '.pt'])}"
        return name, {name: data}

    def _damaged_index(self, rng: random.Random) -> tuple[str, dict[str, bytes]]:
        files = {**self.shards, INDEX: self.index}
        opened = rng.choice([INDEX, *SHARDS])
        if rng.random() < 0.8:
            files[INDEX] = _other_json(self.index, rng)
        if rng.random() < 0.3:
            files[INDEX] = _other_bytes(files[INDEX], rng)
        if rng.random() < 0.3:
            shard = rng.choice(SHARDS)
            files[shard] = _other_safetensors(files[shard], rng)
        return opened, files


def _saved(content: object, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def _other_bytes(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, mostly near the start or the end, where headers and directories are."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        size = len(data)
        window = rng.choice([64, 1024, 8192, size])
        at = rng.randrange(min(window, size) or 1)
        at = at if rng.random() < 0.5 else max(0, size - 1 - at)
        length = rng.choice([1, 1, 2, 4, 8, 64])
        change = rng.randrange(7)
        if change == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif change == 1:
            data[at : at + length] = rng.randbytes(length)
        elif change == 2:
            data[at : at + length] = b""
        elif change == 3:
            data[at:at] = data[at : at + length]
        elif change == 4:
            width = rng.choice([2, 4, 8])
            number = rng.choice(NUMBERS) % 2 ** (8 * width)
            data[at : at + width] = number.to_bytes(width, rng.choice(["little", "big"]))
        elif change == 5 and rng.random() < 0.3:
            del data[at:]
        else:
            other = rng.randrange(size or 1)
            data[at : at + length] = data[other : other + length]
    return bytes(data)


def _other_zip(data: bytes, rng: random.Random) -> bytes:
    """The same archive with another pickle in it, or with records that are not what it says."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in records if name.endswith("data.pkl"))
    if rng.random() < 0.8:
        records[pickled] = _other_pickle(records[pickled], rng)
    else:
        name = rng.choice(list(records))
        change = rng.choice([b"", b"big", records[name][:-1], records[name] * 2, None])
        records[name] = change if change is not None else records.pop(name)
    method = zipfile.ZIP_DEFLATED if rng.random() < 0.1 else zipfile.ZIP_STORED
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, record in records.items():
            archive.writestr(name, record)
    return buffer.getvalue()


def _other_old(data: bytes, rng: random.Random) -> bytes:
    """The same old-format file with one of its five pickles changed."""
    file, ends = io.BytesIO(data), [0]
    for _ in range(5):
        list(pickletools.genops(file))
        ends.append(file.tell())
    which = rng.choice([0, 1, 2, 3, 3, 3, 3, 4])
    start, end = ends[which], ends[which + 1]
    return data[:start] + _other_pickle(data[start:end], rng) + data[end:]


def _other_pickle(data: bytes, rng: random.Random) -> bytes:
    """Opcodes left out, doubled, exchanged, with other numbers, names and functions."""
    starts = [position for _, _, position in pickletools.genops(data)]
    parts = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.randrange(len(parts))
        change = rng.randrange(6)
        if change == 0:
            del parts[at : at + rng.choice([1, 1, 2, 5])]
        elif change == 1:
            start = rng.randrange(len(parts))
            parts[at:at] = parts[start : start + rng.choice([1, 2, 10, 40])]
        elif change == 2:
            other = rng.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        else:
            same = [i for i, part in enumerate(parts) if part[:1] in b"KJMX\x8ach"] or [at]
            at = rng.choice(same) if change < 5 else at
            parts[at] = _opcode(rng)
        parts = parts or [b"."]
    return b"".join(parts)


def _opcode(rng: random.Random) -> bytes:
    change = rng.randrange(4)
    if change == 0:
        number = rng.choice(NUMBERS)
        body = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(body)]) + body
    if change == 1:
        text = rng.choice(WORDS).encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", rng.choice([len(text)] * 9 + [2**32 - 1])) + text
    if change == 2:
        return b"c" + rng.choice(GLOBALS).replace(" ", "\n").encode() + b"\n"
    return rng.choice(
        [bytes([rng.choice(OPCODES)]), bytes([rng.randrange(256)]), b"h\x00", b"h\x05"]
    )


def _other_safetensors(data: bytes, rng: random.Random) -> bytes:
    length = struct.unpack("<Q", data[:8])[0]
    header = _other_json(data[8 : 8 + length], rng)
    header += b" " * (-len(header) % 8)
    size = len(header) if rng.random() < 0.9 else rng.choice(NUMBERS) % 2**64
    return struct.pack("<Q", size) + header + data[8 + length :]


def _other_json(text: bytes, rng: random.Random) -> bytes:
    """Values exchanged, keys renamed and left out, at any depth."""
    content = json.loads(text)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        place = content
        while isinstance(place, dict | list) and place:
            key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
            if rng.random() < 0.4 or not isinstance(place[key], dict | list):
                _exchange(place, key, rng)
                break
            place = place[key]
    return json.dumps(content).encode()


def _exchange(place: dict | list, key: object, rng: random.Random) -> None:
    change = rng.randrange(4)
    if change == 0:
        del place[key]
    elif change == 1 and isinstance(place, dict):
        place[rng.choice(WORDS)] = place.pop(key)
    else:
        nested = json.loads("[" * 50 + "]" * 50)
        others = (*NUMBERS, *WORDS, None, True, 1.5, {}, [], [0, 2**64 - 1, 1], nested, [0] * 200)
        place[key] = rng.choice(others)
