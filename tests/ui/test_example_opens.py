"""The example workflows in ComfyUI's own frontend, in a headless browser."""

import json
import shutil

import comfyui_install
import pytest
import tiny_models
from comfyui_install import ROOT
from comfyui_server import ComfyServer
from ui_workflow import FOLDERS, api_format, model_files

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright and chromium")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
LOADED = "count => window.app?.graph?.nodes?.length === count"
NODES_KNOWN = "() => window.app?.graph && window.LiteGraph?.registered_node_types?.TurboDoctor"
ADD_DOCTOR = """() => {
    window.app.graph.clear();
    window.app.graph.add(window.LiteGraph.createNode("TurboDoctor"));
}"""
SHOWN = "() => window.app.graph.nodes[0].widgets[0].value"
READ_ONLY = "() => window.app.graph.nodes[0].widgets[0].options.read_only"

pytestmark = [
    pytest.mark.ui,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    comfyui = comfyui_install.find()
    if comfyui is None:
        pytest.skip("no ComfyUI found: run make test, or set COMFYUI_DIR to a ComfyUI folder")
    base = tmp_path_factory.mktemp("server")
    # The frontend tells of model files that are missing; empty ones of the right name will do.
    for workflow in WORKFLOWS:
        for class_type, name in model_files(json.loads(workflow.read_text(encoding="utf-8"))):
            file = base / "models" / FOLDERS[class_type] / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    tiny_models.write_picture(base / "input" / "example.png")
    with ComfyServer(comfyui, base) as running:
        yield running


@pytest.fixture
def page():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser.new_page(viewport={"width": 1920, "height": 1000})
        browser.close()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_it_opens_whole(server, page, path):
    """No dialog about missing nodes, no script error, and Run would send what the tests send."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"http://{server.address}/?template={path.stem}&source={ROOT.name}")
    page.wait_for_function(LOADED, arg=len(workflow["nodes"]), timeout=120_000)
    page.wait_for_timeout(2000)  # a dialog comes up after the graph
    assert [dialog.inner_text() for dialog in page.query_selector_all("[role=dialog]")] == []
    # Without internet the frontend cannot fetch its own news.
    assert [error for error in errors if error != "Failed to fetch"] == []
    info = server.object_info()
    unknown = page.evaluate("window.app.graph.nodes.filter(n => n.has_errors).map(n => n.type)")
    assert unknown == []
    sent = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    assert {k: without_title(node) for k, node in sent.items()} == api_format(workflow, info)


def test_the_doctor_shows_its_text(server, page):
    """On the node, in a box that is neither saved with the workflow nor sent with the prompt."""
    page.goto(f"http://{server.address}/")
    page.wait_for_function(NODES_KNOWN, timeout=120_000)
    page.wait_for_timeout(2000)  # the frontend opens its first graph
    page.evaluate(ADD_DOCTOR)
    page.evaluate("() => window.app.queuePrompt(0)")
    page.wait_for_function(SHOWN, timeout=60_000)
    assert page.evaluate(SHOWN).startswith("TurboDiffusion for Wan ")
    assert page.evaluate(READ_ONLY) is True, "Nodes 2.0 would let a user type into it"
    (saved,) = page.evaluate("() => window.app.graph.serialize().nodes")
    assert not saved.get("widgets_values")
    (sent,) = page.evaluate("async () => (await window.app.graphToPrompt()).output").values()
    assert sent["inputs"] == {}


def without_title(node: dict) -> dict:
    return {key: value for key, value in node.items() if key != "_meta"}
