"""Time and memory inside the server, wherever ComfyUI says how far it is; and memory that runs out.

GET /turbo_clock tells of the last prompt and of now, see `readings` and `now`. POST /turbo_clock
lets memory run out in the next prompt, see `Shortage`. POST /turbo_clock/busy_link has a thread
copy to the GPU, or no longer, see `Copier`. POST /turbo_clock/trim has the C library give back what
it has free, and tells of the rest. The first prompt begins as on the older card that
TURBO_TEST_CARD names, if it does.
"""

import asyncio
import gc
import os
import re
import threading
import time
from pathlib import Path

import comfy.model_management as memory
import comfy.utils
import host_memory
import torch
from aiohttp import web
from server import PromptServer
from torch.utils._python_dispatch import TorchDispatchMode

OUTCOMES = "execution_success", "execution_error", "execution_interrupted"
TOLD = "execution_start", "executing", *OUTCOMES
PIECE = 1 << 26  # bytes of a copy
STATUS = Path("/proc/self/status")

one_at_a_time = threading.Lock()
host_loads = memory.load_models_gpu
host_moves_bar = comfy.utils.ProgressBar.update_absolute


def on_gpu() -> bool:
    return memory.get_torch_device().type == "cuda"


class Mark:
    """A moment of the thread that runs the prompt, and one in the GPU's queue, which is later."""

    def __init__(self):
        self.wall = time.perf_counter()
        self.event = torch.cuda.Event(enable_timing=True) if on_gpu() else None
        if self.event:
            self.event.record()

    def since(self, other: "Mark") -> float:
        """Seconds from `other` to here by the GPU's clock; without a GPU by the wall's."""
        if self.event is None:
            return self.wall - other.wall
        self.wait()
        return other.event.elapsed_time(self.event) / 1000

    def wait(self) -> None:
        """Until the GPU is here."""
        if self.event:
            self.event.synchronize()


class Reading:
    """What the server's process had taken when ComfyUI told `event`."""

    def __init__(self, event: str, told: dict):
        self.event, self.told = event, told
        self.memory, self.mark = taken(), Mark()
        self.loads = len(Clock.loads)
        self.copied = Clock.copier.copied if Clock.copier else 0
        if on_gpu():
            torch.cuda.reset_peak_memory_stats()


class Clock:
    """Of the prompt that runs, or the last one."""

    readings: list[Reading] = []
    loads: list[tuple[Mark, Mark]] = []  # starts and ends of the host's bringing models to the GPU
    shortage = None  # the Shortage to come, or the one that is on
    copier = None  # the Copier that keeps the link busy


class Shortage(TorchDispatchMode):
    """Memory that runs out in the middle of something, until the prompt has ended.

    at: a node's id and how far its bar has come, 0 at its start, which it begins at.
    operations: how many of torch's still pass. From then on torch may take no more of the GPU.
    room: without a GPU, where memory cannot run out, every tensor of more bytes than that raises
        what it raises on a GPU.
    """

    def __init__(self, node: str, value: int, operations: int, room: int):
        super().__init__()
        self.at, self.operations, self.room = (node, value), operations, room
        self.begun = False

    def begin(self) -> None:
        self.begun = True
        self.__enter__()

    def end(self) -> None:
        if self.begun:
            self.__exit__(None, None, None)
        if on_gpu():
            torch.cuda.set_per_process_memory_fraction(1.0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations -= 1
        if self.operations == 0 and on_gpu():
            refuse_more()
        out = function(*args, **(kwargs or {}))
        if self.operations < 0 and not on_gpu() and made_bytes(function, out) > self.room:
            raise memory.OOM_EXCEPTION("CUDA out of memory (pretended)")
        return out


def refuse_more() -> None:
    """Let torch take no more of the GPU's memory, nor what it keeps for later."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.0)


def made_bytes(function, out) -> int:
    """Bytes of a tensor that an operation has made; 0 where it gives a view or writes in place."""
    returns = function._schema.returns
    fresh = len(returns) == 1 and returns[0].alias_info is None and isinstance(out, torch.Tensor)
    return out.numel() * out.element_size() if fresh else 0


def taken() -> dict[str, int]:
    """Bytes, by whose they are. `peak` counts from the last reading on."""
    held = {"pinned": memory.TOTAL_PINNED_MEMORY, **resident()}
    if not on_gpu():
        return held
    free, total = torch.cuda.mem_get_info()
    return held | {
        "card": total - free,
        "allocated": torch.cuda.memory_allocated(),
        "peak": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
    }


def resident() -> dict[str, int]:
    """What of the process is in memory, and how much of that are files; Linux tells."""
    if not STATUS.exists():
        return {}
    sizes = dict(re.findall(r"(\w+):\s+(\d+) kB", STATUS.read_text()))
    return {"resident": 1024 * int(sizes["VmRSS"]), "mapped": 1024 * int(sizes["RssFile"])}


def now() -> dict[str, int]:
    """`taken` at this moment, bytes of all tensors that Python holds, wherever they are, and how
    much ComfyUI was asked to give up and has not heard of yet."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
    unheard = len(PromptServer.instance.prompt_queue.flags)
    held = taken() | {"tensors": sum(storages.values()), "unheard": unheard}
    return held | {"reserved": torch.cuda.memory_reserved()} if on_gpu() else held


def readings() -> list[dict]:
    """Of the last prompt in order: event, node, value of max, seconds, loading, copied, memory.

    `seconds` count from its start; a step's are those when the GPU was done with it. `loading` are
    those that went by so far while the host brought models to the GPU, `copied` what a Copier has.
    """
    told, node = [], None
    loads = [end.since(start) for start, end in Clock.loads]
    for reading in Clock.readings:
        seconds = reading.mark.wall
        if reading.event == "progress" and node:
            seconds = node.wall + reading.mark.since(node)
        elif reading.event == "executing":
            node = reading.mark
        told.append(
            {
                "event": reading.event,
                "node": reading.told.get("node"),
                "value": reading.told.get("value", 0),
                "max": reading.told.get("max", 0),
                "seconds": seconds - Clock.readings[0].mark.wall,
                "loading": sum(loads[: reading.loads]),
                "copied": reading.copied,
                **reading.memory,
            }
        )
    return told


def hear(event: str, told: dict) -> None:
    """ComfyUI tells its client something, in the thread that runs the prompt."""
    if event == "execution_start":
        play_card()
        Clock.readings, Clock.loads = [], []
    Clock.readings.append(Reading(event, told))
    shortage = Clock.shortage
    if shortage and not shortage.begun and shortage.at == (told.get("node"), told.get("value", 0)):
        shortage.begin()
    if shortage and event in OUTCOMES:
        Clock.shortage = None
        shortage.end()


class Copier(threading.Thread):
    """Keeps the link to the GPU busy, on a stream of its own, until it is told to stop.

    ahead: copies of pinned memory that it asks for at once, and waits for before it asks again.
    copied: bytes of those that are done.
    """

    def __init__(self, ahead: int):
        super().__init__(daemon=True)  # it ends with the server
        self.ahead, self.copied, self.stopped = ahead, 0, threading.Event()

    def run(self) -> None:
        here, there = on_both_sides(PIECE)
        with torch.cuda.stream(torch.cuda.Stream() if on_gpu() else None):
            while not self.stopped.is_set():
                for _ in range(self.ahead):
                    there.copy_(here, non_blocking=True)
                Mark().wait()
                self.copied += self.ahead * PIECE

    def stop(self) -> None:
        self.stopped.set()
        self.join(timeout=5)


def keep_link_busy(ahead: int) -> dict[str, float]:
    """Have a thread copy from now on, or none of `ahead` 0.

    Bytes per second of copies in the thread that asks, alone and beside that other one, and of the
    other one alone. What is asked last holds, also where a client did not wait for the one before.
    """
    if copier := Clock.copier:
        copier.stopped.set()
    with one_at_a_time:
        return _keep_link_busy(ahead)


def _keep_link_busy(ahead: int) -> dict[str, float]:
    if Clock.copier:
        Clock.copier.stop()
        Clock.copier = None
    speeds = {"alone": link_speed()}
    if ahead:
        Clock.copier = Copier(ahead)
        Clock.copier.start()
        time.sleep(1)  # it is under way
        before = Clock.copier.copied
        time.sleep(1)
        speeds["other"] = Clock.copier.copied - before
    return speeds | {"left": link_speed()}


def link_speed() -> float:
    """Bytes per second of copies to the GPU in a second, each waited for: a single long one would
    have the link to itself once it has begun."""
    here, there = on_both_sides(PIECE)
    start, copies = time.perf_counter(), 0
    while time.perf_counter() - start < 1:
        there.copy_(here, non_blocking=True)
        Mark().wait()
        copies += 1
    return copies * PIECE / (time.perf_counter() - start)


def on_both_sides(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """So many bytes in pinned memory and on the GPU."""
    here = torch.zeros(size, dtype=torch.uint8, pin_memory=on_gpu())
    return here, here.to(memory.get_torch_device(), copy=True)


def play_card() -> None:
    """In the first prompt, as all packs are loaded by then."""
    if card := os.environ.pop("TURBO_TEST_CARD", None):
        import older_cards

        older_cards.play(card)


def told_and_heard(send):
    """The server's `send_sync`, which tells a client what happens, with `hear` before it."""

    def send_sync(event, data, sid=None):
        if event in TOLD:
            hear(event, data)
        send(event, data, sid)

    return send_sync


def moved_bar(bar, value, total=None, preview=None):
    """A bar comes to `value`. ComfyUI 0.33 tells its client of some of that only."""
    node = PromptServer.instance.last_node_id
    hear("progress", {"node": node, "value": value, "max": total or bar.total})
    host_moves_bar(bar, value, total, preview)


def timed_load(*args, **kwargs):
    start = Mark()
    try:
        return host_loads(*args, **kwargs)
    finally:
        Clock.loads.append((start, Mark()))


def install() -> None:
    """Once, while ComfyUI loads its custom nodes."""
    server = PromptServer.instance
    server.send_sync = told_and_heard(server.send_sync)
    comfy.utils.ProgressBar.update_absolute = moved_bar
    memory.load_models_gpu = timed_load

    @server.routes.get("/turbo_clock")
    async def tell(_):
        return web.json_response({"run": readings(), "now": now()})

    @server.routes.post("/turbo_clock")
    async def run_short(request):
        Clock.shortage = Shortage(**await request.json())
        return web.json_response({})

    @server.routes.post("/turbo_clock/trim")
    async def trim(_):
        host_memory.trim()
        return web.json_response({"now": now(), "mappings": host_memory.mappings()})

    @server.routes.post("/turbo_clock/busy_link")
    async def keep_busy(request):
        ahead = (await request.json())["ahead"]
        return web.json_response(await asyncio.to_thread(keep_link_busy, ahead))
