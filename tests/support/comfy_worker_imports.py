"""Importing this imports what a worker in ComfyUI does."""

import importlib

import in_comfyui  # noqa: F401
import worker_imports

for module in ("split_start", "split_worker"):
    importlib.import_module(f"{worker_imports.NAME}.turbo_core.host.{module}")
