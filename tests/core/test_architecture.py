"""The floors of the pack and what none of its modules does, read from the source itself."""

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))
import code_figures  # noqa: E402
from code_figures import FLOORS, LONGEST, LONGEST_KERNEL, MOST_PARAMETERS  # noqa: E402

SHIPPED = [p for p in code_figures.in_checkout() if code_figures.ships(p) and p.suffix == ".py"]

EVERYWHERE = sys.stdlib_module_names | {"torch"}
COMFYUI = {"comfy", "comfy_api", "comfy_kitchen", "folder_paths"}
NO_MODULES = {"ctypes", "ftplib", "http", "requests", "socket", "subprocess", "urllib"}
BY_CTYPES = tuple(f"kernels/{name}.py" for name in ("nvrtc", "driver", "launching", "tape"))
NO_CALLS = {"print", "eval", "exec", "breakpoint", "__import__"}
NO_OS = {"environ", "getenv", "putenv", "system", "popen"}


def floor(path: Path) -> int:
    return FLOORS.index(path.with_suffix("").parts[0])


def is_host_side(path: Path) -> bool:
    """Whether this file may touch ComfyUI."""
    return floor(path) >= FLOORS.index("nodes") or path.parts[:2] == ("turbo_core", "host")


def imports(path: Path, tree: ast.AST) -> Iterator[tuple[str, ...]]:
    """Every imported name, as (module,) from outside and as parts from the root inside the pack."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0],) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module.split(".")[0],)
        elif isinstance(node, ast.ImportFrom):
            package = path.parent.parts[: len(path.parent.parts) + 1 - node.level]
            module = tuple(node.module.split(".")) if node.module else ()
            yield from (("pack", *package, *module, alias.name) for alias in node.names)


def wrong_imports(path: Path, source: str) -> list[str]:
    """Imports that go up, or that this file's place does not allow."""
    allowed = EVERYWHERE | ({"triton"} if floor(path) == 0 else {"safetensors"})
    allowed = (allowed | COMFYUI if is_host_side(path) else allowed) - NO_MODULES
    if path.name == "reference.py" or path.parts[0] == "turbo_core":
        allowed |= {"einops"}  # comes with ComfyUI; not in kernels that launch or compile
    if path.as_posix() == "turbo_core/training/pillow.py":
        allowed |= {"PIL"}  # one of ComfyUI's requirements; the others get it from there
    if path.as_posix() == "turbo_core/parallel/workers.py":
        allowed |= {"subprocess"}  # a GPU more is a process more
    if path.as_posix().endswith(BY_CTYPES):
        allowed |= {"ctypes"}  # NVRTC and the CUDA driver have no other face
    wrong = []
    for first, *rest in imports(path, ast.parse(source)):
        if first == "pack":
            up = rest[0] in FLOORS and FLOORS.index(rest[0]) > floor(path)
            to_host = rest[:2] == ["turbo_core", "host"] and not is_host_side(path)
            if up or to_host:
                wrong.append(".".join(rest))
        elif first not in allowed:
            wrong.append(first)
    return wrong


def wrong_uses(source: str) -> list[str]:
    """Calls that do not belong into a node pack, and uses of the environment."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            wrong += {node.func.id} & NO_CALLS
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            wrong += {node.attr} & NO_OS if node.value.id == "os" else ()
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            wrong += {alias.name for alias in node.names} & NO_OS
    return wrong


def version_probes(source: str) -> list[str]:
    """What asks whether this ComfyUI has a module, a name in one, or an argument of a function."""
    probes = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler) and node.type:
            probes += {"ImportError", "ModuleNotFoundError"} & {ast.unparse(node.type)}
        elif isinstance(node, ast.Call) and node.args:
            asks, first = ast.unparse(node.func).split(".")[-1], ast.unparse(node.args[0])
            of_host = first.split(".")[0] in {*COMFYUI, "io"}
            if asks == "signature" or (asks in ("hasattr", "getattr") and of_host):
                probes.append(ast.unparse(node))
    return probes


def too_much(source: str) -> list[str]:
    """Functions that are longer, or take more parameters, than a reader can hold."""
    wrong = []
    for function in code_figures.functions(source):
        if function.lines > (LONGEST_KERNEL if function.is_kernel else LONGEST):
            wrong.append(f"{function.name}: {function.lines} lines")
        if function.parameters > MOST_PARAMETERS and not function.is_kernel:
            wrong.append(f"{function.name}: {function.parameters} parameters")
    return wrong


def undocumented(source: str) -> list[str]:
    """Public functions of a module without a docstring."""
    public = (f for f in ast.parse(source).body if isinstance(f, ast.FunctionDef))
    return [f.name for f in public if not f.name.startswith("_") and not ast.get_docstring(f)]


def read(path: Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def test_every_floor_is_read():
    assert {floor(path) for path in SHIPPED} == set(range(len(FLOORS)))


def faults(check: Callable[[str], list[str]], paths: list[Path] = SHIPPED) -> dict[str, list[str]]:
    """What `check(source)` finds, by file."""
    found = {path.as_posix(): check(read(path)) for path in paths}
    return {path: wrong for path, wrong in found.items() if wrong}


def test_imports_go_down_only():
    found = {path.as_posix(): wrong_imports(path, read(path)) for path in SHIPPED}
    assert {path: wrong for path, wrong in found.items() if wrong} == {}


def test_no_print_no_eval_no_environment():
    # What torch.distributed does after a failure cannot be told to it in another way.
    told = {"turbo_core/parallel/exchange.py": ["environ"] * 4}
    assert faults(wrong_uses) == told


def test_only_one_file_asks_which_comfyui_this_is():
    host_side = [path for path in SHIPPED if is_host_side(path)]
    assert faults(version_probes, host_side).keys() == {"turbo_core/host/versions.py"}


def test_functions_stay_short():
    """`python tests/code_figures.py` prints where they are."""
    assert faults(too_much) == {}


def test_public_functions_have_docstrings():
    kernels = [p for p in SHIPPED if p.parts[0] == "kernels" and p.stem == "__init__"]
    turbo_core = [p for p in SHIPPED if p.parts[0] == "turbo_core"]
    assert faults(undocumented, kernels + turbo_core) == {}


@pytest.mark.parametrize(
    ("path", "source", "wrong"),
    [
        ("kernels/sla/__init__.py", "from ...turbo_core import rcm", ["turbo_core.rcm"]),
        ("kernels/dispatch.py", "import comfy.ops", ["comfy"]),
        ("kernels/dispatch.py", "import safetensors", ["safetensors"]),
        ("turbo_core/rcm.py", "from ..nodes.loader import x", ["nodes.loader.x"]),
        ("turbo_core/rcm.py", "from comfy.utils import x", ["comfy"]),
        ("turbo_core/rcm.py", "from .host import load", ["turbo_core.host.load"]),
        ("turbo_core/host/load.py", "from ... import NODES, nodes", ["nodes"]),
        ("turbo_core/training/curves.py", "from PIL import Image", ["PIL"]),
        ("nodes/loader.py", "import einops", ["einops"]),
        ("kernels/sla/__init__.py", "from einops import rearrange", ["einops"]),
        ("__init__.py", "def f():\n    import subprocess", ["subprocess"]),
    ],
)
def test_a_wrong_import_is_found(path, source, wrong):
    assert wrong_imports(Path(path), source) == wrong


@pytest.mark.parametrize(
    "source",
    ["print(1)", "eval('1')", "x = os.environ['A']", "from os import getenv", "os.system('a')"],
)
def test_a_wrong_use_is_found(source):
    assert wrong_uses(source)


@pytest.mark.parametrize(
    "source",
    [
        "try:\n    import comfy.gone\nexcept ImportError:\n    pass",
        "hasattr(comfy.ops, 'gone')",
        "getattr(comfy, 'gone', None)",
        "inspect.signature(io.Schema)",
    ],
)
def test_a_version_probe_is_found(source):
    assert version_probes(source)


def test_a_long_function_is_found():
    body = "    x = 0\n" * LONGEST
    assert too_much(f"def f():\n{body}") == [f"f: {LONGEST + 1} lines"]
    assert not too_much(f"@triton.jit\ndef f():\n{body}")
    assert too_much(f"@triton.jit\ndef f():\n{body + body}")


def test_a_function_of_many_parameters_is_found():
    many = ", ".join(f"p{i}" for i in range(MOST_PARAMETERS - 1))
    assert too_much(f"def f({many}, *, a, **b): pass") == [f"f: {MOST_PARAMETERS + 1} parameters"]
    assert not too_much(f"def f({many}, *, a): pass")
    assert not too_much(f"@triton.jit\ndef f({many}, a, b): pass")


def test_a_function_without_a_docstring_is_found():
    assert undocumented("def f():\n    return 1") == ["f"]
