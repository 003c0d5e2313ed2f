"""The options of two experts, merged: dicts alone, no model."""

import copy

import in_comfyui  # noqa: F401  (ComfyUI's modules)
import pytest
from turbodiffusion_pack.turbo_core.host.expert_options import options_of_low, with_switch
from turbodiffusion_pack.turbo_core.host.options import EXPERT_BOUNDARY, EXPERT_SWITCH


def _options(wrappers=None, transformer=None, **others):
    transformer_options = {"wrappers": wrappers or {}, **(transformer or {})}
    return {"transformer_options": transformer_options, **others}


def _low(own=None, run=None, came_with=None):
    return options_of_low(own or _options(), run or _options(), came_with or {}, 0.9)


def _function():
    return lambda *args: args


def test_the_switch_is_around_all_other_wrappers():
    other, ours = _function(), _function()
    options = _options({"predict_noise": {"other": [other]}}, sampler_cfg_function=other)
    switching = with_switch(options, ours)
    wrappers = switching["transformer_options"]["wrappers"]["predict_noise"]
    assert list(wrappers.items()) == [(EXPERT_SWITCH, [ours]), ("other", [other])]
    assert switching["sampler_cfg_function"] is other
    assert options == _options({"predict_noise": {"other": [other]}}, sampler_cfg_function=other)


def test_the_low_noise_expert_keeps_its_own():
    cfg, wrapper = _function(), _function()
    own = _options(
        {"diffusion_model": {"a": [wrapper]}}, {"patches": {"b": 1}}, sampler_cfg_function=cfg
    )
    before = copy.deepcopy(own)
    low = _low(own, _options({"diffusion_model": {"of high": [_function()]}}, {"patches": {}}))
    assert low["transformer_options"]["wrappers"]["diffusion_model"] == {"a": [wrapper]}
    assert low["transformer_options"]["patches"] == {"b": 1}
    assert low["sampler_cfg_function"] is cfg
    assert low["transformer_options"][EXPERT_BOUNDARY] == 0.9
    assert own == before


def test_the_run_goes_for_both():
    windows = object()
    run = _options(
        {"sampler_sample": {"run": [1], "both": [2]}},
        {"sample_sigmas": "sigmas", "sigmas": "of this step"},
        context_handler=windows,
        denoise_mask_function="of high",
    )
    low = _low(_options({"sampler_sample": {"both": [3]}}), run)
    inner = low["transformer_options"]
    assert inner["wrappers"]["sampler_sample"] == {"run": [1], "both": [3]}
    assert inner["sample_sigmas"] == "sigmas"
    assert "sigmas" not in inner
    assert low["context_handler"] is windows
    assert "denoise_mask_function" not in low


def test_its_own_context_windows_come_first():
    low = _low(_options(context_handler="own"), _options(context_handler="of the run"))
    assert low["context_handler"] == "own"


@pytest.mark.parametrize("key", ["sampler_cfg_function", "sampler_calc_cond_batch_function"])
def test_a_function_of_guidance(key):
    of_low, of_high, behind = _function(), _function(), _function()
    own = _options(**{key: of_low})
    assert _low(own, _options(**{key: of_high}), {key: of_high})[key] is of_low
    assert _low(own, _options(**{key: behind}), {key: of_high})[key] is behind
    assert _low(_options(), _options(**{key: behind}))[key] is behind
    assert key not in _low(_options(), _options(**{key: of_high}), {key: of_high})


@pytest.mark.parametrize("key", ["sampler_pre_cfg_function", "sampler_post_cfg_function"])
def test_lists_of_guidance(key):
    of_low, of_high, behind = _function(), _function(), _function()
    own, run = _options(**{key: [of_low]}), _options(**{key: [of_high, behind]})
    assert _low(own, run, {key: [of_high]})[key] == [of_low, behind]
    assert own[key] == [of_low]
