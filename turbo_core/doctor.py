"""TurboDoctor's report without ComfyUI: `python turbo_core/doctor.py` in the pack's folder.

`python -m turbo_core.doctor` does the same, but for the portable ComfyUI: its Python finds no
modules in the current folder.
"""

import importlib.util
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACK = "turbodiffusion_wan"


def main() -> None:
    """Write the report to the terminal.

    The pack's modules import each other relatively, so its folder has to be a package; its own
    __init__.py needs ComfyUI and is left out.
    """
    if importlib.util.find_spec("torch") is None:
        sys.exit(
            f"this Python {sys.version.split()[0]} has no torch, so it is not ComfyUI's. Run this "
            "with the Python that starts ComfyUI (python_embeded\\python.exe in the portable one)."
        )
    pack = types.ModuleType(PACK)
    pack.__path__ = [str(ROOT)]
    sys.modules[PACK] = pack
    diagnosis = importlib.import_module(f"{PACK}.turbo_core.diagnosis")
    sys.stdout.write(diagnosis.report() + "\n")


if __name__ == "__main__":
    main()
