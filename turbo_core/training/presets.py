"""The presets: which network, which data and which recipe, stage by stage.

`--set NAME=VALUE` changes one number of the stage that runs, `--set lr=2e-5`. The recipe of the big
presets is TurboDiffusion's (its trainer's configurations; "rCM" is table 4 of arXiv 2510.08431);
the toy's is ours. A batch is made of slots of `micro_batch` samples, which are dealt to the GPUs.

Memory, in bytes a parameter and split over the GPUs by FSDP2: `sla` 24 (student, gradient, two
moments and average at 4 each, frozen teacher 4), `rcm` 40 (the fake score adds 16). On top come the
activations of one micro-batch, with a checkpoint a block.
"""

import argparse
import dataclasses
from dataclasses import dataclass

from ..checkpoint.sizes import TEXT_DIM, Sizes


@dataclass(frozen=True)
class VAE:
    """ComfyUI's Wan VAE in small, for the toy world; fields as Teacher's.

    Attributes:
        batch: clips in an update; as many fewer where whole frames are learnt.
        crop: height and width of what is cut out around the shape.
        whole: share of the steps, the last ones, that learn whole frames.
        dim: channels at full size; Wan's has 96. 8 of them are 0.9 million parameters.
        mse_weight: of the mean square beside the mean L1 error, without which it learns slower.
        kl_weight: of the mean of each latent number's KL divergence.
        measured: clips that no step saw, for the latents' statistics and the error.
    """

    steps: int
    batch: int
    crop: int
    whole: float = 0.25
    lr: float = 2e-3
    warmup: int = 100
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    dim: int = 8
    mse_weight: float = 2.0
    kl_weight: float = 1e-4
    measured: int = 256


@dataclass(frozen=True)
class Clips:
    """Clips of the toy world, rendered and encoded: what the toys learn from.

    Attributes:
        samples: how many.
        batch: encoded at a time.
    """

    samples: int
    batch: int = 16


@dataclass(frozen=True)
class Evaluation:
    """The examination of all models of a toy run.

    Attributes:
        prompts: how many, each of which makes two videos.
        at_once: samples in one pass.
        teacher_steps: of the teacher and of SLA alone.
    """

    prompts: int = 256
    at_once: int = 64
    teacher_steps: int = 50


@dataclass(frozen=True)
class Teacher:
    """Flow matching from random weights: for toys alone, Wan is its own teacher.

    Attributes:
        steps: updates.
        batch, micro_batch: samples in an update, and in one pass of one GPU.
        lr: highest learning rate, after `warmup` steps; then it falls as a cosine to 0.
        betas, weight_decay: of AdamW.
        level_mean, level_std: of ln sigma, sigma = s / (1 - s), s the noise level.
        dropout: share of the prompts that become the unconditional one.
        ema_length: of the average that is written, as a share of the training.
    """

    steps: int
    batch: int
    micro_batch: int
    lr: float = 6e-4
    warmup: int = 200
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    level_mean: float = 0.5
    level_std: float = 1.4
    dropout: float = 0.1
    ema_length: float = 0.05


@dataclass(frozen=True)
class SLA:
    """SLA fine-tuning, by regression on the frozen dense teacher; fields as Teacher's.

    Attributes:
        after_rcm: tune on rCM's student, which has to be finished, at the points that its sampler
            goes through: see SampledSLATraining. A sample then is all of them, and the levels'
            mean and deviation have no say. False is TurboDiffusion's way: both at the same time.
        topk: share of the key blocks with exact attention.
        block_q, block_k: rows in a query and a key block. TurboDiffusion trains 64 x 64 and runs
            other shapes; what was trained with is written into the file.
        feature_map: of the linear branch.
        guidance: of the samples that are shown while training.
        fall: share of the steps, the last ones, over which the learning rate falls to 0.
        balance: with after_rcm, power p of the weight loss^-p that a point's loss has, by
            micro-batch. At 0 the first points, whose errors are large, teach nearly alone; the last
            ones draw what is seen.
    """

    steps: int
    batch: int
    micro_batch: int
    lr: float = 1e-5
    warmup: int = 100
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    level_mean: float = 1.5
    level_std: float = 1.6
    topk: float = 0.1
    block_q: int = 64
    block_k: int = 64
    feature_map: str = "softmax"
    guidance: float = 5.0
    fall: float = 0.0
    ema_length: float = 0.1
    after_rcm: bool = False
    balance: float = 0.0


@dataclass(frozen=True)
class RCM:
    """rCM distillation of the dense network; fields as Teacher's and SLA's.

    Attributes:
        steps: iterations, those of the student and those of the fake score together.
        lr, fake_lr: of the student and of the fake score.
        level_mean, level_std: of the consistency loss.
        shift: of the noise levels of rollouts and of both scores.
        consistency_only: the first iterations K, with the consistency loss alone, over which the
            tangent is warmed up.
        every: the student learns in one of so many iterations after that, the fake score in the
            others.
        rollout: the student's samples take 1 to so many steps, in turn.
        sampler_angles: samples in training stop where the sampler of `rollout` steps does, in place
            of anywhere.
        guidance: of the teacher.
        dmd_weight: lambda, beside the consistency loss's 100. Both losses are sums, so the balance
            depends on the latent's size: 0.01 for Wan's 2 million numbers, 0.1 for the toy's.
        tangent: "jvp", or "difference" (central) where an operation has no forward mode.
        sigma_max: where samples start while training.
    """

    steps: int
    batch: int
    micro_batch: int
    lr: float = 2e-6
    fake_lr: float = 4e-7
    warmup: int = 100
    betas: tuple[float, float] = (0.0, 0.999)
    weight_decay: float = 0.01
    level_mean: float = 0.7
    level_std: float = 1.6
    shift: float = 5.0
    consistency_only: int = 1000
    every: int = 5
    rollout: int = 4
    sampler_angles: bool = False
    guidance: float = 5.0
    dmd_weight: float = 0.01
    tangent: str = "jvp"
    sigma_max: float = 80.0
    fall: float = 0.0
    ema_length: float = 0.1


@dataclass(frozen=True)
class Preset:
    """A network, its latents and its stages.

    Attributes:
        sizes: of the transformer.
        latent: frames, height and width of the latents.
        context: tokens of a prompt, for the estimate; the data say how many there are.
        sla, rcm: the stages' recipes.
        teacher: None where a finished checkpoint is the teacher.
        vae, data, evaluate: the toy world's.
        text_channels: of the 4096, how many ever differ from 0.
        seed: of weights, data and noise.
        checkpointing: keep one activation a block and compute the rest twice.
        recorded: replay each pass of training as a CUDA graph, where one GPU trains a network so
            small that Python is slower.
        compiled: let torch.compile make the blocks' kernels, where it pays: short sequences.
        deterministic: leave out kernels whose sums depend on who comes first, which a GPU's
            attention has in its backward pass. A resumed run then ends with the very same bits.
        save_every, sample_every: steps.
        note: what a user should know before starting it.
    """

    sizes: Sizes
    latent: tuple[int, int, int]
    context: int
    sla: SLA
    rcm: RCM
    teacher: Teacher | None = None
    vae: VAE | None = None
    data: Clips | None = None
    evaluate: Evaluation | None = None
    text_channels: int = TEXT_DIM
    seed: int = 0
    checkpointing: bool = False
    compiled: bool = False
    recorded: bool = False
    deterministic: bool = False
    save_every: int = 500
    sample_every: int = 500
    note: str = ""

    @property
    def tokens(self) -> int:
        """Rows that attend to each other."""
        frames, height, width = self.latent
        return frames * (height // 2) * (width // 2)

    @property
    def video(self) -> tuple[int, int]:
        """Frames of a clip, and its height and width: the toy's are square."""
        frames, height, _ = self.latent
        return 4 * frames - 3, 8 * height


TOY_WORLD = {"context": 16, "text_channels": 64}

TOY = Preset(
    sizes=Sizes(dim=256, ffn_dim=384, num_layers=5, in_channels=16),
    latent=(5, 32, 32),
    **TOY_WORLD,
    vae=VAE(steps=2600, batch=8, crop=128),
    data=Clips(samples=10240),
    evaluate=Evaluation(),
    teacher=Teacher(steps=18000, batch=64, micro_batch=64, lr=8e-4, level_mean=0.8),
    sla=SLA(
        steps=11700,
        batch=16,
        micro_batch=16,
        lr=1.2e-3,
        topk=0.2,
        block_q=128,
        guidance=2.5,
        fall=0.7,
        after_rcm=True,
        balance=1.0,
    ),
    rcm=RCM(
        steps=2400,
        batch=48,
        micro_batch=48,
        lr=1e-4,
        fake_lr=6e-5,
        level_mean=0.0,  # -0.8 + ln sqrt 5
        shift=3.0,
        sampler_angles=True,
        consistency_only=200,
        every=2,
        guidance=2.5,
        dmd_weight=0.1,
        fall=0.5,
    ),
    compiled=True,
    recorded=True,
    save_every=5000,
    sample_every=10000,
    note="17 frames of 256 x 256 in a world of coloured shapes; made for one GPU",
)

# One expert of an image-to-video pair each, after Wan 2.2: both know all noise levels, as
# consistency runs down to the data, but practise their own side of the boundary 0.9.
I2V = dataclasses.replace(
    TOY,
    sizes=Sizes(dim=128, ffn_dim=256, num_layers=4, in_channels=36),
    sla=SLA(
        steps=3000,
        batch=48,
        micro_batch=48,
        lr=4e-4,
        topk=0.2,
        block_q=128,
        guidance=2.5,
        fall=0.6,
    ),
    rcm=dataclasses.replace(TOY.rcm, steps=2400, shift=5.0, sampler_angles=False),
)

CPU = Preset(
    sizes=Sizes(dim=128, ffn_dim=256, num_layers=2, in_channels=16),
    latent=(3, 16, 16),
    **TOY_WORLD,
    vae=VAE(steps=10, batch=2, crop=32, warmup=2, measured=4, dim=4),
    data=Clips(samples=32, batch=4),
    evaluate=Evaluation(prompts=1, at_once=2, teacher_steps=4),
    teacher=Teacher(steps=40, batch=8, micro_batch=8, lr=2e-3, warmup=10),
    sla=SLA(steps=15, batch=8, micro_batch=8, lr=5e-4, warmup=5, guidance=2.5),
    rcm=RCM(
        steps=20,
        batch=4,
        micro_batch=4,
        lr=5e-5,
        fake_lr=1e-5,
        warmup=5,
        level_mean=-0.25,  # -0.8 + ln sqrt 3
        consistency_only=8,
        guidance=2.5,
        dmd_weight=0.2,
    ),
    save_every=10,
    sample_every=1000,
    note="the toy's commands on two CPU cores; far too short to learn anything",
)

PRESETS = {
    "toy": TOY,
    "toy-i2v-high": dataclasses.replace(
        I2V, seed=1, teacher=Teacher(steps=10000, batch=32, micro_batch=32, lr=8e-4, level_mean=1.5)
    ),
    "toy-i2v-low": dataclasses.replace(
        I2V, seed=2, teacher=Teacher(steps=10000, batch=32, micro_batch=32, lr=8e-4, level_mean=0.0)
    ),
    "toy-cpu": CPU,
    "toy-cpu-i2v": dataclasses.replace(
        CPU, sizes=Sizes(dim=128, ffn_dim=256, num_layers=2, in_channels=36)
    ),
    "1.3B-480P": Preset(
        sizes=Sizes(dim=1536, ffn_dim=8960, num_layers=30, in_channels=16),
        latent=(21, 60, 104),
        context=512,
        sla=SLA(steps=2000, batch=64, micro_batch=1),
        rcm=RCM(steps=10000, batch=64, micro_batch=1),
        checkpointing=True,
        save_every=100,
        note="SLA's paper trained 2000 steps of 64, rCM's 10000 iterations of 64 to 256",
    ),
    "14B-480P": Preset(
        sizes=Sizes(dim=5120, ffn_dim=13824, num_layers=40, in_channels=16),
        latent=(21, 60, 104),
        context=512,
        sla=SLA(steps=2000, batch=32, micro_batch=1),
        rcm=RCM(
            steps=4000,
            batch=64,
            micro_batch=1,
            lr=1e-6,
            fake_lr=1e-7,
            level_mean=1.5,
            consistency_only=0,
            every=10,
            sigma_max=200.0,
        ),
        checkpointing=True,
        save_every=100,
        note="never run by us: all of this is an estimate",
    ),
}

STAGES = ("vae", "data", "teacher", "sla", "rcm", "evaluate")


def settings_of(preset: Preset, stage: str) -> VAE | Clips | Teacher | SLA | RCM | Evaluation:
    """The recipe of a stage.

    Raises:
        ValueError: the preset has no such stage.
    """
    settings = getattr(preset, stage)
    if settings is None:
        raise ValueError(
            f"this preset has no {stage} stage, that is for toys: name its teacher by --base, and "
            "your latents by --data"
        )
    return settings


def chosen(args: argparse.Namespace, stage: str) -> Preset:
    """The preset that the command's arguments name, with what they set otherwise.

    Raises:
        ValueError: no such preset or stage, name or value.
    """
    if args.preset not in PRESETS:
        raise ValueError(f"--preset {args.preset!r}: take one of {', '.join(PRESETS)}")
    preset = dataclasses.replace(PRESETS[args.preset], seed=PRESETS[args.preset].seed + args.seed)
    steps = [f"steps={args.steps}"] if args.steps is not None else []
    return override(preset, stage, [*steps, *args.set])


def override(preset: Preset, stage: str, assignments: list[str]) -> Preset:
    """`preset` with numbers of one stage, or of the preset itself, set anew.

    Args:
        assignments: "steps=100", "lr=2e-5"; a field of the stage, or one of the preset's plain ones
            ("seed=3", "save_every=50").

    Raises:
        ValueError: no such name, or no such value; the message tells the names there are.
    """
    for assignment in assignments:
        name, given, text = assignment.partition("=")
        part = settings_of(preset, stage)
        target = part if name in _plain(part) else preset
        if not given or name not in _plain(target):
            known = ", ".join([*_plain(part), *_plain(preset)])
            raise ValueError(f"--set {assignment!r}: write NAME=VALUE with one of {known}")
        changed = dataclasses.replace(target, **{name: _parsed(name, text, getattr(target, name))})
        preset = changed if target is preset else dataclasses.replace(preset, **{stage: changed})
    return preset


def _plain(settings) -> list[str]:
    """Names of the fields that are a number or a text."""
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return [name for name, value in values.items() if isinstance(value, (bool, int, float, str))]


def _parsed(name: str, text: str, old: bool | int | float | str) -> bool | int | float | str:
    if isinstance(old, bool):
        if text not in ("True", "False"):
            raise ValueError(f"{name} is True or False, got {text!r}")
        return text == "True"
    try:
        return type(old)(text)
    except ValueError as error:
        raise ValueError(f"{name} is a number such as {old}, got {text!r}") from error
