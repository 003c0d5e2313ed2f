"""Merged models in ComfyUI: they load, quantize, run, and core nodes in one order make the same."""

import argparse

import goldens
import in_comfyui
import pytest
import torch
import trained_pair
from safetensors.torch import load_file, save_file
from turbodiffusion_pack.turbo_core.checkpoint import read_checkpoint
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model
from turbodiffusion_pack.turbo_core.host.patch import wan_model
from turbodiffusion_pack.turbo_core.host.quantize_model import quantize_model
from turbodiffusion_pack.turbo_core.host.save import save_turbo_model
from turbodiffusion_pack.turbo_core.host.stages import STAGES
from turbodiffusion_pack.turbo_core.training.merge import merge_files

KEY = "t2v.ragged"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Base, SLA and rCM in bf16, as TurboLoader has them."""
    return trained_pair.write(trained_pair.trio(torch.bfloat16), tmp_path_factory.mktemp("trio"))


@pytest.fixture(scope="module")
def merged(files, tmp_path_factory):
    target = tmp_path_factory.mktemp("merged") / "merged.safetensors"
    merge_files(files["base"], files["sla"], files["rcm"], target)
    return target


def load(path):
    return load_turbo_model(str(path))


def velocity(model):
    data = goldens.load("forward")
    x = data[f"{KEY}.x"][..., :1, :, :]  # 224 tokens
    return in_comfyui.velocity(model, x, data[f"{KEY}.context"], 987.5)


def nodes():
    from comfy_extras.nodes_model_merging import ModelAdd, ModelSubtract

    return ModelAdd(), ModelSubtract()


def by_nodes(files, sla_first=True):
    """What the workflow Merge_SLA_and_rCM.json makes of the three files."""
    add, subtract = nodes()
    base, sla, rcm = (load(files[role]) for role in trained_pair.ROLES)
    (update,) = subtract.merge(sla, base, 1.0)
    return add.merge(update, rcm)[0] if sla_first else add.merge(rcm, update)[0]


@pytest.fixture(scope="module")
def added(files):
    """The result of the core nodes."""
    return by_nodes(files)


def projections(model) -> list[str]:
    """The blocks that have a proj_l."""
    return [name for name, _ in wan_model(model).named_modules() if name.endswith(".proj_l")]


def test_the_merged_model_loads_quantizes_and_runs(merged):
    model = load(merged)
    assert len(projections(model)) == 2
    expected = velocity(model)
    quantized, _ = quantize_model(model)
    assert len(projections(quantized)) == 2
    assert goldens.relative_error(velocity(quantized), expected) < 0.05


def test_the_quantized_model_is_a_file_that_loads(merged, tmp_path):
    save_turbo_model(quantize_model(load(merged))[0], tmp_path / "int8.safetensors")
    checkpoint = read_checkpoint(tmp_path / "int8.safetensors")
    assert checkpoint.quantized and checkpoint.has_sla
    assert velocity(load(tmp_path / "int8.safetensors")).isfinite().all()


def test_the_command_merges_files_from_elsewhere(files, merged, tmp_path, capsys):
    """And tells how large both updates are; the same command again says that it is through."""
    args = argparse.Namespace(
        preset="toy", out=tmp_path / "run", steps=None, seed=0, set=[], dry_run=False, **files
    )
    STAGES["merge"](args, torch.device("cpu"))
    found, expected = load_file(tmp_path / "run/merge/model.safetensors"), load_file(merged)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    told = capsys.readouterr()
    assert "cosine" in told.out + told.err and "block 1" in told.out + told.err
    STAGES["merge"](args, torch.device("cpu"))
    assert "is finished" in "".join(capsys.readouterr())


def test_it_is_neither_of_the_two(files, merged):
    found = velocity(load(merged))
    for role in trained_pair.ROLES:
        assert goldens.relative_error(velocity(load(files[role])), found) > 0.01


def test_core_nodes_make_the_same_weights(files, added, tmp_path):
    """In float32, in which the host adds patches, before it rounds to the weight's dtype."""
    import comfy.lora

    base = {name: tensor.float() for name, tensor in load_file(files["base"]).items()}
    save_file(base, tmp_path / "base.safetensors")
    target = tmp_path / "merged.safetensors"
    merge_files(tmp_path / "base.safetensors", files["sla"], files["rcm"], target)
    expected = load_file(target)
    for name in base:
        key = f"diffusion_model.{name}"
        weight = comfy.utils.get_attr(added.model, key).detach().float().clone()
        found = comfy.lora.calculate_weight(added.patches[key], weight, key)
        torch.testing.assert_close(found, expected[name], rtol=1e-6, atol=1e-8)


def test_core_nodes_save_the_same_file(added, merged, tmp_path):
    save_turbo_model(added, tmp_path / "saved.safetensors")
    found, expected = load_file(tmp_path / "saved.safetensors"), load_file(merged)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        if trained_pair.PROJ_L in name:
            assert torch.equal(found[name], tensor)
        torch.testing.assert_close(found[name], tensor, rtol=2**-7, atol=1e-8)


def test_core_nodes_run_what_the_file_runs(added, merged):
    """But for the host's rounding of patched weights, which is a random one: 6.3e-3 on an H100."""
    assert goldens.relative_error(velocity(added), velocity(load(merged))) < 8e-3


def test_the_other_order_loses_proj_l(files, added, merged, tmp_path):
    """Without a word: the host adds no weight that its first model lacks."""
    assert len(projections(added)) == 2
    swapped = by_nodes(files, sla_first=False)
    assert projections(swapped) == []
    assert goldens.relative_error(velocity(swapped), velocity(load(merged))) > 0.01
    save_turbo_model(swapped, tmp_path / "swapped.safetensors")
    assert not read_checkpoint(tmp_path / "swapped.safetensors").has_sla
