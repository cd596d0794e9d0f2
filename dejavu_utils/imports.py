"""What a module's results depend on: the files of a package that its imports reach, and their code.

Imports are followed wherever they stand, lazy ones inside functions too, to the file that defines
the name. Read from the text alone: nothing is imported, and every file is read once a process.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

EVERYTHING = None  # the attribute of an import that binds a module itself


class Module(NamedTuple):
    """A file of the package: a hash of its code, and the modules of the package it imports."""

    code: str
    imports: frozenset[str]


def code(text: str) -> str:
    """Return a hash of Python code that comments, docstrings, annotations and layout do not
    change.
    """
    return _hash(_bare(text), package="")


def reached(package: Path, roots: Iterable[str], without: str) -> dict[str, Module]:
    """Return the modules that `roots` (dotted names) reach by their imports, the roots among them.

    The search does not enter the module `without`. KeyError if a root is no module of `package`.
    """
    known = modules(package)
    found: dict[str, Module] = {}
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name in found or name == without:
            continue
        found[name] = known[name]
        waiting.extend(found[name].imports)
    return found


@functools.cache
def modules(package: Path) -> dict[str, Module]:
    """Return every module of the package and of the packages inside it, by its dotted name."""
    trees: dict[str, ast.Module] = {}
    packages: set[str] = set()
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        folder = ".".join(parts[:-1])
        packages.add(folder)
        name = folder if path.name == "__init__.py" else ".".join(parts)
        trees[name] = _bare(path.read_text())

    found = {}
    for name, tree in trees.items():
        imports: set[str] = set()
        for module, attribute in _imported(tree, name, name in packages):
            imports |= _defining(module, attribute, trees, packages)
        found[name] = Module(_hash(tree, package.name), frozenset(imports))
    return found


def _imported(tree: ast.AST, name: str, is_package: bool) -> Iterator[tuple[str, str | None]]:
    """Yield (module, attribute) of every import in the code of the module `name`."""
    home = name.split(".") if is_package else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, EVERYTHING
        if isinstance(node, ast.ImportFrom):
            above = home[: len(home) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                yield module, EVERYTHING if alias.name == "*" else alias.name


def _defining(
    module: str, attribute: str | None, trees: dict[str, ast.Module], packages: set[str]
) -> set[str]:
    """Return the modules that define `attribute` of `module`: none if it is another package's.

    A package that is imported as a whole, or that gives a name which its `__init__.py` neither
    defines nor imports (a lazy one), stands for all files in it: the text does not say which.
    """
    if attribute and f"{module}.{attribute}" in trees.keys() | packages:
        module, attribute = f"{module}.{attribute}", EVERYTHING
    if module not in packages:
        return {module} & trees.keys()

    tree = trees.get(module, ast.Module([], []))
    if attribute in _defined(tree):
        return {module}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            names = {alias.asname or alias.name: alias.name for alias in node.names}
            if attribute in names:
                only = ast.Module([node], [])
                origin = next(_imported(only, module, is_package=True))[0]
                return _defining(origin, names[attribute], trees, packages)
    return {name for name in trees if f"{name}.".startswith(f"{module}.")}


def _defined(tree: ast.Module) -> set[str]:
    """Return the names that the top level of a module defines itself."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update(target.id for target in targets if isinstance(target, ast.Name))
    return names


class _Bare(ast.NodeTransformer):
    """Takes away what changes no result: docstrings, annotations, imports for annotations only.

    A field without a value (`x: int` of a dataclass) stays, with an empty annotation.
    """

    def _without_docstring(self, node: ast.AST) -> ast.AST:
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
        return self.generic_visit(node)

    visit_Module = _without_docstring

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.type_params = []
        return self._without_docstring(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.AST:
        node.type_params = []
        node.returns = None
        return self._without_docstring(node)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)

    def visit_TypeAlias(self, node: ast.TypeAlias) -> None:
        return None

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        node = self.generic_visit(node)
        if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            return node.orelse
        return node


def _bare(text: str) -> ast.Module:
    """Return the syntax tree of a module without what changes no result."""
    return _Bare().visit(ast.parse(text))


def _hash(tree: ast.Module, package: str) -> str:
    """Return a hash of a bare tree; imports from outside the package that nothing uses do not
    count: annotations used them.
    """
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    text = ast.dump(_Used(used, package).visit(tree))
    return hashlib.sha256(text.encode()).hexdigest()


class _Used(ast.NodeTransformer):
    """Takes away the names that are imported from outside the package and not used."""

    def __init__(self, used: set[str], package: str) -> None:
        self.used, self.package = used, package

    def _kept(self, node: ast.Import | ast.ImportFrom, outside: bool) -> ast.AST | None:
        if outside:
            bound = {alias: alias.asname or alias.name.split(".")[0] for alias in node.names}
            node.names = [alias for alias in node.names if bound[alias] in {"*", *self.used}]
        return node if node.names else None

    def visit_Import(self, node: ast.Import) -> ast.AST | None:
        inside = any(alias.name.split(".")[0] == self.package for alias in node.names)
        return self._kept(node, not inside)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:
        inside = node.level > 0 or (node.module or "").split(".")[0] == self.package
        return self._kept(node, not inside)
