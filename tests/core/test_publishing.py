"""What the ComfyUI registry and the README's readers see."""

import io
import json
import re
import struct
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
from PIL import Image
from turbodiffusion_pack.turbo_core.run_report import GRANULARITY, RunReport
from ui_workflow import TRAINED

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LARGEST_ZIP, LARGEST_FILE = 1_000_000, 100_000  # bytes
# All that an installed pack consists of.
SHIPPED = {
    "__init__.py",
    "CHANGELOG.md",
    "LICENSE",
    "README.md",
    "example_workflows",
    "kernels",
    "locales",
    "nodes",
    "pyproject.toml",
    "requirements.txt",
    "subgraphs",
    "turbo_core",
    "web",
}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def lines(name: str) -> list[str]:
    """The lines of a list file, without comments and blank lines."""
    stripped = (line.strip() for line in read(name).splitlines())
    return [line for line in stripped if line and not line.startswith("#")]


def packed() -> set[str]:
    """The files and folders at the top that publishing packs."""
    ignored = [pattern.rstrip("/") for pattern in lines(".comfyignore") + lines(".gitignore")]
    names = {path.name for path in ROOT.iterdir()}
    return {name for name in names if not any(fnmatch(name, pattern) for pattern in ignored)}


def test_requirements_equal_the_dependencies():
    assert lines("requirements.txt") == PROJECT["project"]["dependencies"]


def test_registry_fields():
    comfy = PROJECT["tool"]["comfy"]
    assert comfy["DisplayName"] == "TurboDiffusion for Wan"
    assert re.fullmatch(r"[a-z0-9-]+", comfy["PublisherId"])
    assert comfy["requires-comfyui"] == ">=0.3.75"
    assert "web" not in comfy, "help pages are served by WEB_DIRECTORY; both would load JS twice"
    assert PROJECT["project"]["name"] == "turbodiffusion-wan"
    urls = PROJECT["project"]["urls"]
    assert urls.keys() == {"Repository", "Documentation", "Bug Tracker"}
    assert all(url.startswith(urls["Repository"]) for url in urls.values())
    assert urls["Repository"].startswith("https://github.com/")


def test_the_icon_is_one_that_the_registry_takes():
    """A square of at most 400 pixels, where the repository has it."""
    url = PROJECT["tool"]["comfy"]["Icon"]
    repository = PROJECT["project"]["urls"]["Repository"].removeprefix("https://github.com/")
    start = f"https://raw.githubusercontent.com/{repository}/main/"
    assert url.startswith(start)
    header = (ROOT / url.removeprefix(start)).read_bytes()[:24]
    width, height = struct.unpack(">II", header[16:])  # of a PNG
    assert header.startswith(b"\x89PNG")
    assert width == height <= 400


def test_the_models_are_those_of_the_examples():
    models = {m["location"]: m["model_url"] for m in PROJECT["tool"]["comfy"]["Models"]}
    used = {}
    for path in (ROOT / "example_workflows").glob("*.json"):
        for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
            if node["type"] == "TurboLoader" and "models" in node["properties"]:  # no trained one
                (model,) = node["properties"]["models"]
                used[f"models/{model['directory']}/{model['name']}"] = model["url"]
    assert models == used


def test_license():
    assert PROJECT["project"]["license"] == {"file": "LICENSE"}
    assert "Apache License" in read("LICENSE")


def test_newest_change_is_this_version():
    versions = re.findall(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)
    assert versions[0] == PROJECT["project"]["version"]


def test_only_the_pack_is_packed():
    assert packed() == SHIPPED


def test_the_published_zip_is_small():
    """The registry takes 100 MB; a pack of this kind has no reason to be one."""
    names = [n for n in ROOT.rglob("*") if n.relative_to(ROOT).parts[0] in SHIPPED]
    files = [n for n in names if n.is_file() and "__pycache__" not in n.parts]
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            archive.write(file, file.relative_to(ROOT))
    assert len(packed.getvalue()) <= LARGEST_ZIP
    assert {file.name for file in files if file.stat().st_size > LARGEST_FILE} == set()


def test_a_bug_report_asks_for_the_doctors_text():
    form = read(".github/ISSUE_TEMPLATE/bug.yml")
    assert "python turbo_core/doctor.py" in form and "Turbo Doctor" in form
    assert form.count("required: true") == 3


def test_publishing_runs_on_this_project_only():
    action = read(".github/workflows/publish.yml")
    assert f"github.repository_owner == '{PROJECT['tool']['comfy']['PublisherId']}'" in action
    assert "paths: [pyproject.toml]" in action


def test_readme_is_short():
    assert len(read("README.md").splitlines()) <= 150


@pytest.mark.parametrize(
    ("page", "picture", "most"),
    [
        ("README.md", ".github/toy.webp", 1_000_000),
        ("turbo_core/training/README.md", ".github/toy_stages.webp", 400_000),
    ],
)
def test_the_pages_pictures_move_and_are_small(page, picture, most):
    assert f"{picture})" in read(page)
    assert (ROOT / picture).stat().st_size < most
    assert Image.open(ROOT / picture).n_frames == 17


def test_readme_shows_the_log_line_of_a_run():
    report = RunReport()
    counts = report.counts
    counts.forwards, counts.num_blocks = 4, 30
    counts.sla["sagesla top-k 0.1 (int8 QK and fp8 PV)"].update(range(30))
    counts.fused.update(range(30))
    counts.int8[GRANULARITY["rows"]].update(range(300))
    counts.kernels.update({("norm", "Triton", None), ("int8_linear", "CUDA", None)})
    assert report.line() in " ".join(read("README.md").split())


def test_readme_and_changelog_name_every_node():
    nodes = {page.stem for page in (ROOT / "web" / "docs").glob("*.md")}
    assert len(nodes) == 13
    for node in nodes:
        assert f"| [{node}](web/docs/{node}.md) |" in read("README.md")
        assert f"**{node}**" in read("CHANGELOG.md")


def test_nodes_that_tell_something_have_a_box_for_it():
    """The frontend shows text on a node only where a script makes room for it."""
    telling = set()
    for path in (ROOT / "nodes").glob("*.py"):
        for node in re.split(r"^class ", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
            if "ui.PreviewText(" in node:
                telling.add(re.search(r'node_id="(\w+)"', node)[1])
    heights = re.search(r"HEIGHTS = \{(.*?)\}", read("web/turbo_text.js"), re.DOTALL)[1]
    assert set(re.findall(r"(\w+):", heights)) == telling
    assert {"TurboDoctor", "TurboSaveCheckpoint", "W8A8Quantize"} <= telling


def test_readme_links_to_every_example():
    examples = sorted(path.name for path in (ROOT / "example_workflows").glob("*.json"))
    assert examples
    assert [e for e in examples if f"(example_workflows/{e})" not in read("README.md")] == []


def test_readme_lists_the_files_of_the_examples():
    """But for the LoRAs and the stock model, which stand for any, and what a user trains."""
    loaders = ("TurboLoader", "CLIPLoader", "VAELoader")
    for path in (ROOT / "example_workflows").glob("*.json"):
        for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
            if node["type"] in loaders and node["widgets_values"][0] not in TRAINED:
                assert f"`{node['widgets_values'][0]}`" in read("README.md")


def test_readme_links_to_files_that_exist():
    targets = re.findall(r"\]\((?!https?://|#)([^)]+)\)", read("README.md"))
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
