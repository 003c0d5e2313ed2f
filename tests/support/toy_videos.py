"""Videos of the toy world: what a prompt asks for, what a file shows, and pictures of both."""

import io
import textwrap
from pathlib import Path

import av
import numpy as np
import pack  # noqa: F401
import torch
from PIL import Image, ImageDraw, ImageFont
from turbodiffusion_pack.turbo_core.training.toy.measures import in_region
from turbodiffusion_pack.turbo_core.training.toy.reader import Reading, read, say
from turbodiffusion_pack.turbo_core.training.toy.world import (
    REGIONS,
    WORDS,
    Clips,
    properties,
    render,
    start_in,
)
from turbodiffusion_pack.turbo_core.training.video_grid import tiled

FRAMES, PIXELS = 17, 256
CAPTION, LETTERS = 40, 36  # pixels below each video, and letters of a line there
LARGEST_PICTURE = 1_000_000  # bytes


def clip(prompt: str) -> torch.Tensor:
    """The video [T, H, W, 3] that a whole prompt asks for, from the middle of the room it has."""
    return render(clips(prompt), FRAMES, PIXELS)[0]


def clips(prompt: str) -> Clips:
    """What a whole prompt asks for, from the middle of the region it names."""
    asked = {name: torch.tensor([value]) for name, value in properties(prompt).items()}
    asked.setdefault("speed", torch.tensor([0]))
    return Clips(**asked, start=torch.tensor([start_in(prompt)]))


def write_first_frame(prompt: str, path: Path) -> None:
    """The picture that a video of `prompt` begins with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(as_bytes(clip(prompt)[:1])[0].numpy()).save(path)


def frames(video: Path) -> torch.Tensor:
    """A video file as [T, H, W, 3] in [0, 1]."""
    with av.open(video) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(decoded)).float() / 255


def seen(video: torch.Tensor) -> Reading:
    """What the reader sees in a video [T, H, W, 3]."""
    return read(video[None])


def in_words(reading: Reading) -> str:
    """A reading as a prompt would put it, with "?" where it is unsure."""
    said = say(reading)
    words = [said[name] for name in WORDS if name in said and name != "background"]
    return f"a {' '.join(words)} on {said['background']}"


def wrong(prompt: str, reading: Reading) -> list[str]:
    """Where a reading is not what the prompt said: "red, asked for blue" and the like."""
    asked = {name: WORDS[name][value] for name, value in properties(prompt).items()}
    said = say(reading)
    found = [f"{said.get(n)}, asked for {word}" for n, word in asked.items() if said.get(n) != word]
    anywhere = set(REGIONS).isdisjoint(prompt.split())
    if found or anywhere or in_region(reading, clips(prompt), FRAMES):
        return found
    return [f"a start at {reading.start[0].tolist()}, asked for another region"]


def write_picture(path: Path, videos: dict[str, torch.Tensor]) -> None:
    """All videos side by side as one animated picture, their prompts below them.

    Raises:
        ValueError: it became larger than a README should load.
    """
    captioned = [with_caption(video, prompt) for prompt, video in videos.items()]
    pictures = [Image.fromarray(f.numpy()) for f in tiled(torch.stack(captioned), len(videos))]
    settings = {"duration": 1000 // 16, "loop": 0, "quality": 80}
    made = io.BytesIO()
    pictures[0].save(made, "webp", save_all=True, append_images=pictures[1:], **settings)
    if made.tell() > LARGEST_PICTURE:
        raise ValueError(f"{path} would have {made.tell()} bytes, more than {LARGEST_PICTURE}")
    path.write_bytes(made.getvalue())


def with_caption(video: torch.Tensor, text: str) -> torch.Tensor:
    """uint8 [T, H + CAPTION, W, 3]."""
    strip = Image.new("RGB", (video.shape[2], CAPTION), "white")
    middle = (video.shape[2] // 2, CAPTION // 2)
    font = ImageFont.load_default(11)
    lines = textwrap.fill(text, LETTERS)
    ImageDraw.Draw(strip).text(middle, lines, fill="black", anchor="mm", align="center", font=font)
    below = torch.from_numpy(np.asarray(strip).copy()).expand(len(video), -1, -1, -1)
    return torch.cat([as_bytes(video), below], dim=1)


def as_bytes(video: torch.Tensor) -> torch.Tensor:
    return (video.clamp(0, 1) * 255).round().to(torch.uint8)
