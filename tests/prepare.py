"""Sets up .venv for the tests and the demo, then runs its Python with the arguments given here.

    python tests/prepare.py tests/demo.py
    python tests/prepare.py -m pytest -c tests/pytest.ini -n auto --dist loadfile tests

COMFYUI_PACKAGES="comfy-kitchen==0.2.40 comfy-aimdo==0.6.0" takes these in place of the versions
that ComfyUI asks for: newer ones beside the ComfyUI at hand.

Needs Python >= 3.10 with pip. A torch that the running Python has is used, never replaced.
"""

import importlib.metadata
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036 - older Pythons should read why
    raise SystemExit(f"Python 3.10 or newer is needed, got {sys.version.split()[0]}")

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
SCHEME = "nt" if os.name == "nt" else "posix_prefix"
PACKAGES = Path(sysconfig.get_path("purelib", SCHEME, {"base": str(VENV)}))
# Package folders of the Python that made .venv. Written last: its presence says .venv is whole.
INHERITED = PACKAGES / "inherited.pth"

sys.path.append(str(ROOT / "tests" / "support"))
import comfyui_install  # noqa: E402

# ComfyUI starts without these: help pages and several hundred MB of template pictures.
NOT_NEEDED = {"comfyui-workflow-templates", "comfyui-embedded-docs"}
# These come from tests/requirements.txt, so that no requirement of ComfyUI's can move torch.
TORCH = {"torch", "torchvision", "torchaudio"}

# By their presence Chromium is there; and how to get it where there is Debian's package manager.
CHROMIUM = ("chromium", "chromium-browser")
APT_SECONDS = 120
APT = (
    ["apt-get", "install", "--yes", "--no-install-recommends", "chromium"],
    ["apt-get", "update"],
)

log = logging.getLogger("prepare")


def main() -> int:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    create_venv()
    install()
    if "pytest" in sys.argv:
        install_chromium()
    return subprocess.call([str(PYTHON), *sys.argv[1:]], cwd=ROOT)


def create_venv() -> None:
    """Make .venv; where the running Python has torch, its packages stay visible inside."""
    if INHERITED.exists():
        return
    log.info("creating %s", VENV)
    has_ensurepip = importlib.util.find_spec("ensurepip") is not None
    venv.create(VENV, with_pip=has_ensurepip)
    if not has_ensurepip:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--quiet"]
        subprocess.run([*pip, "--target", str(PACKAGES), "pip"], check=True)
    # Not system_site_packages: that would miss the packages of a venv we run in.
    seen = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    INHERITED.write_text("\n".join(seen if torch_version(sys.path) else []), encoding="utf-8")


def torch_version(folders: list[str]) -> str | None:
    """Version of the torch installed in one of `folders`, without importing it."""
    found = importlib.metadata.distributions(name="torch", path=folders)
    return next((torch.version for torch in found), None)


def install() -> None:
    """Everything into .venv: our own list, then what the ComfyUI found or staged asks for."""
    folders = [str(PACKAGES), *INHERITED.read_text(encoding="utf-8").splitlines()]
    kept = torch_version(folders)
    log.info("installing packages (torch: %s)", f"{kept}, kept" if kept else "from PyPI")
    pip_install(["-r", str(ROOT / "tests" / "requirements.txt")], torch=kept)
    torch = torch_version(folders)
    comfyui = comfyui_install.find() or comfyui_install.stage()
    log.info("ComfyUI: %s", comfyui)
    pip_install(comfyui_requirements(comfyui), torch=torch)
    # Without its dependencies: it names one torch version, yet runs beside newer ones.
    minor = int(torch.split(".")[1])
    pip_install(["--no-deps", f"torchaudio<2.{minor + 1}"], torch=torch)


def install_chromium() -> None:
    """Chromium for tests/ui where the system's package manager may; without it they are skipped."""
    if any(map(shutil.which, CHROMIUM)):
        return
    may = shutil.which("apt-get") and os.geteuid() == 0
    install, update = APT
    if may and (apt(install) or (apt(update) and apt(install))):
        return
    log.warning("no Chromium: the tests in tests/ui are skipped. apt-get install chromium helps")


def apt(command: list[str]) -> bool:
    """Whether this command of the package manager went well."""
    log.info("%s", " ".join(command))
    options = {"capture_output": True, "stdin": subprocess.DEVNULL, "timeout": APT_SECONDS}
    options["env"] = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        return subprocess.run(command, **options).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def comfyui_requirements(comfyui: Path) -> list[str]:
    """The lines of ComfyUI's requirements.txt that a server for tests needs."""
    lines = (comfyui / "requirements.txt").read_text(encoding="utf-8").splitlines()
    lines = [line.split("#")[0].strip() for line in lines]
    chosen = os.environ.get("COMFYUI_PACKAGES", "").split()
    left_out = NOT_NEEDED | TORCH | set(map(package_name, chosen))
    return [line for line in lines if line and package_name(line) not in left_out] + chosen


def package_name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower()


def pip_install(arguments: list[str], torch: str | None) -> None:
    """Install with .venv's pip; a `torch` version given here stays as it is."""
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "constraints.txt")
        constraints.write_text(f"torch=={torch}\n" if torch else "", encoding="utf-8")
        pip = [str(PYTHON), "-m", "pip", "install", "--quiet", "--quiet"]
        subprocess.run([*pip, "--constraint", str(constraints), *arguments], check=True)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"not prepared: {error}") from None
