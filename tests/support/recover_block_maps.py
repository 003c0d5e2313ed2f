"""Finds which key blocks the original selected in its recorded outputs; writes them as test data.

    python tests/prepare.py tests/support/recover_block_maps.py

The maps are those that our fp32 reference selects, except where two blocks score so nearly alike
that the original's bf16 may have taken the other one. There both are tried, and the one whose
output is nearer to the recorded output stays. Only such near-ties can be decided that way: nothing
else about the maps is fitted.
"""

import functools
import sys
from collections.abc import Callable, Iterator

import pack  # noqa: F401 - before what imports the pack
import parity
import torch
from goldens import DATA
from safetensors.torch import save_file
from turbodiffusion_pack.turbo_core.host.experts import switch_experts

FILE = DATA / "block_maps.safetensors"
# Scores this near to each other, in units of their row's std, may fall either way.
NEAR = 4e-2
# A swap of two blocks stays where it takes this share of the error away.
GAIN = 0.01


def main() -> None:
    maps = {}
    with torch.inference_mode():
        for key, error in comparisons().items():
            maps[key] = recovered(key, error)
    save_file(maps, FILE)


def comparisons() -> dict[str, Callable[[], float]]:
    """The error of everything on record that ran with SLA."""
    text = parity.in_sla("t2v-quant.pth")
    experts = (parity.in_sla(f"i2v_{name}-quant.pth") for name in ("high", "low"))
    models = {"t2v": text, "i2v": switch_experts(*experts, 0.9)}
    forwards = parity.forward_keys("sla")
    runs = [run for model in models for run in parity.runs(model)]
    return {
        **{k: functools.partial(parity.forward_error, parity.model_of(k), k) for k in forwards},
        **{str(run): functools.partial(parity.run_error, models[run.model], run) for run in runs},
    }


def recovered(key: str, error: Callable[[], float]) -> torch.Tensor:
    """The block maps of all SLA calls in order, int32 [calls, B, H, NQ, count]."""
    best, selections = error_at([], error)
    sys.stdout.write(f"{key}: {best:.2e}")
    while True:
        trials = [error_at(maps, error) for maps in swaps(selections)]
        trial, swapped = min(trials, key=lambda trial: trial[0], default=(best, selections))
        if trial > (1 - GAIN) * best:
            sys.stdout.write("\n")
            return torch.stack([call.given for call in selections])
        best, selections = trial, swapped
        sys.stdout.write(f" -> {best:.2e}")


def error_at(
    maps: list[torch.Tensor], error: Callable[[], float]
) -> tuple[float, list[parity.Selection]]:
    with parity.at_block_maps(maps) as selections:
        return error(), selections


def swaps(selections: list[parity.Selection]) -> Iterator[list[torch.Tensor]]:
    """The maps up to each swap of a selected block for one that scores nearly the same."""
    for number, call in enumerate(selections):
        before = [earlier.given for earlier in selections[:number]]
        is_selected = torch.zeros_like(call.scores, dtype=torch.bool)
        is_selected.scatter_(-1, call.given.long(), True)
        gaps = call.scores[..., :, None] - call.scores[..., None, :]  # [B, H, NQ, NK, NK]
        near = gaps.abs() < NEAR * call.scores.std(-1)[..., None, None]
        near &= is_selected[..., :, None] & ~is_selected[..., None, :]
        for *place, out, other in near.nonzero().tolist():
            swapped = call.given.clone()
            row = swapped[tuple(place)]  # [count]
            row[row == out] = other
            row.copy_(row.sort().values)
            yield [*before, swapped]


if __name__ == "__main__":
    main()
