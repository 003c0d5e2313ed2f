"""One forward pass shared by two and three processes, over gloo; and what cannot be shared."""

import json
from pathlib import Path

import in_comfyui  # noqa: F401
import pytest
import ranks
import tiny_models
import torch
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model
from turbodiffusion_pack.turbo_core.host.patch import wan_model
from turbodiffusion_pack.turbo_core.host.split_pass import split_over, why_not_split
from turbodiffusion_pack.turbo_core.parallel.exchange import Ranks

TESTS = Path(__file__).resolve().parents[1]
CASES = [
    *(f"t2v {a} {g}" for a in ("sagesla", "sla", "dense") for g in ("fast", "exact")),
    *(f"i2v sagesla {g}" for g in ("fast", "exact")),
]
SHARES = {2: [256, 194], 3: [256, 128, 66]}
# INT8 rounds another way where the last bit of a norm's sum decides, one step of 127; a rank that
# norms by its own heads is further off.
NORMS_ROUNDING = 2.5e-3


@pytest.fixture(scope="module")
def measured() -> dict[tuple[str, int], dict]:
    """What support/split_forwards.py found, by case and number of ranks."""
    told = ranks.finish(ranks.start(3, TESTS / "support" / "split_forwards.py"))
    rows = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    return {(row["case"], row["ranks"]): row for row in rows}


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about the CPU's fp32")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("count", [2, 3])
def test_ranks_compute_what_one_computes(measured, case, count):
    row = measured[case, count]
    assert row["tokens"] == SHARES[count]  # it was shared
    assert row["differing"] == count * [[]]  # maps, means, states and scales, to the bit
    assert max(row["from one rank"]) <= 1e-6
    assert max(row["from one process"]) <= NORMS_ROUNDING


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about the CPU's fp32")
@pytest.mark.parametrize("count", [2, 3])
def test_what_is_not_reduced_over_ranks_is_seen(measured, count):
    row = measured[CASES[0], count]
    assert min(row["not summed"]) > 1e-3 and min(row["not largest"]) > 1e-3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    tiny_models.write_checkpoint(path, tiny_models.t2v_checkpoint())
    model = load_turbo_model(str(path))
    in_comfyui.comfy.model_management.load_models_gpu([model])
    return model


def reason(model, count=2, latent=(3, 16, 16), options=None, timesteps=1) -> str | None:
    x = torch.zeros(1, 16, *latent)
    wan, timestep, context = wan_model(model), torch.zeros(1, timesteps), torch.zeros(1, 8, 4096)
    with torch.inference_mode():
        return why_not_split(wan, x, timestep, context, options or {}, count)


def test_what_cannot_be_shared_says_why(model):
    assert reason(model) is None
    assert reason(model, 3) == "3 GPUs do not divide 2 heads"
    few = "its 1 blocks of 128 tokens are too few for 2 GPUs"
    assert reason(model, latent=(1, 16, 16)) == few
    replaced = {"patches_replace": {"dit": {("double_block", 0): None}}}
    assert reason(model, options=replaced) == "a node replaces blocks"
    own_timesteps = "block 0 is not fused: timesteps differ between tokens"
    assert reason(model, timesteps=3) == own_timesteps
    patched = {"patches": {"attn1_patch": [None]}}
    assert reason(model, options=patched) == "block 0 is not fused: a node patches its attention"


def test_a_forward_that_cannot_be_shared_runs_whole(model):
    """Without a word to other ranks: there are none."""
    x, context = torch.randn(1, 16, 3, 16, 16), torch.randn(1, 40, 64)
    alone = in_comfyui.velocity(model, x, context, 900)
    shared = in_comfyui.velocity(split_over(model, Ranks(None, 0, 3)), x, context, 900)
    assert torch.equal(shared, alone)


def test_the_benchmark_runs_on_cpus():
    words = TESTS / "benchmarks" / "two_gpus.py", "--shapes", "tiny", "--runs", "1"
    told = ranks.finish(ranks.start(2, *words))
    rows = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    assert [(row["scheme"], row["ranks"]) for row in rows] == [("int8", 2), ("bf16", 2)]
    assert all(row["predicted_speed_up"] > 0 and row["exchange_ms"] > 0 for row in rows)
