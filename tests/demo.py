"""Makes videos in a real ComfyUI server: what `make demo` runs inside .venv.

    python tests/demo.py [--picture FILE]
    python tests/demo.py [--checkpoint FILE] [--high FILE --low FILE [--image FILE]]

Without checkpoints it shows the toy of tests/data/toy, models that turbo_core/train.py trained on a
world of coloured shapes, from text and from a picture. Of each video an analytic reader says what
it shows, and the demo fails where that is not what the prompt said. --picture keeps the videos that
do as one animated picture. With checkpoints it makes the video that they are for: --checkpoint from
text, --high and --low, the two experts, from a picture.
"""

import argparse
import json
import logging
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "support"))

import comfyui_install  # noqa: E402
import tiny_models  # noqa: E402
import toy_assets  # noqa: E402
import toy_videos  # noqa: E402
from comfyui_server import (  # noqa: E402
    ComfyServer,
    RejectedError,
    ServerError,
    combo_options,
    node_inputs,
)
from video import play  # noqa: E402

WORKFLOWS = ROOT / "tests" / "host" / "workflows"
BASE = ROOT / ".demo" / "server"
# What the toy is asked for; the rest of each workflow is in its file. ComfyUI 0.33 and 0.3.75 give
# other videos: of these the reader sees what was asked in both.
PROMPTS = {
    "t2v": (
        "a big yellow triangle in the centre grows fast on navy",
        "a big cyan square in the east moves left fast on black",
    ),
    "i2v": ("a big red circle grows fast on white",),
}
TOY_VIDEO = (toy_videos.FRAMES, toy_videos.PIXELS, toy_videos.PIXELS)
# What makes a workflow of the toy's one of real models: prompt, frames, width and height, settings.
REAL_PROMPTS = {
    "t2v": "a red panda drums on a rooftop while snow falls over a city at night",
    "i2v": "the picture comes to life, and the camera pushes in slowly",
}
REAL_VIDEO = {"t2v": (81, 832, 480), "i2v": (81, 1280, 720)}
REAL_SETTINGS = {
    "t2v": {"EmptyHunyuanLatentVideo": {"width": 832, "height": 480, "length": 81}},
    "i2v": {
        "WanAdaptiveResolution": {"resolution": "720p", "aspect_ratio": "16:9"},
        "WanVideoLength": {"seconds": 5.0},
        "rCMSampler": {"mode": "ode"},
    },
}
TEXT_ENCODER = "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
VAE = "wan_2.1_vae.safetensors"

log = logging.getLogger("demo")


def main() -> int:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    chosen, image, picture = arguments()
    comfyui = comfyui_install.find()
    if comfyui is None:
        raise FileNotFoundError("no ComfyUI found: run `make demo`, or set COMFYUI_DIR")
    put_picture(image if "i2v" in chosen else None, real="i2v" in chosen)
    if not chosen:
        for name in PROMPTS:
            toy_assets.unpack(name, BASE / "models")
    log.info("starting ComfyUI from %s", comfyui)
    with ComfyServer(comfyui, BASE, model_folders(comfyui, chosen)) as server:
        log.info("device: %s", server.get("/system_stats")["devices"][0]["name"])
        return show_real(server, chosen) if chosen else show_toys(server, picture)


def show_real(server: ComfyServer, chosen: dict[str, list[Path]]) -> int:
    """The videos of the given checkpoints; 0, or 1 if one was not made."""
    failed = 0
    for name, checkpoints in chosen.items():
        log.info("%s:", name)
        workflow = real_workflow(server, name, checkpoints)
        failed |= video_of(server, workflow, REAL_VIDEO[name]) is None
    return failed


def show_toys(server: ComfyServer, picture: Path | None) -> int:
    """The toy's videos, each read; 0, or 1 if one was not made or shows something else."""
    failed, agreed = 0, {}
    for name, prompts in PROMPTS.items():
        for prompt in prompts:
            log.info("%s: %s", name, prompt)
            file = video_of(server, toy_workflow(name, prompt), TOY_VIDEO)
            if file is None:
                failed = 1
                continue
            video = toy_videos.frames(file)
            if agrees(prompt, video):
                agreed[prompt] = video
            else:
                failed = 1
    if picture is not None and agreed:
        toy_videos.write_picture(picture, agreed)
        log.info("picture: %s", picture)
    return failed


def agrees(prompt: str, video) -> bool:
    """Whether the reader sees in `video` what `prompt` said; it is told either way."""
    reading = toy_videos.seen(video)
    log.info("the reader saw: %s", toy_videos.in_words(reading))
    wrong = toy_videos.wrong(prompt, reading)
    if wrong:
        log.error("that is not what the prompt said: %s", "; ".join(wrong))
    return not wrong


def arguments() -> tuple[dict[str, list[Path]], Path | None, Path | None]:
    """The checkpoints of each workflow that real ones are given for, and the two pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="a TurboDiffusion text-to-video file")
    parser.add_argument("--high", type=Path, help="the high-noise expert for image to video")
    parser.add_argument("--low", type=Path, help="the low-noise expert")
    parser.add_argument("--image", type=Path, help="the picture to animate")
    parser.add_argument(
        "--picture", type=Path, help="a .webp to write the toy's videos to, animated"
    )
    given = parser.parse_args()
    if given.picture and (given.checkpoint or given.high):
        parser.error("--picture is of the toy's videos: leave the checkpoints out")
    if given.picture and (given.picture.suffix != ".webp" or not given.picture.parent.is_dir()):
        parser.error(f"--picture is a .webp in a folder that is there, got {given.picture}")
    if (given.high is None) != (given.low is None):
        parser.error("image to video needs both experts, got one of --high and --low")
    for file in filter(None, (given.checkpoint, given.high, given.low, given.image)):
        if not file.is_file():
            raise FileNotFoundError(f"no file at {file}")
    files = {"t2v": [given.checkpoint], "i2v": [given.high, given.low]}
    return {name: paths for name, paths in files.items() if all(paths)}, given.image, given.picture


def put_picture(image: Path | None, real: bool) -> None:
    """The picture for image to video into the server's input folder.

    It is `image`, a drawn one for real models without it, or for the toy how its video begins.
    """
    path = BASE / "input" / node_inputs(workflow_file("i2v"), "LoadImage")["image"]
    if image is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(image, path)
    elif real:
        tiny_models.write_picture(path)
    else:
        toy_videos.write_first_frame(PROMPTS["i2v"][0], path)


def workflow_file(name: str) -> dict:
    return json.loads((WORKFLOWS / f"{name}_api.json").read_text(encoding="utf-8"))


def toy_workflow(name: str, prompt: str) -> dict:
    """The workflow for `prompt`, with the toy's files and its top-k."""
    workflow = workflow_file(name)
    node_inputs(workflow, "TurboTestTextEncode")["text"] = prompt
    node_inputs(workflow, "VAELoader")["vae_name"] = toy_assets.PLACES["vae"].name
    for loader, file in zip(loaders(workflow), toy_assets.CHECKPOINTS[name], strict=True):
        loader["checkpoint"] = toy_assets.PLACES[file].name
    choose_topk(workflow, toy_assets.TOPK[name])
    return workflow


def choose_topk(workflow: dict, topk: float) -> None:
    """Have every model attend to a share `topk` of the key blocks: by the workflow's patch nodes,
    or by one behind each loader."""
    if not any(n["class_type"] == "SLAAttentionPatch" for n in workflow.values()):
        for number in [k for k, n in workflow.items() if n["class_type"] == "TurboLoader"]:
            insert_patch(workflow, number)
    for entry in workflow.values():
        if entry["class_type"] == "SLAAttentionPatch":
            entry["inputs"]["topk"] = topk


def insert_patch(workflow: dict, loader: str) -> None:
    """An SLAAttentionPatch between a loader and all that takes its MODEL."""
    patch = f"{loader} patched"
    for entry in workflow.values():
        for name, value in entry["inputs"].items():
            if value == [loader, 0]:
                entry["inputs"][name] = [patch, 0]
    settings = node_inputs(workflow_file("t2v"), "SLAAttentionPatch")
    workflow[patch] = node("SLAAttentionPatch", **settings | {"model": [loader, 0]})


def loaders(workflow: dict) -> list[dict]:
    """The inputs of each TurboLoader, the high-noise expert's first."""
    return [n["inputs"] for n in workflow.values() if n["class_type"] == "TurboLoader"]


def model_folders(comfyui: Path, chosen: dict[str, list[Path]]) -> dict[str, list[Path]]:
    """Where a server with real checkpoints looks for models, besides the demo's own folder."""
    if not chosen:
        return {}
    models = comfyui / "models"
    files = [file for paths in chosen.values() for file in paths]
    return {
        "diffusion_models": list(dict.fromkeys(file.resolve().parent for file in files)),
        "vae": [models / "vae"],
        "text_encoders": [models / "text_encoders", models / "clip"],
    }


def real_workflow(server: ComfyServer, name: str, checkpoints: list[Path]) -> dict:
    """The demo workflow at full size, with ComfyUI's own umT5 text encoder and Wan VAE."""
    workflow = workflow_file(name)
    (encoder,) = (k for k, v in workflow.items() if v["class_type"] == "TurboTestTextEncode")
    clip_name = find_model(server, "CLIPLoader", "clip_name", r"umt5.*xxl", TEXT_ENCODER)
    vae_name = find_model(server, "VAELoader", "vae_name", r"wan.?2.1.vae", VAE)
    workflow[encoder] = node("CLIPTextEncode", text=REAL_PROMPTS[name], clip=["clip", 0])
    workflow["clip"] = node("CLIPLoader", clip_name=clip_name, type="wan")
    node_inputs(workflow, "VAELoader")["vae_name"] = vae_name
    for loader, checkpoint in zip(loaders(workflow), checkpoints, strict=True):
        loader["checkpoint"] = checkpoint.name
    for settings in workflow.values():
        settings["inputs"] |= REAL_SETTINGS[name].get(settings["class_type"], {})
    return workflow


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def find_model(server: ComfyServer, loader: str, name: str, pattern: str, example: str) -> str:
    """The first file in that loader's list whose name matches `pattern`, as `example` does."""
    files = combo_options(server.object_info(loader)[loader], name)
    found = next((file for file in files if re.search(pattern, file, re.IGNORECASE)), None)
    if found is None:
        raise FileNotFoundError(
            f"a real checkpoint needs {example} or the like in ComfyUI's models folder, got {files}"
        )
    return found


def progress_logger(workflow: dict) -> Callable[[str, dict], None]:
    """Tells each node as it starts and each sampling step as it ends."""

    def show(kind: str, data: dict) -> None:
        if not data.get("node"):
            return
        name = workflow[data["node"]]["class_type"]
        if kind == "executing":
            log.info("  %s", name)
        elif kind == "progress" and name == "SamplerCustomAdvanced":
            log.info("    step %s of %s", data["value"], data["max"])

    return show


def video_of(server: ComfyServer, workflow: dict, wanted: tuple[int, int, int]) -> Path | None:
    """The video that `workflow` makes, None if it makes none of `wanted` frames, width, height."""
    run = server.run(workflow, progress_logger(workflow))
    if run.outcome != "execution_success":
        log.error("%s: %s\nserver log: %s", run.outcome, run.message, server.log_file)
        return None
    told = [line for line in server.log_text().splitlines() if "forward passes" in line]
    log.info("%s", told[-1])
    (video,) = run.files
    found = play(video)
    if found != wanted:
        log.error("the video has %d frames of %dx%d, asked for %d of %dx%d", *found, *wanted)
        return None
    log.info("%d frames of %dx%d in %.1f seconds", *found, run.seconds)
    log.info("video: %s", video)
    return video


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except (FileNotFoundError, ServerError, RejectedError) as error:
        raise SystemExit(f"no video: {error}") from None
