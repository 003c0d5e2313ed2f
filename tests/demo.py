"""Makes a video in a real ComfyUI server: what `make demo` runs inside .venv.

    python tests/demo.py [--checkpoint FILE]

Without a checkpoint it makes a tiny random model, so the video is noise; the path it takes through
ComfyUI is the real one.
"""

import argparse
import json
import logging
import re
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

WORKFLOW = ROOT / "tests" / "host" / "workflows" / "t2v_api.json"
BASE = ROOT / ".demo" / "server"
REAL_SIZE = {"width": 832, "height": 480, "length": 81}
TEXT_ENCODER = "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
VAE = "wan_2.1_vae.safetensors"

log = logging.getLogger("demo")


def main() -> int:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="a TurboDiffusion text-to-video file")
    checkpoint = parser.parse_args().checkpoint
    comfyui = comfyui_install.find()
    if comfyui is None:
        raise FileNotFoundError("no ComfyUI found: run `make demo`, or set COMFYUI_DIR")
    if checkpoint is None:
        make_tiny_models(comfyui)
    elif not checkpoint.is_file():
        raise FileNotFoundError(f"no checkpoint file at {checkpoint}")
    log.info("starting ComfyUI from %s", comfyui)
    with ComfyServer(comfyui, BASE, model_folders(comfyui, checkpoint)) as server:
        workflow = tiny_workflow() if checkpoint is None else real_workflow(server, checkpoint)
        log.info("device: %s", server.get("/system_stats")["devices"][0]["name"])
        run = server.run(workflow, progress_logger(workflow))
        return report(server, workflow, run)


def make_tiny_models(comfyui: Path) -> None:
    workflow = tiny_workflow()
    log.info("no CHECKPOINT given: making a tiny random one")
    checkpoint = node_inputs(workflow, "TurboLoader")["checkpoint"]
    vae = node_inputs(workflow, "VAELoader")["vae_name"]
    tiny_models.write_checkpoint(BASE / "models" / "diffusion_models" / checkpoint)
    tiny_models.write_vae(comfyui, BASE / "models" / "vae" / vae)


def tiny_workflow() -> dict:
    return json.loads(WORKFLOW.read_text(encoding="utf-8"))


def model_folders(comfyui: Path, checkpoint: Path | None) -> dict[str, list[Path]]:
    """Where a server with a real checkpoint looks for models, besides the demo's own folder."""
    if checkpoint is None:
        return {}
    models = comfyui / "models"
    return {
        "diffusion_models": [checkpoint.resolve().parent],
        "vae": [models / "vae"],
        "text_encoders": [models / "text_encoders", models / "clip"],
    }


def real_workflow(server: ComfyServer, checkpoint: Path) -> dict:
    """The demo workflow at full size, with ComfyUI's own umT5 text encoder and Wan VAE."""
    workflow = tiny_workflow()
    text = node_inputs(workflow, "TurboTestTextEncode")["text"]
    (encoder,) = (k for k, v in workflow.items() if v["class_type"] == "TurboTestTextEncode")
    clip_name = find_model(server, "CLIPLoader", "clip_name", r"umt5.*xxl", TEXT_ENCODER)
    vae_name = find_model(server, "VAELoader", "vae_name", r"wan.?2.1.vae", VAE)
    workflow[encoder] = node("CLIPTextEncode", text=text, clip=["clip", 0])
    workflow["clip"] = node("CLIPLoader", clip_name=clip_name, type="wan")
    node_inputs(workflow, "VAELoader")["vae_name"] = vae_name
    node_inputs(workflow, "TurboLoader")["checkpoint"] = checkpoint.name
    node_inputs(workflow, "EmptyHunyuanLatentVideo").update(REAL_SIZE)
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


def report(server: ComfyServer, workflow: dict, run: Run) -> int:
    if run.outcome != "execution_success":
        log.error("%s: %s\nserver log: %s", run.outcome, run.message, server.log_file)
        return 1
    for line in server.log_text().splitlines():
        if "TurboDiffusion" in line:
            log.info("%s", line)
    (video,) = run.files
    frames, width, height = play(video)
    wanted = node_inputs(workflow, "EmptyHunyuanLatentVideo")
    if (frames, width, height) != (wanted["length"], wanted["width"], wanted["height"]):
        log.error("the video has %d frames of %dx%d, asked for %s", frames, width, height, wanted)
        return 1
    log.info("%d frames of %dx%d in %.1f seconds", frames, width, height, run.seconds)
    log.info("video: %s", video)
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except (FileNotFoundError, ServerError, RejectedError) as error:
        raise SystemExit(f"no video: {error}") from None
