"""How long the functions are, how many parameters they take, how many lines stand in which folder.

    python tests/code_figures.py [--rev REVISION]

Of this checkout, or of a git revision. Reads source only; host functions are told from Triton's
kernels, the functions under @triton.jit. tests/core/test_architecture.py holds the limits.
"""

import argparse
import ast
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("kernels", "turbo_core", "nodes", "__init__")  # from the ground up: what ships
CODE = {".py", ".cu", ".cuh"}
# What tests/core/test_architecture.py allows.
LONGEST, LONGEST_KERNEL = 65, 85  # lines
MOST_PARAMETERS = 12  # but of Triton kernels


@dataclass(frozen=True)
class Function:
    """A function or method: `lines` from its def to its end, without decorators."""

    place: str  # file:line
    name: str
    lines: int
    parameters: int
    is_kernel: bool


def in_checkout() -> list[Path]:
    """Files of Python and CUDA C++ of this checkout, from its root."""
    found = [path for folder in (*FLOORS, "tests") for path in (ROOT / folder).rglob("*")]
    return sorted(p.relative_to(ROOT) for p in (ROOT / "__init__.py", *found) if p.suffix in CODE)


def sources(revision: str | None = None) -> dict[Path, str]:
    """Text of all files of Python and CUDA C++ by path, of this checkout without a revision."""
    if revision is None:
        return {path: (ROOT / path).read_text(encoding="utf-8") for path in in_checkout()}
    names = _git("ls-tree", "-r", "--name-only", revision).splitlines()
    paths = [p for p in map(Path, names) if p.suffix in CODE]
    return {path: _git("show", f"{revision}:{path.as_posix()}") for path in paths}


def _git(*arguments: str) -> str:
    run = subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, encoding="utf-8"
    )
    return run.stdout


def functions(source: str, path: str = "") -> list[Function]:
    """Every function of a file, methods and inner functions too."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        Function(
            place=f"{path}:{node.lineno}",
            name=node.name,
            lines=node.end_lineno - node.lineno + 1,
            parameters=len(_parameters(node.args)),
            is_kernel=any("jit" in ast.unparse(d) for d in node.decorator_list),
        )
        for node in ast.walk(ast.parse(source))
        if isinstance(node, kinds)
    ]


def _parameters(arguments: ast.arguments) -> list[ast.arg]:
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [*every, *filter(None, (arguments.vararg, arguments.kwarg))]


def ships(path: Path) -> bool:
    return path.with_suffix("").parts[0] in FLOORS


def lengths(found: list[Function]) -> str:
    """Median, 90th percentile and the longest."""
    lines, longest = sorted(f.lines for f in found), max(found, key=lambda f: f.lines)
    median, p90 = (lines[int(share * (len(lines) - 1))] for share in (0.5, 0.9))
    where = f"{longest.name} ({longest.place})"
    return f"{len(lines):5} median {median:2}, p90 {p90:2}, longest {longest.lines:2}: {where}"


def most_parameters(found: list[Function]) -> str:
    most = max(found, key=lambda f: f.parameters)
    over = sum(f.parameters > MOST_PARAMETERS for f in found)
    where = f"{most.name} ({most.place})"
    return f"most {most.parameters:2}: {where}; {over} take more than {MOST_PARAMETERS}"


def lines_by_folder(texts: dict[Path, str]) -> dict[str, int]:
    """Lines of all files that stand in each folder, without those of the folders in it."""
    lines = Counter()
    for path, text in texts.items():
        lines[path.parent.as_posix()] += len(text.splitlines())
    return dict(sorted(lines.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rev", metavar="REVISION", help="a git revision; this checkout if none")
    texts = sources(parser.parse_args().rev)
    shipped = {path: text for path, text in texts.items() if ships(path) and path.suffix == ".py"}
    every = [f for path, text in shipped.items() for f in functions(text, path.as_posix())]
    host, kernels = ([f for f in every if f.is_kernel is kind] for kind in (False, True))
    out = [
        f"host functions {lengths(host)}",
        f"Triton kernels {lengths(kernels)}",
        f"parameters     {most_parameters(host)}",
        "lines by folder",
    ]
    out += [f"  {lines:6} {folder}" for folder, lines in lines_by_folder(texts).items()]
    shipping = sum(len(text.splitlines()) for path, text in texts.items() if ships(path))
    total = sum(len(text.splitlines()) for text in texts.values())
    out.append(f"  {shipping:6} ship, {total - shipping} do not")
    sys.stdout.write("\n".join(out) + "\n")


if __name__ == "__main__":
    main()
