"""The kernels with TMA, fp8 and NVRTC switched off, as on cards that have none of them."""

import goldens
import older_cards
import pytest
import torch
from attention import exact_linear, exact_sparse, random_proj, random_qkv
from devices import CARD, DEVICE
from turbodiffusion_pack.kernels.block_map import block_map
from turbodiffusion_pack.kernels.dispatch import has_fp8
from turbodiffusion_pack.kernels.int8_linear import int8_linear
from turbodiffusion_pack.kernels.int8_quant import quantize_blocks, quantize_rows
from turbodiffusion_pack.kernels.sla import sla
from turbodiffusion_pack.kernels.sparse_attention import default_pv

LOW_BIT_ERROR = {"fp16": 3e-2, "fp8": 5.5e-2}  # of random attention, as in test_sparse_attention.py
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
QUANTIZERS = {"blocks": quantize_blocks, "rows": quantize_rows}


@pytest.fixture(
    params=[
        older_cards.AMPERE,
        # The interpreter knows no fp8 to rely on.
        pytest.param(older_cards.ADA, marks=pytest.mark.gpu),
        pytest.param(older_cards.HOPPER, marks=pytest.mark.gpu),
    ],
    ids=["ampere", "ada", "hopper without nvrtc"],
)
def card(request, monkeypatch):
    """A card that is no newer than the one there is, and pretended."""
    if DEVICE == "cuda" and request.param > CARD:
        pytest.skip("this GPU is older")
    older_cards.pretend(monkeypatch, request.param)
    return request.param


def test_fp8_is_chosen_where_it_is_fast(card):
    device = torch.device(DEVICE)
    assert has_fp8(device) == (card >= (8, 9))
    # Hopper's fp8 is fast in the CUDA kernel only, which is switched off.
    assert default_pv(device) == ("fp8" if card == older_cards.ADA else "fp16")


@pytest.mark.parametrize("granularity", QUANTIZERS)
def test_int8_linear(card, granularity):
    quantize = QUANTIZERS[granularity]
    x, w = torch.randn(2, 300, 384, device=DEVICE), torch.randn(256, 384, device=DEVICE)
    bias, residual = torch.randn(256, device=DEVICE), torch.randn(2, 300, 256, device=DEVICE)
    operands = *quantize(x, backend="reference"), *quantize(w, backend="reference"), bias
    options = {"gate": torch.randn(2, 1, 256, device=DEVICE), "residual": residual}
    y, expected = (
        int8_linear(*operands, torch.float32, **options, backend=backend)
        for backend in ("triton", "reference")
    )
    assert goldens.relative_error(y, expected) <= 1e-6


@pytest.mark.parametrize("low_bit", [True, False], ids=["sagesla", "sla"])
def test_sparse_linear_attention(card, low_bit):
    q, k, v = random_qkv(1, 400, 2, 128, DTYPE)
    proj = random_proj(128)
    chosen = block_map(q, k, 0.3)
    exact = exact_sparse(q, k, v, chosen) + exact_linear(q, k, v, *proj, "softmax")
    options = {"low_bit": low_bit, "block_map": chosen, "backend": "triton"}
    out = sla(q, k, v, proj, **options)
    bound = LOW_BIT_ERROR[default_pv(q.device)] if low_bit else 1e-2
    assert goldens.relative_error(out, exact) <= bound
