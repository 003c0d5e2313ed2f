"""A LoRA in any spelling on a Wan MODEL, through ComfyUI's own LoRA code."""

import logging
from pathlib import Path

import comfy.sd
from comfy.patcher_extension import WrappersMP

from ..checkpoint import read_named_tensors
from ..checkpoint.file import read_metadata
from ..lora import describe, is_distillation, peft_settings, read_lora
from .options import ADVICE
from .patch import wan_model

log = logging.getLogger(__name__)

DISTILLED = (
    "by its name it distills to few steps, which this model is already: leave it out unless you "
    "want both"
)


def add_lora(model, path: str, strength: float):
    """A clone of `model` with the LoRA of the file at `path`, and what of it fits, in words.

    The host gets the file's tensors under its own names and does the rest: INT8 weights stay INT8.

    Raises:
        CheckpointError: the file cannot be read, see read_named_tensors.
        ValueError: not a Wan MODEL, or a file of which nothing fits it.
    """
    shapes = {n: tuple(t.shape) for n, t in wan_model(model).state_dict().items()}
    file = Path(path).name
    tensors = read_named_tensors(path)
    lora = read_lora(tensors, shapes, peft_settings(read_metadata(Path(path))))
    lines = describe(lora)
    if not lora.tensors:
        raise ValueError(
            f"{file} has no LoRA for this MODEL ({'; '.join(lines) or 'it is empty'}): choose one "
            "for the same Wan model, of the same size"
        )
    if is_distillation(file) and model.get_wrappers(WrappersMP.OUTER_SAMPLE, ADVICE):
        lines.append(DISTILLED)
    report = "\n".join([f"{file}, strength {strength:g}", *lines])
    log.info("TurboDiffusion: LoRA %s", report.replace("\n", "; "))
    if strength == 0:
        return model, report  # a patch of nothing would have INT8 weights quantized anew
    return comfy.sd.load_lora_for_models(model, None, lora.tensors, strength, 0)[0], report
