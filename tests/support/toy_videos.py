"""Videos of the toy world: what a prompt asks for, what a file shows, and pictures of both."""

import io
from pathlib import Path

import av
import numpy as np
import pack  # noqa: F401
import torch
from PIL import Image, ImageDraw, ImageFont
from turbodiffusion_pack.turbo_core.training.toy.reader import read, say
from turbodiffusion_pack.turbo_core.training.toy.world import WORDS, Clips, properties, render
from turbodiffusion_pack.turbo_core.training.video_grid import tiled

FRAMES, PIXELS = 17, 256
CAPTION = 26  # pixels below each video
LARGEST_PICTURE = 1_000_000  # bytes


def clip(prompt: str, start: tuple[float, float] = (0.5, 0.5)) -> torch.Tensor:
    """The video [T, H, W, 3] that a whole prompt asks for, from the middle of the room it has."""
    asked = {name: torch.tensor([value]) for name, value in properties(prompt).items()}
    asked.setdefault("speed", torch.tensor([0]))
    return render(Clips(**asked, start=torch.tensor([start])), FRAMES, PIXELS)[0]


def write_first_frame(prompt: str, path: Path) -> None:
    """The picture that a video of `prompt` begins with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(as_bytes(clip(prompt)[:1])[0].numpy()).save(path)


def frames(video: Path) -> torch.Tensor:
    """A video file as [T, H, W, 3] in [0, 1]."""
    with av.open(video) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(decoded)).float() / 255


def seen(video: torch.Tensor) -> dict[str, str]:
    """What the reader says of a video [T, H, W, 3], by property; "?" where it is unsure."""
    return say(read(video[None]))


def in_words(said: dict[str, str]) -> str:
    """A reading as a prompt would put it."""
    words = [said[name] for name in WORDS if name in said and name != "background"]
    return f"a {' '.join(words)} on {said['background']}"


def wrong(prompt: str, said: dict[str, str]) -> list[str]:
    """Where a reading is not what the prompt said: "red, asked for blue" and the like."""
    asked = {name: WORDS[name][value] for name, value in properties(prompt).items()}
    return [f"{said.get(n)}, asked for {word}" for n, word in asked.items() if said.get(n) != word]


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
    ImageDraw.Draw(strip).text(middle, text, fill="black", anchor="mm", font=font)
    below = torch.from_numpy(np.asarray(strip).copy()).expand(len(video), -1, -1, -1)
    return torch.cat([as_bytes(video), below], dim=1)


def as_bytes(video: torch.Tensor) -> torch.Tensor:
    return (video.clamp(0, 1) * 255).round().to(torch.uint8)
