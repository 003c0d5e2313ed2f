"""Two experts of one Wan model as one MODEL that switches between them by sigma.

The MODEL is a clone of the high-noise expert. Below the boundary the guider that samples it holds
the low-noise expert in its place, with the options and the wrappers that expert came with. ComfyUI
loads each expert when its turn comes, so neither has to leave room for the other; of few steps the
low-noise one makes do with what room there is, see room.py. A run, from the outside in, and which
expert the guider holds there:

    high  OUTER_SAMPLE wrapper of the switch: around_run, ExpertRun.sample
    low       OUTER_SAMPLE wrappers that `low` came with
    high          the rest of `high`'s outer_sample: its wrappers, the sampler, for every step
    high              PREDICT_NOISE wrapper of the switch: ExpertRun._predict_noise
    high                  sigma >= boundary: the rest of `high`'s predict_noise
    low                   sigma < boundary: `low`'s PREDICT_NOISE wrappers, predict_noise, its model

A run that begins below the boundary is one of `low` from its OUTER_SAMPLE wrappers on.
"""

import contextlib
import logging
import threading

import comfy.ldm.wan.model
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.model_management import (
    InterruptProcessingException,
    is_device_cpu,
    throw_exception_if_processing_interrupted,
)
from comfy.model_patcher import ModelPatcher, create_model_options_clone
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers

from .. import run_report
from .expert_options import options_of_low, with_switch
from .in_ram import fit_together, pin
from .operations import Linear
from .options import EXPERT_SWITCH
from .patch import has_hooks, require_model
from .room import GUEST_STEPS, as_guest_of, comes_in_parts, leave
from .versions import has_dynamic_vram, share_latent_shapes, with_hooks

log = logging.getLogger(__name__)

HIGH, LOW = "high-noise expert", "low-noise expert"

# What both experts of one model have in common, by its name in ComfyUI's Wan model.
ARCHITECTURE = {
    "in_dim": "input channels",
    "dim": "channels",
    "ffn_dim": "feed-forward channels",
    "num_layers": "blocks",
    "num_heads": "attention heads",
    "out_dim": "output channels",
    "model_type": "model type",
}


def switch_experts(high: ModelPatcher, low: ModelPatcher, boundary: float) -> ModelPatcher:
    """A clone of `high` that lets `low` denoise while sigma is below `boundary`, 0 to 1.

    Both inputs stay as they are, and each expert keeps its own patches, LoRAs and settings. What is
    patched into the clone later reaches `high` only, but for guidance and context windows.

    Raises:
        ValueError: not two experts of one Wan model, or a boundary outside of 0 to 1.
    """
    _require_two_experts(high, low, boundary)
    came_with = dict(high.model_options)

    def around_run(executor, *args, **kwargs):
        run = ExpertRun(executor, low, boundary, came_with)
        with run_report.run(InterruptProcessingException):
            return run.sample(*args, **kwargs)

    model = high.clone()
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, EXPERT_SWITCH, around_run)
    return model


def _require_two_experts(high: ModelPatcher, low: ModelPatcher, boundary: float) -> None:
    if not isinstance(boundary, (int, float)) or not 0 <= boundary <= 1:
        raise ValueError(
            f"boundary is a sigma from 0 to 1, got {boundary!r}: use 0.9 for image to video, 0.875 "
            "for text to video"
        )
    _require_one_architecture(_expert("model_high", high), _expert("model_low", low))
    if high.is_clone(low) or _same_weights(high, low):
        raise ValueError(
            "model_high and model_low must be two experts, got the same model twice. Load the "
            "high-noise file for one and the low-noise file for the other."
        )


def _expert(name: str, model: ModelPatcher) -> comfy.ldm.wan.model.WanModel:
    require_model(model, name)
    diffusion_model = model.get_model_object("diffusion_model")
    if not isinstance(diffusion_model, comfy.ldm.wan.model.WanModel):
        raise ValueError(
            f"{name} must be a Wan MODEL, got {type(diffusion_model).__name__}. Connect an expert "
            "of Wan 2.2, from TurboLoader or any other loader."
        )
    if model.get_wrappers(WrappersMP.OUTER_SAMPLE, EXPERT_SWITCH):
        raise ValueError(
            f"{name} must be one expert, got the MODEL of another Wan22ExpertSwitch. Connect what "
            "a loader gives."
        )
    return diffusion_model


def _require_one_architecture(high: torch.nn.Module, low: torch.nn.Module) -> None:
    differ = [
        f"{ours} and {theirs} {label}"
        for name, label in ARCHITECTURE.items()
        if (ours := getattr(high, name)) != (theirs := getattr(low, name))
    ]
    if type(high) is not type(low):
        differ.insert(0, f"a {type(high).__name__} and a {type(low).__name__}")
    if differ:
        raise ValueError(
            "model_high and model_low must be experts of one model, got "
            f"{', '.join(differ)}. Load the high-noise and the low-noise file of the same model."
        )


def _same_weights(high: ModelPatcher, low: ModelPatcher) -> bool:
    """Whether all weights are equal. Of two real experts the first few tensors tell them apart."""
    ours, theirs = high.model.state_dict(), low.model.state_dict()
    # A model that is loaded now has its LoRAs in these.
    patched = {key.rpartition(".")[0] for key in (*high.backup, *low.backup)}
    unpatched = [name for name in ours if name.rpartition(".")[0] not in patched]
    return ours.keys() == theirs.keys() and all(_equal(ours[n], theirs[n]) for n in unpatched)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.cpu(), b.cpu())


class ExpertRun:
    """One sampler run: which expert is loaded now, and what the low-noise one runs with."""

    def __init__(self, executor, low: ModelPatcher, boundary: float, came_with: dict):
        self.executor = executor
        self.guider = executor.class_obj
        self.high, self.high_options = self.guider.model_patcher, self.guider.model_options
        self.low = _hookable(low, self.guider.conds)
        self.low_options = create_model_options_clone(self.low.model_options)
        self.boundary = boundary
        self.came_with = came_with  # the options of `high` when the switch was made
        self.loaded = self.high  # by the host, before the first step
        self.low_is_guest = False  # which is streamed beside `high`, see room.py
        self.other_models = []
        self.pinning = None  # a thread that pins the weights of `low` while `high` runs
        self.ended = False

    def sample(self, *args, **kwargs):
        """The guider's outer_sample, inside the wrappers that `low` brings for a run."""
        guider, low, options = self.guider, self.low, self.low_options
        try:
            comfy.sampler_helpers.prepare_model_patcher(low, guider.conds, options)
            device, dtype = low.load_device, low.model_dtype()
            comfy.samplers.cast_to_load_options(options, device=device, dtype=dtype)
            wrappers = get_all_wrappers(WrappersMP.OUTER_SAMPLE, options, is_model_options=True)
            inside = WrapperExecutor.new_class_executor(self._sample, guider, wrappers)
            with (
                _instead(low, hook_mode=self.high.hook_mode),
                _instead(guider, model_patcher=low, model_options=options),
            ):
                return inside.execute(*args, **kwargs)
        finally:
            comfy.samplers.cast_to_load_options(options, device=low.offload_device)
            low.restore_hook_patches()

    def _sample(self, noise, latent, sampler, sigmas, *args, **kwargs):
        self.low_options = self.guider.model_options  # with what its wrappers made of them
        self.low_is_guest = self._may_be_guest(sigmas)
        self._prepare_to_take_turns(noise.shape)
        args = (noise, latent, sampler, sigmas, *args)
        if sigmas.max() < self.boundary:
            run_report.note_expert(LOW)
            with _instead(self.guider, model_options=self._merged(self.high_options)):
                return self.guider.outer_sample(*args, **kwargs)
        options = with_switch(self.high_options, self._predict_noise)
        try:
            with _instead(self.guider, model_patcher=self.high, model_options=options):
                return self.executor(*args, **kwargs)
        finally:
            self._clean_up()

    def _predict_noise(self, executor, x, timestep, model_options, seed):
        if timestep.max() >= self.boundary:
            run_report.note_expert(HIGH)
            self._load(self.high, x.shape, model_options)
            if self.pinning and not self.pinning.ident:
                self.pinning.start()
            return executor(x, timestep, model_options, seed)
        run_report.note_expert(LOW)
        guider, options = self.guider, self._merged(model_options)
        self._load(self.low, x.shape, options)
        share_latent_shapes(self.high.model, self.low.model)
        wrappers = get_all_wrappers(WrappersMP.PREDICT_NOISE, options, is_model_options=True)
        with _instead(guider, inner_model=self.low.model):
            predict = WrapperExecutor.new_class_executor(guider.predict_noise, guider, wrappers)
            return predict.execute(x, timestep, options, seed)

    def _prepare_to_take_turns(self, shape: torch.Size) -> None:
        """Where one expert has to make room for the other, both come and go at full speed."""
        experts = [self.high, self.low]
        if has_dynamic_vram() or is_device_cpu(self.high.load_device):
            return
        estimate = comfy.sampler_helpers.estimate_memory(self.low, shape, self.guider.conds)
        if not fit_together(experts, estimate[1]):
            pin(self.high, _not_cancelled)
            self.pinning = threading.Thread(target=self._pin_low)

    def _may_be_guest(self, sigmas: torch.Tensor) -> bool:
        """Whether `low` has few steps, and weights that come ahead and unchanged in each."""
        steps = int((sigmas[:-1] < self.boundary).sum())
        is_ours = any(isinstance(module, Linear) for module in self.low.model.modules())
        changes = self.low.patches or has_hooks(self.guider.conds)
        return steps <= GUEST_STEPS and is_ours and not changes and comes_in_parts(self.low)

    def _pin_low(self) -> None:
        try:
            pin(self.low, lambda: not self.ended)
        except Exception:  # in a thread, where else nobody would log it
            log.exception("TurboDiffusion: the %s's weights could not be pinned", LOW)

    def _merged(self, run_options: dict) -> dict:
        return options_of_low(self.low_options, run_options, self.came_with, self.boundary)

    def _load(self, expert: ModelPatcher, shape: torch.Size, options: dict) -> None:
        """Let the host load `expert`, in the place of the other one where memory is short."""
        if expert is self.loaded:
            return
        self._wait_for_pins()
        if expert is self.low and self.low_is_guest:
            options = as_guest_of(self.high, options)
        _, _, models = comfy.sampler_helpers.prepare_sampling(
            expert, shape, self.guider.conds, options
        )
        self.other_models += models
        if expert.model.current_patcher is None:
            expert.pre_run()
        self.loaded = expert

    def _wait_for_pins(self) -> None:
        if self.pinning and self.pinning.ident:
            self.pinning.join()

    def _clean_up(self) -> None:
        self.ended = True
        self._wait_for_pins()
        if self.low.model.current_patcher is self.low:
            self.low.cleanup()
        comfy.sampler_helpers.cleanup_additional_models(self.other_models)
        if self.low_is_guest and self.loaded is self.low:
            leave(self.low)


def _not_cancelled() -> bool:
    throw_exception_if_processing_interrupted()
    return True


def _hookable(model: ModelPatcher, conds: dict) -> ModelPatcher:
    """`model` as a patcher that takes the hooks of `conds`, if they have any."""
    return with_hooks(model) if has_hooks(conds) else model


@contextlib.contextmanager
def _instead(owner, **attributes):
    """`owner` with these attributes; its own are back afterwards."""
    own = {name: getattr(owner, name) for name in attributes}
    vars(owner).update(attributes)
    try:
        yield
    finally:
        vars(owner).update(own)
