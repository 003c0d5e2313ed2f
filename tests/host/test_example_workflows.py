"""The example workflows and the help pages, in a real ComfyUI server."""

import copy
import json
import urllib.request
from itertools import combinations
from pathlib import Path

import comfyui_install
import pytest
import tiny_models
from comfyui_install import ROOT
from comfyui_server import ComfyServer, node_inputs
from PIL import Image
from ui_workflow import NOTES, api_format, specs, widget_inputs
from video import play

EXAMPLES = ROOT / "example_workflows"
SMALL = {"width": 160, "height": 96, "length": 9}
TITLE_BAR = 30


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


WORKFLOWS = {path.stem: load(path) for path in EXAMPLES.glob("*.json")}


@pytest.fixture(params=WORKFLOWS)
def workflow(request) -> dict:
    return copy.deepcopy(WORKFLOWS[request.param])


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server with stand-ins of the names the examples use: tiny models, an empty text encoder."""
    comfyui = comfyui_install.find()
    if comfyui is None:
        pytest.skip("no ComfyUI found: run make test, or set COMFYUI_DIR to a ComfyUI folder")
    models = tmp_path_factory.mktemp("models")
    for workflow in WORKFLOWS.values():
        tiny_models.write_checkpoint(models / saved(workflow, "TurboLoader")[0])
        tiny_models.write_vae(comfyui, models / saved(workflow, "VAELoader")[0])
        (models / saved(workflow, "CLIPLoader")[0]).touch()
    folders = {name: [models] for name in ("diffusion_models", "vae", "text_encoders")}
    with ComfyServer(comfyui, tmp_path_factory.mktemp("server"), folders) as running:
        yield running


def saved(workflow: dict, class_type: str) -> list:
    """The widget values of the only node of that class."""
    (values,) = (n["widgets_values"] for n in workflow["nodes"] if n["type"] == class_type)
    return values


def small(prompt: dict) -> dict:
    """An API-format example at a small size, with the test's text encoder in place of umT5."""
    (clip,) = (key for key, node in prompt.items() if node["class_type"] == "CLIPLoader")
    del prompt[clip]
    for node in prompt.values():
        if node["class_type"] == "CLIPTextEncode":
            node["class_type"] = "TurboTestTextEncode"
            del node["inputs"]["clip"]
    node_inputs(prompt, "EmptyHunyuanLatentVideo").update(SMALL)
    return prompt


def put_behind(prompt: dict, class_type: str, added: str, **inputs) -> None:
    """Put an `added` MODEL node between the only node of `class_type` and all that it feeds."""
    (source,) = (k for k, node in prompt.items() if node["class_type"] == class_type)
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if value == [source, 0]:
                node["inputs"][name] = ["added", 0]
    prompt["added"] = {"class_type": added, "inputs": {"model": [source, 0], **inputs}}


def test_every_example_has_a_small_thumbnail():
    assert WORKFLOWS
    names = {path.name for path in EXAMPLES.iterdir()}
    assert names == {f"{stem}.{end}" for stem in WORKFLOWS for end in ("json", "jpg")}
    for stem in WORKFLOWS:
        thumbnail = EXAMPLES / f"{stem}.jpg"
        assert thumbnail.stat().st_size < 200_000
        assert min(Image.open(thumbnail).size) >= 300


def test_links_connect_what_they_say(workflow):
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"])
    for number, source, output, target, slot, kind in workflow["links"]:
        start, end = nodes[source]["outputs"][output], nodes[target]["inputs"][slot]
        assert number in start["links"]
        assert number == end["link"]
        assert start["type"] == end["type"] == kind


def test_no_node_covers_another(workflow):
    for a, b in combinations(workflow["nodes"], 2):
        apart = [
            a["pos"][axis] + a["size"][axis] <= b["pos"][axis] - bar
            or b["pos"][axis] + b["size"][axis] <= a["pos"][axis] - bar
            for axis, bar in ((0, 0), (1, TITLE_BAR))
        ]
        assert any(apart), f"{a['type']} and {b['type']} overlap"


def test_a_note_says_where_every_file_goes(workflow):
    (note,) = (n["widgets_values"][0] for n in workflow["nodes"] if n["type"] in NOTES)
    for loader, folder in (
        ("TurboLoader", "diffusion_models"),
        ("CLIPLoader", "text_encoders"),
        ("VAELoader", "vae"),
    ):
        assert f"models/{folder}" in note
        assert saved(workflow, loader)[0] in note
    assert "https://huggingface.co/TurboDiffusion" in note


@pytest.mark.server
def test_widgets_are_saved_in_the_order_of_the_schema(server, workflow):
    info = server.object_info()
    for node in workflow["nodes"]:
        if node["type"] not in NOTES:
            listed = [i["name"] for i in node["inputs"] if "widget" in i]
            order = [name for name, _ in widget_inputs(node, info[node["type"]])]
            assert listed == [name for name in order if "." not in name][: len(listed)]


@pytest.mark.server
def test_our_nodes_stand_at_their_defaults(server, workflow):
    info = server.object_info()
    module = info["TurboLoader"]["python_module"]
    ours = [n for n in workflow["nodes"] if n["type"] not in NOTES]
    ours = [n for n in ours if info[n["type"]]["python_module"] == module]
    assert len(ours) == 3
    for node in ours:
        values = dict(widget_inputs(node, info[node["type"]]))
        for name, _, options in specs(info[node["type"]]["input"]):
            assert values.get(name) == options.get("default", values.get(name)), name


@pytest.mark.server
def test_comfyui_accepts_it_as_it_is(server, workflow):
    """Validation passes, and what ends the run is the empty file that stands in for umT5."""
    failed = []

    def note_error(kind, data):
        if kind == "execution_error":
            failed.append(data["node_type"])

    server.run(api_format(workflow, server.object_info()), note_error)
    assert failed == ["CLIPLoader"]


@pytest.mark.server
def test_it_makes_a_video(server, workflow):
    run = server.run(small(api_format(workflow, server.object_info())))
    assert run.outcome == "execution_success", run.message
    (video,) = run.files
    assert play(video) == (SMALL["length"], SMALL["width"], SMALL["height"])


@pytest.mark.server
def test_it_runs_in_context_windows(server, workflow):
    prompt = small(api_format(workflow, server.object_info()))
    schema = server.object_info("WanContextWindowsManual")["WanContextWindowsManual"]["input"]
    options = {n: o.get("default") for n, kind, o in specs(schema) if kind != "MODEL"}
    options |= {"context_length": 17, "context_overlap": 5}
    options |= {"context_schedule": "standard_static", "fuse_method": "pyramid"}
    put_behind(prompt, "SLAAttentionPatch", "WanContextWindowsManual", **options)
    node_inputs(prompt, "EmptyHunyuanLatentVideo")["length"] = 33
    before = len(server.log_text())
    run = server.run(prompt)
    assert run.outcome == "execution_success", run.message
    (line,) = (t for t in server.log_text()[before:].splitlines() if "SLA in 2 of 2" in t)
    steps = node_inputs(prompt, "rCMSampler")["steps"]
    forwards = int(line.split("TurboDiffusion: ")[1].split()[0])
    assert forwards > steps, "there was one window only"


@pytest.mark.server
def test_the_host_offers_it_as_a_template(server):
    (offered,) = server.get("/workflow_templates").values()
    assert sorted(offered) == sorted(WORKFLOWS)


@pytest.mark.server
def test_help_pages_name_every_input_and_output(server):
    info = server.object_info()
    module = info["TurboLoader"]["python_module"]
    ours = {name: node for name, node in info.items() if node["python_module"] == module}
    pages = {path.stem for path in (ROOT / "web" / "docs").iterdir()}
    assert pages == set(ours)
    for name, node in ours.items():
        page = help_page(server, name)
        assert page.startswith(f"# {node['display_name']}\n")
        inputs = [i for i, _, _ in specs(node["input"])]
        assert [n for n in (*inputs, *node["output_name"]) if f"| `{n}` |" not in page] == []


def help_page(server: ComfyServer, node: str) -> str:
    """The page as the frontend fetches it."""
    url = f"http://{server.address}/extensions/{ROOT.name}/docs/{node}.md"
    with urllib.request.urlopen(url, timeout=60) as response:
        return response.read().decode("utf-8")
