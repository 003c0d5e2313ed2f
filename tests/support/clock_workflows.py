"""A video by our loader, by a stock model with our nodes, or by ComfyUI alone, as API prompts."""

from random_models import VAE_DIM, WORDS
from turbodiffusion_pack.turbo_core.forward_time import Shape

WAYS = "ours", "stock + pack", "stock"
TEXT, PICTURE = "clock_umt5.safetensors", "clock.png"
TEXTS = "noise", "umt5"
# Which part of the video's time a node's is.
PARTS = {
    "TurboLoader": "load",
    "UNETLoader": "load",
    "VAELoader": "load",
    "W8A8Quantize": "load",
    "SLAAttentionPatch": "load",
    "Wan22ExpertSwitch": "load",
    "LoraLoaderModelOnly": "load",
    "TurboVAE": "load",
    "CLIPLoader": "load",
    "CLIPTextEncode": "text",
    "TurboTestNoiseAsText": "text",
    "WanImageToVideo": "picture",
    "SamplerCustomAdvanced": "sampler",
    "KSampler": "sampler",
    "KSamplerAdvanced": "sampler",
    "VAEDecode": "decode",
    "CreateVideo": "file",
    "SaveVideo": "file",
}
BOUNDARY = 0.9


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


class Video:
    """Which video, of which files, for one API prompt after the other."""

    def __init__(self, shape: Shape, steps: int, text: str = "noise", file: bool = True):
        self.shape, self.steps, self.text, self.file_too = shape, steps, text, file
        self.from_picture = shape.in_channels > 16
        self.vae_dim = VAE_DIM if shape.dim >= 1536 else 8
        self.vae = f"clock_vae_{self.vae_dim}.safetensors"

    def experts(self) -> list[str]:
        return ["high", "low"] if self.from_picture else ["one"]

    def file(self, kind: str, expert: str) -> str:
        s = self.shape
        return f"clock_{kind}_{s.dim}x{s.num_layers}_{s.in_channels}_{expert}.safetensors"

    def jobs(self, ways: list[str]) -> list[tuple]:
        """The files that these ways read, for random_models.write_missing."""
        s = self.shape
        sizes = {"dim": s.dim, "ffn": s.ffn_dim, "layers": s.num_layers}
        sizes["in_channels"] = s.in_channels
        # In what their makers give away: fp16 for 1.3B, fp8 for 14B.
        stock = {"dtype": "float16" if s.dim < 5120 else "float8_e4m3fn"}
        kinds = {"turbo": {}} if "ours" in ways else {}
        kinds |= {"stock": stock} if set(ways) - {"ours"} else {}
        jobs = [
            ("diffusion_models", self.file(kind, expert), kind, {**sizes, **more, "seed": seed})
            for kind, more in kinds.items()
            for seed, expert in enumerate(self.experts())
        ]
        jobs.append(("vae", self.vae, "vae", {"dim": self.vae_dim}))
        return jobs + [("text_encoders", TEXT, "umt5", {})] * (self.text == "umt5")

    def prompt(self, way: str, seed: int, turbo_vae: bool) -> dict:
        """For POST /prompt; every video of one seed is of the same noise."""
        prompt = {"vae": node("VAELoader", vae_name=self.vae)}
        if turbo_vae:
            prompt["turbo_vae"] = node("TurboVAE", vae=["vae", 0])
        vae = ["turbo_vae" if turbo_vae else "vae", 0]
        prompt |= self._text() | self._latent(vae) | self._models(way)
        if way == "ours":
            prompt |= self._sampled_by_rcm(seed)
        elif self.from_picture and way == "stock":
            prompt |= self._sampled_in_two(seed)
        else:
            prompt |= self._sampled_by_host(seed)
        prompt |= {
            "images": node("VAEDecode", samples=["sampler", 0], vae=vae),
            "bits": node("TurboTestLatentBits", samples=["sampler", 0], images=["images", 0]),
        }
        return prompt | self._file() if self.file_too else prompt

    def _file(self) -> dict:
        how = {"filename_prefix": "clock", "format": "auto", "codec": "auto"}
        return {
            "video": node("CreateVideo", images=["images", 0], fps=16.0),
            "file": node("SaveVideo", video=["video", 0], **how),
        }

    def _text(self) -> dict:
        if self.text == "noise":
            return {"text": node("TurboTestNoiseAsText", seed=1)}
        clip = node("CLIPLoader", clip_name=TEXT, type="wan", device="default")
        return {"clip": clip, "text": node("CLIPTextEncode", clip=["clip", 0], text=WORDS)}

    def _latent(self, vae: list) -> dict:
        s = self.shape
        size = {"width": s.width, "height": s.height, "length": s.frames, "batch_size": 1}
        if not self.from_picture:
            return {"latent": node("EmptyHunyuanLatentVideo", **size)}
        texts = {"positive": ["text", 0], "negative": ["text", 0], "vae": vae}
        picture = node("LoadImage", image=PICTURE)
        image = node("WanImageToVideo", **texts, **size, start_image=["picture", 0])
        return {"picture": picture, "latent": image}

    def _models(self, way: str) -> dict:
        """The nodes that end in one called "model", or for stock experts "high" and "low"."""
        names = self.experts() if self.from_picture else ["model"]
        prompt = {}
        for name, expert in zip(names, self.experts(), strict=True):
            prompt |= self._one_model(way, name, expert)
        if self.from_picture and way != "stock":
            experts = {"model_high": ["high", 0], "model_low": ["low", 0]}
            prompt["model"] = node("Wan22ExpertSwitch", **experts, boundary=BOUNDARY)
        return prompt

    def _one_model(self, way: str, name: str, expert: str) -> dict:
        if way == "ours":
            file = self.file("turbo", expert)
            return {name: node("TurboLoader", checkpoint=file, granularity="fast")}
        file = self.file("stock", expert)
        loader = node("UNETLoader", unet_name=file, weight_dtype="default")
        if way == "stock":
            return {name: loader}
        stock, int8 = f"stock_{name}", f"int8_{name}"
        sparse = {"attention": "sagesla", "topk": 0.1, "dense_blocks": "", "dense_steps": 0}
        return {
            stock: loader,
            int8: node("W8A8Quantize", model=[stock, 0], granularity="fast", report=False),
            name: node("SLAAttentionPatch", model=[int8, 0], **sparse, backend="auto"),
        }

    def _conditioning(self) -> tuple[list, list, list]:
        """Positive, negative, latent."""
        if self.from_picture:
            return ["latent", 0], ["latent", 1], ["latent", 2]
        return ["text", 0], ["text", 0], ["latent", 0]

    def _sampled_by_rcm(self, seed: int) -> dict:
        positive, _, latent = self._conditioning()
        links = {"noise": ["noise", 0], "guider": ["guider", 0], "latent_image": latent}
        links |= {"sampler": ["sampling", 0], "sigmas": ["sampling", 1]}
        sigma_max, mode = (200.0, "ode") if self.from_picture else (80.0, "sde")
        return {
            "sampling": node("rCMSampler", steps=self.steps, sigma_max=sigma_max, mode=mode),
            "noise": node("RandomNoise", noise_seed=seed),
            "guider": node("BasicGuider", model=["model", 0], conditioning=positive),
            "sampler": node("SamplerCustomAdvanced", **links),
        }

    def _sampled_by_host(self, seed: int) -> dict:
        positive, negative, latent = self._conditioning()
        links = {"model": ["model", 0], "positive": positive, "negative": negative}
        links["latent_image"] = latent
        how = self._host_settings()
        return {"sampler": node("KSampler", **links, **how, seed=seed, denoise=1.0)}

    def _sampled_in_two(self, seed: int) -> dict:
        """As ComfyUI's own templates sample the experts of Wan 2.2."""
        positive, negative, latent = self._conditioning()
        how = {"positive": positive, "negative": negative, "noise_seed": seed}
        how |= self._host_settings()
        half = self.steps // 2
        high = {"model": ["high", 0], "latent_image": latent, "add_noise": "enable"}
        high |= {"start_at_step": 0, "end_at_step": half, "return_with_leftover_noise": "enable"}
        low = {"model": ["low", 0], "latent_image": ["high_sampler", 0], "add_noise": "disable"}
        low |= {"start_at_step": half, "end_at_step": 10000}
        low["return_with_leftover_noise"] = "disable"
        return {
            "high_sampler": node("KSamplerAdvanced", **how, **high),
            "sampler": node("KSamplerAdvanced", **how, **low),
        }

    def _host_settings(self) -> dict:
        """Of KSampler; without CFG, as TurboDiffusion's models need none."""
        return {"steps": self.steps, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
