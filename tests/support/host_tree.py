"""A ComfyUI's names, read from its source: nothing is imported, so any tree will do."""

import ast
import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HOST = ("comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "comfy_kitchen")
INSTALLED = ("comfy_kitchen",)  # a package beside the tree
MODULE = "torch.nn.Module"  # what all of its own have, a Wan block has too

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Found:
    """What a name stands for: a module, its definitions in a class or module, or just a value."""

    module: Path | None = None
    owner: "Found | None" = None
    nodes: tuple[ast.AST, ...] = ()


class UnknownError(Exception):
    """The source does not say."""


class Tree:
    """The names that a ComfyUI defines, from its source."""

    def __init__(self, folder: Path):
        self.folder = folder

    def file(self, name: str) -> Path | None:
        """The source of a module or package."""
        first, *rest = name.split(".")
        base = self._base(first)
        if base is None:
            return None
        path = base.joinpath(*rest)
        options = path.with_suffix(".py"), path / "__init__.py", path
        found = (option for option in options if option.is_file() or option.is_dir())
        return next(found, None)

    def _base(self, package: str) -> Path | None:
        if package not in INSTALLED:
            return self.folder / package
        spec = importlib.util.find_spec(package)
        return Path(spec.origin).parent if spec else None

    def find(self, name: str) -> Found | None:
        """What `name` stands for, None where the host has no such name.

        Raises:
            UnknownError: a value, or something that is not made in the host's source.
        """
        parts = name.split(".")
        if parts[0] not in HOST or (parts[0] in INSTALLED and self._base(parts[0]) is None):
            raise UnknownError(f"{parts[0]} is not at hand")
        known = max(n for n in range(len(parts) + 1) if n == 0 or self.file(".".join(parts[:n])))
        if known == 0:
            return None
        found = Found(self.file(".".join(parts[:known])))
        for part in parts[known:]:
            found = self._inside(found, part)
            if found is None:
                return None
        return found

    def _inside(self, found: Found, name: str) -> Found | None:
        if name.startswith("__"):
            return Found()  # what Python itself gives
        classes = [node for node in found.nodes if isinstance(node, ast.ClassDef)]
        if found.module is not None and not found.nodes:
            return self._in_module(found.module, name)
        if not classes:
            raise UnknownError("a value")
        return self._in_class(found, classes[0], name)

    def _in_module(self, path: Path, name: str) -> Found | None:
        source = path / "__init__.py" if path.is_dir() else path
        if not source.is_file():
            return None
        scope = _scope(source)
        nodes = tuple(scope.get(name, ()))
        for node in nodes:
            if isinstance(node, ast.Import | ast.ImportFrom):
                return self.find(self._target(source, node, name))
        if nodes:
            return Found(source, nodes=nodes)
        for star in scope.get("*", ()):
            if (found := self.find(self._target(source, star, name))) is not None:
                return found
        if "__getattr__" in scope:
            raise UnknownError("made by the module's __getattr__")
        return None

    def _target(self, source: Path, node: ast.Import | ast.ImportFrom, name: str) -> str:
        """The full name of what an import in `source` calls `name`."""
        alias = next((a for a in node.names if (a.asname or a.name.split(".")[0]) == name), None)
        if isinstance(node, ast.Import):
            return alias.name if alias.asname else name
        module = node.module or ""
        if node.level:
            inside = source.relative_to(self._root(source)).parent.parts
            package = inside[: len(inside) + 1 - node.level]
            module = ".".join((*package, module) if module else package)
        return f"{module}.{alias.name if alias else name}"

    def _root(self, source: Path) -> Path:
        bases = (self._base(package) for package in INSTALLED)
        outside = (base.parent for base in bases if base and source.is_relative_to(base))
        return next(outside, self.folder)

    def _in_class(self, owner: Found, node: ast.ClassDef, name: str) -> Found | None:
        nodes = tuple(_class_scope(node).get(name, ()))
        if nodes:
            return Found(owner.module, owner, nodes)
        unknown = None
        for base in node.bases:
            try:
                found = self._base_class(owner, node, base)
                if (inherited := self._inside(found, name)) is not None:
                    return inherited
            except UnknownError as error:
                unknown = error
        if node.decorator_list and unknown is None:
            raise UnknownError("its decorator may make it")
        if unknown is None:
            return None
        if name in _torch_module_names():
            return Found()
        if str(unknown) == MODULE:
            return None
        raise unknown

    def _base_class(self, owner: Found, node: ast.ClassDef, base: ast.expr) -> Found:
        name = dotted(base.value if isinstance(base, ast.Subscript) else base)
        if name is None:
            raise UnknownError("a base class that is computed")
        if name.rpartition(".")[2] == "Module":
            raise UnknownError(MODULE)
        first, *rest = name.split(".")
        found, around = None, owner.owner
        if around is not None and around.nodes:  # a class inside another one
            beside = _class_scope(around.nodes[0]).get(first, ())
            beside = tuple(other for other in beside if other is not node)
            found = Found(owner.module, around, beside) if beside else None
        found = found or self._in_module(owner.module, first)
        for part in rest:
            found = found and self._inside(found, part)
        if found is None:
            raise UnknownError(f"its base class {name}")
        return found

    def wrong_arguments(
        self, found: Found, positional: int | None, keywords: tuple[str, ...]
    ) -> str | None:
        """What about a call with these arguments fits no definition of `found`.

        `positional` is how many come in order, None where the call does not say.
        """
        wrongs = []
        for node in found.nodes:
            signature = self._signature(found, node)
            if signature is None:
                return None
            wrongs.append(_mismatch(positional, keywords, *signature))
        return wrongs[0] if wrongs and all(wrongs) else None

    def _signature(self, found: Found, node: ast.AST) -> tuple[ast.arguments, bool] | None:
        """The arguments, and whether the first of them is not the caller's."""
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            decorators = {dotted(d) for d in node.decorator_list}
            bound = found.owner is not None and "staticmethod" not in decorators
            known = decorators <= {"staticmethod", "classmethod", "property", None}
            return (node.args, bound) if known and "property" not in decorators else None
        if not isinstance(node, ast.ClassDef) or node.decorator_list:
            return None
        try:
            made = self._in_class(Found(found.module, found.owner, (node,)), node, "__init__")
        except UnknownError:
            return None
        if made is None or not made.nodes or not isinstance(made.nodes[0], ast.FunctionDef):
            return None
        return made.nodes[0].args, True


def _mismatch(
    positional: int | None, keywords: tuple[str, ...], args: ast.arguments, bound: bool
) -> str | None:
    in_order = len((*args.posonlyargs, *args.args)[bound:])
    names = {a.arg for a in (*args.args, *args.kwonlyargs)}
    unknown = [k for k in keywords if k not in names]
    if unknown and args.kwarg is None:
        return f"takes no argument {', '.join(unknown)}"
    if positional is not None and positional > in_order and args.vararg is None:
        return f"takes {in_order} arguments in order, got {positional}"
    return None


@functools.cache
def _scope(source: Path) -> dict[str, list[ast.AST]]:
    """What a module's own statements define, by name; star imports under "*"."""
    return _defined(ast.parse(source.read_text(encoding="utf-8")).body)


def _defined(body: list[ast.stmt]) -> dict[str, list[ast.AST]]:
    names = {}
    for node in _statements(body):
        if isinstance(node, Definition):
            names.setdefault(node.name, []).append(node)
            for inner in ast.walk(node):
                for name in inner.names if isinstance(inner, ast.Global) else ():
                    names.setdefault(name, []).append(inner)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                name = alias.asname or alias.name.split(".")[0]
                names.setdefault(name, []).append(node)
        else:
            for inner in ast.walk(node):
                if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                    names.setdefault(inner.id, []).append(node)
    return names


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those that run in the same scope, whatever branch they are in."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and (dotted(node.test) or "").endswith("TYPE_CHECKING"):
            continue
        for part in ("body", "orelse", "finalbody", "handlers"):
            inner = [] if isinstance(node, Definition) else getattr(node, part, [])
            for child in inner:
                yield from _statements(
                    child.body if isinstance(child, ast.ExceptHandler) else [child]
                )


@functools.cache
def _class_scope(node: ast.ClassDef) -> dict[str, list[ast.AST]]:
    """What a class defines, and what its methods set on self."""
    names = _defined(node.body)
    for inner in ast.walk(node):
        if not isinstance(inner, ast.Attribute) or not isinstance(inner.ctx, ast.Store):
            continue
        if isinstance(inner.value, ast.Name) and inner.value.id == "self":
            names.setdefault(inner.attr, []).append(inner)
    return names


@functools.cache
def _torch_module_names() -> frozenset[str]:
    import torch

    return frozenset((*dir(torch.nn.Module()), "forward"))


def dotted(node: ast.AST) -> str | None:
    """a.b.c as text, None for anything else."""
    if isinstance(node, ast.Attribute):
        left = dotted(node.value)
        return None if left is None else f"{left}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else None
