"""Takes the pictures of examples and help pages again: screenshots of ComfyUI's own frontend.

    COMFYUI_DIR=/path/ComfyUI python tests/thumbnails.py [NAME ...]

Each shows some groups of the workflow close up and the whole of it below, as a square, which is how
the list of templates has them. The workflows without a video are run first, on tiny models, so that
their results are seen. A help page shows some nodes of an example. Needs what tests/ui needs:
playwright and Chromium.
"""

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

sys.path.append(str(Path(__file__).resolve().parent / "support"))

import comfyui_install
import example_models
import pack  # noqa: F401
from comfyui_server import ComfyServer
from frontend import Frontend, frontend, skip_tutorial

DOCS = comfyui_install.ROOT / "web" / "docs"
SIDE, STRIP, GAP = 560, 150, 10  # pixels of a picture, of its lower part, between the parts
BACKGROUND = (20, 20, 20)
QUALITY = 75
# The groups that tell an example apart, by their order; all of them where none are named.
CLOSE_UP = {
    "Text_to_video_1.3B_480p": (0, 1),
    "Text_to_video_14B_480p": (0, 1),
    "Text_to_video_14B_720p": (0, 1),
    "Text_to_video_KSampler": (1, 2),
    "Image_to_video_A14B_720p": (1,),
    "Image_to_video_with_LoRAs": (0,),
    "Image_to_video_NVFP4_Sparse": (0,),
    "Image_to_video_long_SVI_2.0_Pro": (3,),
}
# Of the node whose help page has a picture: the example that it is from, and which nodes.
HELP = {
    "W8A8Quantize": ("Quantize_and_save", {"UNETLoader", "W8A8Quantize", "TurboSaveCheckpoint"}),
    "rCMSampler": (
        "Text_to_video_1.3B_480p",
        {"BasicGuider", "RandomNoise", "rCMSampler", "SamplerCustomAdvanced"},
    ),
}
HELP_WIDTH, MARGIN = 800, 20  # pixels
QUIET = {
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Graph.LinkMarkers": 0,
}
SET = "async settings => { for (const [k, v] of Object.entries(settings)) "
SET += "await app.extensionManager.setting.set(k, v); }"
BOXES_OF = """kinds => app.graph.nodes.filter(node => kinds.includes(node.comfyClass)).map(node => {
    const [x, y, width, height] = node.getBounding();
    return [x, y, x + width, y + height];
})"""
# Shows the graph's box [left, top, right, bottom] in the free part of the page; gives the clip.
SHOW = """([left, top, right, bottom]) => {
    const free = { x: 80, y: 170, width: 1780, height: 800 };
    const scale = Math.min(free.width / (right - left), free.height / (bottom - top));
    const { x, y } = document.querySelector("#graph-canvas").getBoundingClientRect();
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset = [(free.x - x) / scale - left, (free.y - y) / scale - top];
    app.canvas.setDirty(true, true);
    return { ...free, width: (right - left) * scale, height: (bottom - top) * scale };
}"""


def main() -> None:
    comfyui = comfyui_install.find()
    if comfyui is None:
        raise SystemExit("no ComfyUI found: set COMFYUI_DIR to a ComfyUI folder")
    examples = example_models.examples()
    names = sys.argv[1:] or list(examples)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        example_models.write(comfyui, base)
        skip_tutorial(base)
        with ComfyServer(comfyui, base) as server, frontend(server.address) as page:
            page.set_style(False)
            page.page.evaluate(SET, QUIET)
            for name in names:
                open_and_run(page, name, examples[name])
                save(picture(page, name), example_models.EXAMPLES / f"{name}.jpg")
                for node, (example, kinds) in HELP.items():
                    if example == name:
                        save(close_up(page, kinds), DOCS / f"{node}.jpg")


def open_and_run(page: Frontend, name: str, workflow: dict) -> None:
    """Open an example, and run it if it makes no video."""
    page.drop(name, workflow)
    if name not in CLOSE_UP:
        page.set_widgets("W8A8Quantize", {"report": True})
        page.press_run()
        page.text_on("TurboSaveCheckpoint")


def save(image: Image.Image, path: Path) -> None:
    image.save(path, quality=QUALITY, optimize=True)


def close_up(page: Frontend, kinds: set[str]) -> Image.Image:
    """The nodes of these classes, and what lies between them."""
    left, top, right, bottom = around(page.page.evaluate(BOXES_OF, list(kinds)))
    image = shot(page, [left - MARGIN, top - MARGIN, right + MARGIN, bottom + MARGIN])
    return image.resize((HELP_WIDTH, round(image.height * HELP_WIDTH / image.width)))


def picture(page: Frontend, name: str) -> Image.Image:
    """The square of one example."""
    groups = page.groups()
    chosen = [groups[i] for i in CLOSE_UP.get(name, range(len(groups)))]
    whole = around([*page.boxes(nodes_2=False).values(), *groups])
    square = Image.new("RGB", (SIDE, SIDE), BACKGROUND)
    put(square, shot(page, around(chosen)), 0, SIDE - STRIP - GAP)
    put(square, shot(page, whole), SIDE - STRIP, STRIP)
    return square


def around(boxes: list[list[float]]) -> list[float]:
    """The box around boxes of [left, top, right, bottom]."""
    left, top, right, bottom = zip(*boxes, strict=True)
    return [min(left), min(top), max(right), max(bottom)]


def shot(page: Frontend, box: list[float]) -> Image.Image:
    clip = page.page.evaluate(SHOW, box)
    page.page.wait_for_timeout(700)
    return Image.open(io.BytesIO(page.page.screenshot(clip=clip))).convert("RGB")


def put(square: Image.Image, part: Image.Image, top: int, height: int) -> None:
    """Put `part` into the middle of the square's rows from `top` on, as large as it fits."""
    scale = min(SIDE / part.width, height / part.height)
    size = round(part.width * scale), round(part.height * scale)
    place = (SIDE - size[0]) // 2, top + (height - size[1]) // 2
    square.paste(part.resize(size, Image.Resampling.LANCZOS), place)


if __name__ == "__main__":
    main()
