"""All kernels are written in one dialect."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
FILES = sorted(KERNELS.rglob("*.py"))

# Pointers, then sizes and other numbers, then strides in the pointers' order.
ORDER = ("pointer", "number", "stride")


def functions(file: Path) -> Iterator[ast.FunctionDef]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def jitted(function: ast.FunctionDef) -> bool:
    return any("jit" in ast.dump(decorator) for decorator in function.decorator_list)


def launched() -> list[ast.FunctionDef]:
    """All Triton kernels that the host launches."""
    every = (function for file in FILES for function in functions(file))
    return [f for f in every if jitted(f) and f.name.endswith("_kernel")]


def kind(name: str) -> str:
    if name.endswith("_ptr"):
        return "pointer"
    return "stride" if name.startswith("stride_") else "number"


def constexpr(argument: ast.arg) -> bool:
    return argument.annotation is not None and "constexpr" in ast.dump(argument.annotation)


@pytest.mark.parametrize("kernel", launched(), ids=lambda kernel: kernel.name)
def test_a_kernel_takes_pointers_then_numbers_then_strides(kernel):
    runtime = [a.arg for a in kernel.args.args if not constexpr(a)]
    kinds = [kind(name) for name in runtime]
    assert kinds == sorted(kinds, key=ORDER.index), runtime
    assert all(name == name.lower() for name in runtime)
    assert all(a.arg == a.arg.upper() for a in kernel.args.args if constexpr(a))


def test_the_kernels_are_found():
    assert len(launched()) >= 20


def test_one_word_for_what_the_copy_engine_reads_by():
    for file in FILES:
        text = file.read_text(encoding="utf-8").replace("TensorDescriptor", "")
        text = text.replace("tensor_descriptor", "")
        assert not re.search(r"\bdescri(be|ptor)", text), file


def test_one_constant_of_128():
    """Rows and columns that share a scale; checks.py has it, everybody else imports it."""
    own = [
        str(file.relative_to(KERNELS))
        for file in FILES
        if re.search(r"^\w*BLOCK\w* = 128", file.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert own == ["checks.py"]


@pytest.mark.parametrize("module", ["__init__.py", "reference.py"])
def test_names_are_told_apart(module):
    """No two packages have ops, or the plain torch of ops, of the same name."""
    where = {}
    for file in KERNELS.glob(f"*/{module}"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                where.setdefault(node.name, []).append(file.parent.name)
    assert "quantize_blocks" in where
    assert {name: packages for name, packages in where.items() if len(packages) > 1} == {}
