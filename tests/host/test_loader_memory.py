"""Loading into ComfyUI copies no weight; 1.1 times the file's size in memory is promised."""

import json
import subprocess
import sys
from pathlib import Path

import comfyui_install
import dynamic_vram
import pytest
import torch
from peak_memory import can_measure
from safetensors.torch import save_file
from turbodiffusion_pack.turbo_core.checkpoint.names import PROJ_L
from turbodiffusion_pack.turbo_core.checkpoint.sizes import BLOCK_LINEARS
from zero_checkpoint import official_zeros

pytestmark = [
    pytest.mark.skipif(not can_measure(), reason="needs /proc/self/status"),
    pytest.mark.skipif(comfyui_install.find() is None, reason="no ComfyUI found"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's driver takes memory of its own"),
]

TESTS = Path(__file__).resolve().parent.parent
MIB = 2**20
BLOCK_BYTES = 64 * MIB  # of one INT8 block of `official_zeros`

# ComfyUI, which forks for each line of a path and a file to write to what loading it took: so each
# is a fresh process, where no memory freed earlier hides what the work takes.
COMFYUI = """
import sys
sys.path.append(sys.argv.pop())  # ComfyUI takes the arguments from here on
import conftest
import json, logging, os, pathlib
import torch
torch.set_num_threads(1)
import in_comfyui
from in_comfyui import comfy
from peak_memory import peak_anonymous
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model

LOADERS = {"turbo": load_turbo_model, "stock": comfy.sd.load_diffusion_model}

def mapped(path):
    lines = pathlib.Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in lines if line.endswith(path)]
    return [(int(start, 16), int(end, 16)) for start, end in ranges]

def storage(parameter):
    return parameter._qdata if hasattr(parameter, "_qdata") else parameter

def load(loader, path):
    warnings = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    with torch.inference_mode(), peak_anonymous() as peak:
        model = LOADERS[loader](path)
    ranges = mapped(path)
    parameters = {n: storage(p) for n, p in model.model.diffusion_model.named_parameters()}
    return {
        "peak": peak.bytes,
        "warnings": warnings,
        "parameters": {
            name: [
                str(p.dtype),
                p.device.type,
                p.nbytes,
                any(a <= p.data_ptr() and p.data_ptr() + p.nbytes <= b for a, b in ranges),
            ]
            for name, p in parameters.items()
        },
    }

for line in sys.stdin:
    loader, path, result = json.loads(line)
    if os.fork() == 0:
        pathlib.Path(result).write_text(json.dumps(load(loader, path)))
        os._exit(0)
    sys.stdout.write(f"{os.wait()[1]}\\n")
    sys.stdout.flush()
"""


@pytest.fixture(scope="module")
def comfyui():
    command = [sys.executable, "-c", COMFYUI, str(TESTS)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def load(comfyui, tmp_path):
    """Returns a function that tells peak, warnings and parameters of a file that is loaded."""

    def loaded(loader: str, path: Path) -> dict:
        result = tmp_path / "told.json"
        comfyui.stdin.write(json.dumps([loader, str(path), str(result)]) + "\n")
        comfyui.stdin.flush()
        assert comfyui.stdout.readline() == "0\n"
        return json.loads(result.read_text(encoding="utf-8"))

    return loaded


@pytest.fixture
def write(tmp_path):
    """Returns a function that writes tensors to a file, which is removed after the test."""
    paths = []

    def save(name: str, tensors: dict[str, torch.Tensor]) -> Path:
        paths.append(tmp_path / name)
        (save_file if name.endswith(".safetensors") else torch.save)(tensors, paths[-1])
        return paths[-1]

    yield save
    for path in paths:
        path.unlink()


def _is_complete(told: dict, names: set[str]) -> None:
    """Every parameter of ComfyUI's model came from the file of these tensors."""
    assert told["warnings"] == []
    devices = {device for _, device, _, _ in told["parameters"].values()}
    assert devices == {"cpu"}
    names = {n.replace("int8_weight", "weight").replace(PROJ_L, "self_attn.proj_l") for n in names}
    assert set(told["parameters"]) == {n for n in names if not n.endswith(".scale")}


def _copied(told: dict) -> list[str]:
    """Weights of a megabyte or more that are not the file's own bytes."""
    big = {n: mapped for n, (_, _, size, mapped) in told["parameters"].items() if size >= MIB}
    return [name for name, mapped in big.items() if not mapped]


@pytest.mark.parametrize(
    ("quantized", "num_layers", "size"), [(True, 8, 5e8), (False, 4, 5e8)], ids=["int8", "bf16"]
)
def test_a_checkpoint_is_loaded_without_a_copy(write, load, quantized, num_layers, size):
    tensors = official_zeros(num_layers, quantized)
    names = set(tensors)
    path = write("official.pth", tensors)
    del tensors
    assert path.stat().st_size > size
    told = load("turbo", path)
    _is_complete(told, names)
    assert _copied(told) == []
    linears = [n for n in told["parameters"] if n.removesuffix(".weight").endswith(BLOCK_LINEARS)]
    linears = [n for n in linears if n.endswith(".weight")]
    assert len(linears) == 10 * num_layers
    dtype = "torch.int8" if quantized else "torch.bfloat16"
    assert {told["parameters"][n][0] for n in linears} == {dtype}
    assert told["peak"] < 1.1 * path.stat().st_size
    assert told["peak"] < BLOCK_BYTES, f"it takes less than one block; got {told['peak']} bytes"


def test_safetensors_are_loaded_without_a_copy(write, load):
    tensors = official_zeros(num_layers=3, quantized=True)
    told = load("turbo", write("official.safetensors", tensors))
    _is_complete(told, set(tensors))
    assert _copied(told) == []
    assert told["peak"] < BLOCK_BYTES


@pytest.mark.skipif(
    dynamic_vram.wanted(), reason="with dynamic VRAM ComfyUI's own loader copies nothing either"
)
def test_a_loader_that_copies_would_be_seen(write, load):
    """ComfyUI's own loader copies every weight into parameters that it allocated before."""
    tensors = official_zeros(num_layers=1, quantized=False)
    tensors["patch_embedding.weight"] = tensors["patch_embedding.weight"].view(2048, 16, 1, 2, 2)
    path = write("plain.safetensors", tensors)
    told = load("stock", path)
    assert told["peak"] > 0.9 * path.stat().st_size
    assert len(_copied(told)) > 10
    assert [w for w in told["warnings"] if "proj_l" in w] != []
