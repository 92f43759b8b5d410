"""Work that is recorded on a CUDA device once and then replayed: one launch in place of thousands."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from fastcure._fingerprint import fingerprint, settings_of_torch
from fastcure._folding.layers import FOLDS
from fastcure._functional import LossFn

Tensors = Sequence[Tensor | None]
Work = Callable[[], Tensors]
Capture = TypeVar("Capture")

SHAPES = 8
"""Captures that are kept for a model: beyond, the one that was used least recently goes."""


class Recorder(Protocol):
    """Records pieces of work that follow one another and share their memory."""

    def warm_up(self, work: Callable[[], object]) -> None:
        """Run `work` as it will run under `record`: libraries set themselves up, kernels are compiled."""

    def record(self, work: Work) -> tuple[Tensors, Callable[[], object]]:
        """Return the results of `work`, which hold nothing yet, and a function that computes them again.

        It reads the same memory as `work` did and writes into these very results.
        """


class CudaRecorder:
    """Captures CUDA graphs in one memory pool."""

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
        try:
            # Other threads (a loader that pins memory) may go on allocating.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                results = work()
        except BaseException:
            _revive_generator()
            raise
        return results, graph.replay


def _revive_generator() -> None:
    """Let random numbers be drawn again: some releases of torch expect the end of a capture that was aborted."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    state = generator.get_state()
    try:
        torch.rand(1, device="cuda")
    except RuntimeError:
        generator.graphsafe_set_state(generator.clone_state())
    generator.set_state(state)


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """The stream on which a device's captures are made."""
    return torch.cuda.Stream(device)


class Memory:
    """What several captures of one model share, and take turns in: each overwrites what the others have left there."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._holder: ref[Any] | None = None

    @property
    def is_held(self) -> bool:
        """Whether a step needs what it has left here, and is still alive."""
        return self._holder is not None and self._holder() is not None

    def hold(self, step: object) -> None:
        """Keep it for a step, until `release` or for as long as the step lives."""
        self._holder = ref(step)

    def release(self) -> None:
        """Let other captures overwrite it."""
        self._holder = None


class Captures(Generic[Capture]):
    """What was recorded for each model: one capture for each kind of step that it was asked for.

    Args:
        recorder: makes what records a capture; those of one model and stream share one as long as they take turns.
    """

    def __init__(self, recorder: Callable[[], Recorder]) -> None:
        self.recorder = recorder
        self._kept: WeakKeyDictionary[nn.Module, dict[Hashable, Capture]] = WeakKeyDictionary()
        self._memories: WeakKeyDictionary[nn.Module, dict[Hashable, list[Memory]]] = WeakKeyDictionary()

    def get(self, model: nn.Module, key: Hashable) -> Capture | None:
        """Return the capture of this key, if there is one."""
        kept = self._kept.get(model, {})
        if key in kept:
            kept[key] = kept.pop(key)  # to the end: it was used most recently
        return kept.get(key)

    def record(self, model: nn.Module, key: Hashable, make: Callable[[Memory], Capture]) -> Capture:
        """Keep what `make` captures."""
        kept = self._kept.setdefault(model, {})
        while len(kept) >= SHAPES:
            del kept[next(iter(kept))]
        stream = torch.cuda.current_stream() if torch.cuda.is_available() else None
        memories = self._memories.setdefault(model, {}).setdefault(stream, [])
        memory = next((memory for memory in memories if not memory.is_held), None)
        if memory is None:
            memories.append(memory := Memory(self.recorder()))
        with _one_at_a_time:
            kept[key] = make(memory)
        return kept[key]

    def forget(self, model: nn.Module) -> None:
        """Drop what was captured for a model, and its memory."""
        self._kept.pop(model, None)
        self._memories.pop(model, None)


_one_at_a_time = threading.Lock()
"""Captures of a device share a stream."""


def key_of(model: nn.Module, loss_fn: LossFn, device: torch.device) -> Hashable:
    """Return all that a capture of passes of `model` and its loss depends on, apart from their arguments."""
    roots = (model, loss_fn)
    return *FOLDS.get(model, ()), settings_of_torch(device), *(fingerprint(root, device) for root in roots)


def layout_of(*tensors: Tensor) -> Hashable:
    """Return what a capture depends on of its arguments."""
    return tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors)
