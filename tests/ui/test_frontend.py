"""The pack in ComfyUI's own frontend, in a headless Chromium: what a user sees and does.

`make test` leaves out the slow ones, which run every video example from the page.
"""

import copy
import uuid
from itertools import combinations

import comfyui_install
import example_models
import pytest
from comfyui_install import ROOT
from comfyui_server import ComfyServer
from ui_workflow import NOTES, api_format

pytest.importorskip("playwright.sync_api", reason="needs playwright")
import frontend
from frontend import CHROMIUM, Frontend

EXAMPLES = example_models.examples()
BLUEPRINTS = sorted(path.stem for path in (ROOT / "subgraphs").glob("*.json"))
HELP_PAGES = sorted(path.stem for path in (ROOT / "web" / "docs").glob("*.md"))
STYLES = {"LiteGraph": False, "Nodes 2.0": True}
VIDEOS = [name for name in EXAMPLES if "to_video" in name]
QUICKEST = "Text_to_video_1.3B_480p"
SMALL = {
    "EmptyHunyuanLatentVideo": {"width": 160, "height": 96, "length": 9},
    "WanAdaptiveResolution": {"resolution": "custom", "megapixels": 0.015},
    "WanVideoLength": {"seconds": 0.5},
}
VIDEO_SHOWN = """() => [...document.querySelectorAll("video, img")]
    .some(shown => shown.src.includes("type=output") && shown.src.includes(".mp4")
        && (shown.videoWidth || shown.naturalWidth) > 0)"""
SHOWN_READ_ONLY = """text => {
    const shown = [...document.querySelectorAll("textarea")].filter(
        area => area.value === text && area.getBoundingClientRect().height > 20);
    return shown.length === 1 && (shown[0].readOnly || shown[0].disabled);
}"""
PICTURES_SHOWN = """count => [...document.querySelectorAll(".node-help-content img")]
    .filter(picture => picture.naturalWidth > 0).length === count"""
WIDGETS_SHOWN = """() => app.graph.nodes[0].widgets
    .filter(widget => !widget.hidden).map(widget => widget.name)"""

pytestmark = [
    pytest.mark.ui,
    pytest.mark.server,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    comfyui = comfyui_install.find()
    if comfyui is None:
        pytest.skip("no ComfyUI found: run make test, or set COMFYUI_DIR to a ComfyUI folder")
    base = tmp_path_factory.mktemp("server")
    example_models.write(comfyui, base)
    frontend.skip_tutorial(base)
    with ComfyServer(comfyui, base) as running:
        yield running


@pytest.fixture(scope="module")
def page(server):
    with frontend.frontend(server.address) as shown:
        yield shown


@pytest.fixture(autouse=True)
def no_errors_of_ours(page: Frontend):
    yield
    found, page.errors = page.errors, []
    assert found == []


@pytest.fixture(params=STYLES)
def nodes_2(request, page) -> bool:
    """Whether nodes are drawn in the style of Nodes 2.0; the page is set to it."""
    page.set_style(STYLES[request.param])
    return STYLES[request.param]


def meet(one: list[float], other: list[float]) -> bool:
    """Whether two boxes of [left, top, right, bottom] have an area in common."""
    beside = one[2] <= other[0] or other[2] <= one[0]
    above = one[3] <= other[1] or other[3] <= one[1]
    return not beside and not above


def within(box: list[float], group: list[float]) -> bool:
    return box[2] <= group[2] and box[3] <= group[3]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_opens_whole(server, page, nodes_2, name):
    """Nothing missing, covered or out of its place, and Run would send what the tests send."""
    workflow = EXAMPLES[name]
    page.drop(name, workflow)
    assert page.told_at_opening() == []
    kinds = {str(node["id"]): node["type"] for node in workflow["nodes"]}
    boxes = page.boxes(nodes_2)
    assert boxes.keys() == kinds.keys()
    pairs = combinations(boxes, 2)
    assert [(kinds[a], kinds[b]) for a, b in pairs if meet(boxes[a], boxes[b])] == []
    left = [
        kinds[key]
        for group in page.groups()
        for key, box in boxes.items()
        if meet(box, group) and not within(box, group)
    ]
    assert left == [], "stick out of their group"
    (note,) = (key for key, kind in kinds.items() if kind in NOTES)
    assert page.in_sight(boxes[note][0] + 2, boxes[note][1] + 2), "the note is cut off"
    assert page.prompt() == api_format(workflow, server.object_info())


def test_a_missing_node_would_be_seen(page):
    workflow = copy.deepcopy(EXAMPLES["Quantize_and_save"])
    workflow["nodes"][1]["type"] = "UnheardOf"
    page.drop("unheard_of", workflow)
    assert "UnheardOf" in "".join(page.told_at_opening())
    page.close_what_was_told()


def test_a_missing_checkpoint_is_told_with_its_folder(page):
    """With a Download button in frontends that take .pth; that of ComfyUI 0.3.75 takes none."""
    workflow = copy.deepcopy(EXAMPLES["Text_to_video_1.3B_480p"])
    (loader,) = (node for node in workflow["nodes"] if node["type"] == "TurboLoader")
    (model,) = loader["properties"]["models"]
    missing = f"not-here-{model['name']}"
    model["url"] = model["url"].replace(model["name"], missing)
    model["name"] = loader["widgets_values"][0] = missing
    page.drop("missing_model", workflow)
    told = page.missing_models()
    page.close_what_was_told()
    assert missing in told
    assert "diffusion_models" in told
    assert "Download" in told


@pytest.mark.parametrize(
    "name", [n if n == QUICKEST else pytest.param(n, marks=pytest.mark.slow) for n in VIDEOS]
)
def test_run_makes_a_video_that_is_seen(page, name):
    page.set_style(False)
    page.drop(name, EXAMPLES[name])
    for class_type, values in SMALL.items():
        page.set_widgets(class_type, values)
    page.look_at("SaveVideo")
    page.press_run()
    page.page.wait_for_function(VIDEO_SHOWN, timeout=60_000)


def test_what_was_saved_and_the_report_are_seen(page, nodes_2):
    workflow = copy.deepcopy(EXAMPLES["Quantize_and_save"])
    # Not of the other style's run: newer frontends keep results for workflows of the same id.
    workflow["id"] = str(uuid.uuid4())
    (quantize,) = (node for node in workflow["nodes"] if node["type"] == "W8A8Quantize")
    # Not the same twice: ComfyUI 0.3.75 tells nothing of a node that it need not run again.
    # Not set on the page: its Nodes 2.0, a beta then, show no widget that comes after a change.
    quantize["widgets_values"] = ["exact" if nodes_2 else "fast", True]
    page.drop("quantize", workflow)
    page.press_run()
    saved, report = page.text_on("TurboSaveCheckpoint"), page.text_on("W8A8Quantize")
    assert saved.startswith("diffusion_models") and saved.endswith(".safetensors")
    assert "blocks.0.self_attn.q" in report
    for text in (saved, report):
        page.page.wait_for_function(SHOWN_READ_ONLY, arg=text)


def test_the_doctors_text_is_seen(page, nodes_2):
    """In a box that is neither saved with the workflow nor sent with the prompt."""
    page.put_alone("TurboDoctor")
    page.press_run()
    text = page.text_on("TurboDoctor")
    assert text.startswith("TurboDiffusion for Wan ")
    page.page.wait_for_function(SHOWN_READ_ONLY, arg=text)
    (saved,) = page.page.evaluate("() => app.graph.serialize().nodes")
    assert not saved.get("widgets_values")
    (sent,) = page.prompt().values()
    assert sent["inputs"] == {}


def test_megapixels_are_shown_where_they_count(page, nodes_2):
    page.put_alone("WanAdaptiveResolution")
    assert "megapixels" not in page.page.evaluate(WIDGETS_SHOWN)
    page.set_widgets("WanAdaptiveResolution", {"resolution": "custom"})
    assert "megapixels" in page.page.evaluate(WIDGETS_SHOWN)
    page.set_widgets("WanAdaptiveResolution", {"resolution": "720p"})
    assert "megapixels" not in page.page.evaluate(WIDGETS_SHOWN)


def test_the_node_library_lists_the_blueprints(page):
    found = page.search_nodes("TurboDiffusion")
    assert [name for name in BLUEPRINTS if name not in found] == []


def test_every_help_page_opens(page):
    for name in HELP_PAGES:
        page.put_alone(name)
        text = (ROOT / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
        assert page.help_on(name).startswith(text.split("\n")[0].removeprefix("# "))
        page.page.wait_for_function(PICTURES_SHOWN, arg=text.count("!["))


def test_the_templates_have_their_thumbnails(page):
    assert page.thumbnails(ROOT.name) == sorted(EXAMPLES)
