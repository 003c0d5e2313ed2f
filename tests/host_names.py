"""Does a ComfyUI have every name of it that the pack uses?

    python tests/host_names.py COMFYUI_DIR

Reads source only: the host is not started, so any tree will do, with or without its packages. What
is looked up: modules and what they import, functions, classes, their methods and the attributes
that they set on `self`; of calls also the names and the number of the arguments. Branches behind
`hasattr(host_module, "name")` count where the tree has that name. The MODEL, its blocks and their
attentions are known by the names of our variables, see VARIABLES.
"""

import argparse
import ast
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "support"))
from host_tree import HOST, Tree, UnknownError, dotted  # noqa: E402

# What our variables of these names are; an annotation says otherwise where they are not.
MODEL, WAN = "comfy.model_patcher.ModelPatcher", "comfy.ldm.wan.model"
VARIABLES = {
    **dict.fromkeys(("model", "patched", "patcher", "high", "low", "quantized", "fresh"), MODEL),
    "wan": f"{WAN}.WanModel",
    "block": f"{WAN}.WanAttentionBlock",
    "attn": f"{WAN}.WanSelfAttention",
    "guider": "comfy.samplers.CFGGuider",
}
# Files whose variables of these names are something else.
OTHERWISE = {
    "host/sampler.py": {"model"},
    "host/projections.py": {"wan"},
    "host/causal_vae.py": {"block", "model"},
    "host/turbo_vae.py": {"model"},
    "host/wan_vae.py": {"wan"},
}


@dataclass(frozen=True)
class Use:
    """A name of the host as the pack has it, and the arguments where it is called."""

    name: str
    place: str  # file:line
    positional: int | None = None  # None: not called, or with *arguments
    keywords: tuple[str, ...] = ()


class Uses(ast.NodeVisitor):
    """Collects what a file of the pack uses of the host."""

    def __init__(self, tree: Tree, path: Path, own: set[str]):
        self.tree, self.path, self.own = tree, path, own
        self.names = {}  # of this file -> of the host
        self.found = []
        self.optional = False
        place = "/".join(path.parts[-2:])
        self.variables = VARIABLES.keys() - OTHERWISE.get(place, set())

    def add(self, name: str, node: ast.AST, call: ast.Call | None = None) -> None:
        place = f"{self.path.relative_to(ROOT).as_posix()}:{node.lineno}"
        if call is None:
            return self.found.append(Use(name, place))
        starred = any(isinstance(arg, ast.Starred) for arg in call.args)
        keywords = tuple(k.arg for k in call.keywords if k.arg)
        self.found.append(Use(name, place, None if starred else len(call.args), keywords))

    def visit_Import(self, node):
        for alias in node.names:
            if alias.name.split(".")[0] in HOST:
                self.names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                self.add(alias.name, node)

    def visit_ImportFrom(self, node):
        if node.level or node.module.split(".")[0] not in HOST:
            return
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            if not self.optional or self._has(name):
                self.names[alias.asname or alias.name] = name
                self.add(name, node)

    def visit_Try(self, node):
        caught = {dotted(h.type) for h in node.handlers if h.type}
        self.optional = "ImportError" in caught
        for statement in node.body:
            self.visit(statement)
        self.optional = False
        for statement in (*node.handlers, *node.orelse, *node.finalbody):
            self.visit(statement)

    def visit_If(self, node):
        asked = self._asked(node.test)
        if asked is None:
            return self.generic_visit(node)
        for statement in node.body if self._has(asked) else node.orelse:
            self.visit(statement)

    def _asked(self, test: ast.expr) -> str | None:
        """The host's name that `hasattr(module, "name")` asks for."""
        if not isinstance(test, ast.Call) or dotted(test.func) != "hasattr":
            return None
        if not isinstance(test.args[1], ast.Constant):
            return None
        asked = dotted(test.args[0])
        name = VARIABLES[asked] if asked in self.variables else self._host_name(test.args[0])
        return name and f"{name}.{test.args[1].value}"

    def _has(self, name: str) -> bool:
        try:
            return self.tree.find(name) is not None
        except UnknownError:
            return True

    def visit_FunctionDef(self, node):
        before = self.variables
        arguments = (*node.args.args, *node.args.kwonlyargs)
        annotated = {a.arg: a for a in arguments if a.annotation}
        foreign = {n for n, a in annotated.items() if self._annotation(a) is None}
        self.variables = self.variables - foreign
        self.generic_visit(node)
        self.variables = before

    def _annotation(self, argument: ast.arg) -> str | None:
        """The class of the host that an argument is annotated with."""
        return self._host_name(argument.annotation)

    def visit_Call(self, node):
        name = self._host_name(node.func)
        if name is None:
            return self.generic_visit(node)
        self.add(name, node, node)
        for child in (*node.args, *(k.value for k in node.keywords)):
            self.visit(child)

    def visit_Attribute(self, node):
        name = self._host_name(node)
        if name is None:
            return self.generic_visit(node)
        if isinstance(node.ctx, ast.Load):
            self.add(name, node)

    def _host_name(self, node: ast.AST) -> str | None:
        first, *rest = (dotted(node) or "").split(".")
        if first in self.names:
            return ".".join((self.names[first], *rest))
        if first in self.variables and rest and rest[0] not in self.own:
            return f"{VARIABLES[first]}.{rest[0]}" if len(rest) == 1 else None
        return None


def pack_files() -> list[Path]:
    """The files of the pack that touch the host."""
    files = (*(ROOT / "nodes").glob("*.py"), *(ROOT / "turbo_core" / "host").glob("*.py"))
    return sorted((ROOT / "__init__.py", *files))


def _own_names(files: list[Path]) -> set[str]:
    """What the pack sets on the host's objects itself, or asks for before it uses it."""
    own = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own.add(node.attr)
            elif isinstance(node, ast.Call) and dotted(node.func) in ("hasattr", "getattr"):
                own.update(a.value for a in node.args[1:2] if isinstance(a, ast.Constant))
    return own


def uses(tree: Tree, files: list[Path]) -> list[Use]:
    """What `files` use of the host."""
    found, own = [], _own_names(files)
    for path in files:
        visitor = Uses(tree, path, own)
        visitor.visit(ast.parse(path.read_text(encoding="utf-8")))
        found += visitor.found
    return found


def check(tree: Tree, found: list[Use]) -> tuple[list[str], list[str]]:
    """(What the host has not, what its source does not tell), a line each."""
    missing, unknown = [], []
    for use in found:
        try:
            target = tree.find(use.name)
        except UnknownError as reason:
            unknown.append(f"{use.place}: {use.name} ({reason})")
            continue
        wrong = (
            "is missing"
            if target is None
            else tree.wrong_arguments(target, use.positional, use.keywords)
        )
        if wrong:
            missing.append(f"{use.place}: {use.name} {wrong}")
    return missing, unknown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comfyui", metavar="COMFYUI_DIR", type=Path)
    parser.add_argument("--all", action="store_true", help="show every use")
    args = parser.parse_args()
    tree = Tree(args.comfyui.resolve())
    if not (tree.folder / "comfy").is_dir():
        parser.error(f"{tree.folder} has no comfy/: name the folder that main.py is in")
    found = uses(tree, pack_files())
    missing, unknown = check(tree, found)
    lines = [f"{use.place}: {use.name}" for use in found] if args.all else []
    lines += [f"not told by the source: {line}" for line in unknown] + missing
    calls = sum(bool(use.keywords) or bool(use.positional) for use in found)
    lines.append(
        f"{len({use.name for use in found})} names in {len(found)} places, {calls} calls: "
        f"{len(missing)} wrong, {len(unknown)} not told by the source"
    )
    sys.stdout.write("\n".join(lines) + "\n")
    return bool(missing)


if __name__ == "__main__":
    raise SystemExit(main())
