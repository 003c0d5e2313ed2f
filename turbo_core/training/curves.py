"""Draws numbers by step as one picture, a panel for each column."""

import math
from pathlib import Path

from .pillow import Image, ImageDraw, ImageFont, has_pillow, write_picture

WIDTH, HEIGHT = 560, 220  # of a panel, pixels
MARGIN = 8
TITLE = 22
RAW, SMOOTH, FRAME, TEXT = (190, 205, 225), (20, 70, 140), (160, 160, 160), (40, 40, 40)
SMOOTHED_OVER = 40  # a running mean spans this share of the steps
LOG_FROM = 20.0  # largest by smallest, from which the axis is logarithmic

Points = list[tuple[float, float]]


def draw_curves(path: Path, rows: list[dict[str, float]], columns: list[str]) -> None:
    """Write the picture, two panels wide; numbers that are not finite are left out."""
    if not has_pillow():
        return
    down = math.ceil(len(columns) / 2)
    across = min(2, len(columns))
    picture = Image.new("RGB", (across * WIDTH, down * HEIGHT), "white")
    draw = ImageDraw.Draw(picture)
    for i, column in enumerate(columns):
        points = [(row["step"], row[column]) for row in rows if column in row]
        points = [(x, y) for x, y in points if math.isfinite(y)]
        _panel(draw, (i % 2 * WIDTH, i // 2 * HEIGHT), column, points)
    write_picture(path, picture.save)


def _panel(draw: "ImageDraw.ImageDraw", corner: tuple[int, int], name: str, points: Points) -> None:
    left, top = corner[0] + MARGIN, corner[1] + TITLE
    right, bottom = corner[0] + WIDTH - MARGIN, corner[1] + HEIGHT - TITLE
    font = ImageFont.load_default()
    draw.rectangle((left, top, right, bottom), outline=FRAME)
    if not points:
        draw.text((left, top - 16), f"{name}: no values yet", fill=TEXT, font=font)
        return
    smooth = _running_mean(points, max(1, len(points) // SMOOTHED_OVER))
    heights = [y for _, y in points]
    low, high = min(heights), max(heights)
    logarithmic = low > 0 and high > LOG_FROM * low
    title = f"{name}: {smooth[-1][1]:.4g}, from {low:.4g} to {high:.4g}"
    draw.text((left, top - 16), title + " (log)" * logarithmic, fill=TEXT, font=font)
    draw.text((left, bottom + 3), f"step {points[0][0]} to {points[-1][0]}", fill=TEXT, font=font)
    scale = math.log if logarithmic else float
    first, last = points[0][0], points[-1][0]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / max(last - first, 1)
        up = (scale(y) - scale(low)) / ((scale(high) - scale(low)) or 1.0)
        return left + across * (right - left), bottom - up * (bottom - top)

    for line, color in ((points, RAW), (smooth, SMOOTH)):
        shown = [place(*point) for point in _thinned(line)]
        draw.line(shown if len(shown) > 1 else shown * 2, fill=color)


def _running_mean(points: Points, span: int) -> Points:
    """Each value becomes the mean of the last `span`."""
    total, smooth = 0.0, []
    for i, (x, y) in enumerate(points):
        total += y - (points[i - span][1] if i >= span else 0.0)
        smooth.append((x, total / min(i + 1, span)))
    return smooth


def _thinned(points: Points) -> Points:
    """At most about four points to a pixel, so that a long run draws as fast as a short one."""
    return points[:: max(1, len(points) // (4 * WIDTH))]
