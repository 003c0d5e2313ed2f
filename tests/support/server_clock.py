"""Reads turbo_test_nodes' clock in a running server, and makes of its readings a video's parts."""

import itertools
import time
from typing import NamedTuple

from clock_workflows import PARTS
from comfyui_server import ComfyServer

CLOCK = "/turbo_clock"
FREED_SECONDS = 30


class Part(NamedTuple):
    """Of one video: how long it took, and the most memory that was taken in it, in bytes.

    peak: of tensors on the GPU; reserved: by torch there; card: by everybody; resident: by the
    server's process in the host's memory; mapped: files of these; pinned: by the host's loader.
    """

    seconds: float = 0.0
    peak: int = 0
    reserved: int = 0
    card: int = 0
    resident: int = 0
    mapped: int = 0
    pinned: int = 0

    def joined(self, other: "Part") -> "Part":
        """One after the other."""
        most = map(max, self[1:], other[1:])
        return Part(self.seconds + other.seconds, *most)


def readings(server: ComfyServer) -> list[dict]:
    """Those of the last prompt."""
    return server.get(CLOCK)["run"]


def now(server: ComfyServer) -> dict[str, int]:
    """What the server's process takes now, in bytes."""
    return server.get(CLOCK)["now"]


def run_short(server: ComfyServer, node: str, value: int, operations: int, room: int) -> None:
    """Let memory run out in the next prompt, see Shortage in turbo_test_nodes/clock.py."""
    where = {"node": node, "value": value, "operations": operations, "room": room}
    server.post(CLOCK, where)


def keep_link_busy(server: ComfyServer, ahead: int, timeout: float = 20) -> dict[str, float]:
    """Have a thread of the server copy to the GPU, so many copies ahead; none of 0.

    Bytes per second of others' copies: "alone", and what is "left" of it, and of its "other" own.
    """
    return server.post(f"{CLOCK}/busy_link", {"ahead": ahead}, timeout=timeout)


def busy_bytes(told: list[dict], prompt: dict) -> float:
    """Bytes per second that this thread has copied from the sampler's start to the latents."""
    start = next(r for r in told if _class_part(r, prompt) == "sampler")
    end = _ends(told, prompt, "sampler")[-1]
    return (end["copied"] - start["copied"]) / (end["seconds"] - start["seconds"])


def emptied(server: ComfyServer, forget: bool = True) -> dict[str, int]:
    """What is taken once the server has given up its models and, to `forget`, its cache.

    It is asked again and again: while the host gives something up it hears nothing, and would do
    it again after the next prompt, in the midst of what is measured.
    """
    deadline, before, after = time.monotonic() + FREED_SECONDS, None, now(server)
    while time.monotonic() < deadline and not _same(before, after):
        for _ in range(2):
            server.post("/free", {"unload_models": True, "free_memory": forget})
            time.sleep(0.3)
        before, after = after, now(server)
    return after


def held(server: ComfyServer) -> tuple[dict[str, int], dict[str, int]]:
    """What is taken once the server is emptied and its C library has given back what it had free,
    which is "kept" here: the next prompt would have taken that again. And by mapping."""
    before, after = emptied(server), server.post(f"{CLOCK}/trim", {})
    now = after["now"]
    return now | {"kept": before["resident"] - now["resident"]}, after["mappings"]


def _same(before: dict | None, after: dict) -> bool:
    if before is None or after["unheard"]:
        return False
    return all(abs(before[name] - after[name]) < 1 << 20 for name in ("tensors", "resident"))


def parts(told: list[dict], prompt: dict) -> dict[str, Part]:
    """A video's parts, in the order in which they began.

    "to the GPU" is when the host brought models there; of the second expert it is "switch". Steps
    are those of the GPU's own clock. "start to latents", "start to pixels" and "whole" sum up.
    """
    found, steps = {}, 0
    for start, end in itertools.pairwise(told):
        name, steps = _part(start, prompt, steps)
        loading = min(end["loading"] - start["loading"], end["seconds"] - start["seconds"])
        memory = [end.get(field, 0) for field in Part._fields[1:]]
        _join(found, name, end["seconds"] - start["seconds"] - loading, memory)
        if loading:
            moved = "switch" if steps > 1 and name == f"step {steps}" else "to the GPU"
            _join(found, moved, loading, memory)
    start = min(r["seconds"] for r in told if _class_part(r, prompt) == "sampler")
    latents, pixels = (
        max(r["seconds"] for r in _ends(told, prompt, part)) for part in ("sampler", "decode")
    )
    return found | {
        "start to latents": Part(latents - start),
        "start to pixels": Part(pixels - start),
        "whole": Part(told[-1]["seconds"]),
    }


def _part(reading: dict, prompt: dict, steps: int) -> tuple[str, int]:
    """What goes on after a reading, and how many steps have begun by then."""
    part = _class_part(reading, prompt)
    if part != "sampler":
        return part, steps
    if reading["event"] == "executing":
        return f"step {steps + 1}", steps + 1
    if reading["value"] == reading["max"]:
        return "after the steps", steps
    return f"step {steps + 1}", steps + 1


def _class_part(reading: dict, prompt: dict) -> str:
    node = prompt.get(reading["node"])
    return PARTS.get(node["class_type"], "rest") if node else "rest"


def _ends(told: list[dict], prompt: dict, part: str) -> list[dict]:
    pairs = itertools.pairwise(told)
    return [after for before, after in pairs if _class_part(before, prompt) == part]


def _join(found: dict[str, Part], name: str, seconds: float, memory: list[int]) -> None:
    found[name] = found.get(name, Part()).joined(Part(seconds, *memory))
