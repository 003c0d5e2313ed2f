"""The example workflows and the help pages, in a real ComfyUI server."""

import copy
import json
import os
import re
import shutil
import subprocess
import urllib.request
from itertools import combinations
from pathlib import Path

import comfyui_install
import example_models
import numpy as np
import pytest
import torch
from comfyui_install import ROOT
from comfyui_server import ComfyServer, combo_options, node_inputs
from PIL import Image
from turbodiffusion_pack.turbo_core.checkpoint import file_tensors, read_checkpoint
from turbodiffusion_pack.turbo_core.training.merge import merged_tensors
from ui_workflow import (
    FOLDERS,
    NOTES,
    TRAINED,
    WIDGETS,
    api_format,
    model_files,
    specs,
    widget_inputs,
)
from video import play

SMALL = {"width": 160, "height": 96, "length": 9}
# The same size and length, for the workflows that take them from a picture and from seconds.
SMALL_BY_NODE = {
    "EmptyHunyuanLatentVideo": SMALL,
    "WanAdaptiveResolution": {"resolution": "custom", "megapixels": 0.015},
    "WanVideoLength": {"seconds": 0.5},
}
# Where an example needs another setting of our nodes than the default.
IMAGE_TO_VIDEO = {
    "rCMSampler": {"sigma_max": 200, "mode": "ode"},
    "WanAdaptiveResolution": {"resolution": "720p"},
}
LONG, SPARSE = "Image_to_video_long_SVI_2.0_Pro", "Image_to_video_NVFP4_Sparse"
TURBO_EXPERTS = ["Image_to_video_A14B_720p", "Image_to_video_with_LoRAs", LONG]
BOTH_EXPERTS = [*TURBO_EXPERTS, SPARSE]
SETTINGS = dict.fromkeys(TURBO_EXPERTS, IMAGE_TO_VIDEO)
# Frames of a video of two clips: the second's first 5 are the end of the first.
LENGTHS = {LONG: 2 * SMALL["length"] - 5}
TITLE_BAR = 30
# Pixels that the frontend gives a slot, a widget and the rest of a node, by how it draws nodes.
STYLES = {"LiteGraph": (20, 24, 12), "Nodes 2.0": (26, 36, 28)}
WIDGETS_BESIDE = {"KSampler", "RandomNoise", "LoadImage"}  # that choose the next seed, a file
OFFERED = (".safetensors", ".sft", ".ckpt", ".pth", ".pt")  # by the frontend of 0.33


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


WORKFLOWS = example_models.examples()
VIDEOS = [stem for stem, w in WORKFLOWS.items() if "CLIPLoader" in dict(model_files(w))]

# Blueprints of subgraphs, and what of an example each of them leaves out.
BLUEPRINTS = {
    "Text to video (TurboDiffusion)": ("Text_to_video_1.3B_480p", {"SaveVideo"}),
    "Image to video (TurboDiffusion)": ("Image_to_video_A14B_720p", {"SaveVideo", "LoadImage"}),
    "Quantize a Wan model (TurboDiffusion)": ("Quantize_and_save", set()),
}


@pytest.fixture(params=WORKFLOWS)
def workflow(request) -> dict:
    return copy.deepcopy(WORKFLOWS[request.param])


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server with stand-ins of the names the examples use: tiny models, an empty text encoder."""
    comfyui = comfyui_install.find()
    if comfyui is None:
        pytest.skip("no ComfyUI found: run make test, or set COMFYUI_DIR to a ComfyUI folder")
    base = tmp_path_factory.mktemp("server")
    example_models.write(comfyui, base)
    for name in (base / "models" / FOLDERS["CLIPLoader"]).iterdir():
        name.write_bytes(b"")
    with ComfyServer(comfyui, base) as running:
        yield running


def small(prompt: dict) -> dict:
    """An API-format example at a small size, with the test's text encoder in place of umT5."""
    (clip,) = (key for key, node in prompt.items() if node["class_type"] == "CLIPLoader")
    del prompt[clip]
    for node in prompt.values():
        if node["class_type"] == "CLIPTextEncode":
            node["class_type"] = "TurboTestTextEncode"
            del node["inputs"]["clip"]
    return shrunk(prompt)


def shrunk(prompt: dict) -> dict:
    for node in prompt.values():
        node["inputs"] |= SMALL_BY_NODE.get(node["class_type"], {})
    return prompt


def made_frames(server: ComfyServer, prompt: dict) -> np.ndarray:
    """The frames that `prompt` makes, [frames, height, width, 3] uint8."""
    images = node_inputs(prompt, "CreateVideo")["images"]
    inputs = {"images": images, "filename_prefix": "frames"}
    prompt["frames"] = {"class_type": "SaveImage", "inputs": inputs}
    run = server.run(prompt)
    assert run.outcome == "execution_success", run.message
    pngs = sorted(file for file in run.files if file.suffix == ".png")
    return np.stack([np.asarray(Image.open(file)) for file in pngs])


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
    names = {path.name for path in example_models.EXAMPLES.iterdir()}
    assert names == {f"{stem}.{end}" for stem in WORKFLOWS for end in ("json", "jpg")}
    for stem in WORKFLOWS:
        thumbnail = example_models.EXAMPLES / f"{stem}.jpg"
        assert thumbnail.stat().st_size <= 40_000
        width, height = Image.open(thumbnail).size
        assert width == height >= 300, "the list of templates shows squares"
    pictures = {path.read_bytes() for path in example_models.EXAMPLES.glob("*.jpg")}
    assert len(pictures) == len(WORKFLOWS), "two examples have one picture"


def test_links_connect_what_they_say(workflow):
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"])
    for number, source, output, target, slot, kind in workflow["links"]:
        start, end = nodes[source]["outputs"][output], nodes[target]["inputs"][slot]
        assert number in start["links"]
        assert number == end["link"]
        assert start["type"] == end["type"] == kind


def drawn(node: dict, style: str) -> tuple[list[float], list[float]]:
    """Where a node begins, its title above, and ends, at least as large as what is in it."""
    slot, widget, rest = STYLES[style]
    widgets = [entry for entry in node["inputs"] if "widget" in entry]
    slots = max(len(node["inputs"]) - len(widgets), len(node["outputs"]))
    beside = node["type"] in WIDGETS_BESIDE
    height = slots * slot + (len(widgets) + beside) * widget + rest
    (x, y), (width, saved) = node["pos"], node["size"]
    return [x, y - TITLE_BAR], [x + width, y + max(saved, height)]


@pytest.mark.parametrize("style", STYLES)
def test_no_node_covers_another(workflow, style):
    for a, b in combinations(workflow["nodes"], 2):
        (left, top), (right, bottom) = drawn(a, style)
        (other_left, other_top), (other_right, other_bottom) = drawn(b, style)
        beside = right <= other_left or other_right <= left
        above = bottom <= other_top or other_bottom <= top
        assert beside or above, f"{a['type']} and {b['type']} overlap"


def test_wires_run_from_left_to_right(workflow):
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for _, source, _, target, _, kind in workflow["links"]:
        start, end = nodes[source], nodes[target]
        assert start["pos"][0] + start["size"][0] < end["pos"][0], f"{kind} to {end['type']}"
    order = [node["order"] for node in workflow["nodes"]]
    assert order == sorted(order) == list(range(len(order)))
    assert all(nodes[link[1]]["order"] < nodes[link[3]]["order"] for link in workflow["links"])


def test_names_are_read_by_people():
    """The list of templates shows the files' names; the links to them take no more than these."""
    for stem in WORKFLOWS:
        assert re.fullmatch(r"[A-Z][A-Za-z0-9_.]+", stem)


def test_each_resolution_is_the_models():
    for stem, workflow in WORKFLOWS.items():
        sizes = [n for n in workflow["nodes"] if n["type"] == "EmptyHunyuanLatentVideo"]
        loaders = [n for n in workflow["nodes"] if n["type"] == "TurboLoader"]
        for size in sizes:
            wanted = {"480P": [832, 480], "720P": [1280, 720]}
            (name,) = (loader["widgets_values"][0] for loader in loaders)
            (known,) = (side for kind, side in wanted.items() if kind in name)
            assert size["widgets_values"][:2] == known, stem


def test_a_note_says_where_every_file_goes(workflow):
    (note,) = (n["widgets_values"][0] for n in workflow["nodes"] if n["type"] in NOTES)
    for class_type, name in model_files(workflow):
        heading = f"**models/{FOLDERS[class_type]}**"
        section = note[note.index(heading) :].split("\n\n")[0]
        if name in TRAINED:
            assert f"{name}, your own" in section
            continue
        assert re.search(rf"\[{re.escape(name)}\]\(https://huggingface.co/\S+/{name}\)", section)


def test_the_host_can_offer_the_files(workflow):
    """Its list of missing models shows the folder and a Download button by these properties.

    The button comes for the sources and suffixes that the frontend takes. That of ComfyUI 0.3.75
    takes no .pth: there the file and its folder are named, with that remark and without a button.
    """
    for node in workflow["nodes"]:
        if node["type"] in FOLDERS and node["widgets_values"][0] not in TRAINED:
            (model,) = node["properties"]["models"]
            assert set(model) == {"name", "url", "directory"}
            assert model["name"] == node["widgets_values"][0]
            assert model["directory"] == FOLDERS[node["type"]]
            assert model["url"].startswith("https://huggingface.co/")
            assert model["url"].endswith("/" + model["name"])
            assert Path(model["name"]).suffix in OFFERED


@pytest.mark.parametrize("stem", BOTH_EXPERTS)
def test_each_expert_goes_to_its_input(stem):
    """With its own LoRA; nothing but the names tells the files apart."""
    nodes = {node["id"]: node for node in WORKFLOWS[stem]["nodes"]}
    sources = {link[0]: nodes[link[1]] for link in WORKFLOWS[stem]["links"]}
    (switch,) = (node for node in nodes.values() if node["type"] == "Wan22ExpertSwitch")
    for entry, noise in zip(switch["inputs"], ("high", "low"), strict=False):
        while entry["name"].startswith("model"):
            node = sources[entry["link"]]
            if node["type"] in FOLDERS:
                assert re.search(rf"[-_]{noise}[-_]", node["widgets_values"][0], re.IGNORECASE)
            entry = node["inputs"][0]
        assert node["type"] in ("TurboLoader", "UNETLoader")


def test_the_stock_ksampler_samples_as_rcm():
    (sampler,) = (
        n for n in WORKFLOWS["Text_to_video_KSampler"]["nodes"] if n["type"] == "KSampler"
    )
    steps, cfg, *sampling = sampler["widgets_values"][2:]
    assert (steps, cfg, sampling) == (4, 1.0, ["lcm", "rcm", 1.0])


def blueprint(name: str) -> tuple[dict, dict]:
    """The one node of a blueprint, and the subgraph that it stands for."""
    content = load(ROOT / "subgraphs" / f"{name}.json")
    (instance,), (subgraph,) = content["nodes"], content["definitions"]["subgraphs"]
    assert instance["type"] == subgraph["id"]
    return instance, subgraph


def test_every_blueprint_is_of_an_example():
    assert {path.stem for path in (ROOT / "subgraphs").iterdir()} == set(BLUEPRINTS)


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_a_blueprints_slots_lead_where_they_say(name):
    instance, subgraph = blueprint(name)
    assert subgraph["name"] == name and subgraph["description"] and subgraph["category"]
    nodes = {node["id"]: node for node in subgraph["nodes"]}
    links = {link["id"]: link for link in subgraph["links"]}
    for link in links.values():
        if link["origin_id"] in nodes:
            assert link["id"] in nodes[link["origin_id"]]["outputs"][link["origin_slot"]]["links"]
        if link["target_id"] in nodes:
            assert nodes[link["target_id"]]["inputs"][link["target_slot"]]["link"] == link["id"]
    for kind, end in (("inputs", "origin_slot"), ("outputs", "target_slot")):
        assert [s["name"] for s in instance[kind]] == [s["name"] for s in subgraph[kind]]
        for slot, port in enumerate(subgraph[kind]):
            assert port["linkIds"] and all(links[i][end] == slot for i in port["linkIds"])
    shown = map(tuple, instance["properties"]["proxyWidgets"])
    values = dict(zip(shown, instance["widgets_values"], strict=True))
    for port in subgraph["inputs"]:
        target = links[port["linkIds"][0]]
        node = nodes[target["target_id"]]
        inner = node["inputs"][target["target_slot"]]
        if "widget" in inner:
            names = [entry["name"] for entry in node["inputs"] if "widget" in entry]
            own = node["widgets_values"][names.index(inner["name"])]
            assert values["-1", port["name"]] == own


@pytest.mark.server
@pytest.mark.parametrize("name", BLUEPRINTS)
def test_a_blueprint_is_the_example(server, name):
    """Opened up, it sends the same prompt, but for the files at its ends."""
    info, (stem, left_out) = server.object_info(), BLUEPRINTS[name]
    _, subgraph = blueprint(name)
    inside = {node["id"] for node in subgraph["nodes"]}
    ends = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    links = [[link[end] for end in ends] for link in subgraph["links"]]
    own = {link[0] for link in links if link[1] in inside}
    for node in subgraph["nodes"]:
        for entry in node["inputs"]:
            entry["link"] = entry["link"] if entry["link"] in own else None
    found = api_format({"nodes": subgraph["nodes"], "links": links}, info)
    wanted = api_format(WORKFLOWS[stem], info)
    gone = {key for key, node in wanted.items() if node["class_type"] in left_out}
    wanted = {key: node for key, node in wanted.items() if key not in gone}
    for node in wanted.values():
        inputs = node["inputs"].items()
        linked = {n for n, v in inputs if isinstance(v, list) and v[0] in gone}
        node["inputs"] = {n: v for n, v in inputs if n not in linked}
    assert found == wanted


@pytest.mark.server
def test_the_host_offers_the_blueprints(server):
    offered = server.get("/global_subgraphs").values()
    ours = {e["name"] for e in offered if e["info"]["node_pack"] == f"custom_nodes.{ROOT.name}"}
    assert ours == set(BLUEPRINTS)


@pytest.mark.server
def test_widgets_are_saved_in_the_order_of_the_schema(server, workflow):
    info = server.object_info()
    for node in workflow["nodes"]:
        if node["type"] not in NOTES:
            listed = [i["name"] for i in node["inputs"] if "widget" in i]
            order = [name for name, _ in widget_inputs(node, info[node["type"]])]
            assert listed == [name for name in order if "." not in name][: len(listed)]


@pytest.mark.server
@pytest.mark.parametrize("stem", WORKFLOWS)
def test_our_nodes_stand_at_their_defaults(server, stem):
    """But for what the workflow is about, and for file names, which have no default."""
    info = server.object_info()
    module = info["TurboLoader"]["python_module"]
    ours = [n for n in WORKFLOWS[stem]["nodes"] if n["type"] not in NOTES]
    ours = [n for n in ours if info[n["type"]]["python_module"] == module]
    assert ours
    for node in ours:
        values = dict(widget_inputs(node, info[node["type"]]))
        for name, kind, options in specs(info[node["type"]]["input"]):
            if kind in WIDGETS and name not in ("checkpoint", "lora_name"):
                settings = SETTINGS.get(stem, {}).get(node["type"], {})
                assert values[name] == settings.get(name, options.get("default")), name


@pytest.mark.server
def test_comfyui_accepts_it_as_it_is(server, workflow):
    """Validation passes, and what ends the run is the empty file that stands in for umT5.

    But for the size: what comes before the text encoder need not take long.
    """
    failed = []

    def note_error(kind, data):
        if kind == "execution_error":
            failed.append(data["node_type"])

    server.run(shrunk(api_format(workflow, server.object_info())), note_error)
    assert failed == [kind for kind, _ in model_files(workflow) if kind == "CLIPLoader"]


@pytest.mark.server
@pytest.mark.parametrize("stem", VIDEOS)
def test_it_makes_a_video(server, stem):
    before = len(server.log_text())
    run = server.run(small(api_format(WORKFLOWS[stem], server.object_info())))
    assert run.outcome == "execution_success", run.message
    (video,) = run.files
    assert play(video) == (LENGTHS.get(stem, SMALL["length"]), SMALL["width"], SMALL["height"])
    log = server.log_text()[before:]
    lines = [text for text in log.splitlines() if "SLA in 2 of 2" in text]
    assert len(lines) == (2 if stem == LONG else 1), "one line for each clip"
    both = [f"{noise}-noise expert: 2 forward passes" for noise in ("high", "low")]
    wanted = both if stem.startswith("Image") else ["TurboDiffusion: 4 forward passes"]
    for line in lines:
        assert [text for text in wanted if text not in line] == []
        assert line.count("no proj_l so no linear branch") == (2 if stem == SPARSE else 0)
    assert "lora key not loaded" not in log


@pytest.mark.server
def test_the_demo_makes_a_video_from_a_picture(server):
    """The workflow of `make demo`, small, with the examples' stand-ins as its files."""
    prompt = load(ROOT / "tests" / "host" / "workflows" / "i2v_api.json")
    example = WORKFLOWS["Image_to_video_A14B_720p"]
    checkpoints = [name for kind, name in model_files(example) if kind == "TurboLoader"]
    loaders = [node for node in prompt.values() if node["class_type"] == "TurboLoader"]
    for loader, name in zip(loaders, checkpoints, strict=True):
        loader["inputs"]["checkpoint"] = name
    node_inputs(prompt, "VAELoader")["vae_name"] = dict(model_files(example))["VAELoader"]
    node_inputs(prompt, "LoadImage")["image"] = "example.png"
    node_inputs(prompt, "WanAdaptiveResolution")["aspect_ratio"] = "16:9"
    run = server.run(shrunk(prompt))
    assert run.outcome == "execution_success", run.message
    (video,) = run.files
    assert play(video) == (SMALL["length"], SMALL["width"], SMALL["height"])


@pytest.mark.server
def test_a_long_video_goes_on_where_the_clip_before_ended(server):
    """Its start is the first clip to the bit; the second clip hangs on the first one's end."""

    def video(*seeds: int) -> np.ndarray:
        prompt = small(api_format(WORKFLOWS[LONG], server.object_info()))
        noises = [n["inputs"] for n in prompt.values() if n["class_type"] == "RandomNoise"]
        for noise, seed in zip(noises, seeds, strict=True):
            noise["noise_seed"] = seed
        return made_frames(server, prompt)

    first = SMALL["length"]
    plain, other_second, other_first = video(7, 8), video(7, 9), video(9, 8)
    assert len(plain) == LENGTHS[LONG]
    assert np.array_equal(plain[:first], other_second[:first])
    for other in (other_second, other_first):
        assert not np.array_equal(plain[first:], other[first:])


@pytest.mark.server
def test_the_loras_change_the_video(server):
    """The two image-to-video examples, with one prompt and one noise, differ by the LoRAs alone."""

    def frames(stem: str, strength: float = 1.0) -> np.ndarray:
        prompt = small(api_format(WORKFLOWS[stem], server.object_info()))
        node_inputs(prompt, "TurboTestTextEncode")["text"] = "one prompt"
        node_inputs(prompt, "RandomNoise")["noise_seed"] = 5
        for node in prompt.values():
            if node["class_type"] == "LoraLoaderModelOnly":
                node["inputs"]["strength_model"] = strength
        return made_frames(server, prompt)

    plain = frames("Image_to_video_A14B_720p")
    assert np.array_equal(frames("Image_to_video_with_LoRAs", strength=0.0), plain)
    assert not np.array_equal(frames("Image_to_video_with_LoRAs"), plain)


@pytest.mark.server
def test_a_workflow_of_version_0_1_0_makes_the_same_frames(server):
    """Shared with 0.1.0, as it was an example then, with a node that repeated the defaults."""
    old = load(ROOT / "tests" / "host" / "workflows" / "shared_with_0.1.0.json")
    (sampler,) = (n for n in old["nodes"] if n["type"] == "rCMSampler")
    assert sampler["properties"]["ver"] == "0.1.0"
    both = old, WORKFLOWS["Text_to_video_1.3B_480p"]
    prompts = [api_format(workflow, server.object_info()) for workflow in both]
    assert [len(prompt) for prompt in prompts] == [13, 12]
    for prompt in prompts:
        node_inputs(prompt, "RandomNoise")["noise_seed"] = 5
    assert np.array_equal(*(made_frames(server, small(prompt)) for prompt in prompts))


@pytest.mark.server
def test_the_quantized_model_is_offered_and_makes_a_video(server):
    info = server.object_info()
    run = server.run(api_format(WORKFLOWS["Quantize_and_save"], info))
    assert run.outcome == "execution_success", run.message
    folder = server.output / "diffusion_models"
    newest = max(folder.iterdir(), key=lambda path: path.stat().st_mtime)
    loader = server.object_info("TurboLoader")["TurboLoader"]
    assert newest.name in combo_options(loader, "checkpoint")
    prompt = small(api_format(WORKFLOWS["Text_to_video_1.3B_480p"], info))
    node_inputs(prompt, "TurboLoader")["checkpoint"] = newest.name
    before = len(server.log_text())
    run = server.run(prompt)
    assert run.outcome == "execution_success", run.message
    assert "INT8 fast (per token and channel) in 20 linears" in server.log_text()[before:]


@pytest.mark.server
def test_the_merged_model_has_both_updates_and_proj_l(server):
    """The same weights as the training's merge, but for the host's random rounding to bf16."""
    info = server.object_info()
    run = server.run(api_format(WORKFLOWS["Merge_SLA_and_rCM"], info))
    assert run.outcome == "execution_success", run.message
    folder = server.output / "diffusion_models"
    newest = max(folder.iterdir(), key=lambda path: path.stat().st_mtime)
    found = read_checkpoint(newest)
    assert found.has_sla
    models = server.base / "models" / "diffusion_models"
    names = ("wan2.1_t2v_1.3B_bf16.safetensors", *TRAINED)
    expected = dict(merged_tensors(*(read_checkpoint(models / name) for name in names)))
    tensors = file_tensors(found, "comfy")
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name].float(), tensor.float(), rtol=2**-7, atol=1e-8)


@pytest.mark.server
def test_it_runs_in_context_windows(server):
    prompt = small(api_format(WORKFLOWS["Text_to_video_1.3B_480p"], server.object_info()))
    schema = server.object_info("WanContextWindowsManual")["WanContextWindowsManual"]["input"]
    options = {n: o.get("default") for n, kind, o in specs(schema) if kind != "MODEL"}
    options |= {"context_length": 17, "context_overlap": 5}
    options |= {"context_schedule": "standard_static", "fuse_method": "pyramid"}
    put_behind(prompt, "TurboLoader", "WanContextWindowsManual", **options)
    node_inputs(prompt, "EmptyHunyuanLatentVideo")["length"] = 21
    before = len(server.log_text())
    run = server.run(prompt)
    assert run.outcome == "execution_success", run.message
    (line,) = (t for t in server.log_text()[before:].splitlines() if "SLA in 2 of 2" in t)
    steps = node_inputs(prompt, "rCMSampler")["steps"]
    forwards = int(line.split("TurboDiffusion: ")[1].split()[0])
    assert forwards > steps, "there was one window only"


@pytest.mark.server
@pytest.mark.skipif(shutil.which("comfy") is None, reason="needs comfy-cli: pip install comfy-cli")
def test_comfy_cli_accepts_it(server, workflow, tmp_path):
    """`comfy workflow validate`, which turns it into the API format by rules of its own."""
    (tmp_path / "info.json").write_text(json.dumps(server.object_info()), encoding="utf-8")

    def validate(workflow: dict) -> dict:
        (tmp_path / "workflow.json").write_text(json.dumps(workflow), encoding="utf-8")
        options = ["--workflow", "workflow.json", "--input", "info.json"]
        done = subprocess.run(
            ["comfy", "--json", "workflow", "validate", *options],
            cwd=tmp_path,
            env={**os.environ, "HOME": str(tmp_path), "DO_NOT_TRACK": "1"},
            capture_output=True,
            text=True,
        )
        return json.loads(done.stdout)

    told = validate(workflow)["data"]
    assert told["valid"], told["errors"]
    assert told["warnings"] == []
    assert told["converted_node_count"] == len(workflow["nodes"]) - 1  # without the note
    workflow["nodes"][1]["type"] = "UnheardOf"
    assert not validate(workflow)["ok"]


@pytest.mark.server
def test_the_host_offers_it_as_a_template(server):
    offered = server.get("/workflow_templates")[ROOT.name]
    assert sorted(offered) == sorted(WORKFLOWS)


@pytest.mark.server
def test_the_host_offers_the_translations(server):
    offered = server.get("/i18n")
    for language in ("en", "zh"):
        wanted = load(ROOT / "locales" / language / "nodeDefs.json")
        found = offered[language]["nodeDefs"]
        assert {name: found[name] for name in wanted} == wanted


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
