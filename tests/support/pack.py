"""Importing this makes the pack importable without ComfyUI, as `turbodiffusion_pack`."""

import os
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# The pack's own `nodes` folder must not shadow ComfyUI's nodes.py.
sys.path[:] = [p for p in sys.path if Path(p or os.getcwd()).resolve() != ROOT]
package = types.ModuleType("turbodiffusion_pack")
package.__path__ = [str(ROOT)]
sys.modules[package.__name__] = package
