"""Work that is recorded on a CUDA device once and then replayed: one launch in place of thousands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastcure._folding.layers import folds_of
from fastcure._functional import FunctionalLoss
from fastcure._weak import weakly

Tensors = Sequence[Tensor | None]
Work = Callable[[], Tensors]
Capture = TypeVar("Capture")

SHAPES = 4
"""Captures that are kept for a model: beyond, the oldest goes."""


class Recorder(Protocol):
    """Records pieces of work that follow one another and share their memory."""

    def warm_up(self, work: Callable[[], object]) -> None:
        """Run `work` as it will run under `record`: libraries set themselves up, kernels are compiled."""

    def record(self, work: Work) -> tuple[Tensors, Callable[[], object]]:
        """Return the results of `work`, which hold nothing yet, and a function that computes them again.

        It reads the same memory as `work` did and writes into these very results.
        """


class CudaRecorder:
    """Captures CUDA graphs in a memory pool of their own."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = _stream(torch.cuda.current_device())

    def warm_up(self, work: Callable[[], object]) -> None:
        """Run `work` twice on the stream of the capture: autograd's nodes of parameters remember their first one."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(2):
                work()
        torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, work: Work) -> tuple[Tensors, Callable[[], object]]:
        """Capture `work`."""
        graph = torch.cuda.CUDAGraph()
        # Other threads (a loader that pins memory) may go on allocating.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            results = work()
        return results, graph.replay


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """The stream on which a device's captures are made."""
    return torch.cuda.Stream(device)


class Captures(Generic[Capture]):
    """What was recorded for each model: one capture for each kind of step that it was asked for."""

    def __init__(self) -> None:
        self._kept: WeakKeyDictionary[nn.Module, dict[Any, Capture]] = WeakKeyDictionary()

    def find(
        self, functional: FunctionalLoss, x: Tensor, y: Tensor, settings: tuple[Any, ...], record: Callable[[], Capture]
    ) -> Capture:
        """Return the capture of a step, or what `record` makes if there is none.

        Args:
            functional: of the model.
            x, y: of the step.
            settings: all that the step depends on besides these and autocast, hashable.
            record: makes a capture.
        """
        kept, device = self._kept.setdefault(functional.model, {}), x.device.type
        key = (
            *(*settings, weakly(functional.module.loss_fn)),
            *((weakly(fold.layer), weakly(fold.norm), fold.fused) for fold in folds_of(functional.model)),
            *(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
            *((t.shape, t.stride(), t.dtype, t.device) for t in (x, y)),
            *addresses(functional),
        )
        if key not in kept:
            while len(kept) >= SHAPES:
                del kept[next(iter(kept))]
            kept[key] = record()
        return kept[key]


def addresses(functional: FunctionalLoss) -> tuple[Any, ...]:
    """Return what a capture knows its tensors by: which they are, how they lie in memory, and which are trained."""
    parameters = [(id(p), p.data_ptr(), p.shape, p.stride(), p.requires_grad) for p in functional.module.parameters()]
    return *parameters, *((b.shape, b.dtype) for b in buffers(functional))


def buffers(functional: FunctionalLoss) -> list[Tensor]:
    """Return the copies of buffers that `functional` reads; unlike its parameters, they do not follow the model's."""
    return [functional.state[name] for name, _ in functional.module.named_buffers()]
