"""The nodes: one file per family, schema and one call into turbo_core."""

from .attention import SLAAttentionPatch
from .doctor import TurboDoctor
from .experts import Wan22ExpertSwitch
from .loader import TurboLoader
from .lora import TurboLoraLoader
from .parallel import TurboSequenceParallel
from .quantize import W8A8Quantize
from .resolution import WanAdaptiveResolution, WanVideoLength
from .sampler import RCMSampler
from .save import TurboSaveCheckpoint
from .svi import WanSVIProImageToVideo
from .vae import TurboVAE

NODES = [
    TurboLoader,
    TurboLoraLoader,
    SLAAttentionPatch,
    W8A8Quantize,
    TurboSaveCheckpoint,
    RCMSampler,
    Wan22ExpertSwitch,
    TurboSequenceParallel,
    TurboVAE,
    WanAdaptiveResolution,
    WanVideoLength,
    WanSVIProImageToVideo,
    TurboDoctor,
]
