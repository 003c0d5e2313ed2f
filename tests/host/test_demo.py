"""The toy in the repository: its files are made, unpacked and loaded, and it does as it is told."""

import sys
from pathlib import Path

import comfyui_install
import in_comfyui  # noqa: F401
import pytest
import torch
import toy_assets
import trained_pair
from safetensors.torch import load_file, save_file
from turbodiffusion_pack.turbo_core.checkpoint import read_checkpoint
from turbodiffusion_pack.turbo_core.training.merge import merge_files

sys.path.append(str(Path(__file__).resolve().parents[1]))
import demo


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """In place of tests/data/toy."""
    monkeypatch.setattr(toy_assets, "FOLDER", tmp_path / "toy")
    return tmp_path / "toy"


def test_a_training_becomes_the_demos_files(folder, tmp_path, monkeypatch):
    """A merged model in float32 in, an INT8 one with proj_l out, which the demo then asks for."""
    files = trained_pair.write(trained_pair.trio(), tmp_path / "trio")
    merged, vae_file = tmp_path / "merged.safetensors", tmp_path / "vae.safetensors"
    merge_files(*(files[role] for role in trained_pair.ROLES), merged)
    vae = {"conv.weight": torch.randn(3, 2)}
    save_file(vae, vae_file)
    command = ["toy_assets.py", "--t2v", str(merged), "--vae", str(vae_file)]
    monkeypatch.setattr(sys, "argv", command)
    toy_assets.main()
    toy_assets.unpack("t2v", tmp_path / "models")
    model = read_checkpoint(tmp_path / "models" / toy_assets.PLACES["t2v"])
    assert model.quantized and model.has_sla
    small = load_file(tmp_path / "models" / toy_assets.PLACES["vae"])
    assert torch.equal(small["conv.weight"], vae["conv.weight"])
    workflow = demo.toy_workflow("t2v", "a red circle")
    assert demo.loaders(workflow)[0]["checkpoint"] == toy_assets.PLACES["t2v"].name
    assert demo.node_inputs(workflow, "SLAAttentionPatch")["topk"] == 0.3


def test_both_experts_attend_to_as_many_blocks_as_they_learnt_with():
    """The workflow that others take stays as it is: it has no patch nodes, and top-k 0.1."""
    given = demo.workflow_file("i2v")
    workflow = demo.toy_workflow("i2v", "")
    switch = demo.node_inputs(workflow, "Wan22ExpertSwitch")
    for name, loader in (("model_high", "1"), ("model_low", "2")):
        patch = workflow[switch[name][0]]
        assert patch["class_type"] == "SLAAttentionPatch" and switch[name][1] == 0
        assert patch["inputs"]["topk"] == 0.2 and patch["inputs"]["model"] == [loader, 0]
    assert len(workflow) == len(given) + 2
    assert demo.workflow_file("i2v") == given


def test_a_picture_that_could_not_be_written_is_refused_first(monkeypatch, tmp_path, capsys):
    for words in (
        ["--picture", str(tmp_path / "toy.png")],
        ["--picture", str(tmp_path / "no" / "toy.webp")],
        ["--picture", str(tmp_path / "toy.webp"), "--checkpoint", __file__],
    ):
        monkeypatch.setattr(sys, "argv", ["demo.py", *words])
        with pytest.raises(SystemExit):
            demo.arguments()
        assert "error: --picture is " in capsys.readouterr().err


def test_the_files_fit_the_repository():
    assert all(toy_assets.packed(name).exists() for name in toy_assets.PLACES)
    assert sum(path.stat().st_size for path in toy_assets.FOLDER.glob("*")) <= toy_assets.MOST


def test_without_the_files_no_video_is_made(folder, tmp_path):
    """Random models in their place would show nothing, and say that all is well."""
    with pytest.raises(FileNotFoundError, match="toy_vae"):
        toy_assets.unpack("t2v", tmp_path / "models")


@pytest.mark.server
def test_the_toy_does_what_the_prompts_say(monkeypatch, tmp_path):
    """`make demo` with one prompt each: text and picture to video, read, and kept as a picture."""
    if comfyui_install.find() is None:
        pytest.skip("no ComfyUI found: run make test, or set COMFYUI_DIR to a ComfyUI folder")
    monkeypatch.setattr(demo, "BASE", tmp_path / "server")
    few = {name: prompts[:1] for name, prompts in demo.PROMPTS.items()}
    monkeypatch.setattr(demo, "PROMPTS", few)
    picture = tmp_path / "demo.webp"
    monkeypatch.setattr(sys, "argv", ["demo.py", "--picture", str(picture)])
    assert demo.main() == 0
    assert picture.exists()
