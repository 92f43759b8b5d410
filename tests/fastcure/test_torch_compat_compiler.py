"""Canaries for the private names of torch.compile's that the package uses."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from canaries import breaks

import fastcure._torch_compat as compat

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script")  # of torch's own files


@breaks("compiling the penalty would fail with an error that names no cause")
def test_inside_torch_compile_there_is_an_error_that_says_so() -> None:
    torch._dynamo.reset()
    with pytest.raises(Exception, match="not_inside_torch_compile"):
        torch.compile(lambda x: (compat.not_inside_torch_compile(), x + 1), backend="eager")(torch.ones(2))


@breaks("the first result of a compilation would not be checked; every result would be checked")
def test_compilations_are_counted_and_breaks_are_errors() -> None:
    torch._dynamo.reset()
    assert compat.compiler_is_loaded()
    program = torch.compile(lambda x: x + 1, backend="eager", fullgraph=True)
    before = compat.compiled_graphs()
    program(torch.ones(2))
    assert compat.compiled_graphs() == before + 1
    program(torch.ones(2))
    assert compat.compiled_graphs() == before + 1
    for code in (lambda x: print(x), lambda x: x @ x):
        with pytest.raises(compat.graph_break_errors()):
            torch.compile(code, backend="eager", fullgraph=True)(torch.ones(2, 3))


@breaks("convolutions would be compiled with kernels as large as the image")
def test_the_compiler_runs_our_graph_pass_and_keeps_graphs() -> None:
    """Inductor, but for the building of its code, which takes long."""
    from functorch.compile import make_boxed_func
    from torch._inductor.compile_fx import compile_fx

    def inductor(module: torch.fx.GraphModule, inputs: Any) -> Any:
        return compile_fx(module, inputs, inner_compile=lambda graph, *_, **__: make_boxed_func(graph.forward))

    graphs = []

    class Pass(compat.CustomGraphPass):
        def __call__(self, graph):
            graphs.append(graph)

        def uuid(self):
            return None

    assert compat.get_hash_for_files((__file__,))
    torch._dynamo.reset()
    x = torch.rand(3, requires_grad=True)
    with compat.compiling(Pass()):
        y = torch.compile(lambda x: x.sin().exp(), backend=inductor, fullgraph=True)(x)
    for _ in range(2):
        y.sum().backward(retain_graph=True)
    assert graphs


@breaks("an import of fastcure would take seconds")
def test_loading_the_package_loads_no_compiler() -> None:
    code = "import fastcure._torch_compat as compat; print(compat.compiler_is_loaded())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.strip() == "False"


@breaks("a misspelt name would be found")
def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = compat.nothing
