"""Workflows as ComfyUI's frontend saves them, in the API format that POST /prompt takes."""

from collections.abc import Iterator

NOTES = {"MarkdownNote", "Note"}
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"
# The folder in `models` that a loader takes its file from.
FOLDERS = {
    "TurboLoader": "diffusion_models",
    "UNETLoader": "diffusion_models",
    "LoraLoaderModelOnly": "loras",
    "TurboLoraLoader": "loras",
    "CLIPLoader": "text_encoders",
    "VAELoader": "vae",
}
# Files that nobody can download: a user's own training makes them.
TRAINED = ("wan2.1_t2v_1.3B_sla.safetensors", "wan2.1_t2v_1.3B_rcm.safetensors")


def api_format(workflow: dict, object_info: dict) -> dict:
    """The prompt that pressing Run on `workflow` would send; KeyError on an unknown node."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] not in NOTES:
            inputs = dict(widget_inputs(node, object_info[node["type"]]))
            wires = (i for i in node["inputs"] if i["link"] is not None)
            inputs |= {wire["name"]: sources[wire["link"]] for wire in wires}
            prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def model_files(workflow: dict) -> list[tuple[str, str]]:
    """(node class, file) of every model file that `workflow` asks for."""
    loaders = [node for node in workflow["nodes"] if node["type"] in FOLDERS]
    return [(node["type"], node["widgets_values"][0]) for node in loaders]


def widget_inputs(node: dict, node_info: dict) -> Iterator[tuple[str, object]]:
    """Name and value of every widget; saved values are told apart by their order alone."""
    saved = iter(node["widgets_values"])
    yield from _take(saved, node_info["input"], "")
    left = list(saved)
    assert not left, f"{node['type']} has no widgets for {left}"


def _take(saved: Iterator, inputs: dict, prefix: str) -> Iterator[tuple[str, object]]:
    for name, kind, options in specs(inputs):
        if kind == DYNAMIC:
            choices = {choice["key"]: choice["inputs"] for choice in options["options"]}
            value = next(saved, next(iter(choices)))
            yield prefix + name, value
            yield from _take(saved, choices[value], f"{prefix}{name}.")
        elif kind in WIDGETS:
            yield prefix + name, next(saved, options.get("default"))
            if options.get("control_after_generate") or options.get("image_upload"):
                next(saved)  # of a widget beside it, which is not sent


def specs(inputs: dict) -> Iterator[tuple[str, str, dict]]:
    """Name, type and options of each input in the order of the widgets."""
    for name, (kind, *options) in {**inputs["required"], **inputs.get("optional", {})}.items():
        yield name, "COMBO" if isinstance(kind, list) else kind, options[0] if options else {}
