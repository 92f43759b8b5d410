"""Private names of torch's are in one file of each package, and nowhere else."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import fastcure_kernels.torch_compat as kernels_compat

import fastcure

PRIVATE_OF_PYTHON = {"_exit", "_getframe", "_replace", "_asdict"}


def names_defined(tree: ast.Module) -> set[str]:
    found = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return found


def names_used(node: ast.AST) -> tuple[list[str], bool]:
    """The names of an import or attribute, and whether they are torch's for certain."""
    if isinstance(node, ast.Attribute):
        return [node.attr], re.match(r"(torch|nn|F)\.", ast.unparse(node)) is not None
    if isinstance(node, ast.Import):
        return [part for alias in node.names for part in alias.name.split(".")], True
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
        return [*(node.module or "").split("."), *(alias.name for alias in node.names)], True
    return [], False


def test_no_other_file_uses_a_private_name() -> None:
    roots = [Path(fastcure.__file__).parent, Path(kernels_compat.__file__).parent]
    trees = {path: ast.parse(path.read_text()) for root in roots for path in root.rglob("*.py")}
    ours = set[str]().union(*map(names_defined, trees.values())) | PRIVATE_OF_PYTHON
    found = []
    for path, tree in trees.items():
        for node in ast.walk(tree) if path.stem.strip("_") != "torch_compat" else ():
            names, of_torch = names_used(node)
            private = {name for name in names if name.startswith("_") and not name.startswith("__")}
            found += [f"{path.name}:{node.lineno}: {name}" for name in (private if of_torch else private - ours)]
    assert not found, "move these to _torch_compat.py, with a canary here"
