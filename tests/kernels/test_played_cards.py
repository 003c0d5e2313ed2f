"""--card: what can be played, what its code is, and benchmarks that time kernels only."""

import argparse
import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import older_cards
import pytest
import torch
from attention import random_proj, random_qkv
from devices import DEVICE
from gpu_timing import Ceilings, references_of, why_not_timed
from turbodiffusion_pack.kernels import dispatch, nvrtc
from turbodiffusion_pack.kernels.ceilings import FP8, FP8_SHORT, FP16, FP16_SHORT, INT8
from turbodiffusion_pack.kernels.sla import sla

TESTS = Path(__file__).resolve().parents[1]
HOPPER = older_cards.HOPPER

# In a process of its own: Triton's interpreter is on in this one, and what is played stays.
PLAY_ADA = """
import importlib, sys, types, torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda device=None: (9, 0)
import older_cards, pack
served = types.ModuleType("served_pack")  # as ComfyUI has it
served.__path__ = [str(pack.ROOT)]
sys.modules[served.__name__] = served
attention = importlib.import_module("served_pack.kernels.sparse_attention")
older_cards.play("8.9")
import tempfile, triton, triton.language as tl
from triton.backends.nvidia.driver import CudaDriver
from ahead_of_time import MATRIX_INSTRUCTION, machine_products
from turbodiffusion_pack.kernels import dispatch, sparse_attention
from turbodiffusion_pack.kernels.sparse_attention import triton as kernels

@triton.jit
def product_kernel(x, y, out):
    i = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)
    tl.store(out + i, tl.dot(tl.load(x + i), tl.load(y + i)))

triton.knobs.cache.dir = tempfile.mkdtemp()
signature = {"x": "*i8", "y": "*i8", "out": "*i32"}
source = triton.compiler.ASTSource(fn=product_kernel, signature=signature)
code = triton.compile(source, target=CudaDriver.get_current_target(None)).asm
gpu = torch.device("cuda", 0)
print(dispatch.capability(gpu), kernels.capability(gpu), sparse_attention.default_pv(gpu))
print(".target sm_89" in code["ptx"], *sorted(set(MATRIX_INSTRUCTION.findall(code["ptx"]))))
print(*machine_products("sm_90a", code["cubin"]))
print(older_cards.playing())
import served_pack.kernels.nvrtc
print(attention.default_pv(gpu), served_pack.kernels.nvrtc.load.func.__name__)
"""


def here(monkeypatch, card):
    """A machine with a GPU of this compute capability, as far as is asked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: card)


def benchmark(name):
    """A module of tests/benchmarks; support has files of the same names."""
    spec = importlib.util.spec_from_file_location(
        f"{name}_benchmark", TESTS / "benchmarks" / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# What can be played


@pytest.mark.parametrize(
    ("card", "why"),
    [
        ("12.0", "this GPU is sm_90, and code for a newer card does not run on it"),
        ("8.7", "the cards that can be played are 8.0, 8.6, 8.9"),
        ("ada", "the cards that can be played are 8.0, 8.6, 8.9"),
        ("8.9", None),
    ],
)
def test_cards_that_hopper_plays(card, why, monkeypatch):
    here(monkeypatch, HOPPER)
    assert older_cards.unplayable(card) == why


def test_without_a_gpu_nothing_is_played(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"^--card 8\.9: there is no GPU"):
        older_cards.parse(argparse.ArgumentParser(), ["--card", "8.9"])


def test_pytest_refuses_in_one_sentence():
    command = [sys.executable, "-m", "pytest", "-c", "tests/pytest.ini", "--card", "12.0"]
    done = subprocess.run(
        [*command, "tests/kernels/test_rope.py"], cwd=TESTS.parent, capture_output=True, text=True
    )
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    told = (done.stdout + done.stderr).strip().splitlines()
    assert [line for line in told if "--card 12.0: " in line]
    assert "Traceback" not in done.stdout + done.stderr


def test_triton_makes_the_older_cards_code_and_it_is_assembled_for_this_one(tmp_path):
    file = tmp_path / "play_ada.py"  # Triton reads a kernel's source
    file.write_text(f"import sys; sys.path.append({str(TESTS / 'support')!r})\n{PLAY_ADA}")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(file)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    decided, ptx, machine, told, served = done.stdout.splitlines()
    assert decided == "(8, 9) (8, 9) fp8"
    assert ptx == "True mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"
    assert machine.startswith("IMMA.16832.S8.S8")
    assert told.startswith("as sm_89; ")
    assert "products of fp8, fp8 in fp16 sums are emulated here by those of fp16" in told
    assert served == "fp8 fitting"


def test_cuda_that_takes_more_shared_memory_than_the_card_has_is_refused(monkeypatch):
    monkeypatch.setattr(nvrtc, "load", lambda *_, **__: "a kernel")
    older_cards._fit_cuda(1000)
    assert nvrtc.load(Path(), "f", "compute_86", 1000, None, 0) == "a kernel"
    with pytest.raises(AssertionError, match="f takes 1001 bytes of 1000"):
        nvrtc.load(Path(), "f", "compute_86", 1001, None, 0)


def test_the_target_is_machine_code_of_this_card_or_ptx_of_the_played_one(monkeypatch):
    here(monkeypatch, HOPPER)
    targets = [nvrtc.target_of(card, torch.device("cuda", 0)) for card in (HOPPER, (8, 6))]
    assert targets == ["sm_90", "compute_86"]


# Benchmarks


def runs_the_reference():
    """An op on the CPU."""
    dispatch.choose("sage_attention", "auto", torch.empty(0), types, None)
    raise AssertionError("the reference ran")


def test_a_reference_is_not_run_to_be_timed():
    why = why_not_timed(runs_the_reference)
    assert why.startswith("sage_attention has no kernel here: ")
    assert why_not_timed(lambda: None) is None


def test_references_are_told():
    def run():
        dispatch.choose("rope", "auto", torch.empty(0), types, None)

    assert references_of(run).startswith("rope: ")
    assert references_of(lambda: None) == ""


TOPS = {INT8: 1000.0, FP16: 500.0}


@pytest.mark.parametrize("name", ["attention", "int8_linear"])
def test_a_benchmark_tells_a_fallback_and_prints_no_time(name, monkeypatch, capsys):
    module = benchmark(name)
    monkeypatch.setattr(module, "kernel_ms", None)
    options = types.SimpleNamespace(pv=["fp8"], topk=0.1, runs=1, epilogue=False)
    if name == "attention":
        contender = module.Contender("sagesla fp8", True, runs_the_reference)
        monkeypatch.setattr(module, "contenders", lambda *_: [contender])
        monkeypatch.setattr(module, "random_inputs", lambda *_: None)
        monkeypatch.setattr(module, "ours_whole", lambda *_: runs_the_reference)
        rows = list(module.measure("14B-480P", Ceilings(TOPS, 1000.0, 1.0), options))
    else:
        monkeypatch.setattr(module, "contenders", lambda *_: [("fast", runs_the_reference)])
        rows = list(module.measure((128, 128, 128), 1000.0, options))
    (row,) = rows
    assert "ms" not in row and "tops" not in row
    module.show(row)
    assert "not timed: sage_attention has no kernel here" in capsys.readouterr().out


@pytest.mark.gpu
def test_fp8_values_of_a_card_without_them_are_not_timed(monkeypatch):
    older_cards.pretend(monkeypatch, (8, 0))
    q, k, v = random_qkv(1, 400, 2, 128, torch.bfloat16)
    proj = random_proj(128)
    why = why_not_timed(lambda: sla(q, k, v, proj, topk=0.3, low_bit=True, pv="fp8"))
    assert "fp8 needs sm_89" in why
    assert why_not_timed(lambda: sla(q, k, v, proj, topk=0.3, low_bit=True, pv="fp16")) is None


def test_benchmarks_ask_for_the_card_when_it_is_played():
    """A name that was imported before stays the real card's."""
    files = Path(__file__).resolve().parents[1].joinpath("benchmarks").glob("*.py")
    assert [f.name for f in files if "import capability" in f.read_text("utf-8")] == []


def test_attention_is_rated_by_what_it_multiplies():
    module = benchmark("attention")
    tops = {**TOPS, FP16_SHORT: 1000.0, FP8: 800.0, FP8_SHORT: 1600.0}
    ceilings = Ceilings(tops, 1000.0, 1.0)
    ms = {
        values: module.best_ms(2e9, module.Contender("", True, None, "int8", values), ceilings)
        for values in ("16 bit", "fp16", "fp8")
    }
    of_values = {"16 bit": 2e-3, "fp16": 1e-3, "fp8": 0.625e-3}
    assert ms == {values: pytest.approx(1e-3 + x) for values, x in of_values.items()}
    emulated = Ceilings(TOPS, 1000.0, 1.0)
    assert emulated.value_tops("fp8") == TOPS[FP16]


@pytest.mark.gpu
def test_ceilings_stand_above_a_table():
    from gpu_timing import measure_ceilings

    lines = measure_ceilings().lines()
    assert "by mma.sync: int8 " in lines and "copies at " in lines
    assert DEVICE == "cuda"
