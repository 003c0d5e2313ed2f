"""From the prompt to the video's file, in a real ComfyUI server: where time and memory go.

    COMFYUI_DIR=/path/ComfyUI python tests/benchmarks/whole_clock.py --models 1.3B-480P 14B-480P
    ... whole_clock.py --models A14B-I2V-720P --ways ours --free 0 12 6    as on smaller cards
    ... whole_clock.py --models A14B-I2V-720P --ways ours --free 12 --busy-link 12
    ... whole_clock.py --models 14B-480P --ways ours --vae both --text umt5 --from-disk
    ... whole_clock.py --models 14B-480P --ways ours --card 8.9    as on an older card
    ... whole_clock.py --told A.json B.json    one table of what --json wrote, no server

Random models of real size are written as files, and each way has a server of its own: our loader,
a stock model with our nodes, and ComfyUI alone, with as many steps and no CFG. The first run brings
the models up and compiles what is not in the caches of kernels; the others, of other seeds, find
them there, and their medians count. Between models the server gives up what it holds, and between
sizes of the card what it holds on the GPU. The same seeds run at each size, and their latents' bits
are told by a hash. Written just before, the files are in the page cache, but for --from-disk. Linux
only.

Everything is read in the server itself, where ComfyUI tells its client how far it is, see
tests/support/turbo_test_nodes/clock.py. Steps end when the GPU has done them.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))

import comfyui_install
import older_cards
import pack  # noqa: F401
import random_models
import server_clock
import tiny_models
from clock_workflows import PICTURE, TEXTS, WAYS, Video
from comfyui_server import ComfyServer
from server_clock import Part
from turbodiffusion_pack.turbo_core import forward_time
from video import play

TINY = "tiny"
MODELS = {TINY: forward_time.Shape(256, 512, 2, 16, 64, 64, 5), **forward_time.MODELS}
VAES = "turbo", "stock", "both"
GB = 1e9
# Holds what is to be no part of the card: all but as many GB as a line says, 0 for nothing.
HOLD = """
import sys, torch
free, held = torch.cuda.mem_get_info()[0], None
for line in sys.stdin:
    held = None
    torch.cuda.empty_cache()
    if left := float(line):
        held = torch.empty(int(free - left * 1e9), dtype=torch.uint8, device="cuda")
    print("done", flush=True)
"""


def measure(server: ComfyServer, video: Video, way: str, turbo_vae: bool, options) -> dict:
    """One way of making one video: the first run and the medians of the others, by part."""
    start, runs, bits, copied = len(server.log_text()), [], [], []
    for seed in range(1 + options.runs):
        prompt = video.prompt(way, seed, turbo_vae)
        run = server.run(prompt)
        if run.outcome != "execution_success":
            return {"failed": run.message or run.outcome, "log": told_since(server, start)}
        if "sampler" in run.cached:
            raise SystemExit("ComfyUI has kept these latents: add --server=--cache-classic")
        bits += run.outputs["bits"]["bits"]
        readings = server_clock.readings(server)
        runs.append(server_clock.parts(readings, prompt))
        copied.append(server_clock.busy_bytes(readings, prompt))
        if seed == 0 and video.file_too:
            check(run.files, video)
        if runs[0]["whole"].seconds > options.longest or time.monotonic() > options.deadline:
            break
    found = {"first": runs[0], "warm": warm(runs[1:]), "runs": len(runs) - 1}
    return found | {"bits": bits, "log": told_since(server, start), "copied": copied}


def told_since(server: ComfyServer, start: int) -> list[str]:
    """The pack's last line on what ran in a log from `start` on."""
    return re.findall(r"TurboDiffusion: .*passes?;.*", server.log_text()[start:])[-1:]


def measured(server: ComfyServer, *of, ahead: int) -> dict:
    """The same while a thread of the server copies to the GPU, so many copies ahead, unless 0."""
    if not ahead:
        return measure(server, *of)
    try:
        link = server_clock.keep_link_busy(server, ahead)
        say(f"  {link}")
        return measure(server, *of) | {"link": link}
    except TimeoutError as error:
        return {"failed": f"{error!r}\n{server.log_tail()}"}
    finally:
        with contextlib.suppress(TimeoutError):
            server_clock.keep_link_busy(server, 0)


def check(files: list[Path], video: Video) -> None:
    (file,) = (file for file in files if file.suffix == ".mp4")
    made, wanted = play(file), (video.shape.frames, video.shape.width, video.shape.height)
    if made != wanted:
        raise SystemExit(f"a video of frames, width, height {made} for {wanted}")


def warm(runs: list[dict[str, Part]]) -> dict[str, Part]:
    """Of each part the median of its seconds and the most of its memory; empty of no runs."""
    names = dict.fromkeys(name for run in runs for name in run)
    parts = {}
    for name in names:
        same = [run.get(name, Part()) for run in runs]
        memory = (max(values) for values in zip(*(part[1:] for part in same), strict=True))
        parts[name] = Part(statistics.median(part.seconds for part in same), *memory)
    return parts


def show(title: str, result: dict) -> None:
    """A line for each part: seconds at first and warm, and the memory of warm runs."""
    say(title)
    if "failed" in result:
        say(f"  failed: {result['failed'][:300]}")
        for line in result.get("log", ()):
            say(f"  {line}")
        return
    first, later = result["first"], result["warm"]
    say(f"  {'':16}    first     warm | GB of tensors  torch's  card | host  mapped  pinned")
    for name in dict.fromkeys((*first, *later)):
        times = [
            f"{parts[name].seconds:8.3f}" if name in parts else 8 * " " for parts in (first, later)
        ]
        told = [f"{value / GB:6.2f}" for value in (later.get(name) or first[name])[1:]]
        memory = f" | {'  '.join(told[:3])} | {'  '.join(told[3:])}" if any(told) else ""
        say(f"  {name:16} {' '.join(times)}{memory}")
    say(f"  bits of the latents: {' '.join(result['bits'])}")
    if result.get("link"):
        say(f"  {in_words(result)}")
    for line in result["log"]:
        say(f"  {line}")


def summary(results: list[dict]) -> None:
    """A line for each way of each video, in groups by the ComfyUI that made them."""
    names = "to latents  decode  to pixels  whole, warm   first"
    names += " | GB on GPU in decode      card      host | bits"
    host = None
    for result in results:
        if result["host"] != host:
            host = result["host"]
            say(f"{host:48} {names}")
        say(f"{result['title']:48} {'failed' if 'failed' in result else in_numbers(result)}")


def in_numbers(result: dict) -> str:
    """Seconds and GB of the warm runs, or of the first one where there are no others."""
    first, told = result["first"], result["warm"] or result["first"]
    parts = [told[name] for name in ("start to latents", "decode", "start to pixels", "whole")]
    times = zip([*parts, first["whole"]], (10, 7, 10, 12, 7), strict=True)
    seconds = " ".join(f"{part.seconds:{width}.2f}" for part, width in times)
    most = Part(*(max(values) for values in zip(*told.values(), strict=True)))
    memory = most.peak, told["decode"].peak, most.card, most.resident
    taken = " ".join(f"{value / GB:9.2f}" for value in memory)
    how = "" if result["warm"] else " (all of the first run)"
    how += f"; {in_words(result)}" if result.get("link") else ""
    return f"{seconds} | {taken} | {' '.join(result['bits'])}{how}"


def in_words(result: dict) -> str:
    """How busy the link was."""
    copied = [f"{value / GB:.1f}" for value in result["copied"]]
    alone, left, other = (result["link"][name] / GB for name in ("alone", "left", "other"))
    told = f"busy link: {left:.1f} of {alone:.1f} GB/s left, the other thread copied {other:.1f} by"
    return f"{told} itself and {', '.join(copied)} GB/s from start to latents"


def cards(options) -> Iterator[tuple[float, int]]:
    """GB of the card, and copies ahead on the link, 0 where nothing keeps it busy."""
    for free in options.free:
        yield free, 0
        for ahead in options.ahead if free in options.busy_link else ():
            yield free, ahead


@contextlib.contextmanager
def small_card() -> Iterator[Callable[[float], None]]:
    """A function that leaves so many GB of the GPU to others than a process that holds the rest.

    0 leaves all. It counts what others hold already as theirs.
    """
    command = [sys.executable, "-c", HOLD]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as holder:

        def leave(gigabytes: float) -> None:
            holder.stdin.write(f"{gigabytes}\n")
            holder.stdin.flush()
            if not holder.stdout.readline():
                raise SystemExit(f"the GPU has no memory to hold so that {gigabytes} GB are left")

        try:
            leave(0)  # it is up, and knows the whole card
            yield leave
        finally:
            holder.stdin.close()


def nobody_holds(gigabytes: float) -> None:
    """In the place of what `small_card` gives, where the whole card is free."""


def drop_from_page_cache(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def vaes(server: ComfyServer, way: str, wanted: str) -> list[bool]:
    """Whether TurboVAE decodes, for each video of this way."""
    if way == "stock" or wanted == "stock":
        return [False]
    if "TurboVAE" not in server.object_info():
        say("this pack has no TurboVAE: ComfyUI's own VAE decodes")
        return [False]
    return [True, False] if wanted == "both" else [True]


def run_way(comfyui: Path, base: Path, models: Path, way: str, options, leave) -> Iterator[dict]:
    """All videos in one server, at each size of the card."""
    folders = {name: [models / name] for name in ("diffusion_models", "vae", "text_encoders")}
    start = time.monotonic()
    tiny_models.write_picture(base / "input" / PICTURE)
    extra = tuple(shlex.split(options.server))
    with ComfyServer(comfyui, base, folders, options=extra, card=options.card) as server:
        played = f", our kernels as on a card of {options.card}" if options.card else ""
        say(f"server up in {time.monotonic() - start:.1f} s{played}")
        host = f"ComfyUI {server.get('/system_stats')['system']['comfyui_version']}"
        for model in options.models:
            video = Video(MODELS[model], options.steps, options.text, not options.no_file)
            for turbo_vae in vaes(server, way, options.vae):
                for free, ahead in cards(options):
                    title = f"{model}, {way}, {'TurboVAE' if turbo_vae else 'its own VAE'}"
                    title += f", {free:g} GB" * bool(free)
                    title += f", link busy by {ahead}" * bool(ahead)
                    if time.monotonic() > options.deadline:
                        say(f"{title}: no time left")
                        continue
                    leave(free)
                    result = measured(server, video, way, turbo_vae, options, ahead=ahead)
                    show(title, result)
                    yield {"host": f"{host} {options.server}", "title": title, **result}
                    server_clock.emptied(server, forget=False)
                server_clock.emptied(server)


def write_models(comfyui: Path, models: Path, options) -> None:
    start, jobs = time.monotonic(), []
    for model in options.models:
        jobs += Video(MODELS[model], options.steps, options.text).jobs(options.ways)
    random_models.write_missing(comfyui, models, list({job[1]: job for job in jobs}.values()))
    size = sum(path.stat().st_size for path in models.rglob("*.safetensors"))
    say(f"models: {size / GB:.1f} GB in {time.monotonic() - start:.0f} s")
    if options.from_disk:
        drop_from_page_cache(models)


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["1.3B-480P", "14B-480P"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3, help="warm ones")
    parser.add_argument("--vae", choices=VAES, default="turbo", help="of the ways that are ours")
    parser.add_argument("--text", choices=TEXTS, default="noise", help="umt5: as large as umT5-XXL")
    parser.add_argument(
        "--free",
        nargs="+",
        type=float,
        default=[0.0],
        help="GB of the GPU that are left to the server, one size after the other; 0: all",
    )
    parser.add_argument(
        "--busy-link",
        nargs="+",
        type=float,
        default=[],
        help="those of --free that come once more, while a thread of the server copies to the GPU",
    )
    parser.add_argument(
        "--ahead", nargs="+", type=int, default=[2], help="its copies of 64 MiB that are queued"
    )
    parser.add_argument("--no-file", action="store_true", help="up to the pixels only")
    parser.add_argument("--from-disk", action="store_true", help="files out of the page cache")
    parser.add_argument("--server", default="", help="further options of ComfyUI's main.py")
    parser.add_argument("--folder", type=Path, help="for the models, which are kept there")
    parser.add_argument("--longest", type=float, default=60, help="no warm runs above, seconds")
    parser.add_argument("--seconds", type=float, default=1e6, help="begin nothing after these")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--told", nargs="+", type=Path, help="only one table of such files")
    options = older_cards.parse_for_a_server(parser, arguments)
    if left_out := set(options.busy_link) - set(options.free):
        parser.error(f"--busy-link takes sizes of --free, and {sorted(left_out)} are none")
    options.deadline = time.monotonic() + options.seconds
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    if options.told:
        summary([result for file in options.told for result in read(file)])
        return
    comfyui = comfyui_install.find()
    if comfyui is None:
        raise SystemExit("no ComfyUI found: set COMFYUI_DIR to a ComfyUI folder")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        models = options.folder or Path(folder, "models")
        write_models(comfyui, models, options)
        with contextlib.ExitStack() as stack:
            leave = stack.enter_context(small_card()) if any(options.free) else nobody_holds
            for way in options.ways:
                base = Path(folder, way.replace(" ", ""))
                for result in run_way(comfyui, base, models, way, options, leave):
                    results.append(result)
                    if options.json:
                        write(options.json, results)
    summary(results)


def write(file: Path, results: list[dict]) -> None:
    told = [with_parts(result, Part._asdict) for result in results]
    file.write_text(json.dumps(told, indent=1))


def read(file: Path) -> list[dict]:
    return [
        with_parts(result, lambda part: Part(**part)) for result in json.loads(file.read_text())
    ]


def with_parts(result: dict, change: Callable) -> dict:
    """The result with each of its parts changed."""
    runs = {name: result[name] for name in ("first", "warm") if name in result}
    runs = {name: {k: change(part) for k, part in parts.items()} for name, parts in runs.items()}
    return {**result, **runs}


if __name__ == "__main__":
    main()
