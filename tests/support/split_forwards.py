"""Forward passes of tiny models that several processes share, compared with one process's.

One of three processes, started with torchrun's variables. Each has the same weights, runs each case
alone and with others, and compares its own part; rank 0 prints one line of JSON by case and number
of ranks.
"""

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

sys.path.append(str(Path(__file__).resolve().parent))
import pack  # noqa: E402, F401
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from in_comfyui import velocity  # noqa: E402
from tiny_models import t2v_checkpoint, write_checkpoint  # noqa: E402
from turbodiffusion_pack.kernels import sla as kernels_sla  # noqa: E402
from turbodiffusion_pack.turbo_core.host import split_block  # noqa: E402
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model  # noqa: E402
from turbodiffusion_pack.turbo_core.host.patch import patch_attention  # noqa: E402
from turbodiffusion_pack.turbo_core.host.split_pass import split_over  # noqa: E402
from turbodiffusion_pack.turbo_core.parallel.exchange import Ranks, ranks_of  # noqa: E402
from turbodiffusion_pack.turbo_core.sla_settings import SLASettings  # noqa: E402

SIZES = {"dim": 768, "ffn": 512, "layers": 2}  # six heads, for two ranks and for three
LATENT = 5, 18, 20  # 450 tokens: 3 whole blocks of 128 and one of 66
SHARES = {2: (256, 194), 3: (256, 128, 66)}  # of them, by the number of ranks
CHANNELS = {"t2v": 16, "i2v": 36}
CASES = [
    (model, attention, granularity)
    for model, attentions in (("t2v", ("sagesla", "sla", "dense")), ("i2v", ("sagesla",)))
    for attention in attentions
    for granularity in ("fast", "exact")
]


class Seen:
    """What the first block's attention was made of, by heads [B, H, ...]."""

    def __init__(self):
        self.parts, self.tokens = {}, None

    @contextlib.contextmanager
    def watch(self):
        attend = split_block.split_attend

        def attended(attn, index, normed, *arguments):
            def noted():
                n = normed()
                if index == 0:
                    self.tokens = n[0].shape[1]
                    self.parts["scale of n"] = n[1]  # of own tokens
                return n

            y, scale = attend(attn, index, noted, *arguments)
            self.parts.setdefault("scale of y", scale)
            return y, scale

        patches = [mock.patch("turbodiffusion_pack.turbo_core.host.block.split_attend", attended)]
        for name in ("select_blocks", "center_means", "key_value_state", "attend_quantized",
                     "key_value_state_and_maximum"):  # fmt: skip
            patches.append(mock.patch.object(kernels_sla, name, self._noting(name)))
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            yield self

    def _noting(self, name):
        run = getattr(kernels_sla, name)

        def noted(*arguments, **options):
            found = run(*arguments, **options)
            if name == "attend_quantized":
                self.parts.setdefault("scale of q", arguments[1].scale)
            else:
                for i, part in enumerate(found if isinstance(found, tuple) else (found,)):
                    self.parts.setdefault(f"{name} {i}", part)
            return found

        return noted


def differing(alone: Seen, shared: Seen, ranks: Ranks) -> list[str]:
    """What of a rank's first attention is not exactly its part of what one process has."""
    wrong = [] if alone.parts.keys() == shared.parts.keys() else ["what was seen"]
    for name, part in shared.parts.items():
        whole = alone.parts[name]
        if name in ("scale of n", "scale of y"):
            first = sum(SHARES[ranks.count][: ranks.rank])
            first = first // 128 if whole.ndim == 3 else first
            expected = whole[:, first : first + part.shape[1]]
        else:
            expected = whole.chunk(ranks.count, 1)[ranks.rank]
        if not torch.equal(part, expected):
            wrong.append(name)
    return wrong


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.double().norm())


def inputs(model: str) -> dict:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, 16, *LATENT, generator=generator)
    context = torch.randn(1, 40, 64, generator=generator)
    image = torch.randn(1, 20, *LATENT, generator=generator) if model == "i2v" else None
    return {"x": x, "context": context, "timestep": 900, "image": image}


def shared_run(model, ranks: Ranks, given: dict) -> tuple[torch.Tensor, Seen]:
    with Seen().watch() as seen:
        return velocity(split_over(model, ranks), **given), seen


def mutants_of(model, ranks: Ranks, given: dict, alone: torch.Tensor) -> dict[str, float]:
    """How far a rank is from one that reduces nothing over ranks: not the norms, not the maxima."""
    alike = {"summed": lambda ranks, x: x * ranks.count, "largest": lambda ranks, x: x}
    distances = {}
    for name, instead in alike.items():
        with mock.patch.object(split_block, name, instead):
            distances[f"not {name}"] = relative(velocity(split_over(model, ranks), **given), alone)
    return distances


def measure(model, given: dict, groups: list[Ranks], mutants: bool) -> list[dict]:
    """Of one case: how far each group is from one rank, and from one process without ranks."""
    ordinary = velocity(model, **given)
    alone, seen_alone = shared_run(model, Ranks(None), given)
    rows = []
    for ranks in groups:
        shared, seen = shared_run(model, ranks, given)
        mine = {
            "tokens": seen.tokens,
            "differing": differing(seen_alone, seen, ranks),
            "from one rank": relative(shared, alone),
            "from one process": relative(shared, ordinary),
        }
        if mutants:
            mine |= mutants_of(model, ranks, given, alone)
        of_all = [None] * ranks.count
        dist.all_gather_object(of_all, mine, group=ranks.group)
        rows.append({"ranks": ranks.count, **{name: [m[name] for m in of_all] for name in mine}})
    return rows


def main() -> None:
    dist.init_process_group("gloo")
    pair = dist.new_group([0, 1])
    groups = [ranks_of(pair)] if dist.get_rank() < 2 else []
    groups.append(ranks_of())
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            name, attention, granularity = case
            path = Path(folder) / f"{name}.safetensors"
            if not path.exists():
                write_checkpoint(path, t2v_checkpoint(3, **SIZES, in_channels=CHANNELS[name]))
            model = load_turbo_model(str(path), granularity)
            model = patch_attention(model, SLASettings(attention, topk=0.4))
            for row in measure(model, inputs(name), groups, mutants=case == CASES[0]):
                if dist.get_rank() == 0:
                    sys.stdout.write(json.dumps({"case": " ".join(case)} | row) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
