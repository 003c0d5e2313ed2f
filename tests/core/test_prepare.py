"""What tests/prepare.py installs of a ComfyUI's requirements."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
import prepare


def _requirements(folder, monkeypatch, chosen):
    monkeypatch.setenv("COMFYUI_PACKAGES", chosen)
    lines = "torch\ncomfyui-embedded-docs==0.1\n# a note\naiohttp>=3\ncomfy-kitchen==0.2.31 # so\n"
    (folder / "requirements.txt").write_text(lines)
    return prepare.comfyui_requirements(folder)


def test_the_hosts_own_versions(tmp_path, monkeypatch):
    expected = ["aiohttp>=3", "comfy-kitchen==0.2.31"]
    assert _requirements(tmp_path, monkeypatch, "") == expected


def test_chosen_versions_take_their_place(tmp_path, monkeypatch):
    chosen = ["comfy-kitchen==0.2.40", "comfy-aimdo==0.6.0"]
    assert _requirements(tmp_path, monkeypatch, " ".join(chosen)) == ["aiohttp>=3", *chosen]
