"""Makes videos in a real ComfyUI server: what `make demo` runs inside .venv.

    python tests/demo.py [--checkpoint FILE] [--high FILE --low FILE [--image FILE]]

Without checkpoints it makes tiny random models for text to video and image to video, so the videos
are noise; the path they take through ComfyUI is the real one. With checkpoints it makes the video
that they are for: --checkpoint from text, --high and --low, the two experts, from a picture.
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
from comfyui_server import (  # noqa: E402
    ComfyServer,
    RejectedError,
    Run,
    ServerError,
    combo_options,
    node_inputs,
)
from video import play  # noqa: E402

WORKFLOWS = ROOT / "tests" / "host" / "workflows"
BASE = ROOT / ".demo" / "server"
# Frames, width and height of the tiny and of the real videos.
TINY_VIDEO = {"t2v": (17, 256, 256), "i2v": (17, 336, 192)}
REAL_VIDEO = {"t2v": (81, 832, 480), "i2v": (81, 1280, 720)}
# What makes a workflow of tiny videos one of real videos.
REAL_SETTINGS = {
    "EmptyHunyuanLatentVideo": {"width": 832, "height": 480, "length": 81},
    "WanAdaptiveResolution": {"resolution": "720p"},
    "WanVideoLength": {"seconds": 5.0},
}
TEXT_ENCODER = "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
VAE = "wan_2.1_vae.safetensors"

log = logging.getLogger("demo")


def main() -> int:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    chosen, image = arguments()
    comfyui = comfyui_install.find()
    if comfyui is None:
        raise FileNotFoundError("no ComfyUI found: run `make demo`, or set COMFYUI_DIR")
    put_picture(image)
    if not chosen:
        make_tiny_models(comfyui)
    log.info("starting ComfyUI from %s", comfyui)
    failed = 0
    with ComfyServer(comfyui, BASE, model_folders(comfyui, chosen)) as server:
        log.info("device: %s", server.get("/system_stats")["devices"][0]["name"])
        for name in chosen or TINY_VIDEO:
            workflow = real_workflow(server, name, chosen[name]) if chosen else tiny_workflow(name)
            log.info("%s:", name)
            run = server.run(workflow, progress_logger(workflow))
            failed |= report(server, run, (REAL_VIDEO if chosen else TINY_VIDEO)[name])
    return failed


def arguments() -> tuple[dict[str, list[Path]], Path | None]:
    """The checkpoints of each workflow that real ones are given for, and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="a TurboDiffusion text-to-video file")
    parser.add_argument("--high", type=Path, help="the high-noise expert for image to video")
    parser.add_argument("--low", type=Path, help="the low-noise expert")
    parser.add_argument("--image", type=Path, help="the picture to animate")
    given = parser.parse_args()
    if (given.high is None) != (given.low is None):
        parser.error("image to video needs both experts, got one of --high and --low")
    for file in filter(None, vars(given).values()):
        if not file.is_file():
            raise FileNotFoundError(f"no file at {file}")
    files = {"t2v": [given.checkpoint], "i2v": [given.high, given.low]}
    return {name: paths for name, paths in files.items() if all(paths)}, given.image


def put_picture(image: Path | None) -> None:
    """The picture for image to video, `image` or a drawn one, into the server's input folder."""
    (loader,) = (n for n in tiny_workflow("i2v").values() if n["class_type"] == "LoadImage")
    path = BASE / "input" / loader["inputs"]["image"]
    tiny_models.write_picture(path)
    if image is not None:
        shutil.copyfile(image, path)


def make_tiny_models(comfyui: Path) -> None:
    log.info("no checkpoints given: making tiny random ones")
    models = BASE / "models"
    vae = node_inputs(tiny_workflow("t2v"), "VAELoader")["vae_name"]
    tiny_models.write_vae(comfyui, models / "vae" / vae)
    makers = {"t2v": tiny_models.t2v_checkpoint, "i2v": tiny_models.i2v_checkpoint}
    for name, make in makers.items():
        for seed, loader in enumerate(loaders(tiny_workflow(name))):
            path = models / "diffusion_models" / loader["checkpoint"]
            tiny_models.write_checkpoint(path, make(seed))


def tiny_workflow(name: str) -> dict:
    return json.loads((WORKFLOWS / f"{name}_api.json").read_text(encoding="utf-8"))


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
    workflow = tiny_workflow(name)
    text = node_inputs(workflow, "TurboTestTextEncode")["text"]
    (encoder,) = (k for k, v in workflow.items() if v["class_type"] == "TurboTestTextEncode")
    clip_name = find_model(server, "CLIPLoader", "clip_name", r"umt5.*xxl", TEXT_ENCODER)
    vae_name = find_model(server, "VAELoader", "vae_name", r"wan.?2.1.vae", VAE)
    workflow[encoder] = node("CLIPTextEncode", text=text, clip=["clip", 0])
    workflow["clip"] = node("CLIPLoader", clip_name=clip_name, type="wan")
    node_inputs(workflow, "VAELoader")["vae_name"] = vae_name
    for loader, checkpoint in zip(loaders(workflow), checkpoints, strict=True):
        loader["checkpoint"] = checkpoint.name
    for settings in workflow.values():
        settings["inputs"] |= REAL_SETTINGS.get(settings["class_type"], {})
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


def report(server: ComfyServer, run: Run, wanted: tuple[int, int, int]) -> int:
    if run.outcome != "execution_success":
        log.error("%s: %s\nserver log: %s", run.outcome, run.message, server.log_file)
        return 1
    told = [line for line in server.log_text().splitlines() if "forward passes" in line]
    log.info("%s", told[-1])
    (video,) = run.files
    found = play(video)
    if found != wanted:
        log.error("the video has %d frames of %dx%d, asked for %d of %dx%d", *found, *wanted)
        return 1
    log.info("%d frames of %dx%d in %.1f seconds", *found, run.seconds)
    log.info("video: %s", video)
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except (FileNotFoundError, ServerError, RejectedError) as error:
        raise SystemExit(f"no video: {error}") from None
