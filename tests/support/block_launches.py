"""What a fused block launches, anew and from its tape, without a GPU.

In a process of its own: a card is pretended, kernels are named but neither compiled nor run, and
tensors lie on the CPU. A driver takes the launches down as it would read them.
"""

import contextlib
import ctypes
import functools
import itertools
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import comfyui_install
import fresh_process

LAYERS, TOKENS, TEXT, DIM, FFN = 2, 384, 512, 256, 512


def differences(small: int | None, card: tuple[int, int], batch: int = 1) -> list[str]:
    """How a block's launches from a tape differ from those anew, on a card of this capability, of
    so many samples; rooms of at most `small` bytes come together, as many as in use if None."""
    return fresh_process.call(_differences, small, card, batch)


def from_tape() -> dict[str, list[bool]]:
    """By what is done before a pass: which of its blocks then run from a tape."""
    return fresh_process.call(_from_tape)


class Triton:
    """Stands in for a Triton kernel: of what it is launched with it makes a compiled one."""

    numbers, kinds = itertools.count(1), {}  # by the function's number: of all it takes

    def __init__(self, kernel):
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments, **constants):
        import torch

        def kind(x) -> str:
            if x is None or isinstance(x, torch.dtype | str):
                return "constexpr"
            if isinstance(x, torch.Tensor):
                return "*i8"
            return "fp32" if isinstance(x, float) else "i64"

        given = dict(zip(self.arg_names, arguments, strict=False))
        signature = {n: kind(given[n]) if n in given else "constexpr" for n in self.arg_names}
        number = next(self.numbers)
        taken = [kind for kind in signature.values() if kind != "constexpr"]
        self.kinds[number] = taken
        words = ["f32" if kind == "fp32" else "u64" for kind in taken] + ["u64", "u64"]
        return types.SimpleNamespace(
            function=number,
            metadata=types.SimpleNamespace(
                num_warps=4, num_ctas=1, shared=number, launch_cooperative_grid=False,
                launch_pdl=False, global_scratch_size=0, profile_scratch_size=0,
            ),
            src=types.SimpleNamespace(signature=signature),
            asm={"ptx": f".entry f({''.join(f'.param .{word} p, ' for word in words)})"},
        )  # fmt: skip


class Driver:
    """Takes launches down: addresses apart from all else that the driver reads."""

    def __init__(self):
        self.launches, self.operands, self.kernels = [], {}, {}

    def load(self, source, name, target, shared_bytes, operands, device, **constants):
        from turbodiffusion_pack.kernels import nvrtc

        key = str(source), name, operands, *constants.items()
        if key not in self.kernels:
            number = next(Triton.numbers)
            self.operands[number] = operands
            self.kernels[key] = nvrtc.Kernel(ctypes.c_void_p(number), shared_bytes, 0)
        return self.kernels[key]

    def cuTensorMapEncodeTiled(self, room, kind, rank, pointer, *layout):  # noqa: N802
        arrays = [tuple(x) if isinstance(x, ctypes.Array) else x for x in layout]
        room[:] = (pointer.value, hash((kind, rank, *arrays)) % 2**63, *[0] * 14)
        return 0

    def cuLaunchKernel(self, function, *how):  # noqa: N802
        *shape, _, parameters, _ = how
        number = function.value
        read = self._cuda if number in self.operands else self._triton
        addresses, rest = read(number, parameters)
        self.launches.append(((number, *shape, *rest), addresses))
        return 0

    def _cuda(self, number: int, parameters) -> tuple[list, list]:
        given = self.operands[number].from_address(parameters[0])
        addresses, rest = [], []
        for name, kind in type(given)._fields_:
            value = getattr(given, name)
            if kind is ctypes.c_void_p:
                addresses.append(value or 0)
            elif name != "end" and isinstance(value, ctypes.Array):
                addresses.append(value[0])
                rest.append(value[1])
            elif name != "end":
                rest.append(value)
        return addresses, rest

    def _triton(self, number: int, parameters) -> tuple[list, list]:
        addresses, rest = [], []
        for place, kind in zip(parameters, Triton.kinds[number], strict=False):
            word = ctypes.c_uint64.from_address(place).value
            (addresses if kind.startswith("*") else rest).append(word)
        return addresses, rest


def _start_comfyui_on_the_cpu() -> None:
    folder = str(comfyui_install.find())
    sys.path[:0] = [folder] * (folder not in sys.path)
    sys.argv = ["comfyui", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()


@contextlib.contextmanager
def blocks(small: int | None = None, card: tuple[int, int] = (9, 0)):
    """A function that runs all blocks of a small model in a pass; the driver; and that model."""
    _start_comfyui_on_the_cpu()
    import pretended_card  # before all that asks for the card
    import tiny_models
    import torch
    import triton
    from in_comfyui import comfy
    from turbodiffusion_pack.kernels import launching, tape
    from turbodiffusion_pack.turbo_core import activation_memory
    from turbodiffusion_pack.turbo_core.host import block, block_tape, text
    from turbodiffusion_pack.turbo_core.host.load import load_turbo_model
    from turbodiffusion_pack.turbo_core.host.options import BLOCKS, MADE_ONCE, THIS_PASS
    from turbodiffusion_pack.turbo_core.host.options import TEXT as TEXT_OPTION
    from turbodiffusion_pack.turbo_core.host.patch import patch_attention
    from turbodiffusion_pack.turbo_core.sla_settings import SLASettings

    torch.set_num_threads(1)
    settings, launched = SLASettings("sagesla", 0.1), launching.Launched
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model-quant.pth")
        torch.save(tiny_models.t2v_checkpoint(dim=DIM, ffn=FFN, layers=LAYERS), path)
        model = patch_attention(load_turbo_model(str(path)), settings)
        comfy.model_management.load_models_gpu([model])
    wan = model.model.diffusion_model
    made_of = text.KeysValues(None, repeats=TEXT - 120)

    def run(tokens=TOKENS, seed=0, settings=settings, keys_values=made_of, step=-1, batch=1):
        generator = torch.Generator().manual_seed(seed)
        x, context = (
            torch.randn(batch, n, DIM, generator=generator).bfloat16() for n in (tokens, TEXT)
        )
        e = torch.zeros(batch, 1, 6, DIM)
        freqs = wan.rope_encode(tokens // 64, 16, 16, dtype=x.dtype)
        options = {THIS_PASS: (settings, step), MADE_ONCE: {}, BLOCKS: wan.blocks}
        options[TEXT_OPTION] = lambda: keys_values
        for run_block in wan.blocks:
            x = run_block(x, e=e, freqs=freqs, context=context, transformer_options=options)
        return x

    library = Driver()
    kernels = [x for module in _modules() for x in vars(module).values() if type(x) is launched]
    stubs = [
        *(mock.patch.object(kernel, "kernel", Triton(kernel.kernel)) for kernel in kernels),
        mock.patch.object(activation_memory, "PART_BYTES", 3 * FFN * TOKENS // 3),  # 3 parts
        mock.patch.object(activation_memory, "TEXT_ACTIVATIONS", 0),
        mock.patch.object(block, "tiles_of", lambda *_: None),  # a CPU has no multiprocessors
        mock.patch.object(tape, "SMALL", tape.SMALL if small is None else small),
        # What Triton launches by itself it neither compiles nor runs.
        mock.patch.object(triton.knobs.runtime, "jit_cache_hook", lambda **_: True),
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(pretended_card.pretended(card, has_nvrtc=True))
        stack.enter_context(pretended_card.launched_by(library, library.load))
        for stub in stubs:
            stack.enter_context(stub)
        block_tape._tapes.clear()
        yield run, library, wan


def _modules() -> list:
    return [m for name, m in sys.modules.items() if name.startswith("turbodiffusion_pack.kernels.")]


def _differences(small: int | None, card: tuple[int, int], batch: int) -> list[str]:
    with blocks(small, card) as (run_blocks, library, _):
        run = functools.partial(run_blocks, batch=batch)
        from turbodiffusion_pack.kernels.tape import Tape
        from turbodiffusion_pack.turbo_core import run_report
        from turbodiffusion_pack.turbo_core.host import block_tape

        with mock.patch.object(block_tape, "ATTEMPTS", 0):
            run()
            with run_report.noting() as noted:
                anew = _watched(run, library)
        run()
        if not any(isinstance(tape, Tape) for tape in block_tape._tapes.values()):
            return ["nothing is recorded"]
        with run_report.noting() as noted_again:
            again = _watched(run, library)
    found = _compare(*anew, *again)
    for name in ("sla", "fused", "int8", "kernels"):
        if getattr(noted, name) != getattr(noted_again, name):
            found.append(f"the report is told of other {name}")
    return found


def _watched(run: Callable, library: Driver) -> tuple[list, list]:
    """What torch and the driver are asked for meanwhile, in turn; and all memory that is new."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_flatten
    from turbodiffusion_pack.kernels import tape

    rooms, library.launches = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and type(out) is torch.Tensor:
                given = [x for x in tree_flatten(args)[0] if isinstance(x, torch.Tensor)]
                place = out.untyped_storage().data_ptr()
                if all(x.untyped_storage().data_ptr() != place for x in given):
                    rooms.append((len(library.launches), place, out.untyped_storage().nbytes()))
                    if func not in tape.EMPTY:
                        layouts = [(x.shape, x.stride(), x.dtype) for x in given]
                        what = str(func), *map(str, layouts)
                        addresses = [x.data_ptr() for x in (*given, out)]
                        library.launches.append((what, addresses))
            return out

    with Watch():
        run()
    found, library.launches = library.launches, []
    return found, rooms


def _compare(anew: list, rooms: list, again: list, _) -> list[str]:
    """How `again` differs from `anew`, but for where new memory lies: each of the `rooms` of the
    one has to lie in one place in the other, where nothing else is that is taken later."""
    if [what for what, _ in anew] != [what for what, _ in again]:
        return ["other launches"]
    found, there, uses = [], {}, {}
    for step, ((what, old), (_, new)) in enumerate(zip(anew, again, strict=True)):
        for a, b in zip(old, new, strict=True):
            born = [i for i, (at, start, size) in enumerate(rooms)
                    if at <= step and start <= a < start + size]  # fmt: skip
            if not born:
                found += [f"{what[0]} takes another tensor"] if a != b else []
                continue
            room = born[-1]
            start = b - (a - rooms[room][1])
            if there.setdefault(room, start) != start:
                found.append(f"{what[0]} finds something in two places")
            first, _ = uses.get(room, (step, step))
            uses[room] = first, step
    for a, b in itertools.combinations(there, 2):
        beside = there[a] + rooms[a][2] <= there[b] or there[b] + rooms[b][2] <= there[a]
        apart = uses[a][1] < uses[b][0] or uses[b][1] < uses[a][0]
        if not (beside or apart):
            found.append(f"rooms {a} and {b} overlap")
    return found


def _from_tape() -> dict[str, list[bool]]:
    with blocks() as (run, _, wan):
        return _runs(run, wan)


def _runs(run: Callable, wan) -> dict[str, list[bool]]:
    from turbodiffusion_pack.kernels import tape
    from turbodiffusion_pack.turbo_core.host import block, text
    from turbodiffusion_pack.turbo_core.sla_settings import SLASettings

    told, results, from_tape, run_tape = [], {}, block.from_tape, tape.Tape.run

    def counted_run(self, inputs):
        told[-1] = True
        return run_tape(self, inputs)

    def counted(*arguments):
        told.append(False)
        return from_tape(*arguments)

    def of(name: str, repeats: int | None = None, **asked):
        if repeats is not None:
            asked["keys_values"] = text.KeysValues(None, repeats)
        told.clear()
        run(**asked)
        results[name] = list(told)

    with (
        mock.patch.object(tape.Tape, "run", counted_run),
        mock.patch.object(block, "from_tape", counted),
    ):
        of("the first pass of all")
        of("the second pass")
        of("a new prompt", repeats=TEXT - 120)
        of("a prompt of another length", repeats=TEXT - 100)
        of("no padding", repeats=1)
        of("another length", tokens=256)
        of("other settings", settings=SLASettings("sagesla", 0.5))
        of("16 bits", settings=SLASettings("sla", 0.1))
        of("a dense block", settings=SLASettings("sagesla", 0.1, dense_blocks=(1,)))
        of("a dense step", settings=SLASettings("sagesla", 0.1, dense_steps=1), step=0)
        op = wan.blocks[0].ffn[0]
        op.weight_function = [lambda weight: weight]
        of("a weight that is patched at each use")
        op.weight_function = []
        of("afterwards")
    return results
