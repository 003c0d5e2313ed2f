"""Importing this imports what every worker does, under the name that the pack has in them."""

import importlib
import sys
import types

import pack
import worker_jobs  # noqa: F401

NAME = "turbodiffusion_wan"
sys.modules[NAME] = types.ModuleType(NAME)
sys.modules[NAME].__path__ = [str(pack.ROOT)]
for module in ("exchange", "parcels"):
    importlib.import_module(f"{NAME}.turbo_core.parallel.{module}")
