"""Fixtures of several files: devices on which steps are replayed; runs that leave their picture undrawn."""

from importlib.util import find_spec
from typing import IO, Any

import pytest
import torch
from rerun import Rerun

from fastcure._cuda_graphs import CudaRecorder
from fastcure.engines import ENGINES
from fastcure.engines.auto import Auto
from fastcure.engines.cuda_graph import CudaGraph


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device, on which `auto` and `cuda_graph` replay steps: CUDA graphs, and on a CPU what runs them again."""
    recorder = Rerun if request.param == "cpu" else CudaRecorder
    monkeypatch.setitem(ENGINES, "auto", Auto(recorder, request.param))
    monkeypatch.setitem(ENGINES, "cuda_graph", CudaGraph(recorder, request.param))
    return torch.device(request.param)


def undrawn(history: Any, metrics: Any, file: IO[bytes], *words: object) -> None:
    file.write(b"undrawn")


@pytest.fixture(autouse=True)
def _leave_pictures_undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take longer than all steps of a small run. Without tqdm, as on a bare GPU machine, nothing is run."""
    if find_spec("tqdm") and not request.node.get_closest_marker("picture"):
        monkeypatch.setattr("fastcure.training.finetune.draw_curves", undrawn)
