"""Estimates forward passes on cards that nobody timed here, from passes on an H100 that played one.

    python tests/benchmarks/estimate.py
    COMFYUI_DIR=... python tests/benchmarks/forward.py --card 8.6 --json 86.json --models 14B-480P
    python tests/benchmarks/estimate.py 86.json    from these, and prints them for forward_time.py

Needs no GPU. Prints, for each card and model, seconds of a pass and of a video's four: the fast and
the slow end, and what they rest on.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))

import pack  # noqa: F401
from turbodiffusion_pack.kernels.ceilings import FP16, INT8
from turbodiffusion_pack.turbo_core import forward_time
from turbodiffusion_pack.turbo_core.cards import CARDS, Card
from turbodiffusion_pack.turbo_core.forward_time import MODELS, Parts, Session

STEPS = 4


def read(file: Path) -> tuple[tuple[int, int], Session]:
    """The card that was played, and its session, of what forward.py wrote with --json.

    Raises:
        SystemExit: the passes multiplied fp8 values, or were not timed.
    """
    told = json.loads(file.read_text(encoding="utf-8"))
    passes = {}
    for result in told["results"]:
        if "parts" not in result or result["values"] != "fp16" or result["attention"] != "sagesla":
            sys.exit(
                f"{file}: needs timed sagesla passes with fp16 values, got {result['model']} "
                f"{result['attention']}. Run forward.py with --card 8.0 or 8.6 and its kernels."
            )
        passes[result["model"]] = Parts(**result["parts"])
    ceilings = told["ceilings"]
    tops = {name: round(ceilings["tops"][name]) for name in (INT8, FP16)}
    return tuple(told["card"]), Session(tops, round(ceilings["copy_gbs"]), passes)


def row(card: tuple[int, int], session: Session) -> str:
    """A row of forward_time.MEASURED."""
    passes = ", ".join(f'"{model}": Parts{tuple(p)}' for model, p in session.passes.items())
    tops = f"{{INT8: {session.tops[INT8]}, FP16: {session.tops[FP16]}}}"
    return f"    {card}: Session({tops}, {session.copy_gbs}, {{{passes}}}),"


def line(card: Card, model: str) -> str:
    ends = forward_time.estimate(card, model)
    if ends is None:
        return f"{card.name:9s} {model:14s} not measured"
    fast, slow = (ms / 1000 for ms in ends)
    video = f"{STEPS} steps {STEPS * fast:5.1f} to {STEPS * slow:5.1f} s"
    return f"{card.name:9s} {model:14s} a pass {fast:5.2f} to {slow:5.2f} s, {video}  (estimate)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="what forward.py --json wrote")
    options = parser.parse_args()
    read_now = dict(map(read, options.files))
    forward_time.MEASURED.update(read_now)
    for card in CARDS:
        for model in MODELS:
            sys.stdout.write(line(card, model) + "\n")
    sys.stdout.write("\n".join(("", *forward_time.ASSUMPTIONS, "")))
    for card, session in read_now.items():
        sys.stdout.write(f"\n{row(card, session)}\n")


if __name__ == "__main__":
    main()
