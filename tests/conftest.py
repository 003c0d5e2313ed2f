"""Makes the pack importable, shares the cores out, skips what needs a GPU where there is none."""

import gc
import os
import random
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent / "support"))


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Workers of pytest-xdist, and what they start, share the cores. Set before torch is imported.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    threads = max(1, usable_cores() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))

import dynamic_vram  # noqa: E402
import interpreter  # noqa: E402
import pack  # noqa: E402, F401

if dynamic_vram.wanted():
    dynamic_vram.prepare()

import numpy  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

# Without a GPU the Triton kernels run in Triton's interpreter; set before Triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    interpreter.speed_up()


def pytest_addoption(parser):
    parser.addoption("--card", help="run the kernels as on an older card: 8.0, 8.6 or 8.9")


def pytest_configure(config):
    if card := config.getoption("card"):
        import older_cards

        if problem := older_cards.unplayable(card):
            raise pytest.UsageError(f"--card {card}: {problem}")
        older_cards.play(card)


def pytest_report_header(config):
    if config.getoption("card"):
        import older_cards

        return f"kernels run {older_cards.playing() or 'as on this GPU'}"


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in SLOWEST)
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU of sm_80 or newer")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported while tests are collected stays, so no garbage collection need look at it,
    then (2 s of 9) or later: tests ask for many, ComfyUI for more, and each went through a million
    objects."""
    gc.disable()
    collected = yield
    gc.collect()
    gc.freeze()
    gc.enable()
    return collected


# Of no generator that a test makes: what it draws from both would be the same numbers.
SEED = 20611


@pytest.fixture(autouse=True)
def same_numbers_in_any_order():
    """Every test draws the same random numbers, whatever ran before it: fixtures of more than one
    test come before this one and draw from generators of their own."""
    torch.manual_seed(SEED)
    numpy.random.seed(SEED)
    random.seed(SEED)


# A worker has ComfyUI and torch in about 1 GB of memory.
MOST_WORKERS = 4
# A worker takes one file after the other. These take longest, so they come first, and the workers
# are done at about the same time.
SLOWEST = (
    "test_ahead_of_time.py",
    "test_server.py",
    "test_example_workflows.py",
    "test_nvrtc.py",
    "test_demo.py",
    "test_training_processes.py",
    "test_compile.py",
    "test_experts.py",
    "test_loader_memory.py",
    "test_frontend.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """What `-n auto` means: one process per core, and one in all where there is a GPU to test."""
    return 0 if torch.cuda.is_available() else min(usable_cores(), MOST_WORKERS)
