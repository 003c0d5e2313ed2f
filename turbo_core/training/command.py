"""What `python turbo_core/train.py` does once torch is there: stages in turn, errors told."""

import argparse
import contextlib
import gc
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import torch

from .error import TrainingError
from .loop import Stopped
from .processes import processes, rank
from .toy.recipe import check_alone

STOPPED = 130  # exit code of a run that its user stopped, as shells have it for Ctrl-C


def run(args: argparse.Namespace, stages: Callable[[], ModuleType]) -> int:
    """Run the stages that `args` name, one after the other.

    Args:
        stages: imports the module that has STAGES, {name: function(args, device)}: on the host's
            side, as the network is ComfyUI's.

    Returns:
        The command's exit code: 0, 1 after an error, 130 when the user stopped it.
    """
    try:
        with processes(args.device or ("cuda" if torch.cuda.is_available() else "cpu")) as device:
            try:
                for stage in args.stages:  # before hours of those in front of it
                    check_alone(stage)
                for stage in args.stages:
                    with _in_a_process_of_its_own():
                        stages().STAGES[stage](args, device)
            except Exception as error:
                return _told(error)
    except TrainingError as error:
        return _told(error)
    return 0


@contextlib.contextmanager
def _in_a_process_of_its_own() -> Iterator[None]:
    """As good as: a stage leaves no settings, networks in circles, compiled code nor memory."""
    precision = torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = fills
        _forget()


def _forget() -> None:
    if "torch._dynamo" in sys.modules:  # it keeps few versions of a function, by shape
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _told(error: Exception) -> int:
    """Write an error that is the user's to mend as one sentence; others keep their traceback."""
    if not isinstance(error, (TrainingError, OSError, ValueError, torch.OutOfMemoryError)):
        raise error
    ours = isinstance(error, TrainingError)
    if rank() == 0:
        sys.stderr.write(f"{'' if isinstance(error, Stopped) else 'error: '}{_sentence(error)}\n")
    elif not (ours and error.everywhere):
        sys.stderr.write(f"error in process {rank()}: {_sentence(error)}\n")
    return STOPPED if isinstance(error, Stopped) else 1


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"the GPU's memory is full ({text.split('. ')[0]}): --dry-run tells what the stage "
            "needs; use a smaller batch, or more GPUs with torchrun"
        )
    return text
