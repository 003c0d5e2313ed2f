"""ComfyUI's frontend in a headless Chromium: what a user of the page sees and does."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from comfyui_install import ROOT
from playwright.sync_api import Page, Route, expect, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
SIZE = {"width": 1920, "height": 1000}
OWN_SCRIPTS = f"/extensions/{ROOT.name}/"
# The host's own: files that a fresh user folder has not got, servers elsewhere that it may not ask,
# its package of templates, which tests/prepare.py leaves out.
HOSTS_ERRORS = (
    "Failed to load resource",
    "Content Security Policy",
    "Error fetching file size: TypeError: Failed to fetch",
    "Error loading core workflow templates",
)

NODES_KNOWN = """() => !!window.app?.graph?.nodes.length
    && !!window.LiteGraph?.registered_node_types?.TurboDoctor"""
DROP = """([name, text]) => {
    for (const node of app.graph.nodes) node.ofBefore = true;
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([text], name, { type: "application/json" }));
    const canvas = document.querySelector("#graph-canvas");
    const { x, y, width, height } = canvas.getBoundingClientRect();
    const at = { clientX: x + width / 2, clientY: y + height / 2 };
    for (const kind of ["dragenter", "dragover", "drop"])
        canvas.dispatchEvent(
            new DragEvent(kind, { bubbles: true, cancelable: true, dataTransfer, ...at }));
}"""
DROPPED = """count => app.graph.nodes.length === count
    && app.graph.nodes.every(node => !node.ofBefore)"""
# [left, top, right, bottom] in the graph's coordinates, the title within.
BOXES = """() => Object.fromEntries(app.graph.nodes.map(node => {
    const [x, y, width, height] = node.getBounding();
    return [node.id, [x, y, x + width, y + height]];
}))"""
BOXES_2 = """() => Object.fromEntries([...document.querySelectorAll("[data-node-id]")].map(node => {
    const { left, top, right, bottom } = node.getBoundingClientRect();
    const inGraph = (x, y) => app.canvas.convertEventToCanvasOffset({ clientX: x, clientY: y });
    return [node.dataset.nodeId, [...inGraph(left, top), ...inGraph(right, bottom)]];
}))"""
GROUPS = """() => app.graph.groups.map(({ pos: [x, y], size: [width, height] }) =>
    [x, y, x + width, y + height])"""
# Whether the point of the graph is free of the page's bars and menus.
IN_SIGHT = """([x, y]) => {
    const canvas = document.querySelector("#graph-canvas");
    const [left, top] = app.canvas.ds.convertOffsetToCanvas([x, y]);
    const start = canvas.getBoundingClientRect();
    const there = document.elementFromPoint(start.x + left, start.y + top);
    return there === canvas || !!there?.closest("[data-node-id], .dom-widget");
}"""
SET = """([kind, values]) => {
    for (const node of app.graph.nodes.filter(node => node.comfyClass === kind))
        for (const widget of node.widgets ?? [])
            if (widget.name in values) {
                widget.value = values[widget.name];
                widget.callback?.(widget.value);
            }
}"""
SELECT = """kind => {
    const node = app.graph.nodes.find(node => node.comfyClass === kind);
    app.canvas.deselectAll();
    app.canvas.centerOnNode(node);
    app.canvas.selectNode(node);
}"""
ALONE = """kind => {
    app.graph.clear();
    const node = LiteGraph.createNode(kind);
    app.graph.add(node);
    app.canvas.centerOnNode(node);
}"""
TEXT = """kind => app.graph.nodes.find(node => node.comfyClass === kind)
    ?.widgets?.find(widget => widget.name === "text")?.value ?? "" """

OWN_PICTURE = "shown => shown.naturalWidth > 0 && !shown.src.includes('default-template')"


def skip_tutorial(base: Path) -> None:
    """Set up a server's `base` so that its page opens with a graph, as every time but the first."""
    settings = base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"Comfy.TutorialCompleted": True}), encoding="utf-8")


class Frontend:
    """The page of one running server."""

    def __init__(self, page: Page, address: str):
        self.page = page
        self.address = address
        self.errors: list[str] = []
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", self.note)
        page.route("**/*", self.only_this_server)

    def note(self, message) -> None:
        if message.type == "error" and not any(known in message.text for known in HOSTS_ERRORS):
            self.errors.append(f"{message.text} ({message.location.get('url')})")

    def only_this_server(self, route: Route) -> None:
        route.continue_() if self.address in route.request.url else route.abort()

    def open(self) -> None:
        """Load the page; of what the host reports while it starts, only what is ours counts."""
        self.page.goto(f"http://{self.address}/")
        self.page.wait_for_function(NODES_KNOWN, timeout=120_000)
        self.page.wait_for_timeout(1000)  # the frontend opens its first graph
        self.errors = [error for error in self.errors if OWN_SCRIPTS in error]
        for banner in self.page.get_by_text("Introducing Nodes 2.0").all():
            banner.locator("xpath=ancestor::*[.//button][1]").locator("button").last.click()

    def set_style(self, nodes_2: bool) -> None:
        """Draw nodes in the style of Nodes 2.0, or in LiteGraph's."""
        setting = "value => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', value)"
        self.page.evaluate(setting, nodes_2)
        self.page.wait_for_function(
            "value => (document.querySelectorAll('[data-node-id]').length > 0) === value",
            arg=nodes_2,
        )

    def drop(self, name: str, workflow: dict) -> None:
        """Drop the workflow's file on the canvas."""
        self.page.mouse.move(900, 950)  # off the tabs, which show a large picture under a pointer
        self.page.evaluate(DROP, [f"{name}.json", json.dumps(workflow)])
        self.page.wait_for_function(DROPPED, arg=len(workflow["nodes"]))
        self.page.wait_for_timeout(400)  # what is missing is told after the graph

    def told_at_opening(self) -> list[str]:
        """Texts of the dialogs, and of the panel of errors that newer frontends have for them."""
        shown = self.page.query_selector_all("[role=dialog], [data-testid=error-overlay]")
        return [each.inner_text() for each in shown if each.is_visible()]

    def boxes(self, nodes_2: bool) -> dict[str, list[float]]:
        """Where each node is drawn: [left, top, right, bottom] by id."""
        return self.page.evaluate(BOXES_2 if nodes_2 else BOXES)

    def groups(self) -> list[list[float]]:
        return self.page.evaluate(GROUPS)

    def in_sight(self, x: float, y: float) -> bool:
        return self.page.evaluate(IN_SIGHT, [x, y])

    def prompt(self) -> dict:
        """What pressing Run would send."""
        sent = self.page.evaluate("async () => (await app.graphToPrompt()).output")
        return {key: {k: v for k, v in n.items() if k != "_meta"} for key, n in sent.items()}

    def set_widgets(self, class_type: str, values: dict) -> None:
        self.page.evaluate(SET, [class_type, values])

    def put_alone(self, class_type: str) -> None:
        """A new graph of one node."""
        self.page.evaluate(ALONE, class_type)

    def look_at(self, class_type: str) -> None:
        """Scroll to that node: what is out of sight is not drawn."""
        centre = "kind => app.canvas.centerOnNode(app.graph.nodes.find(n => n.comfyClass === kind))"
        self.page.evaluate(centre, class_type)

    def press_run(self) -> None:
        by_name = self.page.get_by_role("button", name="Run", exact=True)
        self.page.get_by_test_id("queue-button").or_(by_name).first.click()

    def text_on(self, class_type: str, seconds: float = 20) -> str:
        """The text that a run puts on that node, once it is there."""
        has_text = f"kind => ({TEXT})(kind) !== ''"
        self.page.wait_for_function(has_text, arg=class_type, timeout=1000 * seconds)
        return self.page.evaluate(TEXT, class_type)

    def help_on(self, class_type: str) -> str:
        """The help page that the button on a selected node opens."""
        self.page.evaluate(SELECT, class_type)
        self.page.get_by_test_id("info-button").click()
        content = self.page.locator(".node-help-content").last
        expect(content).to_contain_text("Inputs")
        return content.inner_text()

    def missing_models(self) -> str:
        """What is told of missing models: in a dialog, or in the panel of newer frontends."""
        see = self.page.get_by_test_id("error-overlay-see-errors")
        panel = self.page.get_by_test_id("error-group-missing-model")
        if see.is_visible():
            see.click()
            self.page.wait_for_timeout(500)
            return panel.inner_text()
        return self.page.get_by_role("dialog").inner_text()

    def close_what_was_told(self) -> None:
        dismiss = self.page.get_by_test_id("error-overlay-dismiss")
        if dismiss.is_visible():
            dismiss.click()
        else:
            self.page.keyboard.press("Escape")
        expect(self.page.get_by_role("dialog")).to_have_count(0)

    def search_nodes(self, words: str) -> str:
        """What the node library lists for these words."""
        self.page.get_by_role("button", name="Node Library (n)").click()
        self.page.get_by_placeholder("Search").first.fill(words)
        self.page.wait_for_timeout(1000)
        return self.page.locator(".side-bar-panel").first.inner_text()

    def thumbnails(self, pack: str) -> list[str]:
        """Names of a pack's templates whose own picture is there, in the dialog of templates."""
        self.page.get_by_role("button", name="Templates").last.click()
        dialog = self.page.get_by_role("dialog")
        dialog.get_by_text(pack, exact=True).click()
        self.page.mouse.move(960, 500)
        names = set()
        for _ in range(2):  # what is out of sight is not in the page, or has no picture
            self.page.wait_for_timeout(1000)
            pictures = dialog.locator("img").all()
            loaded = [each for each in pictures if each.evaluate(OWN_PICTURE)]
            names |= {each.get_attribute("alt") for each in loaded}
            self.page.mouse.wheel(0, 5000)
        return sorted(names)


@contextlib.contextmanager
def frontend(address: str) -> Iterator[Frontend]:
    """The page of the server at `address`, open."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        shown = Frontend(browser.new_page(viewport=SIZE), address)
        shown.open()
        yield shown
        browser.close()
