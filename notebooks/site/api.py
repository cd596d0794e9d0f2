"""The public functions and classes of the module, from its files: the API page of `make site`.

Nothing is imported: what a file says is read from its syntax tree.
"""

from __future__ import annotations

import ast
import re
from typing import Any

import pages
from markupsafe import Markup, escape

from dejavu_utils import store

Definition = ast.FunctionDef | ast.ClassDef


def text(docstring: str | None) -> Markup:
    """Return a docstring as HTML: paragraphs, what stands between backquotes as code, and between
    asterisks in italics.
    """
    paragraphs = re.split(r"\n\s*\n", docstring or "")
    marked = [re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(one))) for one in paragraphs]
    marked = [re.sub(r"(?<!\w)\*(\w[^*`<]*)\*(?!\w)", r"<em>\1</em>", one) for one in marked]
    return Markup("".join(f"<p>{one}</p>" for one in marked if one))


def signature(node: Definition) -> str:
    """Return how a function is called, or what a class is made of: fields, or its bases."""
    if isinstance(node, ast.FunctionDef):
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return f"{node.name}({ast.unparse(node.args)}){returns}"
    fields = [ast.unparse(one) for one in node.body if isinstance(one, ast.AnnAssign)]
    inside = fields or [ast.unparse(base) for base in node.bases]
    return f"class {node.name}({', '.join(inside)})"


def public(body: list[ast.stmt]) -> list[Definition]:
    """Return the functions and classes of a file, or methods of a class, that others may use."""
    found = [node for node in body if isinstance(node, Definition)]
    return [node for node in found if not node.name.startswith("_")]


def entries(tree: ast.Module) -> list[dict[str, Any]]:
    """Return what a file offers: name, signature and text of each function, class and method."""
    found = []
    for node in public(tree.body):
        methods = public(node.body) if isinstance(node, ast.ClassDef) else []
        for one in [node, *methods]:
            name = one.name if one is node else f"{node.name}.{one.name}"
            kept = {"name": name, "signature": signature(one), "method": one is not node}
            found.append(kept | {"text": text(ast.get_docstring(one))})
    return found


def page() -> pages.Page:
    """Return the API page: what each file of the module holds, room by room."""
    files = []
    for path in sorted(store.PACKAGE.rglob("[a-z]*.py"), key=lambda path: path.parts):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        name = ".".join(path.relative_to(store.PACKAGE).with_suffix("").parts)
        file = {"name": name, "text": text(ast.get_docstring(tree)), "entries": entries(tree)}
        if file["entries"]:
            files.append(file)
    body = pages.templates().get_template("api.html.j2").render(files=files)
    return pages.Page("api.html", "API", "Module", "Déjà vu: the module", body)
