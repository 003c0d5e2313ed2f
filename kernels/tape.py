"""What a function on GPU tensors allocates, computes and launches, recorded once and run again.

Python takes longer to decide on the kernels of a transformer block than a GPU may take to run them,
and decides alike in every block and step. A tape keeps what came of it: the launches with all that
they take, of which only the tensors' addresses change. Running it allocates as the function does,
in the same order, and frees as soon, but for small rooms, which come together: nothing is kept in
between, unlike by a CUDA graph.
"""

import collections
import contextlib
import ctypes
import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from . import driver, nvrtc
from .dispatch import CUDA, REFERENCE, listener, listening

aten = torch.ops.aten
EMPTY = {aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default}
# Ops that Triton launches by itself where they run in it: those launches are not seen here.
TRITONS_OWN = {"int8_linear", "sage_attention", "sparse_attention"}
ROOM, COMPUTE, LAUNCH = range(3)
# Bytes: rooms of at most SMALL come together in one of at most TOGETHER, which torch's allocator
# cuts from memory for small ones.
SMALL, TOGETHER, ALIGNED = 2**18, 2**20, 512

_constants = []


def constant(make: Callable[[torch.device], torch.Tensor]) -> Callable:
    """Decorates what makes a tensor of a device that stays as it is, once: tapes know its place."""

    @functools.cache
    def made(device: torch.device) -> torch.Tensor:
        _constants.append(make(device))
        return _constants[-1]

    return made


class UnrecordedError(Exception):
    """Why a function cannot be run from a tape."""


class _Piece:
    """A tensor in what lies in a slot."""

    def __init__(self, slot: int, offset: int, x: torch.Tensor):
        self.slot, self.layout = slot, (x.shape, x.stride(), offset // x.itemsize)

    def of(self, held: list) -> torch.Tensor:
        x = held[self.slot]
        size, stride, offset = self.layout
        if x.shape == size and x.stride() == stride and offset == 0:
            return x
        return x.as_strided(size, stride, x.storage_offset() + offset)


class _Slot(NamedTuple):
    """Memory that a tape tells from other."""

    address: int
    size: int  # bytes
    dtype: torch.dtype | None


class Recorder(TorchDispatchMode):
    """Notes, while it is entered, what happens to `inputs` and is made of them on their device.

    Memory is named by slots: the inputs' first, then each new one's in turn.
    """

    def __init__(self, inputs: Sequence[torch.Tensor | None]):
        super().__init__()
        self.device, self.index = inputs[0].device, inputs[0].get_device()
        self.inputs, self.why, self.outer = len(inputs), None, listener()
        self.slots = [_extent(x) for x in inputs]
        self.constants = [_extent(x) for x in _constants]
        self.steps, self.maps, self.heard = [], {}, {}
        self.uses = {}  # by slot: the last step that takes it
        self.shaped = set()  # slots that torch takes as tensors
        spans = sorted(slot[:2] for slot in self.slots if slot.size)
        if any(a + size > b for (a, size), (b, _) in itertools.pairwise(spans)):
            self.refuse("inputs share memory")

    def refuse(self, why: str) -> None:
        """What happens now cannot be run from a tape."""
        self.why = self.why or why

    def hear(self, op: str, name: str, why: str | None) -> None:
        """As a listener of dispatch.choose."""
        if self.outer is not None:
            self.outer(op, name, why)
        self.heard[op, name, why] = None
        if name == REFERENCE or (op in TRITONS_OWN and name != CUDA):
            self.refuse(f"{op} runs in {name}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.why is None:
            self._note(func, args, kwargs, out)
        return out

    def _note(self, func, args: tuple, kwargs: dict, out) -> None:
        given, made = (
            [x for x in tree_flatten(found)[0] if isinstance(x, torch.Tensor)]
            for found in ((args, kwargs), out)
        )
        if func._schema.is_mutable or not made:
            self.refuse(f"{func} gives no tensor of its own")
            return
        known = {x.untyped_storage().data_ptr() for x in given}
        if all(x.untyped_storage().data_ptr() in known for x in made):
            return  # views
        if type(out) is not torch.Tensor or out.device != self.device:
            self.refuse(f"{func} gives a {type(out).__name__} on {made[0].device}")
        elif func not in EMPTY:
            pieces = [self._piece(x) if isinstance(x, torch.Tensor) else x for x in args]
            if len(given) > sum(isinstance(x, _Piece) for x in pieces):
                self.refuse(f"{func} takes tensors by name or in a list")
            self._new(out, COMPUTE, (func, pieces, kwargs))
        elif out.is_contiguous():
            self._new(out, ROOM, (tuple(out.shape), out.dtype))
        else:
            self.refuse("memory is not contiguous")

    def _new(self, x: torch.Tensor, kind: int, more: tuple) -> None:
        storage = x.untyped_storage()
        self.steps.append((kind, len(self.slots), more))
        self.slots.append(_Slot(storage.data_ptr(), storage.nbytes(), x.dtype))

    def _piece(self, x: torch.Tensor) -> _Piece:
        slot, offset = self._place(x.data_ptr())
        if slot is None or self.slots[slot].dtype != x.dtype:
            self.refuse("torch takes memory for something else")
        self.shaped.add(slot)
        return _Piece(slot, offset, x)

    def _place(self, address: int) -> tuple[int | None, int]:
        """The slot that an address lies in and how far, None for a constant's; it is taken now."""
        # From the end: memory that was freed may be a later slot's by now.
        for i in reversed(range(len(self.slots))):
            if 0 <= (offset := address - self.slots[i].address) < self.slots[i].size:
                self.uses[i] = len(self.steps)
                return i, offset
        if not any(0 <= address - x.address < x.size for x in self.constants):
            self.refuse("a kernel takes memory that was neither given nor made")
        return None, 0

    def mapped(self, tensor_map: ctypes.Array, key: tuple) -> None:
        """nvrtc.tensor_map gave this for the `key`."""
        self.maps[bytes(tensor_map)] = key

    def launched(
        self, kernel, grid: tuple, threads: int, memory: bytes, arguments, pointers, maps=()
    ) -> None:
        """A kernel was started with what lies in `memory`: where in it each of its arguments
        begins, each address and each tensor map."""
        if kernel.device != self.index:
            self.refuse("a kernel runs on another device")
        if self.why is not None:
            return
        memory, patches = ctypes.create_string_buffer(memory, len(memory)), []
        for at in pointers:
            word = ctypes.c_uint64.from_buffer(memory, at)
            if word.value:
                patches.append((*self._place(word.value), word))
        for at in maps:
            room = nvrtc.TENSOR_MAP.from_buffer(memory, at)
            if (key := self.maps.get(bytes(room))) is None:
                self.refuse("a kernel takes a tensor map that nobody told of")
                return
            patches.append((*self._place(key[0]), _Map(room, key[1:])))
        first = ctypes.addressof(memory)
        parameters = (ctypes.c_void_p * len(arguments))(*(first + at for at in arguments))
        self.steps.append((LAUNCH, (kernel, memory), (grid, threads, parameters, patches)))

    def tape(self, out: torch.Tensor) -> "Tape":
        """Of a function that gave `out`.

        Raises:
            UnrecordedError: it cannot be run again.
        """
        piece = self._piece(out)
        if piece.slot is None or piece.slot < self.inputs:
            self.refuse("it gives what it was given")
        if self.why is not None:
            raise UnrecordedError(self.why)
        return Tape(self, piece)


class _Map:
    """Room for a tensor map among a kernel's arguments, set by an address as a number there is."""

    def __init__(self, room: ctypes.Array, layout: tuple):
        self.room, self.layout = room, layout

    @property
    def value(self) -> None:
        """Only to be set."""

    @value.setter
    def value(self, address: int) -> None:
        self.room[:] = nvrtc.map_of(address, *self.layout)


def _extent(x: torch.Tensor | None) -> _Slot:
    """From where a tensor begins to where it ends."""
    if x is None or x.numel() == 0:
        return _Slot(0, 0, None)
    last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return _Slot(x.data_ptr(), (last + 1) * x.itemsize, x.dtype)


class Tape:
    """What a Recorder saw, to be run on other inputs of the same layouts."""

    def __init__(self, recorder: Recorder, out: _Piece):
        self.device, self.index = recorder.device, recorder.index
        self.out, self.heard = out, list(recorder.heard)
        self.lock, self.stream = threading.Lock(), ctypes.c_void_p()
        self.addresses = [None] * len(recorder.slots)
        self.places = [[] for _ in recorder.slots]  # by slot: what to set to its address, and more
        self.kept = []  # kernels unload themselves once nobody holds them
        self.shared = {}  # by slot that lies in another one's room: that slot, and how far
        rooms, uses = self._rooms(recorder)
        ends = collections.defaultdict(list)  # by step: the slots that nobody takes after it
        for slot, step in uses.items():
            if slot >= recorder.inputs and slot != out.slot:
                ends[step].append(slot)
        self.steps = []
        for i, (kind, what, more) in enumerate(recorder.steps):
            if kind == ROOM and what in rooms:
                self.steps.append((ROOM, what, rooms[what]))
            elif kind == COMPUTE:
                self.steps.append((COMPUTE, what, (*more, ends[i])))
            elif kind == LAUNCH:
                self.steps.append((LAUNCH, self._launch(*what, *more), ends[i]))

    def _rooms(self, recorder: Recorder) -> tuple[dict, dict]:
        """By slot: the shape and dtype of each room, and the last step that takes it."""
        rooms, uses, parts = {}, dict(recorder.uses), {}
        for step, (kind, slot, more) in enumerate(recorder.steps):
            if kind != ROOM or slot not in uses:
                continue
            size = recorder.slots[slot].size
            if slot in recorder.shaped:
                rooms[slot] = more
            elif size > SMALL:
                rooms[slot] = size, torch.uint8
            else:
                first, at = self._place_for(size, step, slot, parts)
                parts.setdefault(first, []).append((at, at + size, uses[slot]))
                self.shared[slot] = first, at
        for first, of_it in parts.items():
            rooms[first] = max(end for _, end, _ in of_it), torch.uint8
            uses[first] = max(last for *_, last in of_it)
        for slot in self.shared.keys() - rooms.keys():
            del uses[slot]
        return rooms, uses

    @staticmethod
    def _place_for(size: int, step: int, slot: int, parts: dict) -> tuple[int, int]:
        """Where `size` bytes that are taken from `step` on may lie: in the room of which slot, that
        of `slot` if in none of those there are, and how far in it."""
        for first, of_it in parts.items():
            at = 0
            for start, end, last in sorted(of_it):
                if last >= step and start < at + size and at < end:
                    at = -(-end // ALIGNED) * ALIGNED
            if at + size <= TOGETHER:
                return first, at
        return slot, 0

    def _launch(self, kernel, memory, grid, threads, parameters, patches) -> tuple:
        """What cuLaunchKernel takes, of which addresses are to be set in `memory`."""
        for slot, offset, word in patches:
            if slot is not None:
                slot, further = self.shared.get(slot, (slot, 0))
                self.places[slot].append((word, offset + further))
        self.kept.append((kernel, memory))
        size = kernel.shared_bytes
        return kernel.function, *grid, threads, 1, 1, size, self.stream, parameters, None

    def run(self, inputs: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        """What the function gives of `inputs`; None where another thread is at it."""
        if not self.lock.acquire(blocking=False):
            return None
        try:
            with driver.on_device(self.index):
                out = self._run(inputs)
        finally:
            self.lock.release()
        if (tell := listener()) is not None:
            for heard in self.heard:
                tell(*heard)
        return out

    def _run(self, inputs: Sequence[torch.Tensor | None]) -> torch.Tensor:
        held = [*inputs, *[None] * (len(self.addresses) - len(inputs))]
        addresses, device, empty = self.addresses, self.device, torch.empty
        for slot, x in enumerate(inputs):
            if x is not None and addresses[slot] != (address := x.data_ptr()):
                self._move(slot, address)
        launch = driver.driver().cuLaunchKernel
        self.stream.value = driver.stream_on(self.index)
        for kind, what, more in self.steps:
            if kind == LAUNCH:
                if code := launch(*what):
                    driver.check(code)
                for slot in more:
                    held[slot] = None
                continue
            if kind == ROOM:
                x = held[what] = empty(more[0], dtype=more[1], device=device)
            else:
                func, args, named, ends = more
                args = [y.of(held) if type(y) is _Piece else y for y in args]
                x = held[what] = func(*args, **named)
                del args
                for slot in ends:
                    held[slot] = None
            if addresses[what] != (address := x.data_ptr()):
                self._move(what, address)
            x = None  # `held` alone holds it
        return self.out.of(held)

    def _move(self, slot: int, address: int) -> None:
        """Have launches find at `address` what lies in a slot."""
        self.addresses[slot] = None  # where the driver refuses a tensor map, some are set already
        for word, offset in self.places[slot]:
            word.value = address + offset
        self.addresses[slot] = address


@contextlib.contextmanager
def recording(inputs: Sequence[torch.Tensor | None]) -> Iterator[Recorder]:
    """Meanwhile it is noted what is made of `inputs`, of which the first is a tensor."""
    recorder = Recorder(inputs)
    with driver.told_to(recorder), listening(recorder.hear), recorder:
        yield recorder
