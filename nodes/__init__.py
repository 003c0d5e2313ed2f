"""The nodes: one file per family, schema and one call into turbo_core."""

from .attention import SLAAttentionPatch
from .loader import TurboLoader
from .sampler import RCMSampler

NODES = [TurboLoader, SLAAttentionPatch, RCMSampler]
