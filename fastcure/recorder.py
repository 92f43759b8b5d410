"""Work that is recorded on a CUDA device once and then replayed: one launch in place of thousands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastcure.objective import Objective

Tensors = Sequence[Tensor | None]
Work = Callable[[], Tensors]


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

    def warm_up(self, work: Callable[[], object]) -> None:
        """Run `work` twice on a side stream."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                work()
        torch.cuda.current_stream().wait_stream(stream)

    def record(self, work: Work) -> tuple[Tensors, Callable[[], object]]:
        """Capture `work`."""
        graph = torch.cuda.CUDAGraph()
        # Other threads (a loader that pins memory) may go on allocating.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            results = work()
        return results, graph.replay


def addresses(objective: Objective) -> tuple[Any, ...]:
    """Return what a capture knows its tensors by: which they are, how they lie in memory, and which are trained."""
    parameters = [(id(p), p.data_ptr(), p.shape, p.stride(), p.requires_grad) for p in objective.module.parameters()]
    return *parameters, *((b.shape, b.dtype) for b in buffers(objective))


def buffers(objective: Objective) -> list[Tensor]:
    """Return the copies of buffers that `objective` reads; unlike its parameters, they do not follow the model's."""
    return [objective.state[name] for name, _ in objective.module.named_buffers()]
