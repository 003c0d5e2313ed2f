"""One CUDA graph in place of a forward pass that Python cannot launch as fast as the GPU runs it.

So it is with small models on a slow processor: the GPU waits. A graph is captured once a few such
passes were seen, and replayed from then on. It repeats the launches of the pass that it was made
from, so it lives only as long as all is the same that those depended on: the shapes and options of
`_kind`, the weights' places, the prompt's padding and everybody's patches in `_state`. What it
could not honour keeps passes as they are, see `_refusal`.
"""

import collections
import functools
import logging
import time
import types
import weakref
from collections.abc import Callable

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP

from .. import run_report
from . import per_run
from .block import why_not_fused
from .int8_tensor import is_int8, unpack
from .options import (
    ATTENTION,
    BLOCKS,
    EXPERT_BOUNDARY,
    MADE_ONCE,
    PREFETCH,
    SIGMA_MAX,
    TEXT,
    THIS_PASS,
    TIMESTEP,
)
from .patch_owner import is_hooked, is_ours, is_stock
from .text import KeysValues
from .versions import COMPILED, MANAGED

log = logging.getLogger(__name__)

# Passes of a kind before it is captured: a video takes four, and capturing as long as a pass.
EAGER_PASSES = 4
BOUND = 0.9  # Python is the limit where launching takes this share of a pass
MOST_MEMORY = 0.1  # of the card's, for all graphs: models and the VAE need the rest
CLAIMED = 2**20  # bytes; smaller blocks of a graph's memory are too few to matter

POSITIONAL = "x", "timestep", "context", "clip_fea", "time_dim_concat"
OUR_WRAPPERS = {ATTENTION, TIMESTEP}
# What may stand in transformer_options: what launches do not depend on, or `_kind` knows of.
KNOWN_OPTIONS = {
    "callbacks", "cond_or_uncond", "patches", "patches_replace", "prefetch_dynamic_vbars",
    "sample_sigmas", "sigmas", "uuids", "wrappers",
    ATTENTION, BLOCKS, EXPERT_BOUNDARY, MADE_ONCE, PREFETCH, SIGMA_MAX, TEXT, THIS_PASS,
}  # fmt: skip
EMPTY_OPTIONS = "patches", "patches_replace", "prefetch_dynamic_vbars", PREFETCH
PLAIN = (type(None), bool, int, float, str)
# What cuBLAS rounds by; nodes set it for some models, and older versions of torch lack the last.
ROUNDING = "allow_tf32", "allow_bf16_reduced_precision_reduction", "allow_fp16_accumulation"

Inputs = dict[str, torch.Tensor]
Run = Callable[[Inputs], torch.Tensor]

_followed = weakref.WeakKeyDictionary()  # by model


class Followed:
    """The passes of one model that were all of one kind, and the graph that stands for them."""

    def __init__(self, kind: tuple):
        self.kind, self.passes, self.graph, self.state = kind, 0, None, None
        self.paces = collections.deque(maxlen=2)  # the newest may still run on the GPU
        self.failed = False  # capturing was tried, and shall not be again

    def run(self, run: Run, alone: Run, inputs: Inputs, state: Callable[[], tuple]) -> torch.Tensor:
        """run(inputs), or the replay of a graph of alone(inputs); `state` is `_state` of now."""
        if self.graph is not None and self.state != state()[0]:
            self.drop()
        if self.graph is None and self.passes >= EAGER_PASSES and not self.failed:
            self._capture_if_it_pays(alone, inputs, state)
        if self.graph is not None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            return self.graph.replay(inputs)
        self.passes += 1
        with Pace() as pace:
            out = run(inputs)
        self.paces.append(pace)
        return out

    def _capture_if_it_pays(self, run: Run, inputs: Inputs, state: Callable[[], tuple]) -> None:
        launching, whole = next((p.ms() for p in reversed(self.paces) if p.over()), (0.0, 1.0))
        if launching < BOUND * whole:
            return
        state, why = state()  # not before: it goes through the whole model, in milliseconds
        if why is not None:
            run_report.note_no_graph(why)
            return
        try:
            graph = Graph(run, inputs)
        except RuntimeError as error:
            self.failed = True
            log.warning("TurboDiffusion: a pass cannot be captured as a CUDA graph: %s", error)
            return
        others = sum(f.graph.size for f in _followed.values() if f.graph is not None)
        gigabytes = graph.size / 1e9
        if graph.size + others > MOST_MEMORY * graph.card_memory:
            self.failed = True
            graph.drop()
            log.info("TurboDiffusion: no CUDA graph, it would keep %.1f GB of memory", gigabytes)
            return
        self.graph, self.state = graph, state
        log.info(
            "TurboDiffusion: launching takes %.0f of a pass's %.0f ms, so from here on passes "
            "like it run as one CUDA graph, which keeps %.1f GB of memory",
            launching, whole, gigabytes,
        )  # fmt: skip

    def drop(self) -> None:
        """Give the graph's memory back, and begin anew."""
        if self.graph is not None:
            self.graph.drop()
        self.graph, self.passes = None, 0
        self.paces.clear()


class Pace:
    """How long Python takes to launch an eager pass, and how long that takes in all.

    It tells only where the GPU had nothing left to do: else launches wait for room in its queue.
    """

    def __enter__(self):
        self.idle = torch.cuda.current_stream().query()
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.start.record()
        self.began = time.perf_counter()
        return self

    def __exit__(self, *_):
        self.launching = 1000 * (time.perf_counter() - self.began)
        self.end.record()

    def over(self) -> bool:
        """Whether it tells, as the GPU is done with it."""
        return self.idle and self.end.query()

    def ms(self) -> tuple[float, float]:
        """Of launching and of the whole, in ms, once it is over."""
        return self.launching, self.start.elapsed_time(self.end)


class Graph:
    """A captured pass with its inputs, its output and the memory in between.

    Raises:
        RuntimeError: something in the pass cannot be captured.
    """

    def __init__(self, run: Run, inputs: Inputs):
        self.device = inputs["x"].device
        self.inputs = {name: x.clone() for name, x in inputs.items()}
        self.pool, self.graph = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
        self.stream = torch.cuda.Stream(self.device)
        # The host counts its frequencies on the CPU (torch.arange in sinusoidal_embedding_1d,
        # comfy/ldm/wan/model.py), and a copy from there cannot be captured. Told a device, torch
        # counts there, once what does it is loaded.
        torch.arange(1, device=self.device).float()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # the graph gets what eager passes had
        with torch.cuda.stream(self.stream), self.device, run_report.noting() as self.notes:
            self._capture(run)
        self.card_memory = torch.cuda.get_device_properties(self.device).total_memory
        self.size, self.claims = self._claim()

    def _capture(self, run: Run) -> None:
        # cuBLAS shall work in the graph's memory, and in it no longer than the capture takes.
        torch._C._cuda_clearCublasWorkspaces()
        self.graph.capture_begin(self.pool, capture_error_mode="thread_local")
        try:
            self.output = run(self.inputs)
        except BaseException:
            self._abandon()
            raise
        finally:
            torch._C._cuda_clearCublasWorkspaces()
        self.graph.capture_end()

    def _abandon(self) -> None:
        """End a capture that went wrong, whether or not the driver still calls it one."""
        try:
            self.graph.capture_end()
        except RuntimeError:
            # torch left the pool and its random generator as in a capture. One of nothing that
            # ends well puts both right.
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
            torch._C._cuda_releasePool(self.device.index, self.pool)
            nothing = torch.cuda.CUDAGraph()
            nothing.capture_begin(capture_error_mode="thread_local")
            torch.empty(1, device=self.device).zero_()
            nothing.capture_end()
        self.graph.reset()

    def _claim(self) -> tuple[int, list[torch.Tensor]]:
        """Bytes of the graph's memory, and the free ones among them, which replays write to, held.

        Else they count as free, and the host would plan with them.
        """
        segments = [s for s in torch.cuda.memory_snapshot() if s["segment_pool_id"] == self.pool]
        # Blocks of over 1 MB come from large segments only, even where a small one has 2 MB free.
        large = [s for s in segments if s["segment_type"] == "large"]
        blocks = [block for segment in large for block in segment["blocks"]]
        free = [b["size"] for b in blocks if b["state"] == "inactive" and b["size"] > CLAIMED]
        pool = types.SimpleNamespace(id=self.pool)
        with torch.cuda.stream(self.stream), torch.cuda.use_mem_pool(pool, self.device):
            room = {"dtype": torch.uint8, "device": self.device}
            claims = [torch.empty(size, **room) for size in sorted(free, reverse=True)]
        return sum(segment["total_size"] for segment in segments), claims

    def replay(self, inputs: Inputs) -> torch.Tensor:
        """The pass on other inputs of the same shapes."""
        with torch.inference_mode():
            for name, x in inputs.items():
                self.inputs[name].copy_(x)
        self.graph.replay()
        run_report.note_replayed(self.notes)
        return self.output.clone()

    def drop(self) -> None:
        """Give the memory back."""
        self.claims, self.output = [], None
        self.graph.reset()
        torch.cuda.empty_cache()


@torch.compiler.disable(recursive=False)  # as block.block_forward
def forward(executor, options: dict, named: dict) -> torch.Tensor:
    """A Wan model's forward pass, a DIFFUSION_MODEL wrapper's `executor`, or its graph's replay.

    `named` are what the model is given by name, `options` its transformer_options.
    """
    inputs = {name: x for name, x in named.items() if isinstance(x, torch.Tensor)}
    others = {name: x for name, x in named.items() if name not in inputs}

    def run(inputs: Inputs, **fresh: dict) -> torch.Tensor:
        given = {**others, **inputs}
        told = {**options, **fresh}
        return executor(*(given.pop(name) for name in POSITIONAL), told, **given)

    def alone(inputs: Inputs) -> torch.Tensor:
        """With nothing that other passes made, as the text's keys and values."""
        text = functools.partial(KeysValues, repeats=options[TEXT]().repeats)
        with per_run.forgotten():
            return run(inputs, **{TEXT: functools.cache(text), MADE_ONCE: {}})

    followed = _follow(executor.class_obj, inputs, others, options)
    if followed is None:
        return run(inputs)
    return followed.run(run, alone, inputs, lambda: _state(executor.class_obj, inputs, options))


@torch.compiler.disable
def _follow(wan, inputs: Inputs, others: dict, options: dict) -> Followed | None:
    """What is known of passes like this one; None where no graph may stand for it."""
    why = _refusal(inputs, others, options)
    kind = None if why else _kind(inputs, others, options)
    followed = _followed.get(wan)
    if followed is None or followed.kind != kind:
        drop(wan)
        followed = None if why else _followed.setdefault(wan, Followed(kind))
    return followed


def drop(wan: torch.nn.Module) -> None:
    """Forget the passes of a model, and give its graph's memory back."""
    if (followed := _followed.pop(wan, None)) is not None:
        followed.drop()


def _kind(inputs: Inputs, others: dict, options: dict) -> tuple:
    """All that decides on the launches of a pass, but for the model itself."""
    shapes = [(name, x.shape, x.stride(), x.dtype, x.device) for name, x in inputs.items()]
    settings, step = options[THIS_PASS]
    kept_dense = 0 <= step < settings.dense_steps
    matmul = torch.backends.cuda.matmul
    rounding = [getattr(matmul, name, None) for name in ROUNDING]
    modes = torch.is_inference_mode_enabled(), *rounding
    return *shapes, *others.items(), settings, kept_dense, modes


def _refusal(inputs: Inputs, others: dict, options: dict) -> str | None:
    """Why no graph may stand for a pass, the model apart; None where one may."""
    if why := _device_problem(inputs["x"].device):
        return why
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return "gradients are asked for, or it is compiled"
    if any(x.device != inputs["x"].device for x in inputs.values()):
        return "its inputs are on several devices"
    if inputs["timestep"].ndim != 1:
        return "timesteps differ between tokens"
    if strange := [name for name, value in others.items() if not isinstance(value, PLAIN)]:
        return f"the model is given {strange[0]}"
    if strange := [name for name in options if name not in KNOWN_OPTIONS]:
        return f"the model is told {strange[0]}"
    if full := [name for name in EMPTY_OPTIONS if options.get(name)]:
        return f"the model is told {full[0]}"
    wrappers = options.get("wrappers", {})
    if other := wrappers.get(WrappersMP.DIFFUSION_MODEL, {}).keys() - OUR_WRAPPERS:
        return f"another node wraps the model ({next(iter(other))})"
    if COMPILED in wrappers.get(WrappersMP.APPLY_MODEL, {}):
        return "the host compiles it"
    return None


def _device_problem(device: torch.device) -> str | None:
    """Why there are no graphs on `device`; None where there are."""
    if device.type != "cuda":
        return f"it runs on {device.type}"
    if torch.cuda.get_allocator_backend() != "native":
        return "memory is not torch's own (start ComfyUI with --disable-cuda-malloc)"
    return None


def _state(wan, inputs: Inputs, options: dict) -> tuple[tuple | None, str | None]:
    """Where all weights of the model lie, and how much of the text is padding; or None, and why a
    graph may not stand for it now."""
    for block in wan.blocks:
        if why := why_not_fused(block, inputs["timestep"], options):
            return None, why
    device, modules, found = inputs["x"].device, [wan], [options[TEXT]().repeats]
    while modules:
        module = modules.pop()
        if why := _why_not_as_it_is(module):
            return None, why
        found.append(type(module))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None:
                continue
            if tensor.device != device:
                return None, "a weight is offloaded"
            parts = unpack(tensor) if is_int8(tensor) else (tensor,)
            found += [(part.data_ptr(), part.dtype, part.shape) for part in parts]
        modules += module._modules.values()
    return tuple(found), None


def _why_not_as_it_is(module: torch.nn.Module) -> str | None:
    """What may change what a module does from pass to pass; None where nothing does."""
    own = module.__dict__
    if MANAGED in own:
        return "the host moves the weights by itself"
    if is_hooked(module) or not (is_stock(module) or is_ours(own.get("forward"))):
        return "a node patches a part of the model"
    if own.get("weight_function") or own.get("bias_function"):
        return "a weight is patched at each use"
    if own.get("_compiled_call_impl"):
        return "a part of the model is compiled"
    return None
