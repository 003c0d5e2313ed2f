"""TurboDoctor's text, and the command that prints it without ComfyUI."""

import logging
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import ahead_of_time
import pytest
import torch
from turbodiffusion_pack.kernels import dispatch, nvrtc
from turbodiffusion_pack.turbo_core import diagnosis

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
GPU = torch.device("cuda:0")
# What has CUDA kernels, of what is as small as the trials.
ON_HOPPER = {
    "int8_linear", "key_value_state", "layer_norm_quant", "prepare", "quantize_rows",
    "sage_attention",
}  # fmt: skip
OPS = ON_HOPPER | {
    "apply_rope", "block_means", "center_means", "linear_attention", "quantize_blocks",
    "requantize_rows", "rms_norm", "select_blocks", "sparse_attention",
}  # fmt: skip


def _run(*command, cwd=ROOT):
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(autouse=True)
def examined_anew():
    """What is known of a device is kept, except between these tests."""
    kept = dispatch.capability, dispatch.triton_unavailable
    for known in kept:
        known.cache_clear()
    yield
    for known in kept:
        known.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """Pretends to a GPU, as far as its properties go; gives a setter."""

    def pretend(name, capability, count=1):
        major, minor = capability
        memory = 80 * 2**30
        card = types.SimpleNamespace(name=name, major=major, minor=minor, total_memory=memory)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * 2**30, memory))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return pretend


# The text


def test_it_says_what_a_bug_report_needs():
    text = diagnosis.report(CPU)
    for part in (
        r"^TurboDiffusion for Wan \d+\.\d+\.\d+$",
        r"^ComfyUI",
        rf"^Python 3\.{sys.version_info.minor}\.",
        rf"^torch {re.escape(torch.__version__)}, .*, Triton \d",
        r"^Models run on: cpu$",
        r"^SageSLA here: int8 QK and fp16 PV$",
        r"^Trial: none, as no Triton kernel runs here$",
    ):
        assert re.search(part, text, re.MULTILINE), part
    assert text.isascii()
    assert len(text.splitlines()) <= 15


def test_it_says_why_every_op_is_slow():
    text = diagnosis.report(CPU)
    (line,) = re.findall("^Torch reference, slow: (.*)$", text, re.MULTILINE)
    (why,) = re.findall("^Why: (.*)$", text, re.MULTILINE)
    assert line.split(", ") == sorted(OPS)
    assert why == dispatch.why_reference("an op", "auto", torch.empty(0))


def test_without_triton_it_says_what_to_do(monkeypatch):
    problem = "Triton is not installed (No module named 'triton')"
    monkeypatch.setattr(dispatch, "_TRITON_PROBLEM", problem)
    for system, package in (("Windows", "triton-windows"), ("Linux", "triton")):
        monkeypatch.setattr(diagnosis.platform, "system", lambda system=system: system)
        lines = diagnosis.report(CPU).splitlines()
        assert f"Why: {problem}" in lines
        assert lines[-1].startswith("To do: install Triton 3.4 or newer in ComfyUI's Python")
        assert lines[-1].endswith(f": pip install -U {package}")


def test_a_torch_without_cuda_is_told(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    text = diagnosis.report(CPU)
    assert "no CUDA in it" in text
    assert "To do: this torch cannot use NVIDIA GPUs" in text


@pytest.mark.parametrize(
    "path", ["/home/ada/x/triton.py", "/Users/ada", "C:\\Users\\Jo ada\\triton", "D:/Users/ada"]
)
def test_it_names_nobody(monkeypatch, path):
    monkeypatch.setattr(dispatch, "_TRITON_PROBLEM", f"Triton is broken ({path})")
    text = diagnosis.report(CPU, f"ComfyUI 1.2.3 in {path}")
    assert "ada" not in text
    assert "Triton is broken (" in text and "ComfyUI 1.2.3 in " in text


def test_no_path_and_no_environment_in_it():
    text = diagnosis.report(CPU)
    assert str(ROOT) not in text and str(Path.home()) not in text
    assert sys.executable not in text


def test_what_cannot_be_found_is_called_unknown(tmp_path):
    assert diagnosis.comfyui_version(tmp_path) == "of unknown version"
    (tmp_path / "comfyui_version.py").write_text('# made\n__version__ = "0.9.1"\n')
    assert diagnosis.comfyui_version(tmp_path) == "0.9.1"


# Cards


@pytest.mark.parametrize(
    ("name", "card", "state"),
    [
        ("NVIDIA H100 80GB HBM3", (9, 0), "measured"),
        ("NVIDIA H200", (9, 0), "untested: the kernels were compiled for it"),
        ("NVIDIA GeForce RTX 4090", (8, 9), "untested: the kernels were compiled for it"),
        ("NVIDIA GeForce RTX 5090", (12, 0), "untested: the kernels were compiled for it"),
        ("NVIDIA Thor", (11, 0), "untested"),
        ("Tesla V100-SXM2-16GB", (7, 0), "too old for the kernels, which need sm_80 or newer"),
    ],
)
def test_state_of_a_card(name, card, state):
    found = diagnosis.card_state(name, card)
    assert found.startswith(state)
    assert ("compiled" in found) == ("compiled" in state)


def test_compiled_cards_are_those_that_the_tests_compile_for():
    assert diagnosis.COMPILED == ahead_of_time.CARDS


@pytest.mark.parametrize(
    ("device", "told"),
    # The latter: ComfyUI started with --cpu, on a machine that has a GPU.
    [(GPU, "Models run on: cuda:0, 60.0 GiB free"), (CPU, "Models run on: cpu")],
)
def test_a_gpu_is_told_with_its_memory(gpu, monkeypatch, device, told):
    gpu("NVIDIA GeForce RTX 4090", (8, 9))
    monkeypatch.setattr(diagnosis, "trials", lambda device: {})  # there is none to try
    lines = diagnosis.report(device).splitlines()
    at = lines.index(told)
    assert lines[at - 1].startswith("GPU 0: NVIDIA GeForce RTX 4090, sm_89, 80.0 GiB, untested: ")


@pytest.mark.parametrize(
    ("reached", "told"),
    [
        ({(0, 1), (0, 2), (1, 2)}, "every pair"),
        ({(0, 1)}, "0-1"),
        ({(0, 2), (1, 2)}, "0-2, 1-2"),
        (set(), "none"),
    ],
)
def test_all_gpus_and_who_reaches_whom_are_told(gpu, monkeypatch, reached, told):
    gpu("NVIDIA H100 80GB HBM3", (9, 0), count=3)
    both_ways = reached | {(b, a) for a, b in reached}
    reach = torch.cuda, "can_device_access_peer"
    monkeypatch.setattr(*reach, lambda a, b: (a, b) in both_ways)
    monkeypatch.setattr(diagnosis, "trials", lambda device: {})
    lines = diagnosis.report(GPU).splitlines()
    at = lines.index(f"Peer access between GPUs: {told}")
    assert [line.split(":")[0] for line in lines[at - 3 : at]] == ["GPU 0", "GPU 1", "GPU 2"]


def test_reach_one_way_is_no_peer_access(gpu, monkeypatch):
    gpu("NVIDIA H100 80GB HBM3", (9, 0), count=2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: a < b)
    monkeypatch.setattr(diagnosis, "trials", lambda device: {})
    assert "Peer access between GPUs: none" in diagnosis.report(GPU)


def test_ops_stand_by_what_they_run_in():
    no_nvrtc = "torch's NVRTC does not load"
    choices = {
        ("int8_linear", dispatch.TRITON, no_nvrtc),
        ("prepare", dispatch.TRITON, no_nvrtc),
        ("rms_norm", dispatch.TRITON, None),
        ("apply_rope", dispatch.TRITON, None),
        ("sage_attention", dispatch.CUDA, None),
        ("sparse_attention", dispatch.REFERENCE, "float32 does not fit"),
    }
    assert diagnosis.kernel_lines(choices) == [
        "CUDA kernels: sage_attention",
        "Triton kernels: apply_rope, rms_norm",
        "Triton kernels, where CUDA is faster: int8_linear, prepare",
        f"Why: {no_nvrtc}",
        "Torch reference, slow: sparse_attention",
        "Why: float32 does not fit",
    ]


@pytest.mark.gpu
def test_the_kernels_it_names_are_those_that_run(monkeypatch):
    launched, load = set(), nvrtc.load

    def note(source, name, *arguments, **constants):
        launched.add(name)
        return load(source, name, *arguments, **constants)

    monkeypatch.setattr(nvrtc, "load", note)
    choices = diagnosis.heard(diagnosis.trials(GPU))
    assert {op for op, _, _ in choices} == OPS
    assert {op for op, name, _ in choices if name == dispatch.CUDA} == launched
    assert launched == (set() if dispatch.cuda_unavailable(GPU) else ON_HOPPER)


# Trials


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
@pytest.mark.parametrize("name", ["rms_norm", "apply_rope", "int8_linear", "sla", "sagesla"])
def test_a_trial_passes(name):
    run = diagnosis.trials(CPU, torch.float16)[name]
    line = diagnosis.trial_line(name, run)
    assert re.fullmatch(rf"Trial of {name}: ok, \d\.\de[-+]\d\d from the torch reference", line)


def test_a_wrong_kernel_is_told():
    wrong = {"triton": torch.ones(4), "reference": torch.full((4,), 1.1)}
    told = diagnosis.trial_line("sla", wrong.get)
    assert told == "Trial of sla: WRONG, 9.1e-02 from the torch reference"
    nothing = {"triton": torch.full((4,), torch.nan), "reference": torch.ones(4)}
    assert "WRONG" in diagnosis.trial_line("sla", nothing.get)


def test_a_compiler_that_fails_is_told_and_logged(caplog):
    caplog.set_level(logging.WARNING)

    def fails(backend):
        raise subprocess.CalledProcessError(1, ["gcc", "/home/ada/secret.c"])

    told = diagnosis.trial_line("rms_norm", fails)
    assert told == "Trial of rms_norm: failed with CalledProcessError, the log has all of it"
    assert "the trial of rms_norm failed" in caplog.text
    assert "secret.c" in caplog.text


def test_trials_leave_the_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    diagnosis.trials(CPU)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.gpu
def test_every_trial_passes_on_this_gpu():
    lines = diagnosis.report().splitlines()
    trials = [line for line in lines if line.startswith("Trial of ")]
    assert len(trials) == 5
    assert [line for line in trials if ": ok, " not in line] == []
    assert any(line.startswith("Triton kernels: ") for line in lines)


# The command


def test_the_command_prints_it_without_comfyui():
    code, out, err = _run("-m", "turbo_core.doctor")
    assert (code, err) == (0, "")
    assert out.startswith("TurboDiffusion for Wan ")
    assert "\nComfyUI" in out and "\nModels run on: " in out


def test_the_command_runs_from_any_folder_and_finds_a_comfyui_around_it(tmp_path):
    pack = tmp_path / "custom_nodes" / "my-pack.1"
    pack.mkdir(parents=True)
    for name in ("kernels", "turbo_core", "pyproject.toml"):
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, pack / name)
    (tmp_path / "comfyui_version.py").write_text('__version__ = "0.3.99"\n')
    # -I: as the portable ComfyUI's Python, which looks for modules nowhere near.
    code, out, err = _run("-I", str(pack / "turbo_core" / "doctor.py"), cwd=tmp_path)
    assert (code, err) == (0, "")
    assert "\nComfyUI 0.3.99, not running (the TurboDoctor node tells more)\n" in out


def test_the_command_in_a_python_without_torch_says_which_to_use():
    code, out, err = _run("-S", "-m", "turbo_core.doctor")
    assert (code, out) == (1, "")
    assert "has no torch, so it is not ComfyUI's. Run this with the Python that starts" in err
    assert "Traceback" not in err
