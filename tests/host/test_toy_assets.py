"""The archive of a trained toy holds what the nodes load, and nothing too large is written."""

import argparse
import dataclasses
import sys
import tarfile
from pathlib import Path

import in_comfyui  # noqa: F401
import pytest
import torch
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).resolve().parents[1]))
import toy_assets
from turbodiffusion_pack.turbo_core.checkpoint import read_checkpoint
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model
from turbodiffusion_pack.turbo_core.training.initial_weights import initial_weights
from turbodiffusion_pack.turbo_core.training.presets import PRESETS


@pytest.fixture
def run(tmp_path):
    sizes = dataclasses.replace(PRESETS["toy-cpu"].sizes, num_layers=1)
    for name, tensors in {
        toy_assets.MERGED: initial_weights(sizes, 0, 64),
        toy_assets.VAE: {"x": torch.zeros(3)},
    }.items():
        (tmp_path / name).parent.mkdir()
        save_file(tensors, tmp_path / name)
    return tmp_path


def packed(run, monkeypatch, **options) -> Path:
    args = argparse.Namespace(archive=run / "toy.tar.xz", t2v=run, i2v=None, comfyui=None)
    monkeypatch.setattr(toy_assets, "arguments", lambda: args)
    monkeypatch.setattr(toy_assets, "import_comfyui", lambda folder: None)
    for name, value in options.items():
        monkeypatch.setattr(toy_assets, name, value)
    toy_assets.main()
    return args.archive


def test_the_archive_has_an_int8_checkpoint_and_the_vae(run, monkeypatch, tmp_path):
    with tarfile.open(packed(run, monkeypatch)) as archive:
        archive.extractall(tmp_path / "out", filter="data")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"toy_vae.safetensors", "toy_t2v.safetensors"}
    checkpoint = tmp_path / "out" / "toy_t2v.safetensors"
    assert read_checkpoint(checkpoint).quantized
    assert load_turbo_model(str(checkpoint)).model.diffusion_model.dim == 128


def test_more_than_fits_is_not_written(run, monkeypatch):
    with pytest.raises(SystemExit, match="train smaller"):
        packed(run, monkeypatch, MOST_BYTES=1000)
    assert not (run / "toy.tar.xz").exists()
