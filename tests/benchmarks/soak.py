"""Does a ComfyUI server give back its memory: after many videos, and after it ran out of it?

    COMFYUI_DIR=/path/ComfyUI python tests/benchmarks/soak.py
    ... soak.py --model tiny --runs 30      without a GPU, where running out is pretended
    ... soak.py --card 8.9                  as on an older card

- `runs` videos in a row of random models (text to video, an expert pair, a stock model made INT8),
  LoRAs, sizes and lengths, some cancelled at a random time. One of each has come before, so that
  every kernel is compiled and every library is in. Afterwards, models and cache given up, nothing
  may be larger by more than 64 MB: on the GPU what tensors take, what torch has and what is gone of
  the card; on the host the process without files, what is pinned and all of Python's tensors. What
  the C library only keeps, as it does of small pieces, is told apart; and if the process is larger,
  which of its mappings are.
- Memory that runs out in the middle of a step, at the switch of experts and in the decoder: the run
  must end in one error that says so, the next one must make the frames that it made before, and
  nothing may stay. On a GPU torch is refused what it has not got at that moment.

Ends with 1 where something does not hold.
"""

import argparse
import random
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))

import comfyui_install
import older_cards
import pack  # noqa: F401
import random_models
import server_clock
import tiny_models
from clock_workflows import PICTURE, Video, node
from comfyui_server import ComfyServer, Run
from PIL import Image
from turbodiffusion_pack.turbo_core.forward_time import MODELS, Shape

MB = 1 << 20
MOST = 64 * MB  # that may be left of a row of videos
ROOM = 20_000  # largest tensor, in bytes, where running out is pretended: more than tiny latents
MAPPINGS = 8  # of those that grew, that are told
CANCELLED = 0.3  # the share of the videos that somebody cancels
TINY = Shape(256, 512, 2, 16, 64, 64, 5)
SIZES = {  # width, height and frames of the videos
    "1.3B": ((832, 480, 33), (480, 832, 17), (640, 640, 49)),
    "tiny": ((64, 64, 5), (96, 64, 9), (64, 128, 5)),
}
LORA = "soak_lora.safetensors"


class Place(NamedTuple):
    """Where memory runs out: a node, how far it has come, and after how many operations more."""

    node: str
    value: int
    operations: int


PLACES = {
    "in the middle of a step": Place("sampler", 1, 150),
    "at the switch of experts": Place("sampler", 2, 100),  # the sampler's own are a dozen
    "in the decoder": Place("images", 0, 150),
}


class Soak:
    """The videos of one size of model."""

    def __init__(self, model: str, steps: int = 4):
        shape = TINY if model == "tiny" else MODELS["1.3B-480P"]
        self.sizes, self.steps, self.layers = SIZES[model], steps, shape.num_layers
        self.dim = shape.dim
        self.text_to_video = shape
        self.experts = shape._replace(in_channels=36)

    def jobs(self) -> list[tuple]:
        """The files, for random_models.write_missing."""
        jobs = Video(self.text_to_video, self.steps).jobs(["ours", "stock"])
        jobs += Video(self.experts, self.steps).jobs(["ours"])
        sizes = {"rank": 32, "layers": self.layers, "dim": self.dim}
        jobs.append(("loras", LORA, "lora", sizes))
        return list({job[1]: job for job in jobs}.values())

    def kinds(self) -> list[tuple[Shape, str]]:
        return [
            (self.text_to_video, "ours"),
            (self.text_to_video, "stock + pack"),
            (self.experts, "ours"),
        ]

    def prompt(self, kind: tuple[Shape, str], size: tuple, seed: int, lora: bool, vae: bool):
        shape, way = kind
        width, height, frames = size
        shape = shape._replace(width=width, height=height, frames=frames)
        prompt = Video(shape, self.steps).prompt(way, seed, vae)
        return with_lora(prompt) if lora else prompt


def with_lora(prompt: dict) -> dict:
    """The prompt with a LoRA behind each loader of a model."""
    loaders = [k for k, n in prompt.items() if n["class_type"] in ("TurboLoader", "UNETLoader")]
    for name in loaders:
        lora = node("LoraLoaderModelOnly", model=[name, 0], lora_name=LORA, strength_model=0.5)
        for other in prompt.values():
            links = {k: v for k, v in other["inputs"].items() if v == [name, 0]}
            other["inputs"] |= {key: [f"{name}_lora", 0] for key in links}
        prompt[f"{name}_lora"] = lora
    return prompt


def grown(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """Bytes by which each kind of memory has grown, but for mapped files and what is only kept."""
    left_out = "mapped", "peak", "unheard", "kept"
    before, after = (
        {**taken, "resident": taken["resident"] - taken["mapped"]} for taken in (before, after)
    )
    return {name: after[name] - before[name] for name in after if name not in left_out}


def larger(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """The mappings that have grown by a MB or more, with how much, those that grew most first."""
    grew = {name: after[name] - before.get(name, 0) for name in after}
    most = sorted(grew, key=grew.get, reverse=True)[:MAPPINGS]
    return {name: grew[name] for name in most if grew[name] >= MB}


def in_words(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size / MB:+.1f}" for name, size in sizes.items()) + " MB"


def soak(server: ComfyServer, videos: Soak, runs: int, seed: int, vae: bool) -> bool:
    """A row of videos; whether memory is as it was before."""
    rng, start = random.Random(seed), time.monotonic()
    for kind in videos.kinds():
        for size in videos.sizes:
            lora = size is videos.sizes[-1]  # what it compiles does not go by the size
            made(server, videos.prompt(kind, size, 0, lora, vae))
            say(f"{time.monotonic() - start:5.0f} s, first of its kind: {title(kind, size, lora)}")
    before, mappings = server_clock.held(server)
    start, outcomes = time.monotonic(), []
    for number in range(runs):
        kind, size, lora = rng.choice(videos.kinds()), rng.choice(videos.sizes), rng.random() < 0.5
        prompt = videos.prompt(kind, size, 1 + number, lora, vae)
        cancel = canceller(server, rng) if rng.random() < CANCELLED else None
        outcomes.append(server.run(prompt, cancel).outcome)
        told = f"{title(kind, size, lora)}{', to be cancelled' * bool(cancel)}: {outcomes[-1]}"
        say(f"{time.monotonic() - start:5.0f} s, {told}")
    after, mappings_after = server_clock.held(server)
    told = ", ".join(f"{outcomes.count(o)} {o}" for o in sorted(set(outcomes)))
    say(f"{runs} videos in {time.monotonic() - start:.0f} s: {told}")
    more = grown(before, after)
    kept = [f"{taken['kept'] / MB:.1f}" for taken in (before, after)]
    say(f"memory: {in_words(more)}; only kept before and after: {', '.join(kept)} MB")
    if more["resident"] > MOST:
        say(f"larger: {in_words(larger(mappings, mappings_after))}")
    return "execution_error" not in outcomes and max(more.values()) <= MOST


def title(kind: tuple[Shape, str], size: tuple, lora: bool) -> str:
    shape, way = kind
    experts = ", two experts" * (shape.in_channels > 16)
    return f"{way}{experts}, {'x'.join(map(str, size))}{', LoRA' * lora}"


def canceller(server: ComfyServer, rng: random.Random) -> Callable[[str, dict], None]:
    """What cancels a run at one of its messages."""
    left = rng.randrange(4, 30)

    def hear(kind: str, data: dict) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            server.interrupt()

    return hear


def out_of_memory(server: ComfyServer, prompt: dict, place: Place) -> list[str]:
    """Let memory run out in `prompt`; what is wrong about how it ends."""
    told, start, wrong = [], len(server.log_text()), []
    server_clock.run_short(server, *place, ROOM)
    run = server.run(prompt, lambda kind, data: told.append((kind, data)))
    errors = [data for kind, data in told if kind == "execution_error"]
    readings = [r for r in server_clock.readings(server) if r["node"] == place.node]
    if len(errors) != 1 or run.outcome != "execution_error":
        return [f"it ended in {run.outcome}"]
    if not re.search("out of memory|allocation", run.message, re.IGNORECASE):
        wrong.append(f"the error says {run.message!r}")
    done = [reading["value"] for reading in readings][-1:]
    if errors[0]["node_id"] != place.node or (place.value and done != [place.value]):
        wrong.append(f"it ended in {errors[0]['node_id']} at {done}")
    if server.log_text()[start:].count("!!! Exception during processing") > 1:
        wrong.append("more than one error is in the log")
    return wrong


def with_frames(prompt: dict) -> dict:
    """The prompt with its frames saved one by one instead.

    The same frames make another video file at times: its encoder runs in many threads.
    """
    save = node("SaveImage", images=["images", 0], filename_prefix="frames")
    return {k: n for k, n in prompt.items() if k not in ("video", "file")} | {"frames": save}


def run_out(server: ComfyServer, videos: Soak, vae: bool) -> bool:
    """Memory runs out everywhere; whether all is well afterwards."""
    kind, size, well = videos.kinds()[-1], videos.sizes[0], True
    prompt, other = (with_frames(videos.prompt(kind, size, seed, False, vae)) for seed in (1, 2))
    expected = made(server, prompt)
    for name, place in PLACES.items():
        before, _ = server_clock.held(server)
        wrong = out_of_memory(server, other, place)
        if made(server, prompt) != expected:
            wrong.append("the next run made other frames")
        more = grown(before, server_clock.held(server)[0])
        wrong += [f"{kind} has grown" for kind, size in more.items() if size > MOST]
        say(f"out of memory {name}: {'; '.join(wrong) or 'well'}; {in_words(more)}")
        well = well and not wrong
    return well


def made(server: ComfyServer, prompt: dict) -> list[bytes]:
    """The frames that an honest run makes."""
    run = server.run(prompt)
    if run.outcome != "execution_success":
        raise SystemExit(f"{run.outcome}: {run.message}\n{server.log_tail()}")
    return frames(run)


def frames(run: Run) -> list[bytes]:
    pictures = (file for file in sorted(run.files) if file.suffix == ".png")
    return [Image.open(file).tobytes() for file in pictures]


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SIZES, default="1.3B")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--vae", choices=("turbo", "stock"), default="turbo")
    parser.add_argument("--server", default="", help="further options of ComfyUI's main.py")
    parser.add_argument("--folder", type=Path, help="for the models, which are kept there")
    options = older_cards.parse_for_a_server(parser)
    comfyui = comfyui_install.find()
    if comfyui is None:
        raise SystemExit("no ComfyUI found: set COMFYUI_DIR to a ComfyUI folder")
    with tempfile.TemporaryDirectory() as folder:
        base, models = Path(folder), options.folder or Path(folder, "clock_models")
        videos = Soak(options.model)
        random_models.write_missing(comfyui, models, videos.jobs())
        tiny_models.write_picture(base / "input" / PICTURE)
        folders = {name: [models / name] for name in ("diffusion_models", "vae", "loras")}
        further = tuple(shlex.split(options.server))
        with ComfyServer(comfyui, base, folders, options=further, card=options.card) as server:
            vae = options.vae == "turbo" and "TurboVAE" in server.object_info()
            say(f"decoded by {'TurboVAE' if vae else 'the host'}")
            well = [
                soak(server, videos, options.runs, options.seed, vae),
                run_out(server, videos, vae),
            ]
    sys.exit(not all(well))


if __name__ == "__main__":
    main()
