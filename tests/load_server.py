"""Puts a live ComfyUI server under load: nothing may end it, fill its memory or change its frames.

    python tests/load_server.py [--prompts 10000] [--runs 1000] [--seed 1] [--again 12]
                                [--server=--cache-classic]

Two parts, on tiny random models and the CPU or GPU that there is:

- `prompts`: API prompts with random damage (values of wrong types and sizes, links that lead
  anywhere, inputs and nodes that are missing or unheard of). The server may refuse them or end them
  with an error. It must not die or hang, and an honest run afterwards must make the frames that it
  made before.
- `runs`: honest runs, queued in eights, of random models (text to video, an expert pair, a stock
  model made INT8), LoRAs, attention, sizes and seeds; of each eight some are cancelled, running or
  waiting. It tells the server's memory at the start and the end, and makes `again` of the runs
  that went through in a fresh process: the frames must be equal.

Sizes and steps are kept small, damaged ones as well: a large video is no defect. Linux only, which
tells the memory of another process.
"""

import argparse
import copy
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "support"))

import comfyui_install  # noqa: E402
import pack  # noqa: E402, F401
import tiny_models  # noqa: E402
from comfyui_server import ComfyServer, RejectedError  # noqa: E402
from PIL import Image  # noqa: E402

PROMPT_BATCH, RUN_BATCH = 20, 8
SECONDS = 120  # a batch that takes longer hangs
CANCELLED = 0.3  # the share of the runs' batches' members that somebody cancels
LARGEST = {
    "width": 128,
    "height": 128,
    "length": 17,
    "batch_size": 2,
    "steps": 6,
    "seconds": 1.0,
    "megapixels": 0.02,
}
LORA_LOADERS = {"TurboLoraLoader": "strength", "LoraLoaderModelOnly": "strength_model"}
VALUES = (
    None, True, False, 0, 1, -1, 2, 7, 0.5, 1.5, -0.5, 10**12, -(10**12), 1e308, "", "0", "auto",
    "all", "none", "0-1", "1-0", "../../etc/passwd", "\x00", "ü" * 300, [], {}, ["1"], ["1", 0],
    ["1", 99], ["nowhere", 0], [1, 0], [[["1", 0]]], {"a": 1},
)  # fmt: skip


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def write_models(comfyui: Path, base: Path) -> None:
    models = base / "models"
    tiny_models.write_vae(comfyui, models / "vae" / "vae.safetensors")
    unets = models / "diffusion_models"
    for seed in range(2):
        tiny_models.write_checkpoint(unets / f"t2v_{seed}.pth", tiny_models.t2v_checkpoint(seed))
        tiny_models.write_checkpoint(unets / f"i2v_{seed}.pth", tiny_models.i2v_checkpoint(seed))
        lora = models / "loras" / f"lora_{seed}.safetensors"
        tiny_models.write_checkpoint(lora, tiny_models.lora(seed))
    tiny_models.write_checkpoint(unets / "stock.safetensors", tiny_models.stock_checkpoint())
    tiny_models.write_picture(base / "input" / "example.png", 128, 96)


class RandomPrompt:
    """An honest prompt of a random kind; its frames are saved under `name`."""

    def __init__(self, rng: random.Random, name: str):
        self.rng, self.prompt = rng, {}
        self.granularity = rng.choice(("fast", "exact"))
        kind = rng.choice((self.text_to_video, self.text_to_video, self.experts, self.quantized))
        model, conditioning, latent = kind()
        self.sample(model, conditioning, latent)
        self.add("decode", node("VAEDecode", samples=["sampler", 0], vae=["vae", 0]))
        self.add("save", node("SaveImage", images=["decode", 0], filename_prefix=name))

    def add(self, key: str, added: dict) -> list:
        self.prompt[key] = added
        return [key, 0]

    def loader(self, file: str) -> list:
        loader = node("TurboLoader", checkpoint=f"{file}.pth", granularity=self.granularity)
        return self.with_lora(file, self.add(file, loader))

    def with_lora(self, key: str, model: list) -> list:
        if self.rng.random() < 0.5:
            return model
        name = self.rng.choice(list(LORA_LOADERS))
        file = f"lora_{self.rng.randrange(2)}.safetensors"
        strength = {LORA_LOADERS[name]: self.rng.choice((0.3, 1.0))}
        return self.add(f"lora_{key}", node(name, model=model, lora_name=file, **strength))

    def text_to_video(self) -> tuple[list, list, list]:
        return self.with_attention(self.loader(f"t2v_{self.rng.randrange(2)}")), *self.from_text()

    def quantized(self) -> tuple[list, list, list]:
        loader = node("UNETLoader", unet_name="stock.safetensors", weight_dtype="default")
        stock, report = self.add("stock", loader), self.rng.random() < 0.2
        settings = {"granularity": self.granularity, "report": report}
        model = self.add("int8", node("W8A8Quantize", model=stock, **settings))
        return self.with_attention(self.with_lora("int8", model)), *self.from_text()

    def experts(self) -> tuple[list, list, list]:
        high, low = self.loader("i2v_0"), self.loader("i2v_1")
        switch = node("Wan22ExpertSwitch", model_high=high, model_low=low, boundary=0.9)
        model, (text, _) = self.add("switch", switch), self.from_text()
        picture = self.add("picture", node("LoadImage", image="example.png"))
        prompts = {"positive": text, "negative": text, "vae": ["vae", 0]}
        image = node("WanImageToVideo", **prompts, start_image=picture, **self.size())
        return model, self.add("latent", image), ["latent", 2]

    def with_attention(self, model: list) -> list:
        if self.rng.random() < 0.5:
            return model
        settings = {
            "attention": self.rng.choice(("sagesla", "sla", "dense")),
            "topk": self.rng.choice((0.1, 0.5)),
            "dense_blocks": self.rng.choice(("", "0")),
            "dense_steps": self.rng.randrange(2),
            "backend": "auto",
        }
        return self.add("attention", node("SLAAttentionPatch", model=model, **settings))

    def from_text(self) -> tuple[list, list]:
        words = self.rng.choice(("a big red circle", "a small diamond"))
        text = self.add("text", node("TurboTestTextEncode", text=words))
        self.add("vae", node("VAELoader", vae_name="vae.safetensors"))
        return text, self.add("latent", node("EmptyHunyuanLatentVideo", **self.size()))

    def size(self) -> dict:
        width, height = self.rng.choice(((64, 64), (96, 64), (64, 128)))
        length = self.rng.choice((5, 9))
        return {"width": width, "height": height, "length": length, "batch_size": 1}

    def sample(self, model: list, conditioning: list, latent: list) -> None:
        steps, mode = self.rng.randint(1, 4), self.rng.choice(("sde", "ode"))
        self.add("sampling", node("rCMSampler", steps=steps, sigma_max=80.0, mode=mode))
        self.add("noise", node("RandomNoise", noise_seed=self.rng.randrange(1000)))
        self.add("guider", node("BasicGuider", model=model, conditioning=conditioning))
        links = {"noise": ["noise", 0], "guider": ["guider", 0], "latent_image": latent}
        links |= {"sampler": ["sampling", 0], "sigmas": ["sampling", 1]}
        self.add("sampler", node("SamplerCustomAdvanced", **links))


def honest(rng: random.Random, name: str) -> dict:
    return RandomPrompt(rng, name).prompt


def damaged(rng: random.Random, classes: dict[str, set[str]], others: list[str]) -> dict:
    """An honest prompt, with other nodes of ours in it, after one to four damages.

    `others` are the nodes that may come in, `classes` all there are, with their inputs. A list for
    an input that a node has not got is taken out again: ComfyUI does not look at it before the run,
    where a link that leads nowhere ends its worker, whatever the node.
    """
    prompt = honest(rng, "damaged")
    (model,) = (n["inputs"]["model"] for n in prompt.values() if n["class_type"] == "BasicGuider")
    extras = {
        "doctor": node("TurboDoctor"),
        "file": node("TurboSaveCheckpoint", model=model, filename_prefix="saved"),
        "size": node(
            "WanAdaptiveResolution", resolution="custom", aspect_ratio="16:9", megapixels=0.01
        ),
        "seconds": node("WanVideoLength", seconds=0.5, fps=16.0),
    }
    for key in rng.sample(list(extras), rng.randrange(2)):
        prompt[key] = extras[key]
    for _ in range(rng.randint(1, 4)):
        damage(rng, prompt, others)
    for entry in prompt.values():
        for name, value in list(entry["inputs"].items()):
            known = name in classes.get(entry["class_type"], ())
            if isinstance(value, list) and not known:
                del entry["inputs"][name]
            if isinstance(value, (int, float)) and value > LARGEST.get(name, value):
                entry["inputs"][name] = LARGEST[name]
    return prompt


def damage(rng: random.Random, prompt: dict, classes: list[str]) -> None:
    key = rng.choice(list(prompt))
    inputs = prompt[key]["inputs"]
    kind = rng.choice(("value", "value", "value", "link", "link", "input", "node", "class"))
    if kind == "node" and len(prompt) > 1:
        del prompt[key]
    elif kind == "class":
        prompt[key]["class_type"] = rng.choice(classes)
    elif inputs and kind == "input":
        del inputs[rng.choice(list(inputs))]
    elif inputs and kind == "link":
        inputs[rng.choice(list(inputs))] = [rng.choice(list(prompt)), rng.randrange(3)]
    elif inputs:
        inputs[rng.choice(list(inputs))] = copy.deepcopy(rng.choice(VALUES))


def wait(server: ComfyServer, ids: list[str]) -> dict[str, dict]:
    """The history of these prompts once the queue is empty; those taken off it have none."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        server.check_alive()
        queue = server.get("/queue")
        if not queue["queue_running"] and not queue["queue_pending"]:
            return {i: server.get(f"/history/{i}").get(i) for i in ids}
        time.sleep(0.03)
    raise SystemExit(f"hangs: a batch did not end in {SECONDS} s\n{server.log_tail()}")


def outcome(entry: dict | None) -> str:
    if entry is None:
        return "taken off the queue"
    events = [event for event, _ in entry["status"]["messages"]]
    return "cancelled" if "execution_interrupted" in events else entry["status"]["status_str"]


def frames(server: ComfyServer, entry: dict) -> list[bytes]:
    saved = entry["outputs"]["save"]["images"]
    files = [server.output / image["subfolder"] / image["filename"] for image in saved]
    return [Image.open(file).tobytes() for file in files]


def made(server: ComfyServer, prompt: dict) -> list[bytes]:
    """The frames of one honest run."""
    prompt_id = server.queue(prompt)
    entry = wait(server, [prompt_id])[prompt_id]
    if outcome(entry) != "success":
        raise SystemExit(f"an honest run: {outcome(entry)}\n{server.log_tail()}")
    return frames(server, entry)


def memory(server: ComfyServer) -> int:
    """MB resident in the server's process."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) // 1000


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def random_prompts(server: ComfyServer, count: int, seed: int) -> None:
    rng = random.Random(f"prompts {seed}")
    info = server.object_info()
    classes = {name: set().union(*node["input"].values()) for name, node in info.items()}
    module = info["TurboLoader"]["python_module"]
    ours = [name for name, known in info.items() if known["python_module"] == module]
    ours += ["KSampler", "VAEDecode", "ModelMergeAdd", "PreviewAny", "UnheardOf"]
    check = honest(random.Random(seed), "check")
    before, start, counts = made(server, check), time.perf_counter(), Counter()
    first = memory(server)
    for done in range(0, count, PROMPT_BATCH):
        ids = []
        for _ in range(min(PROMPT_BATCH, count - done)):
            try:
                ids.append(server.queue(damaged(rng, classes, ours)))
            except RejectedError as error:
                counts[f"refused with {error.status}"] += 1
        counts.update(map(outcome, wait(server, ids).values()))
        if done % 500 == 0:
            shutil.rmtree(server.output, ignore_errors=True)
            say(f"  {done + PROMPT_BATCH} prompts: {dict(counts)}, {memory(server)} MB")
    if made(server, copy.deepcopy(check)) != before:
        raise SystemExit("after the random prompts an honest run makes other frames")
    told = ", ".join(f"{number} {what}" for what, number in sorted(counts.items()))
    say(f"{count} random prompts in {time.perf_counter() - start:.0f} s: {told}")
    say(f"memory {first} to {memory(server)} MB; an honest run makes the frames it made before")


def random_runs(server: ComfyServer, count: int, seed: int, again: int) -> dict[str, tuple]:
    """Runs with random cancels; gives prompts and frames of those to make again."""
    rng = random.Random(f"runs {seed}")
    made(server, honest(random.Random(seed), "warm"))
    start, first, counts, kept = time.perf_counter(), memory(server), Counter(), {}
    chosen = set(rng.sample(range(count), min(count, 3 * again)))
    for done in range(0, count, RUN_BATCH):
        numbers = range(done, min(done + RUN_BATCH, count))
        prompts = {server.queue(p): (i, p) for i in numbers for p in [honest(rng, f"run_{i}")]}
        for prompt_id in prompts:
            if rng.random() < CANCELLED:
                time.sleep(rng.uniform(0, 0.4))
                if rng.random() < 0.5:
                    server.interrupt()
                else:
                    server.post("/queue", {"delete": [prompt_id]})
        history = wait(server, list(prompts))
        counts.update(map(outcome, history.values()))
        for prompt_id, entry in history.items():
            number, prompt = prompts[prompt_id]
            if number in chosen and outcome(entry) == "success" and len(kept) < again:
                kept[f"run_{number}"] = prompt, frames(server, entry)
        shutil.rmtree(server.output, ignore_errors=True)
        if done % 200 == 0:
            say(f"  {done} runs: {memory(server)} MB")
    told = ", ".join(f"{number} {what}" for what, number in sorted(counts.items()))
    say(f"{count} runs in {time.perf_counter() - start:.0f} s: {told}")
    say(f"memory {first} to {memory(server)} MB")
    if counts["error"]:
        raise SystemExit(f"an honest run failed\n{server.log_tail(80)}")
    return kept


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=10_000, help="random prompts")
    parser.add_argument("--runs", type=int, default=1000, help="runs with random cancels")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--again", type=int, default=12, help="runs to make in a fresh process")
    parser.add_argument("--server", action="append", default=[], help="an option of ComfyUI's")
    args = parser.parse_args()
    comfyui = comfyui_install.find()
    if comfyui is None:
        raise SystemExit("no ComfyUI found: set COMFYUI_DIR to a ComfyUI folder")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        write_models(comfyui, base)
        with ComfyServer(comfyui, base, options=tuple(args.server)) as server:
            if args.prompts:
                random_prompts(server, args.prompts, args.seed)
            kept = random_runs(server, args.runs, args.seed, args.again) if args.runs else {}
        if kept:
            with ComfyServer(comfyui, base) as fresh:
                equal = sum(made(fresh, prompt) == seen for prompt, seen in kept.values())
            say(f"{equal} of {len(kept)} sampled runs make the same frames in a fresh process")
            sys.exit(equal != len(kept))


if __name__ == "__main__":
    main()
