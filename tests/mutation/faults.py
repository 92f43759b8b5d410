"""The faults that are put into a file: mutmut's, each as a changed source text."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.file_mutation import MutationVisitor
from mutmut.mutation.mutators import mutation_operators
from mutmut.mutation.pragma_handling import get_ignored_lines

ROOT = Path(__file__).parents[2]


class Fault(NamedTuple):
    """One changed expression of a source file."""

    file: str
    function: str
    change: str
    """The line before and after."""
    lines: range
    body: range
    """The lines of the function."""
    text: str
    """The whole file with the fault in it."""

    @property
    def name(self) -> str:
        """What tells it from all others, also when lines have moved."""
        return f"{self.file} {self.function}: {self.change}"


class Faults(MutationVisitor):
    """mutmut's faults, in decorated functions too; not in triton kernels, nor in the text of errors and warnings."""

    def _skip_node_and_children(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.FunctionDef) and node.decorators:
            names = [cst.Module([]).code_for_node(decorator.decorator) for decorator in node.decorators]
            return "kernel" in names or "overload" in names
        if isinstance(node, (cst.Raise, cst.Decorator)):
            return True
        if isinstance(node, cst.Call) and cst.Module([]).code_for_node(node.func).endswith("warn"):
            return True
        return super()._skip_node_and_children(node)


def faults_of(file: str) -> Iterator[Callable[[], Fault | None]]:
    """Yield the faults of a file, each written out only when it is called; None if it is no Python."""
    code = (ROOT / file).read_text()
    wrapper = MetadataWrapper(cst.parse_module(code))
    visitor = Faults(mutation_operators, get_ignored_lines(file, code, wrapper, None))
    module = wrapper.visit(visitor)
    place = wrapper.resolve(PositionProvider)
    classes = {f: c.name.value for c in module.body if isinstance(c, cst.ClassDef) for f in c.body.body}

    def fault(original: cst.CSTNode, mutated: cst.CSTNode, function: cst.FunctionDef) -> Fault | None:
        changed = module.deep_replace(original, mutated)
        assert isinstance(changed, cst.Module)
        before, after = code.splitlines(), changed.code.splitlines()
        try:
            compile(changed.code, file, "exec")
        except SyntaxError:
            return None
        while before and after and before[0] == after[0]:
            del before[0], after[0]
        while before and after and before[-1] == after[-1]:
            del before[-1], after[-1]
        change = " -> ".join(" ".join(" ".join(lines).split()) for lines in (before, after))
        name = function.name.value if function not in classes else f"{classes[function]}.{function.name.value}"
        at, body = place[original], place[function.body]
        lines, within = range(at.start.line, at.end.line + 1), range(body.start.line, body.end.line + 1)
        return Fault(file, name, change, lines, within, changed.code)

    for mutation in visitor.mutations:
        function = mutation.contained_by_top_level_function
        if isinstance(function, cst.FunctionDef):
            yield lambda m=mutation, f=function: fault(m.original_node, m.mutated_node, f)  # type: ignore[misc]


def sample(file: str, size: int | None, seed: int) -> list[Fault]:
    """Return `size` faults of a file, drawn with this seed, or all of them."""
    makers = list(faults_of(file))
    random.Random(f"{seed} {file}").shuffle(makers)
    found: dict[str, Fault] = {}
    for maker in makers:
        if size is not None and len(found) == size:
            break
        fault = maker()
        if fault is not None:
            found.setdefault(fault.name, fault)
    return list(found.values())
