"""A model loads to the same output from every layout its checkpoint is found in."""

import goldens
import in_comfyui
import pytest
import torch
from layouts import LAYOUTS
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model

KEY = "t2v.ragged"
MODELS = ("t2v.pth", "t2v-quant.pth")


def _forward(path):
    data = goldens.load("forward")
    x = data[f"{KEY}.x"][..., :1, :, :]  # 224 tokens
    model = load_turbo_model(str(path))
    return in_comfyui.velocity(model, x, data[f"{KEY}.context"], 987.5)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """The tensors of the official files, and the output of each."""
    folder = tmp_path_factory.mktemp("official")
    files = {name: goldens.unpack_checkpoint(name, folder) for name in MODELS}
    return {name: (torch.load(file), _forward(file)) for name, file in files.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_the_output_is_the_official_files(official, tmp_path, model, layout):
    tensors, expected = official[model]
    assert torch.equal(_forward(LAYOUTS[layout](tensors, tmp_path)), expected)


def test_a_training_file_in_bf16_throughout(official, tmp_path):
    """Norms and projections too are bf16 then, which costs a little precision and nothing else."""
    tensors, expected = official["t2v.pth"]
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    out = _forward(LAYOUTS["training"](tensors, tmp_path))
    assert 0 < goldens.relative_error(out, expected) < 5e-3
