"""Stand-ins for the files that the example workflows ask for: tiny models, some words as umT5."""

import json
from pathlib import Path

import tiny_models
import torch
import trained_pair
from comfyui_install import ROOT
from ui_workflow import FOLDERS, TRAINED, model_files

EXAMPLES = ROOT / "example_workflows"
WORDS = "turbo_test_words"  # the one tensor of a file that turbo_test_nodes reads as a text encoder


def examples() -> dict[str, dict]:
    """Every example workflow by the name of its file, without the ending."""
    paths = sorted(EXAMPLES.glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def write(comfyui: Path, base: Path) -> None:
    """A file for every model that an example asks for, and its picture, into a server's `base`."""
    for class_type, name in {file for w in examples().values() for file in model_files(w)}:
        path = base / "models" / FOLDERS[class_type] / name
        if class_type == "VAELoader":
            tiny_models.write_vae(comfyui, path)
        else:
            tiny_models.write_checkpoint(path, tensors(class_type, name))
    tiny_models.write_picture(base / "input" / "example.png")


def tensors(class_type: str, name: str) -> dict[str, torch.Tensor]:
    """What stands in for the model file `name`; the two of an expert pair differ."""
    seed = int("low" in name.lower())
    if class_type == "CLIPLoader":
        return {WORDS: torch.zeros(1)}
    if FOLDERS[class_type] == "loras":
        return tiny_models.lora(seed)
    if name in TRAINED:
        start = tiny_models.stock_checkpoint()
        if "sla" in name:
            return trained_pair.with_proj_l(trained_pair.tuned(start, 1))
        return trained_pair.tuned(start, 2)
    if class_type == "UNETLoader":
        channels = tiny_models.I2V_CHANNELS if "I2V" in name else tiny_models.T2V_CHANNELS
        return tiny_models.stock_checkpoint(seed, in_channels=channels)
    return (tiny_models.i2v_checkpoint if "I2V" in name else tiny_models.t2v_checkpoint)(seed)
