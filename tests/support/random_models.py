"""Random models of real size as files, for benchmarks that start a server.

    python tests/support/random_models.py COMFYUI_DIR MODELS_FOLDER JOBS.json

It is a process of its own: importing ComfyUI takes over sys.path and argv, and what it holds of the
GPU is given back at its end. JOBS is a list of [folder, file, kind, sizes], see WRITERS.
"""

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tiny_models
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.uint8: "U8",
}
VAE_DIM = 96  # channels of Wan 2.1's
WORDS = "a red panda drums on a rooftop while snow falls over a city at night"

Tensors = dict[str, torch.Tensor]


def write_missing(comfyui: Path, models: Path, jobs: list[tuple]) -> None:
    """Have the files written that `models` has not got; a job is (folder, file, kind, sizes)."""
    missing = [job for job in jobs if not (models / job[0] / job[1]).exists()]
    if not missing:
        return
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder, "jobs.json")
        told.write_text(json.dumps(missing))
        command = [sys.executable, __file__, str(comfyui), str(models), str(told)]
        subprocess.run(command, check=True)


def turbo(**sizes) -> Tensors:
    """What TurboLoader takes: INT8, with SLA's projections."""
    return tiny_models.t2v_checkpoint(**sizes, device=DEVICE)


def stock(dtype: str, **sizes) -> Tensors:
    """What UNETLoader takes: the linears of the blocks in `dtype`, the rest in bf16."""
    tensors = tiny_models.stock_checkpoint(**sizes, device=DEVICE)
    for name, tensor in tensors.items():
        if name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2:
            tensors[name] = tensor.to(getattr(torch, dtype))
    return tensors


def lora(rank: int, layers: int, **sizes) -> Tensors:
    """A LoRA on q of every self-attention."""
    tensors = {}
    for i in range(layers):
        one = tiny_models.lora(i, rank=rank, **sizes)
        tensors |= {name.replace("blocks.0.", f"blocks.{i}."): x for name, x in one.items()}
    return tensors


def vae(dim: int) -> Tensors:
    """Wan 2.1's VAE."""
    from comfy.ldm.wan.vae import WanVAE

    config = {**tiny_models.VAE_CONFIG, "dim": dim}
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in WanVAE(**config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    return {n: tiny_models.vae_tensor(n, s, generator).bfloat16() for n, s in shapes.items()}


def umt5() -> Tensors:
    """umT5-XXL's encoder in fp8, 5.7 GB, and a tokenizer of a few words."""
    import comfy.ops
    from comfy.text_encoders import t5, wan

    config = json.loads(Path(wan.__file__).with_name("umt5_config_xxl.json").read_text())
    with torch.device("meta"):
        model = t5.T5(config, torch.bfloat16, "meta", comfy.ops.disable_weight_init)
    tensors = {}
    for name, x in model.state_dict().items():
        values = torch.ones(x.shape, device=DEVICE)
        if x.ndim == 2:
            values.normal_(std=x.shape[-1] ** -0.5)
        tensors[name] = values.to(torch.float8_e4m3fn)
    return tensors | {"spiece_model": tokenizer()}


def tokenizer() -> torch.Tensor:
    """A sentencepiece model that knows WORDS, as bytes."""
    import io

    import sentencepiece

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS] * 20),
        model_writer=made,
        vocab_size=26,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return torch.frombuffer(bytearray(made.getvalue()), dtype=torch.uint8)


WRITERS = {"turbo": turbo, "stock": stock, "lora": lora, "vae": vae, "umt5": umt5}


def write_safetensors(path: Path, tensors: Tensors) -> None:
    """As safetensors' own writer, which would hold the whole file in memory twice, and slower."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        known = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = {**known, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    with unfinished.open("wb") as file, ThreadPoolExecutor(8) as pool:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()

        def write(name: str) -> None:
            data = tensors[name].contiguous().flatten().view(torch.uint8).cpu().numpy()
            offset = begin + header[name]["data_offsets"][0]
            while len(data):
                written = os.pwrite(file.fileno(), data, offset)
                data, offset = data[written:], offset + written

        list(pool.map(write, tensors))
    unfinished.rename(path)


def main() -> None:
    comfyui, models, told = map(Path, sys.argv[1:])
    sys.path.insert(0, str(comfyui))
    sys.argv[1:] = ["--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    with torch.inference_mode():
        for folder, file, kind, sizes in json.loads(told.read_text()):
            write_safetensors(models / folder / file, WRITERS[kind](**sizes))


if __name__ == "__main__":
    main()
