"""Fixtures of several files: engines; small runs, which leave their picture undrawn."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from rerun import Rerun

from fastcure._cuda_graphs import CudaRecorder
from fastcure.engines import ENGINES
from fastcure.engines.auto import Auto
from fastcure.engines.compile import Compile
from fastcure.engines.cuda_graph import CudaGraph


@pytest.fixture
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run kernels where a GPU would."""
    monkeypatch.setenv("FASTCURE_BACKEND", "triton")


@pytest.fixture
def aot_eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An engine "compile" that stops before code generation: the counter of its compilations."""
    from torch._dynamo.testing import CompileCounterWithBackend  # slow to import

    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setitem(ENGINES, "compile", Compile(counter))
    yield counter
    torch._dynamo.reset()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device, on which `auto` and `cuda_graph` replay steps: CUDA graphs, and on a CPU what runs them again."""
    recorder = Rerun if request.param == "cpu" else CudaRecorder
    monkeypatch.setitem(ENGINES, "auto", Auto(recorder, request.param))
    monkeypatch.setitem(ENGINES, "cuda_graph", CudaGraph(recorder, request.param))
    return torch.device(request.param)


@pytest.fixture(scope="session")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images for small runs."""
    from small_runs import write_npz

    return write_npz(tmp_path_factory.mktemp("npz") / "bright.npz")


@pytest.fixture(scope="session")
def whole(npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run that nobody disturbed."""
    from small_runs import finetune

    out = tmp_path_factory.mktemp("runs") / "whole"
    assert finetune(npz, out) == 0
    return out


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from evaluated import Place

    return Place(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture
def place(evaluated: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The folder of `evaluated.Place`, to work in."""
    monkeypatch.chdir(evaluated.path)
    return evaluated


def undrawn(history: Any, metrics: Any, file: IO[bytes], *words: object) -> None:
    file.write(b"undrawn")


@pytest.fixture(autouse=True)
def _leave_pictures_undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take longer than all steps of a small run. Without tqdm, as on a bare GPU machine, nothing is run."""
    if find_spec("tqdm") and not request.node.get_closest_marker("picture"):
        monkeypatch.setattr("fastcure.training.finetune.draw_curves", undrawn)
