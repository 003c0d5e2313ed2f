"""The pack uses no name that this ComfyUI has not; see tests/host_names.py."""

import ast
import sys
from pathlib import Path

import comfyui_install
import pytest

TESTS = Path(__file__).resolve().parent.parent
sys.path.append(str(TESTS))
import host_names  # noqa: E402
from host_tree import Tree  # noqa: E402

FOLDER = comfyui_install.find()
pytestmark = pytest.mark.skipif(FOLDER is None, reason="no ComfyUI found")


@pytest.fixture(scope="module")
def tree():
    return Tree(FOLDER)


def test_this_host_has_every_name(tree):
    found = host_names.uses(tree, host_names.pack_files())
    missing, unknown = host_names.check(tree, found)
    assert missing == []
    assert len({use.name for use in found}) > 140
    assert sum(bool(use.keywords) for use in found) > 45
    assert len(unknown) <= 10, unknown


WRONG = {
    "import comfy.no_such_module": "comfy.no_such_module is missing",
    "from comfy.samplers import KSampler, Other": "comfy.samplers.Other is missing",
    "import comfy.ops\ncomfy.ops.gone(1)": "comfy.ops.gone is missing",
    "import comfy.ops\nclass A(comfy.ops.manual_cast.Gone): pass": "manual_cast.Gone is missing",
    "from comfy.patcher_extension import WrappersMP as W\nW.GONE": "WrappersMP.GONE is missing",
    "from comfy_api.latest import io\nio.Models.Input('a')": "io.Models.Input is missing",
    "import comfy.ops\ncomfy.ops.cast_bias_weight(1, gone=2)": "takes no argument gone",
    "import comfy.float as f\nf.stochastic_rounding(1, 2, 3, 4)": "3 arguments in order, got 4",
    "from comfy.samplers import KSAMPLER\nKSAMPLER(1, gone=2)": "takes no argument gone",
    "def f(model): model.gone()": "ModelPatcher.gone is missing",
    "def f(model): model.clone(gone=1)": "takes no argument gone",
    "def f(attn): attn.norm_r": "WanSelfAttention.norm_r is missing",
    "import comfy.ops\nif hasattr(comfy.ops, 'run_every_op'): comfy.ops.gone": "gone is missing",
}
RIGHT = (
    "try:\n    from comfy.ops import gone\nexcept ImportError:\n    gone = None\ngone.x",
    "import comfy.ops\nif hasattr(comfy.ops, 'gone'):\n    comfy.ops.gone(1)",
    "import comfy.ops\ncomfy.ops.cast_bias_weight(1, dtype=2, offloadable=True)",
    "import torch\ndef f(model: torch.nn.Module): model.gone()",
    "def f(block): block.named_parameters(recurse=False)",
    "from comfy_api.latest import io\nio.Int.Input('a', default=1, min=0)",
)


def _check(tree, source):
    visitor = host_names.Uses(tree, host_names.ROOT / "some.py", set())
    visitor.visit(ast.parse(source))
    return host_names.check(tree, visitor.found)[0]


@pytest.mark.parametrize("source", WRONG)
def test_a_name_that_it_has_not_is_found(tree, source):
    (line,) = _check(tree, source)
    assert line.startswith("some.py:")
    assert line.endswith(WRONG[source])


@pytest.mark.parametrize("source", RIGHT)
def test_a_name_that_it_has_or_need_not_have(tree, source):
    assert _check(tree, source) == []


def test_the_command(capsys, monkeypatch):
    files = [host_names.ROOT / "turbo_core" / "host" / "save.py"]
    monkeypatch.setattr(host_names, "pack_files", lambda: files)
    monkeypatch.setattr(sys, "argv", ["host_names.py", str(FOLDER)])
    assert host_names.main() == 0
    assert ": 0 wrong, " in capsys.readouterr().out
