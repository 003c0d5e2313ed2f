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


def _installs(monkeypatch, present, outcomes):
    """The commands that prepare gives where these programs are there, ending in these outcomes."""
    given, outcomes = [], iter(outcomes)
    monkeypatch.setattr(prepare.shutil, "which", lambda name: name if name in present else None)
    monkeypatch.setattr(prepare.os, "geteuid", lambda: 0, raising=False)
    monkeypatch.setattr(prepare, "apt", lambda command: given.append(command[1]) or next(outcomes))
    prepare.install_chromium()
    return given


def test_chromium_is_installed_where_that_may_be(monkeypatch, caplog):
    assert _installs(monkeypatch, {"apt-get"}, [True]) == ["install"]
    assert _installs(monkeypatch, {"apt-get"}, [False, True, True]) == [
        "install", "update", "install",
    ]  # fmt: skip
    assert _installs(monkeypatch, {"apt-get", "chromium"}, []) == []
    assert "skipped" not in caplog.text


def test_without_chromium_its_tests_are_said_to_be_skipped(monkeypatch, caplog):
    assert _installs(monkeypatch, set(), []) == []
    assert _installs(monkeypatch, {"apt-get"}, [False, False]) == ["install", "update"]
    assert caplog.text.count("the tests in tests/ui are skipped") == 2
