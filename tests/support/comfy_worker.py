"""Importing this imports what workers do, under the name that the pack has in them."""

import sys
import types

import in_comfyui  # noqa: F401
import pack

sys.modules["turbodiffusion_wan"] = types.ModuleType("turbodiffusion_wan")
sys.modules["turbodiffusion_wan"].__path__ = [str(pack.ROOT)]

import turbodiffusion_wan.turbo_core.host.split_start  # noqa: E402
import turbodiffusion_wan.turbo_core.host.sequence_parallel  # noqa: E402, F401
