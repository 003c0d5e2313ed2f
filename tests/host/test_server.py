"""The main job in a real ComfyUI server, queued over HTTP and followed on the websocket."""

import copy
import importlib.util
import json
import sys
import types
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import comfyui_install
import host_memory
import numpy as np
import pytest
import random_models
import server_clock
import tiny_models
import torch
from clock_workflows import PICTURE, Video
from comfyui_server import ComfyServer, RejectedError, Run, combo_options, node_inputs
from PIL import Image
from processes import children, ended
from safetensors.torch import load_file
from video import play

pytestmark = pytest.mark.server

HERE = Path(__file__).parent
INTERFACE = HERE / "object_info.json"
WORKFLOW = json.loads((HERE / "workflows" / "t2v_api.json").read_text(encoding="utf-8"))
CHECKPOINT = node_inputs(WORKFLOW, "TurboLoader")["checkpoint"]
LOADING = f"TurboDiffusion: loading {CHECKPOINT}"
VAE = node_inputs(WORKFLOW, "VAELoader")["vae_name"]
SIZE = {"width": 160, "height": 96, "length": 9}
DENSE = {"SLAAttentionPatch": {"attention": "dense"}}  # the fastest without a GPU
TINY = {"width": 64, "height": 64, "length": 5}
LARGE = {"width": 256, "height": 256, "length": 17}


def benchmark(name: str):
    """A module of tests/benchmarks; support has files of the same names."""
    path = HERE.parent / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CLOCK, SOAK = benchmark("whole_clock"), benchmark("soak")
VIDEO, EXPERTS = (Video(shape, 4) for shape in (SOAK.TINY, SOAK.TINY._replace(in_channels=36)))
SUMS = "start to latents", "start to pixels", "whole"


@pytest.fixture(scope="module")
def comfyui_dir() -> Path:
    """The ComfyUI to test in; `make test` sees to it that there is one."""
    folder = comfyui_install.find()
    if folder is None:
        pytest.skip("no ComfyUI found: run make test, or set COMFYUI_DIR to a ComfyUI folder")
    return folder


@pytest.fixture(scope="module")
def models(comfyui_dir, tmp_path_factory) -> dict[str, list[Path]]:
    """Search paths to a good checkpoint, broken ones and a VAE."""
    folder = tmp_path_factory.mktemp("models")
    tiny_models.write_vae(comfyui_dir, folder / VAE)
    tensors = tiny_models.t2v_checkpoint()
    torch.save(tensors, folder / CHECKPOINT)
    whole = (folder / CHECKPOINT).read_bytes()
    (folder / "truncated.pth").write_bytes(whole[: len(whole) // 2])
    torch.save(without(tensors, "blocks.1.ffn.0.scale"), folder / "no_scale.pth")
    write_clock_models(folder)
    return {"diffusion_models": [folder], "vae": [folder]}


@pytest.fixture(scope="module")
def server(comfyui_dir, models, tmp_path_factory):
    with ComfyServer(comfyui_dir, tmp_path_factory.mktemp("server"), models) as running:
        yield running
        workers = children(running.process.pid)
    assert ended(workers), "what the server has started is still there"


@pytest.fixture(scope="module")
def other(comfyui_dir, models, server, tmp_path_factory):
    """A second server beside the first, with the same models and the same output folder."""
    base = tmp_path_factory.mktemp("other")
    with ComfyServer(comfyui_dir, base, models, server.output) as running:
        yield running


def write_clock_models(folder: Path) -> None:
    """Those that the prompts of tests/benchmarks/whole_clock.py name."""
    jobs = VIDEO.jobs(["ours", "stock"]) + EXPERTS.jobs(["ours", "stock"])
    for _, file, kind, sizes in jobs:
        if kind != "vae":
            tensors = random_models.WRITERS[kind](**sizes)
            random_models.write_safetensors(folder / file, tensors)
    (folder / VIDEO.vae).write_bytes((folder / VAE).read_bytes())


def without(tensors: dict, name: str) -> dict:
    return {key: value for key, value in tensors.items() if key != name}


def t2v(changes: dict[str, dict] | None = None) -> dict:
    """The demo workflow, small, each frame also saved as PNG; `changes` by node class."""
    workflow = copy.deepcopy(WORKFLOW)
    for class_type, inputs in {"EmptyHunyuanLatentVideo": SIZE, **(changes or {})}.items():
        node_inputs(workflow, class_type).update(inputs)
    images = node_inputs(workflow, "CreateVideo")["images"]
    frames = {"images": images, "filename_prefix": "frames"}
    workflow["frames"] = {"class_type": "SaveImage", "inputs": frames}
    return workflow


def node_id(class_type: str) -> str:
    return next(key for key, node in WORKFLOW.items() if node["class_type"] == class_type)


def pixels(run: Run) -> np.ndarray:
    """The frames a run saved, [frames, height, width, 3] uint8."""
    assert run.outcome == "execution_success", run.message
    return np.stack([np.asarray(Image.open(f)) for f in sorted(run.files) if f.suffix == ".png"])


def interface(info: dict) -> dict:
    """What saved workflows depend on: inputs in order with types, limits and defaults, outputs."""
    kept = ("default", "min", "max", "step")
    inputs = {}
    both = {**info["input"]["required"], **info["input"].get("optional", {})}
    for name, (kind, *options) in both.items():
        combo = kind == "COMBO" or isinstance(kind, list)
        inputs[name] = {"type": "COMBO" if combo else kind}
        if combo and name not in ("checkpoint", "lora_name", "projections"):
            inputs[name]["options"] = combo_options(info, name)
        inputs[name] |= {k: v for k, v in (options or [{}])[0].items() if k in kept}
    return {"inputs": inputs, "outputs": info["output"], "output_names": info["output_name"]}


def test_nodes_keep_their_interface(server):
    module = server.object_info("TurboLoader")["TurboLoader"]["python_module"]
    nodes = {k: v for k, v in server.object_info().items() if v["python_module"] == module}
    found = {name: interface(nodes[name]) for name in sorted(nodes)}
    if not INTERFACE.exists():
        INTERFACE.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        pytest.fail(f"{INTERFACE.name} was missing and has been written: read it and commit it")
    recorded = json.loads(INTERFACE.read_text(encoding="utf-8"))
    assert found == recorded
    for name, node in recorded.items():
        assert list(found[name]["inputs"]) == list(node["inputs"]), f"{name}: inputs moved"


def test_workflow_makes_a_video(server):
    run = server.run(t2v())
    frames = pixels(run)
    assert frames.shape == (SIZE["length"], SIZE["height"], SIZE["width"], 3)
    assert frames.std() > 5, "every frame is one flat colour"
    (video,) = (file for file in run.files if file.suffix == ".mp4")
    assert play(video) == (SIZE["length"], SIZE["width"], SIZE["height"])


def test_a_turbo_vae_makes_the_same_video(server):
    """On a GPU in bf16 a convolution may sum in another order, hence the one step of 255."""
    seed = {"RandomNoise": {"noise_seed": 12}}
    stock, workflow = pixels(server.run(t2v(seed))), t2v(seed)
    decode = node_inputs(workflow, "VAEDecode")
    workflow["turbo"] = {"class_type": "TurboVAE", "inputs": {"vae": decode["vae"]}}
    decode["vae"] = ["turbo", 0]
    assert np.abs(pixels(server.run(workflow)).astype(int) - stock).mean() <= 1


@pytest.mark.skipif(sys.platform != "linux", reason="workers are for Linux")
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="there is one GPU")
def test_two_processes_share_a_video(server):
    """On CPUs, or each with a GPU. The worker ends with the server, see there."""
    changes = {"RandomNoise": {"noise_seed": 13}, "rCMSampler": {"steps": 1}}
    alone, workflow = pixels(server.run(t2v(changes))).astype(int), t2v(changes)
    model, before = [node_id("SLAAttentionPatch"), 0], len(server.log_text())
    for node in workflow.values():
        node["inputs"] |= {k: ["gpus", 0] for k, v in node["inputs"].items() if v == model}
    inputs = {"model": model, "gpus": 2}
    workflow["gpus"] = {"class_type": "TurboSequenceParallel", "inputs": inputs}
    rounding = 3 if torch.cuda.is_available() else 1  # of bf16
    assert np.abs(pixels(server.run(workflow)) - alone).mean() <= rounding
    assert "1 forward pass; on 2 GPUs" in server.log_text()[before:]
    assert len(children(server.process.pid)) == 1


def test_a_run_is_told_in_one_log_line(server):
    before = len(server.log_text())
    assert server.run(t2v({"RandomNoise": {"noise_seed": 11}})).outcome == "execution_success"
    lines = [line for line in server.log_text()[before:].splitlines() if "SLA in" in line]
    assert len(lines) == 1
    assert "TurboDiffusion" in lines[0]
    assert "SLA in 2 of 2 blocks" in lines[0]


@pytest.mark.parametrize(
    ("class_type", "inputs"),
    [
        ("SLAAttentionPatch", {"topk": 1.5}),
        ("SLAAttentionPatch", {"topk": 0.0}),
        ("TurboLoader", {"checkpoint": "not_there.pth"}),
        ("rCMSampler", {"steps": 0}),
    ],
)
def test_bad_workflow_is_refused(server, class_type, inputs):
    with pytest.raises(RejectedError) as caught:
        server.queue(t2v({class_type: inputs}))
    assert caught.value.status == 400
    (wrong,) = caught.value.node_errors
    assert wrong == node_id(class_type)
    ((name, value),) = inputs.items()
    told = json.dumps(caught.value.node_errors[wrong]["errors"])
    assert name in told
    assert str(value) in told


@pytest.mark.parametrize(
    ("class_type", "name"), [("SLAAttentionPatch", "attention"), ("rCMSampler", "mode")]
)
def test_unknown_option_is_refused(server, class_type, name):
    # ComfyUI 0.3.75 does not check the combos of V3 nodes, so there the node itself must.
    try:
        run = server.run(t2v({class_type: {name: "unheard_of"}}))
        outcome, told = run.outcome, run.message
    except RejectedError as error:
        outcome, told = "execution_error", str(error)
    assert outcome == "execution_error"
    assert "unheard_of" in told


@pytest.mark.parametrize(
    ("checkpoint", "reason"),
    [("truncated.pth", "truncated"), ("no_scale.pth", "blocks.1.ffn.0")],
)
def test_broken_checkpoint_is_named(server, checkpoint, reason):
    run = server.run(t2v({"TurboLoader": {"checkpoint": checkpoint}}))
    assert run.outcome == "execution_error"
    assert checkpoint in run.message
    assert reason in run.message


def test_second_run_after_a_cancel_reuses_the_model(server):
    steps = 100
    seen = []

    def cancel_at_first_step(kind, data):
        if kind == "progress" and data["node"] == node_id("SamplerCustomAdvanced"):
            seen.append(data["value"])
            server.interrupt()

    loader = {"TurboLoader": {"granularity": "exact"}}  # as no other test, so nothing is cached
    loads = server.log_text().count(LOADING)
    changes = {**loader, "rCMSampler": {"steps": steps}, "EmptyHunyuanLatentVideo": LARGE}
    cancelled = server.run(t2v(changes), cancel_at_first_step)
    assert cancelled.outcome == "execution_interrupted"
    assert max(seen) < steps
    assert cancelled.files == []

    again = server.run(t2v({**loader, "RandomNoise": {"noise_seed": 12}}))
    assert again.outcome == "execution_success"
    assert node_id("TurboLoader") in again.cached
    assert server.log_text().count(LOADING) - loads == 1


def stock_ksampler(sampler: str, scheduler: str) -> dict:
    """The demo workflow with ComfyUI's own KSampler in place of our sampler and what it needs."""
    workflow = t2v({**DENSE, "EmptyHunyuanLatentVideo": TINY})
    prompt = [node_id("TurboTestTextEncode"), 0]
    workflow[node_id("SamplerCustomAdvanced")] = {
        "class_type": "KSampler",
        "inputs": {
            "model": [node_id("SLAAttentionPatch"), 0],
            "positive": prompt,
            "negative": prompt,
            "latent_image": [node_id("EmptyHunyuanLatentVideo"), 0],
            "sampler_name": sampler,
            "scheduler": scheduler,
            "seed": 21,
            "steps": 4,
            "cfg": 1.0,
            "denoise": 1.0,
        },
    }
    for class_type in ("rCMSampler", "RandomNoise", "BasicGuider"):
        del workflow[node_id(class_type)]
    return workflow


def test_ksampler_and_basic_scheduler_offer_rcm(server):
    for node in ("KSampler", "KSamplerAdvanced", "BasicScheduler"):
        assert combo_options(server.object_info(node)[node], "scheduler").count("rcm") == 1


def test_ksampler_makes_the_video_of_the_rcm_sampler(server):
    ours = {"RandomNoise": {"noise_seed": 21}, "rCMSampler": {"mode": "ode"}}
    ours |= {**DENSE, "EmptyHunyuanLatentVideo": TINY}
    expected = pixels(server.run(t2v(ours))).astype(int)

    def distance(*sampling):
        return np.abs(pixels(server.run(stock_ksampler(*sampling))) - expected).mean()

    # Rounded otherwise here and there, and INT8 makes that a little larger.
    assert distance("euler", "rcm") < 1
    assert distance("lcm", "rcm") > 1
    assert distance("euler", "simple") > 1


def test_size_and_length_come_from_nodes(server):
    workflow = t2v({**DENSE, "rCMSampler": {"steps": 1}})
    size = {"resolution": "custom", "aspect_ratio": "16:9", "megapixels": 0.01}
    workflow["size"] = {"class_type": "WanAdaptiveResolution", "inputs": size}
    workflow["length"] = {"class_type": "WanVideoLength", "inputs": {"seconds": 0.25, "fps": 16.0}}
    links = {"width": ["size", 0], "height": ["size", 1], "length": ["length", 0]}
    node_inputs(workflow, "EmptyHunyuanLatentVideo").update(links)
    node_inputs(workflow, "CreateVideo")["fps"] = ["length", 1]
    assert pixels(server.run(workflow)).shape == (5, 80, 144, 3)


def test_the_clock_takes_a_video_apart(server):
    """tests/benchmarks/whole_clock.py, each way of its prompts once."""
    tiny_models.write_picture(server.base / "input" / PICTURE, 128, 96)
    options = CLOCK.parse_options(["--runs", "0"])
    for video, way in ((VIDEO, "ours"), (VIDEO, "stock + pack"), (EXPERTS, "stock")):
        result = CLOCK.measure(server, video, way, False, options)
        assert "failed" not in result, result
        parts = result["first"]
        expected = {"load", "decode", "file", *(f"step {i}" for i in range(1, 5))}
        assert expected <= parts.keys()
        assert all(parts[name].seconds > 0 for name in expected)
        summed = sum(part.seconds for name, part in parts.items() if name not in SUMS)
        assert summed == pytest.approx(parts["whole"].seconds)
        assert 0 < parts["start to pixels"].seconds < parts["whole"].seconds
        assert len(result["bits"]) == 1
        assert ("picture" in parts) == (video is EXPERTS)
        assert parts["step 1"].resident > parts["step 1"].mapped > 0


def test_a_server_is_emptied_once_it_has_heard_all_that_it_was_asked(monkeypatch):
    """What it has not heard while it gave up its models it would do after the next prompt."""
    told = [(9, 0), (9, 1), (9, 1), (4, 1), (4, 0), (4, 0)]  # bytes, unheard
    told = iter([{"tensors": n << 30, "resident": n << 30, "unheard": m} for n, m in told])
    server = types.SimpleNamespace(post=lambda *_: None, get=lambda _: {"now": next(told)})
    monkeypatch.setattr(server_clock.time, "sleep", lambda seconds: None)
    assert server_clock.emptied(server)["tensors"] == 4 << 30
    assert len(list(told)) == 1


def test_what_the_c_library_keeps_is_told_apart(monkeypatch):
    answers = {
        server_clock.CLOCK: {"now": {"tensors": 1, "resident": 9, "mapped": 2, "unheard": 0}}
    }
    trimmed = {"now": {"tensors": 1, "resident": 5, "mapped": 2}, "mappings": {"[heap]": 3}}
    asked = []
    server = types.SimpleNamespace(post=lambda *a: asked.append(a[0]) or trimmed, get=answers.get)
    monkeypatch.setattr(server_clock.time, "sleep", lambda seconds: None)
    held, mappings = server_clock.held(server)
    assert asked[-1] == f"{server_clock.CLOCK}/trim" and mappings == {"[heap]": 3}
    assert held["kept"] == 4
    assert SOAK.grown({**held, "resident": 4}, held) == {"tensors": 0, "resident": 1}


def test_a_server_tells_its_mappings(server):
    if not host_memory.SMAPS.exists():
        pytest.skip("Linux tells")
    held, mappings = server_clock.held(server)
    assert sum(mappings.values()) == pytest.approx(held["resident"] - held["mapped"], rel=0.1)
    assert mappings["[heap]"] > 0


def test_mappings_that_grew_are_told(monkeypatch):
    mb = SOAK.MB
    monkeypatch.setattr(SOAK, "MAPPINGS", 2)
    before, after = {"a": 9 * mb, "b": mb}, {"a": 8 * mb, "b": 3 * mb, "c": mb, "d": 4 * mb}
    assert SOAK.larger(before, after) == {"d": 4 * mb, "b": 2 * mb}
    assert SOAK.larger({}, {"e": mb - 1}) == {}


def test_a_link_is_kept_busy_for_sizes_that_are_asked_for(capsys):
    with pytest.raises(SystemExit):
        CLOCK.parse_options(["--free", "0", "--busy-link", "12"])
    assert "[12.0] are none" in capsys.readouterr().err


def test_a_thread_keeps_the_link_busy_while_a_video_is_made(server):
    """whole_clock.py --busy-link; without a GPU its copies go from RAM to RAM."""
    options = CLOCK.parse_options(["--runs", "0", "--free", "0", "12", "--busy-link", "12"])
    assert list(CLOCK.cards(options)) == [(0, 0), (12, 0), (12, 2)]
    link = server_clock.keep_link_busy(server, 2)
    assert link["other"] > 0 and link["alone"] > 0 and link["left"] > 0
    busy = CLOCK.measure(server, VIDEO, "ours", False, options)
    assert busy["copied"][0] > 0
    assert "GB/s left" in CLOCK.in_numbers(busy | {"link": link})
    with pytest.raises(TimeoutError):
        server_clock.keep_link_busy(server, 2, timeout=0.5)
    server_clock.keep_link_busy(server, 0)  # whoever was not waited for copies no more
    assert CLOCK.measure(server, VIDEO, "stock + pack", False, options)["copied"] == [0]


def test_clocks_are_told_in_one_table(server, tmp_path, capsys):
    """whole_clock.py --told, of two files."""
    tiny_models.write_picture(server.base / "input" / PICTURE, 128, 96)
    options = CLOCK.parse_options(["--runs", "1"])
    run = CLOCK.measure(server, VIDEO, "ours", False, options)
    made = {"host": "ComfyUI A", "title": "a video", **run}
    lost = {"host": "ComfyUI B", "title": "another", "failed": "out of memory"}
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, result in zip(files, (made, lost), strict=True):
        CLOCK.write(file, [result])
    assert CLOCK.read(files[0]) + CLOCK.read(files[1]) == [made, lost]
    CLOCK.main(["--told", *map(str, files)])
    first, row, second, failed = capsys.readouterr().out.splitlines()
    assert first.startswith("ComfyUI A") and second.startswith("ComfyUI B")
    assert f"{run['warm']['start to latents'].seconds:.2f}" in row.split("|")[0]
    assert row.startswith("a video") and row.endswith(" ".join(run["bits"]))
    assert failed.split() == ["another", "failed"]


def test_runs_that_are_out_of_memory_leave_nothing(server):
    """tests/benchmarks/soak.py, where running out is pretended: in a step, switch and decoder."""
    tiny_models.write_picture(server.base / "input" / PICTURE, 128, 96)
    prompt, other = (SOAK.with_frames(EXPERTS.prompt("ours", seed, False)) for seed in (1, 2))
    expected, before = SOAK.made(server, prompt), server_clock.now(server)["tensors"]
    for name, place in SOAK.PLACES.items():
        assert SOAK.out_of_memory(server, other, place) == [], name
        assert SOAK.made(server, prompt) == expected, name
    assert server_clock.now(server)["tensors"] - before < SOAK.ROOM


def test_loaders_of_an_older_pack_are_stood_for(server):
    try:
        offered = server.get("/node_replacements")
    except urllib.error.HTTPError:
        pytest.skip("this ComfyUI replaces no nodes")
    assert {"TurboWanModelLoader", "TurboWanVAELoader"} <= offered.keys()
    workflow = t2v({**DENSE, "EmptyHunyuanLatentVideo": TINY, "rCMSampler": {"steps": 1}})
    expected = pixels(server.run(copy.deepcopy(workflow)))
    old = {"model_name": CHECKPOINT, "attention_type": "sla", "sla_topk": 0.1}
    for new, name, inputs in (
        ("TurboLoader", "TurboWanModelLoader", old),
        ("VAELoader", "TurboWanVAELoader", {"vae_name": VAE}),
    ):
        node = workflow[node_id(new)]
        workflow[node_id(new)] = {**node, "class_type": name, "inputs": inputs, "_meta": {}}
    assert np.array_equal(pixels(server.run(workflow)), expected)


def test_an_image_that_is_missing_is_asked_for(server):
    workflow = t2v()
    size = {"resolution": "480p", "aspect_ratio": "image", "megapixels": 0.38}
    workflow["size"] = {"class_type": "WanAdaptiveResolution", "inputs": size}
    node_inputs(workflow, "EmptyHunyuanLatentVideo")["width"] = ["size", 0]
    run = server.run(workflow)
    assert run.outcome == "execution_error"
    assert "no image is connected. Connect one, or choose a fixed aspect ratio" in run.message


def test_the_doctor_tells_in_every_run(server):
    shown = []

    def keep(kind, data):
        if kind == "executed":
            shown.extend(data["output"]["text"])

    workflow = {"1": {"class_type": "TurboDoctor", "inputs": {}}}
    for _ in range(2):
        assert server.run(workflow, keep).outcome == "execution_success"
    assert len(shown) == 2
    assert all(text.startswith("TurboDiffusion for Wan ") for text in shown)


def test_same_seed_makes_the_same_frames_on_a_fresh_server(server, other):
    first = pixels(server.run(t2v({"RandomNoise": {"noise_seed": 13}})))
    other_seed = pixels(other.run(t2v({"RandomNoise": {"noise_seed": 14}})))
    again = pixels(other.run(t2v({"RandomNoise": {"noise_seed": 13}})))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other_seed)


def test_two_servers_at_once_share_models_and_output(server, other):
    """As one ComfyUI per GPU does: equal frames, and files saved under one name are both kept."""
    workflows = []
    for name in ("one", "two"):
        workflow = t2v({"RandomNoise": {"noise_seed": 31}})
        workflow["frames"]["inputs"]["filename_prefix"] = name
        node_inputs(workflow, "SaveVideo")["filename_prefix"] = name
        saved = {"model": [node_id("TurboLoader"), 0], "filename_prefix": "shared/model"}
        workflow["saved"] = {"class_type": "TurboSaveCheckpoint", "inputs": saved}
        workflows.append(workflow)
    before = set(server.output.rglob("*"))
    with ThreadPoolExecutor(2) as pool:
        runs = pool.map(ComfyServer.run, (server, other), workflows)
        one, two = map(pixels, runs)
    assert np.array_equal(one, two)
    made = sorted(file for file in set(server.output.rglob("*")) - before if "shared" in str(file))
    files = [file for file in made if file.is_file()]
    assert [file.suffix for file in files] == [".safetensors"] * 2
    tensors, same = map(load_file, files)
    assert tensors.keys() == same.keys()
    assert all(torch.equal(tensor, same[name]) for name, tensor in tensors.items())
