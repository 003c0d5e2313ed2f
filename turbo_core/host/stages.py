"""The stages of `python turbo_core/train.py`: what each reads, trains and writes."""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import torch

from ..checkpoint import CheckpointError, read_checkpoint
from ..checkpoint.file import read_metadata
from ..checkpoint.write import write_safetensors
from ..rcm import rcm_angles
from ..training import rcm as rcm_training
from ..training import run_folder
from ..training import sla as sla_training
from ..training import teacher as teacher_training
from ..training.batches import Data, Draws
from ..training.estimate import show
from ..training.initial_weights import initial_weights
from ..training.loop import train
from ..training.merge import STUDENT, merge_files, sha256_of, table
from ..training.presets import PRESETS, Preset, chosen, settings_of
from ..training.processes import grouped, rank, say
from ..training.rcm import RCMTraining
from ..training.recorded import wanted
from ..training.report import Report
from ..training.sharding import shard
from ..training.sla import SampledSLATraining, SLATraining
from ..training.teacher import TeacherTraining
from . import standalone  # noqa: F401 - first of all that imports ComfyUI
from .toy_evaluate import sla_options
from .toy_stages import STAGES as TOY_STAGES
from .toy_stages import decoder
from .wan_network import WanNetwork, build_network, load_weights, wan_tensors

Tensors = dict[str, torch.Tensor]
MODEL = "model.safetensors"
# What folders of earlier versions do not tell, as those ran.
SINCE = {
    "sla": {"sla.after_rcm": False, "sla.balance": 0.0},
    "rcm": {"rcm.sampler_angles": False},
}
SHOWN = 8  # videos in the grid of samples


def teacher(args: argparse.Namespace, device: torch.device) -> None:
    """RUN/teacher/model.safetensors: a dense network, from random weights or, to train one further,
    from those of --base."""

    def begin(preset: Preset, data: Data) -> TeacherTraining:
        seeded = preset.sizes, preset.seed, preset.text_channels
        weights = _base(args, preset) if args.base else initial_weights(*seeded)
        network = _network(preset, device, weights)
        return TeacherTraining(network, data, preset.teacher, preset.seed, wanted(preset, device))

    _train(args, device, "teacher", teacher_training.COLUMNS, begin)


def sla(args: argparse.Namespace, device: torch.device) -> None:
    """RUN/sla/model.safetensors: the base with SLA, tuned to the dense base, or to rCM's student.

    See SampledSLATraining for the second, which takes RUN's student, or the one that --rcm names.
    """

    def begin(preset: Preset, data: Data) -> SLATraining:
        base, settings = _base(args, preset), preset.sla
        rest = data, settings, preset.seed, wanted(preset, device)
        weights = _student(args, preset) if settings.after_rcm else base
        sparse = _network(preset, device, weights, sla_options(settings))
        dense = _frozen(_network(preset, device, weights))
        if not settings.after_rcm:
            return SLATraining(sparse, dense, *rest)
        base_network = functools.partial(_network, preset, device, base)
        return SampledSLATraining(sparse, dense, base_network, _angles(args, preset), *rest)

    _train(args, device, "sla", sla_training.COLUMNS, begin)


def rcm(args: argparse.Namespace, device: torch.device) -> None:
    """RUN/rcm/model.safetensors: the dense base, distilled to a few steps."""

    def begin(preset: Preset, data: Data) -> RCMTraining:
        weights = _base(args, preset)
        student, fake = (_network(preset, device, weights) for _ in range(2))
        dense = _frozen(_network(preset, device, weights))
        return RCMTraining(
            student, fake, dense, data, preset.rcm, preset.seed, wanted(preset, device)
        )

    _train(args, device, "rcm", rcm_training.COLUMNS, begin)


def merge(args: argparse.Namespace, device: torch.device) -> None:
    """RUN/merge/model.safetensors: the base with SLA's and rCM's updates, of RUN or elsewhere."""
    chosen(args, "sla")  # an unknown preset is refused as in every stage
    if args.dry_run:
        say("merge: reads three checkpoints tensor by tensor and writes one; nothing is started")
        return
    base = args.base or run_folder.RunFolder(args.out, "teacher").sibling("teacher") / MODEL
    told = {"base": _base_name(args), "sla": str(args.sla or "sla"), "rcm": str(args.rcm or "rcm")}
    with run_folder.open(args.out, "merge", told) as folder:
        if folder.finished is not None:
            say(f"{folder.path} is finished")
            return
        sla_file = args.sla or folder.sibling("sla") / MODEL
        rcm_file = args.rcm or folder.sibling("rcm") / MODEL

        def write(part: Path) -> None:
            if rank() == 0:
                say(table(merge_files(base, sla_file, rcm_file, part / MODEL)))

        folder.finish(write)


STAGES: dict[str, Callable[[argparse.Namespace, torch.device], None]] = {
    **TOY_STAGES,
    "teacher": teacher,
    "sla": sla,
    "rcm": rcm,
    "merge": merge,
}


def _train(args, device: torch.device, stage: str, columns: tuple[str, ...], begin) -> None:
    """The frame of all three: folder, data, steps, outputs."""
    preset = chosen(args, stage)
    settings = settings_of(preset, stage)
    if args.dry_run:
        show(args.preset, preset, stage, device)
        return
    since = {"text_channels": PRESETS[args.preset].text_channels, **SINCE.get(stage, {})}
    with run_folder.open(args.out, stage, _told(args, preset, stage), since) as folder:
        if folder.finished is not None:
            say(f"{folder.path} is finished")
            return
        path = args.data or folder.sibling("data")
        data = Data(path, device)
        data.check(preset.latent, image=preset.sizes.in_channels == 36)
        choose_kernels(preset, device)
        training = begin(preset, data)
        about = {"stage": stage, "preset": args.preset, **_plain(settings)}
        if getattr(settings, "after_rcm", False) and (student := _student_path(args)).is_file():
            about[STUDENT] = sha256_of(student)
        report = Report(folder.path, list(columns), settings.steps)
        sample = _sampler(training, data, preset.seed, decoder(path, device))
        every = (preset.save_every, sample, preset.sample_every)
        train(folder, report, training.state(), training.step, *every)
        folder.finish(lambda part: _save(part / MODEL, training.exported(), about))


def _sampler(training, data: Data, seed: int, decode) -> Callable | None:
    """What makes videos of the data's first prompts; None without a VAE.

    So few of them are there sooner without torch.compile, which makes kernels for each batch size.
    """
    if decode is None:
        return None
    batch = data.take(torch.arange(SHOWN, device=data.device) % len(data))
    noise = Draws(seed, 0, 0, data.device).normal("samples", batch.latents)

    def sample() -> torch.Tensor:
        with torch.compiler.set_stance("force_eager"):
            return decode(training.sample(batch, noise))

    return sample


def _told(args: argparse.Namespace, preset: Preset, stage: str) -> dict:
    """All that decides what a stage computes.

    Saving and drawing do not, nor does how it is computed: compiled, with fewer activations kept or
    on more GPUs it is the same training but for rounding, and a run may go on so. The data say how
    many tokens a prompt has.
    """
    settings = settings_of(preset, stage)
    student = {"rcm": str(args.rcm or "rcm")} if getattr(settings, "after_rcm", False) else {}
    return {
        "preset": args.preset,
        "seed": preset.seed,
        "base": _base_name(args),
        "data": str(args.data or "data"),
        "sizes": dataclasses.asdict(preset.sizes),
        "text_channels": preset.text_channels,
        **student,
        stage: dataclasses.asdict(settings),
    }


def _base_name(args: argparse.Namespace) -> str:
    return str(args.base) if args.base else "teacher"


def _base(args: argparse.Namespace, preset: Preset) -> Tensors:
    """The weights to start from: --base, or the toy's teacher."""
    path = args.base or run_folder.RunFolder(args.out, "teacher").sibling("teacher") / MODEL
    return _dense(path, args, preset, "train from the plain Wan model, in bf16 or fp32")


def _student(args: argparse.Namespace, preset: Preset) -> Tensors:
    """The weights of rCM's student."""
    return _dense(_student_path(args), args, preset, "take what the stage rcm wrote")


def _student_path(args: argparse.Namespace) -> Path:
    """--rcm, or RUN's."""
    return args.rcm or run_folder.RunFolder(args.out, "rcm").sibling("rcm") / MODEL


def _angles(args: argparse.Namespace, preset: Preset) -> list[float]:
    """Of the student's sampler, falling: as its file says that it was trained, or as the preset."""
    told = read_metadata(_student_path(args))
    rollout = int(told.get("rollout", preset.rcm.rollout))
    return rcm_angles(rollout, float(told.get("sigma_max", preset.rcm.sigma_max)))[:-1]


def _dense(path: Path, args: argparse.Namespace, preset: Preset, instead: str) -> Tensors:
    """The weights of a dense checkpoint of the preset's sizes."""
    checkpoint = read_checkpoint(path)
    if checkpoint.quantized or checkpoint.has_sla:
        raise CheckpointError(
            f"{path.name} {'is quantized' if checkpoint.quantized else 'has SLA'}: {instead}"
        )
    wanted = dataclasses.asdict(preset.sizes)
    found = {name: getattr(checkpoint, name) for name in wanted}
    other = [f"{n} {found[n]}, not {wanted[n]}" for n in wanted if found[n] != wanted[n]]
    if other:
        raise CheckpointError(
            f"{path.name} is no model of the preset {args.preset} ({'; '.join(other)}): choose "
            "another preset or another checkpoint"
        )
    return checkpoint.tensors


def new_network(preset: Preset, device: torch.device, sla: dict | None = None) -> WanNetwork:
    """The preset's network as its stages have it, split where processes train together.

    Its weights are yet to come. `sla` are the options of SLA, see sla_options.
    """
    split = (lambda network: shard(network, device)) if grouped() else None
    network = build_network(preset.sizes, device, sla, split)
    network.checkpointing = preset.checkpointing
    if preset.compiled and device.type == "cuda":
        network.compile_blocks()
    return network


def _network(
    preset: Preset, device: torch.device, weights: Tensors, sla: dict | None = None
) -> WanNetwork:
    network = new_network(preset, device, sla)
    load_weights(network, weights)
    return network


def _frozen(network: WanNetwork) -> WanNetwork:
    return network.requires_grad_(False)


def choose_kernels(preset: Preset, device: torch.device) -> None:
    """Let a GPU round to TF32 what stays in fp32, and keep to deterministic kernels if asked."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    torch.use_deterministic_algorithms(preset.deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a fill for each new tensor


def _plain(settings) -> dict[str, str]:
    return {name: str(value) for name, value in dataclasses.asdict(settings).items()}


def _save(path: Path, tensors: Tensors, about: dict[str, str]) -> None:
    """Write the weights in fp32, so that the merge has their exact updates, whole on one process.

    All processes call it; sharded tensors are gathered one by one.
    """
    whole = {n: torch.empty(t.shape, device="meta") for n, t in wan_tensors(tensors).items()}
    values = ((n, _gathered(t)) for n, t in wan_tensors(tensors).items())
    try:
        if rank() == 0:
            write_safetensors(path, whole, values, about)
    finally:  # where it fails too: the others gather all of them
        for _ in values:
            pass


def _gathered(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
