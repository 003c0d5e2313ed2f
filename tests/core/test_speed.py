"""What TurboDoctor measures of a GPU, and the estimates made of such figures."""

import contextlib
import itertools
import logging
import re
import time
import types

import pytest
import torch
from turbodiffusion_pack.kernels import ceilings, dispatch
from turbodiffusion_pack.kernels.ceilings import FP8, FP8_SHORT, FP16, FP16_SHORT, INT8, PRODUCTS
from turbodiffusion_pack.turbo_core import cards, forward_time, speed
from turbodiffusion_pack.turbo_core.cards import CARDS
from turbodiffusion_pack.turbo_core.forward_time import MODELS, Parts, Session

GPU = torch.device("cuda:0")
RATES = {INT8: 600, FP16: 150, FP16_SHORT: 300, FP8: 300, FP8_SHORT: 600}
ADA = cards.named("NVIDIA GeForce RTX 4090")


@pytest.fixture
def gpu(monkeypatch):
    """Pretends to a 4090 that reaches RATES, as far as the doctor looks."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * 2**30, 24 * 2**30))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: ADA.torch_name)
    measured = ceilings.Ceilings(RATES, 900.0)
    monkeypatch.setattr(ceilings, "measure", lambda device: measured)
    monkeypatch.setattr(speed, "linear_tops", lambda device: 450.0)
    monkeypatch.setattr(speed, "attention_tops", lambda device: 200.0)
    monkeypatch.setattr(speed, "default_pv", lambda device: "fp8")


# The doctor's lines


def test_without_a_gpu_it_says_so():
    lines = speed.speed_lines(torch.device("cpu"))
    assert lines == ["Speed: not measured, as models run on no NVIDIA GPU"]


def test_it_tells_the_shares_of_what_it_measured(gpu):
    best, published, linear, attention, passes = speed.speed_lines(GPU)
    assert best == (
        "Speed at best: int8 600, fp16 150, fp16 in fp16 sums 300, fp8 300, fp8 in fp16 sums 600 "
        "TOPS, copies 900 GB/s"
    )
    assert published.startswith("Published for the RTX 4090: int8 661, fp16 165, ")
    assert published.endswith(", copies 1008 GB/s")
    assert linear == "Speed of int8_linear: 450 TOPS, 75% of mma.sync's"
    # Half of the products are int8, half fp8 in the faster sums.
    assert attention == "Speed of SageSLA: 200 TOPS, 33%"
    assert passes.startswith("A forward pass, estimated from these: ")
    assert all(f"{model} " in passes for model in MODELS)


def test_fp16_values_go_by_the_faster_sums_too(gpu, monkeypatch):
    monkeypatch.setattr(speed, "default_pv", lambda device: "fp16")
    assert "Speed of SageSLA: 200 TOPS, 50%" in speed.speed_lines(GPU)


def test_a_card_that_is_not_listed_has_no_published_line(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert not any(line.startswith("Published") for line in speed.speed_lines(GPU))


def test_it_does_not_push_a_model_out(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 24 * 2**30))
    monkeypatch.setattr(ceilings, "measure", None)
    assert speed.speed_lines(GPU) == [
        "Speed: not measured, as 1.0 GiB are free and 3 are needed: unload the models first"
    ]


def test_a_reference_is_no_kernel_and_gets_no_figure(gpu, monkeypatch):
    def run():
        dispatch.choose("int8_linear", "auto", torch.empty(0), types, None)
        raise AssertionError("the reference ran")

    monkeypatch.setattr(speed, "linear_tops", lambda device: speed._ms(run))
    *_, last = speed.speed_lines(GPU)
    assert last.startswith("Speed of our kernels: none, as int8_linear runs in torch: ")


def test_what_fails_is_told_and_logged(gpu, monkeypatch, caplog):
    def fail(device):
        raise RuntimeError("the driver says /home/ada")

    monkeypatch.setattr(ceilings, "measure", fail)
    with caplog.at_level(logging.WARNING):
        assert speed.speed_lines(GPU) == ["Speed: failed with RuntimeError, the log has all of it"]
    assert "/home/ada" in caplog.text


@pytest.mark.gpu
def test_this_gpu_is_measured_in_ten_seconds():
    speed.speed_lines(GPU)  # compiles
    state, start = torch.cuda.get_rng_state(), time.perf_counter()
    lines = speed.speed_lines(GPU)
    assert time.perf_counter() - start < 10
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert [re.match(r"(Speed at best|Speed of \w+|A forward pass)", x)[1] for x in lines] == [
        "Speed at best", "Speed of int8_linear", "Speed of SageSLA", "A forward pass"
    ]  # fmt: skip


@pytest.mark.gpu
def test_products_of_fp16_are_half_as_many_as_of_int8():
    best = ceilings.measure(GPU)
    assert set(best.tops) <= set(ceilings.products_of(dispatch.capability(GPU)))
    # What is counted wrongly is off by a factor of two; what else runs on the GPU, by less.
    assert 0.5 / 2**0.5 < best.tops[FP16_SHORT] / best.tops[INT8] < 0.5 * 2**0.5
    assert 100 < best.copy_gbs < 20000


# Cards


def test_cards_have_the_products_that_are_measured_on_them(monkeypatch):
    monkeypatch.setattr(ceilings.nvrtc, "version", lambda: ceilings.FP8_SHORT_FROM)
    for card in CARDS:
        assert set(card.tops) == set(ceilings.products_of(card.capability)), card.name
        assert card.base_mhz < card.boost_mhz


@pytest.mark.parametrize("name", ["RTX 3090", "RTX 4090", "RTX 5090"])
def test_geforce_cards_halve_fp32_sums(name):
    tops = next(card.tops for card in CARDS if card.name == name)
    assert tops[FP16] == pytest.approx(tops[FP16_SHORT] / 2, rel=0.01)
    assert tops[FP16] == pytest.approx(tops[INT8] / 4, rel=0.01)
    if FP8 in tops:
        assert tops[FP8] == pytest.approx(tops[FP8_SHORT] / 2, rel=0.01)


def test_rates_are_clocks_times_multiprocessors():
    """2048 INT8 operations a clock on a GeForce multiprocessor, 4096 on an A100's."""
    for card in CARDS:
        each = 4096 if card.name == "A100" else 2048
        tops = card.multiprocessors * card.boost_mhz * each / 1e6
        assert card.tops[INT8] == pytest.approx(tops, rel=0.01), card.name


@pytest.mark.parametrize(
    "name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D"]
)
def test_another_card_of_a_like_name_is_not_that_card(name):
    assert cards.named(name) is None


def test_hoppers_fp8_is_not_taken_for_a_product_of_mma_sync():
    assert [ceilings.products_of(card) for card in ((8, 0), (8, 6), (9, 0), (10, 0))] == [
        PRODUCTS[:3]
    ] * 4


def test_an_old_nvrtc_has_no_fp8_in_fp16_sums(monkeypatch):
    monkeypatch.setattr(ceilings.nvrtc, "version", lambda: (12, 6))
    assert ceilings.products_of((8, 9)) == PRODUCTS[:4]


# Estimates


def played(tops: dict[str, float], copy_gbs: float, shape, reaches: float) -> Session:
    """A session in which each kernel reached this share of the card's best."""
    half = forward_time.self_attention_operations(shape, forward_time.TOPK) / 2e9
    linear = forward_time.linear_operations(shape) / 1e9 / tops[INT8]
    attention = half / tops[INT8] + half / tops[FP16]
    parts = Parts(linear / reaches, attention / reaches, 1.0, 100.0)
    return Session(tops, copy_gbs, {"14B-480P": parts})


def test_what_reaches_all_of_the_card_does_so_everywhere(monkeypatch):
    shape = MODELS["14B-480P"]
    session = played({INT8: 1000, FP16: 500}, 2000, shape, 1.0)
    monkeypatch.setattr(forward_time, "MEASURED", {(8, 6): session})
    fast, slow = forward_time.estimate(ADA, "14B-480P")
    half = forward_time.self_attention_operations(shape, forward_time.TOPK) / 2e9
    products = forward_time.linear_operations(shape) / 1e9 / 660.6
    products += half / 660.6 + half / 660.6  # fp8 with fp16 sums: the full rate
    products += forward_time.cross_attention_operations(shape) / 1e9 / (0.7 * 165.2)
    rest = 100 * 2000 / (0.9 * 1008)
    assert fast == pytest.approx(products + rest)
    assert slow == pytest.approx(products * 2520 / 2235 + rest)


def test_a_smaller_share_makes_the_slow_end_that_much_slower(monkeypatch):
    shape, ends = MODELS["14B-480P"], []
    for reaches in (1.0, 0.5):
        session = played({INT8: 1000, FP16: 500}, 2000, shape, reaches)
        monkeypatch.setattr(forward_time, "MEASURED", {(8, 6): session})
        ends.append(forward_time.estimate(ADA, "14B-480P"))
    (fast, slow), (half_fast, half_slow) = ends
    assert fast < half_fast < half_slow
    assert slow < half_slow < 2 * slow


def test_a_model_that_was_not_measured_is_not_estimated(monkeypatch):
    monkeypatch.setattr(forward_time, "MEASURED", {(8, 6): Session({}, 1.0, {})})
    assert forward_time.estimate(ADA, "14B-720P") is None
    assert forward_time.estimate_here("14B-720P", 1.0, 1.0, RATES, 1.0) is None


def test_every_card_has_an_estimate():
    for card, model in itertools.product(CARDS, MODELS):
        fast, slow = forward_time.estimate(card, model)
        assert 200 < fast <= slow < 20000, (card.name, model)


def test_what_was_measured_on_a_card_is_used_as_it_is():
    shape = MODELS["14B-480P"]
    one, two = (
        forward_time.estimate_here("14B-480P", tops, 200.0, RATES, 900.0) for tops in (300, 600)
    )
    assert one - two == pytest.approx(forward_time.linear_operations(shape) / 1e9 / 600)
